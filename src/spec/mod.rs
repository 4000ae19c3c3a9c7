//! What one matrix becomes: the shapes of its factors, what they cost, and how a configuration asks for them.
//!
//! * `kronecker`: Kronecker sums with permutations.
//! * `low_rank`: low rank in interpolative form.
//! * `matrix`: one matrix as a sum of these terms.
//! * `json`: the JSON of that.

mod json;
mod kronecker;
mod low_rank;
mod matrix;

pub use json::{matrix_spec, matrix_spec_json};
pub use kronecker::{KroneckerShape, KroneckerSpec, Permute};
pub use low_rank::LowRankShape;
pub use matrix::{MatrixSpec, TermSpec, Usage};
