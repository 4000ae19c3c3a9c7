//! Approximation of one matrix by its spec, or as closely as a number of parameters allows.

use super::grouped::GroupedSpectrum;
use super::low_rank::{Spectrum, low_rank};
use super::mixed::{Problem, Shared, mixed};
use super::moment::Norm;
use super::terms::{Fit, Term};
use super::weighted::{Turns, in_own_order, upcast, weighted_kronecker};
use crate::error::{Error, Result};
use crate::kron::MatrixView;
use crate::permute::{Effort, decompose};
use crate::progress::{Parallelism, Progress};
use crate::spec::{GroupedShape, KroneckerSpec, LowRankShape, MatrixSpec, Permute, TermSpec, Usage};

/// Approximates `view` by `spec` in `norm`.
///
/// The result depends on all arguments but `parallelism` and `progress`.
///
/// # Errors
/// [`Error::Shape`] if `spec` does not fit, [`Error::NonFinite`], [`Error::Convergence`], [`Error::Cancelled`].
///
/// # Cost
/// That of [`low_rank`] or [`decompose`].
pub fn fit(
    view: MatrixView<'_>,
    spec: &MatrixSpec,
    norm: &Norm,
    effort: Effort,
    seed: u64,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<Fit> {
    view.in_safe_range(|view| fit_safely(view, spec, norm, effort, seed, parallelism, progress))
}

/// [`fit`] for finite values in the safe range.
fn fit_safely(
    view: MatrixView<'_>,
    spec: &MatrixSpec,
    norm: &Norm,
    effort: Effort,
    seed: u64,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<Fit> {
    let term = match spec.terms() {
        [TermSpec::LowRank { rank }] => Term::LowRank(low_rank(view, *rank, norm, progress)?),
        [TermSpec::Grouped(groups)] => {
            let shape = GroupedShape::new(view.rows(), view.columns(), groups)?;
            let sizes: Vec<_> = groups.iter().map(|group| group.rows).collect();
            Term::Grouped(GroupedSpectrum::new(view, norm, &sizes, progress)?.low_rank(view, &shape, progress)?)
        }
        [TermSpec::Kronecker(kronecker)] if norm.is_frobenius() => Term::Kronecker(in_own_order(view, |w| {
            decompose(w, (view.rows(), view.columns()), kronecker, effort, seed, parallelism, progress)
        })?),
        [TermSpec::Kronecker(kronecker)] => {
            Term::Kronecker(weighted_kronecker(view, *kronecker, norm, effort, progress)?)
        }
        terms => {
            let (terms, lost_energy) = mixed(view, terms, norm, effort, seed, parallelism, progress)?;
            return Ok(Fit { spec: spec.clone(), terms, lost_energy });
        }
    };
    Ok(Fit::of_term(spec.clone(), term))
}

/// The longest side for which more than low rank is tried. For a vocabulary, it would take gigabytes and minutes.
const LONGEST: usize = 4096;

/// The limits of one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest number of parameters.
    pub parameters: usize,
    /// The largest number of MACs for one token in the given use; `None` for no limit.
    pub macs: Option<(usize, Usage)>,
}

impl Limits {
    /// A limit on parameters only.
    #[must_use]
    pub fn of_parameters(parameters: usize) -> Self {
        Self { parameters, macs: None }
    }

    /// Whether an `(m, n)` matrix of that spec is within the limit on MACs.
    fn affords(&self, spec: &MatrixSpec, m: usize, n: usize) -> Result<bool> {
        self.macs.map_or(Ok(true), |(most, usage)| Ok(spec.macs(m, n, usage)? <= most))
    }
}

/// The best approximation of `view` found within `limits` in `norm`. `spectrum` is that of `view` in `norm`.
///
/// At effort [`Effort::Fast`] it is the low-rank matrix of the largest rank that fits. Above, sums of low rank and
/// permuted Kronecker terms are screened by rough fits. The best candidate is fitted well, and replaces low rank if it
/// loses less energy.
///
/// # Errors
/// [`Error::Shape`] if rank 1 exceeds the parameters or no rank is within the MACs; otherwise as [`fit`].
///
/// # Cost
/// At balanced effort, some 25 evaluations of the norm with both sides full, in f32, and two more of [`low_rank`]; some
/// twenty times that at [`Effort::Best`].
pub fn fit_within(
    view: MatrixView<'_>,
    limits: Limits,
    norm: &Norm,
    spectrum: &Spectrum,
    effort: Effort,
    progress: &Progress,
) -> Result<Fit> {
    let rank = largest_rank(view.rows(), view.columns(), limits)?;
    view.in_safe_range(|view| fit_within_safely(view, limits, rank, norm, spectrum, effort, progress))
}

/// [`fit_within`] for finite values in the safe range. `rank` is the largest within the limits. The scale of the
/// spectrum does not matter.
fn fit_within_safely(
    view: MatrixView<'_>,
    limits: Limits,
    rank: usize,
    norm: &Norm,
    spectrum: &Spectrum,
    effort: Effort,
    progress: &Progress,
) -> Result<Fit> {
    let (m, n) = (view.rows(), view.columns());
    let low_rank = MatrixSpec::low_rank(rank);
    let term = spectrum.low_rank(view, rank, progress)?;
    let mut best = Fit::of_term(low_rank, Term::LowRank(term));
    let mut candidates = candidates(m, n, limits.parameters, effort);
    let affordable = candidates.iter().map(|spec| limits.affords(spec, m, n)).collect::<Result<Vec<_>>>()?;
    let mut affordable = affordable.into_iter();
    candidates.retain(|_| affordable.next() == Some(true));
    if effort == Effort::Balanced {
        candidates.truncate(1);
    }
    if candidates.is_empty() {
        return Ok(best);
    }
    let target = upcast(view);
    let shared = Shared { target: target.as_ref(), norm, spectrum, progress };
    let problems = candidates.iter().map(|spec| Problem::new(&shared, spec.terms())).collect::<Result<Vec<_>>>()?;
    // The energy left beyond low rank is a little too small, so that a sum worse than this is hopeless.
    let hopeless = HOPELESS * best.lost_energy * norm.energy(target.as_ref());
    let mut screened = Vec::with_capacity(problems.len());
    for (which, problem) in problems.iter().enumerate() {
        let (energy, factors) = problem.screen()?;
        if energy < hopeless {
            screened.push((energy, which, factors));
        }
    }
    for kept in [FINALISTS, 1] {
        screened.sort_by(|x, y| x.0.total_cmp(&y.0).then(x.1.cmp(&y.1)));
        screened.truncate(kept);
        // There is nothing to screen.
        if kept > 1 && screened.len() < 2 {
            continue;
        }
        let turns = if kept > 1 { Turns::SECOND_SCREENING } else { Turns::beside(effort) };
        for (energy, which, factors) in &mut screened {
            *energy = problems[*which].improve(factors, turns)?;
        }
    }
    if let Some((_, which, factors)) = screened.pop() {
        let (terms, lost_energy) = problems[which].finish(factors)?;
        if lost_energy < best.lost_energy {
            best = Fit { spec: candidates[which].clone(), terms, lost_energy };
        }
    }
    Ok(best)
}

/// The largest rank of an `(m, n)` matrix within `limits`.
fn largest_rank(m: usize, n: usize, limits: Limits) -> Result<usize> {
    let refused = |operation, least: usize, got: usize| Error::Shape {
        operation,
        expected: format!("at least {least} for a matrix of shape ({m}, {n})"),
        got: got.to_string(),
    };
    let most = LowRankShape::largest_rank(m, n, limits.parameters);
    if most == 0 {
        return Err(refused("parameters", m + n - 1, limits.parameters));
    }
    for rank in (1..=most).rev() {
        if limits.affords(&MatrixSpec::low_rank(rank), m, n)? {
            return Ok(rank);
        }
    }
    let (got, usage) = limits.macs.expect("any number of MACs is afforded otherwise");
    Err(refused("MACs", MatrixSpec::low_rank(1).macs(m, n, usage)?, got))
}

/// A candidate is dropped after the first screening if it loses this many times as much as low rank.
const HOPELESS: f64 = 1.25;
/// Candidates in the second screening.
const FINALISTS: usize = 3;

/// Sums with at most `parameters` parameters that may lose less than low rank.
///
/// Kronecker terms beside a low rank, each of one product and with orders of its own. A few of these lose less than a
/// term of many products in one order, and take fewer MACs.
fn candidates(m: usize, n: usize, parameters: usize, effort: Effort) -> Vec<MatrixSpec> {
    // `counts` are the numbers of Kronecker terms. `sizes` are block sizes as shares of √(m·n), the size at which a
    // Kronecker product has the fewest parameters. Measured on attention and feed-forward matrices of SmolLM2. At balanced
    // effort the first that is within the limits is the only one.
    let (counts, sizes): (&[usize], &[f64]) = match effort {
        Effort::Fast => (&[], &[]),
        Effort::Balanced => (&[2, 1], &[0.3]),
        Effort::Best => (&[1, 2, 4, 6], &[0.3, 0.6]),
    };
    let mut candidates = Vec::new();
    if m.max(n) > LONGEST {
        return candidates;
    }
    for size in sizes {
        let Some(block) = block_near(m, n, size * ((m * n) as f64).sqrt()) else { continue };
        let kronecker = TermSpec::Kronecker(KroneckerSpec { block, rank: 1, permute: Permute::Both });
        let each = m * n / (block.0 * block.1) + block.0 * block.1;
        for &count in counts {
            let rank = LowRankShape::largest_rank(m, n, parameters.saturating_sub(count * each));
            if rank == 0 {
                continue;
            }
            let mut terms = vec![TermSpec::LowRank { rank }];
            terms.extend(std::iter::repeat_n(kronecker.clone(), count));
            let spec = MatrixSpec::new(terms).expect("one term at least");
            if !candidates.contains(&spec) {
                candidates.push(spec);
            }
        }
    }
    candidates
}

/// The block of about the given number of entries, as square as the divisors of the sides allow; `None` if a side has
/// no proper divisor.
fn block_near(m: usize, n: usize, entries: f64) -> Option<(usize, usize)> {
    let divisors = |side: usize| (2..side).filter(move |divisor| side.is_multiple_of(*divisor));
    let distance = |&(m2, n2): &(usize, usize)| {
        let (height, width) = (m2 as f64, n2 as f64);
        (height * width / entries).ln().abs() + 0.2 * (height / width).ln().abs()
    };
    let blocks = divisors(m).flat_map(|m2| divisors(n).map(move |n2| (m2, n2)));
    blocks.min_by(|x, y| distance(x).total_cmp(&distance(y)))
}
