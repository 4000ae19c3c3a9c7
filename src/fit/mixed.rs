//! A sum of several terms: low rank for the smooth part, a permuted Kronecker sum for the remainder.
//!
//! The best value of each term depends on the others, so descent on the factors improves all terms together. The
//! permutations and the final low-rank terms are fitted to the residual of the other terms. No step increases the lost
//! energy.

use std::slice;

use faer::{Mat, MatRef};

use super::descent::{left_to, residual};
use super::factors::Factors;
use super::low_rank::{Spectrum, Whitened, low_rank_of, plain_factors, whiten};
use super::moment::Norm;
use super::terms::Term;
use super::weighted::{ASSIGNMENTS, Turns, improve, in_own_order, lost_energy, start, upcast};
use crate::error::{Error, Result};
use crate::kron::MatrixView;
use crate::permute::{Effort, decompose};
use crate::progress::{Parallelism, Progress};
use crate::spec::{Permute, TermSpec};

/// `W ≈ Σ_t Ŵ_t` for terms of the given specs, near in `norm`, and the lost energy.
///
/// It loses no more than the best of its terms alone, fitted with the same effort.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if a term does not fit, [`Error::NonFinite`](crate::Error::NonFinite),
/// [`Error::Convergence`](crate::Error::Convergence), [`Error::Cancelled`](crate::Error::Cancelled).
///
/// # Cost
/// Three times the cost of every Kronecker term alone, and an eigendecomposition for every low-rank term.
pub fn mixed(
    view: MatrixView<'_>,
    terms: &[TermSpec],
    norm: &Norm,
    effort: Effort,
    seed: u64,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<(Vec<Term>, f64)> {
    view.in_safe_range(|view| mixed_safely(view, terms, norm, effort, seed, parallelism, progress))
}

/// [`mixed`] for finite values in the safe range.
fn mixed_safely(
    view: MatrixView<'_>,
    terms: &[TermSpec],
    norm: &Norm,
    effort: Effort,
    seed: u64,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<(Vec<Term>, f64)> {
    let spectrum = Spectrum::new(view, norm, progress)?;
    let target = upcast(view);
    let shared = Shared { target: target.as_ref(), norm, spectrum: &spectrum, progress };
    let problem = Problem::new(&shared, terms)?;
    let turns = Turns::new(effort);
    let mut best: Option<(f64, Vec<Factors>)> = None;
    for which in 0..terms.len() {
        let alone = match &terms[which] {
            // In this norm, the permutation search finds better permutations than alternating steps.
            TermSpec::Kronecker(spec) if norm.is_frobenius() => {
                let shape = (view.rows(), view.columns());
                let search = |w: &[f32]| decompose(w, shape, spec, effort, seed, parallelism, progress);
                Factors::from_decomposition(&in_own_order(view, search)?)
            }
            _ => problem.alone(which, turns)?,
        };
        let energy = norm.energy(residual(slice::from_ref(&alone), target.as_ref()).as_ref());
        if best.as_ref().is_none_or(|(least, _)| energy < *least) {
            let mut factors = problem.zeros();
            factors[which] = alone;
            best = Some((energy, factors));
        }
    }
    let Some((least, mut factors)) = best else {
        return Err(Error::Config("terms: expected at least one, got none".into()));
    };
    if problem.single_low_rank().is_some() {
        let mut beside = factors.clone();
        problem.improve(&mut beside, Turns::beside(effort))?;
        let found = problem.finish(beside)?;
        // The energy that low rank cannot make up for is not all of it: the sum may lose more than a term alone.
        if found.1 * norm.energy(target.as_ref()) <= least {
            return Ok(found);
        }
    }
    problem.fill(&mut factors, ASSIGNMENTS)?;
    problem.improve_together(&mut factors, turns)?;
    problem.finish(factors)
}

/// What [`MatrixSpec`](crate::spec::MatrixSpec) makes sure of.
const GROUPS_ALONE: &str = "groups of rows are the only term";

/// Alternating assignments before a candidate is screened.
const SCREENING_ASSIGNMENTS: usize = 2;

/// The state that all fits of one matrix share.
pub(super) struct Shared<'a> {
    pub target: MatRef<'a, f64>,
    pub norm: &'a Norm,
    pub spectrum: &'a Spectrum,
    pub progress: &'a Progress,
}

/// The fit of a sum of terms to a matrix.
pub(super) struct Problem<'a> {
    shared: &'a Shared<'a>,
    terms: &'a [TermSpec],
}

