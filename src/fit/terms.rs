//! The result of a fit: the terms of a sum, and the lost energy.

use super::low_rank::LowRank;
use crate::permute::Decomposition;
use crate::spec::MatrixSpec;

/// One term of a [`Fit`].
#[derive(Clone, Debug, PartialEq)]
pub enum Term {
    /// A permuted Kronecker sum.
    Kronecker(Decomposition),
    /// A low-rank matrix in interpolative form.
    LowRank(LowRank),
}

impl Term {
    /// The dense matrix of this term, row-major `(m, n)`, in the original order of rows and columns.
    #[must_use]
    pub fn to_dense(&self) -> Vec<f32> {
        match self {
            Self::Kronecker(decomposition) => decomposition.to_dense(),
            Self::LowRank(low_rank) => low_rank.to_dense(),
        }
    }
}

/// `W ≈ Σ_t Ŵ_t`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// The spec of the terms.
    pub spec: MatrixSpec,
    /// The terms, in the order of the spec.
    pub terms: Vec<Term>,
    /// `‖W − Σ_t Ŵ_t‖² / ‖W‖²` in the norm of the fit, which is the Frobenius norm without moments.
    pub lost_energy: f64,
}
