//! Approximating a matrix in a norm of its own: low rank, Kronecker sums, and sums of both.

mod choose;
mod descent;
mod factors;
mod low_rank;
mod mixed;
mod moment;
mod preconditioner;
mod terms;
#[cfg(test)]
mod tests;
mod weighted;
mod weighted_permutation;

pub use choose::{Limits, fit, fit_within};
pub use low_rank::{LowRank, low_rank, spectrum};
pub use mixed::mixed;
pub use moment::{Moment, Moments, Norm, Weight};
pub use terms::{Fit, Term};
pub use weighted::weighted_kronecker;