impl<'a> Problem<'a> {
    /// Checks the terms.
    pub fn new(shared: &'a Shared<'a>, terms: &'a [TermSpec]) -> Result<Self> {
        for term in terms {
            term.parameters(shared.target.nrows(), shared.target.ncols())?;
        }
        Ok(Self { shared, terms })
    }

    /// Factors of zero for every term.
    pub fn zeros(&self) -> Vec<Factors> {
        let (m, n) = (self.shared.target.nrows(), self.shared.target.ncols());
        let zeros = |term: &TermSpec| match term {
            TermSpec::LowRank { rank } => Factors::low_rank(Mat::zeros(m, *rank), Mat::zeros(n, *rank)),
            TermSpec::Kronecker(spec) => Factors::zeros(spec.shape(m, n).expect("a term that was checked")),
            TermSpec::Grouped(_) => unreachable!("{GROUPS_ALONE}"),
        };
        self.terms.iter().map(zeros).collect()
    }

    /// One term fitted to the whole target.
    pub fn alone(&self, which: usize, turns: Turns) -> Result<Factors> {
        let Shared { target, norm, spectrum, progress } = self.shared;
        let Spectrum { roots, whitened, .. } = spectrum;
        match &self.terms[which] {
            TermSpec::LowRank { rank } => Ok(balanced_low_rank(plain_factors(*target, *rank, roots, whitened))),
            TermSpec::Kronecker(spec) => {
                let mut factors = start(*target, spec, norm, ASSIGNMENTS, progress)?;
                improve(slice::from_mut(&mut factors), &[spec.permute], *target, norm, turns, progress)?;
                Ok(factors)
            }
            TermSpec::Grouped(_) => unreachable!("{GROUPS_ALONE}"),
        }
    }

    /// Fits the terms that are still zero to the residual of the others; `assignments` as in [`start`].
    pub fn fill(&self, factors: &mut [Factors], assignments: usize) -> Result<()> {
        let Shared { target, norm, progress, .. } = self.shared;
        for (which, term) in self.terms.iter().enumerate() {
            if !factors[which].is_zero() {
                continue;
            }
            let left = residual(factors, *target);
            factors[which] = match term {
                TermSpec::LowRank { rank } => self.low_rank(factors, left.as_ref(), *rank)?.0,
                TermSpec::Kronecker(spec) => start(left.as_ref(), spec, norm, assignments, progress)?,
                TermSpec::Grouped(_) => unreachable!("{GROUPS_ALONE}"),
            };
        }
        Ok(())
    }

    /// Low rank fitted to `left`, what the other terms leave, and the spectrum of `left` unless it is the shared one.
    fn low_rank(&self, factors: &[Factors], left: MatRef<'_, f64>, rank: usize) -> Result<(Factors, Option<Whitened>)> {
        let Shared { norm, spectrum, progress, .. } = self.shared;
        let own = if factors.iter().all(Factors::is_zero) {
            None
        } else {
            Some(whiten(left, norm, &spectrum.roots, progress)?)
        };
        let whitened = own.as_ref().unwrap_or(&spectrum.whitened);
        Ok((balanced_low_rank(plain_factors(left, rank, &spectrum.roots, whitened)), own))
    }

    /// The only low-rank term beside Kronecker terms, and its rank.
    fn single_low_rank(&self) -> Option<(usize, usize)> {
        let mut ranks = self.terms.iter().enumerate().filter_map(|(which, term)| match term {
            TermSpec::LowRank { rank } => Some((which, *rank)),
            _ => None,
        });
        let first = ranks.next()?;
        (ranks.next().is_none() && self.terms.len() > 1).then_some(first)
    }

    fn permute(term: &TermSpec) -> Permute {
        match term {
            TermSpec::Kronecker(spec) => spec.permute,
            TermSpec::LowRank { .. } => Permute::None,
            TermSpec::Grouped(_) => unreachable!("{GROUPS_ALONE}"),
        }
    }

