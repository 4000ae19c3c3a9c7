//! Families of models: which tensor of a checkpoint is what, described once, as data.
//!
//! `families.json` names for each family its prefixes, embeddings, heads, layers and fused weights. Rust reads
//! checkpoints by it, and Python asks the same table for the parts of fused weights of live models.

mod description;
mod gpt2;
mod matrix;

pub use description::{Family, fused_parts, split_part};
pub use gpt2::Geometry;
pub use matrix::{Kind, Matrix};
