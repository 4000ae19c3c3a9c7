//! Specs of compressed matrices: the shapes of their factors, their cost, and their JSON.
//!
//! * `kronecker`: Kronecker sums with permutations.
//! * `low_rank`: low rank in interpolative form.
//! * `grouped`: low rank by groups of rows.
//! * `matrix`: one matrix as a sum of these terms.
//! * `json`: its JSON.

mod grouped;
mod json;
mod kronecker;
mod low_rank;
mod matrix;

pub use grouped::{GroupedShape, RowGroup};
pub(crate) use json::given;
pub use json::{matrix_spec, matrix_spec_json};
pub use kronecker::{KroneckerShape, KroneckerSpec, Permute};
pub use low_rank::LowRankShape;
pub use matrix::{MatrixSpec, TermSpec, Usage};
