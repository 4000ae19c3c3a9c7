//! Kronecker sums `Σ_k A_k ⊗ B_k`: the nearest one to a matrix, and applying one to vectors.

mod apply;
mod decompose;
mod expand;
mod gram;
mod view;

#[cfg(test)]
mod tests;

pub use decompose::{KroneckerSum, lost_energy, nearest_kronecker_sum};
pub use expand::{expand, expand_gradients};
pub use gram::{block_gram, eigenvectors, top_eigenvectors};
pub use view::MatrixView;
