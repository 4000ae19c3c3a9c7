//! Families of models: the role of each tensor of a checkpoint, described once, as data.
//!
//! `families.json` lists the prefixes, embeddings, heads, layers and fused weights of each family. Rust reads
//! checkpoints by this table, and Python finds the parts of fused weights of live models in it.

mod check;
mod decoder;
mod description;
mod geometry;
mod gpt2;
mod matrix;

pub use decoder::{DecoderRoles, Norm};
pub use description::{Family, fused_parts, model_types, split_part};
pub use geometry::Geometry;
pub(crate) use geometry::{given, optional_flag, optional_number};
pub use gpt2::Gpt2Geometry;
pub use matrix::{Kind, Matrix};
