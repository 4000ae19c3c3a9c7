//! Approximating a matrix in a norm of its own: low rank, also by groups of rows, Kronecker sums, and sums of both.

mod choose;
mod descent;
mod factors;
mod grouped;
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
pub use grouped::{GroupedLowRank, GroupedSpectrum};
pub use low_rank::{LowRank, Spectrum, low_rank};
pub use mixed::mixed;
pub use moment::{Moment, Moments, Norm, Weight};
pub use terms::{Fit, Term};
pub use weighted::weighted_kronecker;
