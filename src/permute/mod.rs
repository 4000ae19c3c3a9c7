//! Permutations of rows and columns under which a matrix is nearer to a Kronecker sum.

mod anneal;
mod assign;
mod decomposition;
mod effort;
mod jonker_volgenant;
mod norm_sort;
mod orders;
mod permutation;
mod phase_gram;
mod projector;
mod search;
mod side;
#[cfg(test)]
mod tests;

pub use decomposition::Decomposition;
pub use effort::Effort;
pub use jonker_volgenant::solve_assignment;
pub use norm_sort::norm_sort;
pub use orders::Orders;
pub use permutation::Permutation;
pub use search::{decompose, find_permutation, work};
pub use side::Side;