    /// Improves the Kronecker terms beside the low rank of index `which`, which follows them: see [`Whitened::beyond`].
    /// Terms that are still zero are started with at most `assignments`. Returns the energy left in that norm.
    fn improve_beside(
        &self,
        (which, rank): (usize, usize),
        factors: &mut Vec<Factors>,
        assignments: usize,
        turns: Turns,
    ) -> Result<f64> {
        let Shared { target, norm, spectrum, progress } = self.shared;
        let left = left_to(which, factors, *target);
        factors.remove(which);
        let (low_rank, own) = self.low_rank(factors, left.as_ref(), rank)?;
        let whitened = own.as_ref().unwrap_or(&spectrum.whitened);
        let beyond = whitened.beyond(left.as_ref(), rank, norm, &spectrum.roots);
        let target = residual(slice::from_ref(&low_rank), *target);
        let terms: Vec<_> = self.terms.iter().enumerate().filter(|(t, _)| *t != which).map(|(_, term)| term).collect();
        for (at, term) in terms.iter().enumerate() {
            if let (TermSpec::Kronecker(spec), true) = (term, factors[at].is_zero()) {
                let left = residual(factors, target.as_ref());
                factors[at] = start(left.as_ref(), spec, &beyond, assignments, progress)?;
            }
        }
        let permutes: Vec<_> = terms.into_iter().map(Self::permute).collect();
        let energy = improve(factors, &permutes, target.as_ref(), &beyond, turns, progress)?;
        factors.insert(which, low_rank);
        Ok(energy)
    }

    /// A rough fit of all terms, to rank specs: its residual energy and its factors.
    pub fn screen(&self) -> Result<(f64, Vec<Factors>)> {
        let mut factors = self.zeros();
        if self.single_low_rank().is_none() {
            self.fill(&mut factors, SCREENING_ASSIGNMENTS)?;
        }
        Ok((self.improve(&mut factors, Turns::SCREENING)?, factors))
    }

    /// As [`improve`]. Low rank follows the other terms in closed form where it is the only one.
    pub fn improve(&self, factors: &mut Vec<Factors>, turns: Turns) -> Result<f64> {
        if let Some(low_rank) = self.single_low_rank() {
            let mut energy = f64::INFINITY;
            for _ in 0..turns.rounds {
                energy = self.improve_beside(low_rank, factors, SCREENING_ASSIGNMENTS, turns)?;
            }
            return Ok(energy);
        }
        self.improve_together(factors, turns)
    }

    /// As [`improve`], with all terms in the norm itself: it never raises the energy.
    fn improve_together(&self, factors: &mut [Factors], turns: Turns) -> Result<f64> {
        let permutes: Vec<_> = self.terms.iter().map(Self::permute).collect();
        improve(factors, &permutes, self.shared.target, self.shared.norm, turns, self.shared.progress)
    }

    /// The terms in f32, each low-rank term fitted to the residual of the others, and the lost energy.
    pub fn finish(&self, mut factors: Vec<Factors>) -> Result<(Vec<Term>, f64)> {
        let Shared { target, norm, spectrum, progress } = self.shared;
        let roots = &spectrum.roots;
        let mut terms = Vec::with_capacity(factors.len());
        for (which, term) in self.terms.iter().enumerate() {
            terms.push(match term {
                TermSpec::Kronecker(spec) => Term::Kronecker(factors[which].decomposition(spec.permute, 0.0)?),
                TermSpec::LowRank { rank } => {
                    let left = left_to(which, &factors, *target);
                    let whitened = whiten(left.as_ref(), norm, roots, progress)?;
                    let fitted = low_rank_of(left.as_ref(), *rank, roots, &whitened, progress)?;
                    // Later low-rank terms are fitted to the residual of this one.
                    let (a, b) = plain_factors(left.as_ref(), *rank, roots, &whitened);
                    factors[which] = Factors::low_rank(a, b);
                    Term::LowRank(fitted)
                }
                TermSpec::Grouped(_) => unreachable!("{GROUPS_ALONE}"),
            });
        }
        let dense: Vec<Vec<f32>> = terms.iter().map(Term::to_dense).collect();
        let lost_energy = lost_energy(*target, &dense, norm);
        Ok((terms, lost_energy))
    }
}

fn balanced_low_rank((a, b): (Mat<f64>, Mat<f64>)) -> Factors {
    let mut factors = Factors::low_rank(a, b);
    factors.balance();
    factors
}
