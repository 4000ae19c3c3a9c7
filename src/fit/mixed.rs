//! A sum of several terms: low rank for what is smooth, a permuted Kronecker sum for what it leaves.
//!
//! All terms are lowered together by descent on their factors, since what one of them should leave depends on what the
//! others can take; orders and the final low-rank terms are fitted to what the other terms leave. No step raises what is
//! lost.

use faer::{Mat, MatRef, Par};

use super::Term;
use super::descent::{descend, residual};
use super::factors::Factors;
use super::low_rank::{Roots, low_rank_of, plain_factors};
use super::moment::Norm;
use super::weighted::{Turns, improve, start, widened};
use super::weighted_permutation::improve_orders;
use crate::error::Result;
use crate::kron::MatrixView;
use crate::permute::Effort;
use crate::progress::Progress;
use crate::spec::TermSpec;

/// `W ≈ Σ_t Ŵ_t` for terms of the given specs, near in `norm`, and the lost energy.
///
/// Never worse than the best of its terms alone, fitted with the same effort.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if a term does not fit, [`Error::NonFinite`](crate::Error::NonFinite),
/// [`Error::Convergence`](crate::Error::Convergence), [`Error::Cancelled`](crate::Error::Cancelled).
///
/// # Cost
/// Every Kronecker term twice as by itself, and an eigendecomposition for every low-rank term.
pub fn mixed(
    view: MatrixView<'_>,
    terms: &[TermSpec],
    norm: &Norm,
    effort: Effort,
    progress: &Progress,
) -> Result<(Vec<Term>, f64)> {
    view.check_finite()?;
    let target = widened(view);
    let problem = Problem::new(target.as_ref(), terms, norm, progress)?;
    let turns = Turns::new(effort);
    let mut best: Option<(f64, Vec<Factors>)> = None;
    for first in 0..terms.len() {
        let alone = problem.alone(first, target.as_ref(), turns)?;
        let energy = norm.energy(residual(std::slice::from_ref(&alone), target.as_ref()).as_ref(), Par::Seq);
        if best.as_ref().is_none_or(|(least, _)| energy < *least) {
            let mut factors = problem.zeros();
            factors[first] = alone;
            best = Some((energy, factors));
        }
    }
    let (_, mut factors) = best.expect("a sum has at least one term");
    problem.improve(&mut factors, turns)?;
    problem.finish(&factors)
}

/// What all steps of a fit share.
pub(super) struct Problem<'a> {
    pub target: MatRef<'a, f64>,
    pub terms: &'a [TermSpec],
    pub norm: &'a Norm,
    roots: Roots,
    progress: &'a Progress,
}

impl<'a> Problem<'a> {
    /// Checks the terms.
    pub fn new(target: MatRef<'a, f64>, terms: &'a [TermSpec], norm: &'a Norm, progress: &'a Progress) -> Result<Self> {
        let shape = (target.nrows(), target.ncols());
        for term in terms {
            term.parameters(shape.0, shape.1)?;
        }
        let has_low_rank = terms.iter().any(|term| matches!(term, TermSpec::LowRank { .. }));
        let frobenius = Norm::frobenius();
        let roots = Roots::new(shape, if has_low_rank { norm } else { &frobenius })?;
        Ok(Self { target, terms, norm, roots, progress })
    }

    /// Every term zero.
    pub fn zeros(&self) -> Vec<Factors> {
        let (m, n) = (self.target.nrows(), self.target.ncols());
        let zeros = |term: &TermSpec| match term {
            TermSpec::LowRank { rank } => Factors::low_rank(Mat::zeros(m, *rank), Mat::zeros(n, *rank)),
            TermSpec::Kronecker(spec) => Factors::zeros(spec.shape(m, n).expect("a term that was checked")),
        };
        self.terms.iter().map(zeros).collect()
    }

