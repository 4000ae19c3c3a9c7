//! Compress transformers by calibrated low rank and Kronecker decomposition improved by permutations.
//!
//! A weight `W` of shape `(m, n) = (in, out)` is replaced by `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, with the row and
//! column permutations `p` and `q` searched so that little energy is lost.
//!
//! Modules, from the bottom up (each imports only from those before it):
//! [`error`], [`portable`], [`progress`], [`numeric`], [`spec`], [`loss`], [`kron`], [`permute`], [`fit`], [`family`], [`checkpoint`], [`plan`],
//! [`compress`], [`runtime`].
//! `python` is the only module that knows Python.

pub mod checkpoint;
pub mod compress;
pub mod error;
pub mod family;
pub mod fit;
pub mod kron;
pub mod loss;
pub mod numeric;
pub mod permute;
pub mod plan;
pub mod portable;
pub mod progress;
pub mod runtime;
pub mod spec;

#[cfg(feature = "python")]
mod python;
#[cfg(test)]
mod testing;

pub use error::{Error, Result};
