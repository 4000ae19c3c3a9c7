//! The result of a fit: the terms of a sum, and the lost energy.

use super::grouped::GroupedLowRank;
use super::low_rank::LowRank;
use crate::numeric::range::Rescale;
use crate::permute::Decomposition;
use crate::spec::MatrixSpec;

/// One term of a [`Fit`].
#[derive(Clone, Debug, PartialEq)]
pub enum Term {
    /// A permuted Kronecker sum.
    Kronecker(Decomposition),
    /// A low-rank matrix in interpolative form.
    LowRank(LowRank),
    /// A table in groups of rows.
    Grouped(GroupedLowRank),
}

impl Term {
    /// The dense matrix of this term, row-major `(m, n)`, in the original order of rows and columns.
    #[must_use]
    pub fn to_dense(&self) -> Vec<f32> {
        match self {
            Self::Kronecker(decomposition) => decomposition.to_dense(),
            Self::LowRank(low_rank) => low_rank.to_dense(),
            Self::Grouped(grouped) => grouped.to_dense(),
        }
    }

    /// The share of the energy that this term alone loses.
    #[must_use]
    pub fn lost_energy(&self) -> f64 {
        match self {
            Self::Kronecker(decomposition) => decomposition.sum.lost_energy,
            Self::LowRank(low_rank) => low_rank.lost_energy,
            Self::Grouped(grouped) => grouped.lost_energy,
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

impl Fit {
    /// The fit of one term, which is all of `spec`.
    #[must_use]
    pub fn of_term(spec: MatrixSpec, term: Term) -> Self {
        Self { spec, lost_energy: term.lost_energy(), terms: vec![term] }
    }
}

impl Rescale for Term {
    fn rescaled(self, exponent: i32) -> Option<Self> {
        Some(match self {
            Self::Kronecker(term) => Self::Kronecker(term.rescaled(exponent)?),
            Self::LowRank(term) => Self::LowRank(term.rescaled(exponent)?),
            Self::Grouped(term) => Self::Grouped(term.rescaled(exponent)?),
        })
    }
}

impl Rescale for (Vec<Term>, f64) {
    fn rescaled(self, exponent: i32) -> Option<Self> {
        let terms = self.0.into_iter().map(|term| term.rescaled(exponent));
        Some((terms.collect::<Option<_>>()?, self.1))
    }
}

impl Rescale for Fit {
    fn rescaled(self, exponent: i32) -> Option<Self> {
        let (terms, lost_energy) = (self.terms, self.lost_energy).rescaled(exponent)?;
        Some(Self { terms, lost_energy, ..self })
    }
}