    /// One term fitted to `target` by itself.
    pub fn alone(&self, which: usize, target: MatRef<'_, f64>, turns: Turns) -> Result<Factors> {
        match &self.terms[which] {
            TermSpec::LowRank { rank } => {
                let (a, b) = plain_factors(target, *rank, self.norm, &self.roots, self.progress)?;
                let mut factors = Factors::low_rank(a, b);
                factors.balance();
                Ok(factors)
            }
            TermSpec::Kronecker(spec) => {
                let shape = spec.shape(target.nrows(), target.ncols())?;
                let mut factors = start(target, shape, spec.permute, self.norm, self.progress)?;
                improve(&mut factors, target, spec.permute, self.norm, turns, self.progress)?;
                Ok(factors)
            }
        }
    }

    /// Fits the terms that are still zero to what the others leave, then takes turns; returns the energy that is left.
    pub fn improve(&self, factors: &mut [Factors], turns: Turns) -> Result<f64> {
        for which in 0..factors.len() {
            if is_zero(&factors[which]) {
                let left = residual(factors, self.target);
                let fitted = self.alone(which, left.as_ref(), Turns { turns: 1, steps: 5, last_steps: 0 })?;
                // A closed form in another norm may start above nothing at all.
                let energy = |error: &Mat<f64>| self.norm.energy(error.as_ref(), Par::Seq);
                if energy(&residual(std::slice::from_ref(&fitted), left.as_ref())) < energy(&left) {
                    factors[which] = fitted;
                }
            }
        }
        for _ in 0..turns.turns {
            descend(factors, self.target, self.norm, turns.steps, self.progress)?;
            let mut changed = false;
            for (which, term) in self.terms.iter().enumerate() {
                if let TermSpec::Kronecker(spec) = term {
                    let left = self.left_to(which, factors);
                    changed |=
                        improve_orders(&mut factors[which], left.as_ref(), self.norm, spec.permute, self.progress)?;
                }
            }
            if !changed {
                break;
            }
        }
        descend(factors, self.target, self.norm, turns.last_steps, self.progress)
    }

    /// `W` without all terms but one.
    fn left_to(&self, which: usize, factors: &[Factors]) -> Mat<f64> {
        let mut left = self.target.to_owned();
        for (other, factors) in factors.iter().enumerate() {
            if other != which {
                factors.subtract_from(&mut left);
            }
        }
        left
    }

    /// The terms in f32, each low-rank one nearest to what the others leave, and the lost energy.
    pub fn finish(&self, factors: &[Factors]) -> Result<(Vec<Term>, f64)> {
        let mut factors = factors.to_vec();
        let mut terms = Vec::with_capacity(factors.len());
        for (which, term) in self.terms.iter().enumerate() {
            terms.push(match term {
                TermSpec::Kronecker(spec) => Term::Kronecker(factors[which].decomposition(spec.permute, 0.0)?),
                TermSpec::LowRank { rank } => {
                    let left = self.left_to(which, &factors);
                    let fitted = low_rank_of(left.as_ref(), *rank, self.norm, &self.roots, self.progress)?;
                    // A later low-rank term is fitted to what this one really leaves.
                    if self.terms[which + 1..].iter().any(|term| matches!(term, TermSpec::LowRank { .. })) {
                        let (a, b) = plain_factors(left.as_ref(), *rank, self.norm, &self.roots, self.progress)?;
                        factors[which] = Factors::low_rank(a, b);
                    }
                    Term::LowRank(fitted)
                }
            });
        }
        let dense: Vec<Vec<f32>> = terms.iter().map(Term::to_dense).collect();
        let lost_energy = super::weighted::lost_energy(self.target, &dense, self.norm);
        Ok((terms, lost_energy))
    }
}

fn is_zero(factors: &Factors) -> bool {
    let zero = |factor: &Mat<f64>| factor.col_iter().all(|column| column.iter().all(|&value| value == 0.0));
    zero(&factors.a) || zero(&factors.b)
}
