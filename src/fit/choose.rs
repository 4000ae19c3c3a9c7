//! Approximating one matrix as its spec says, or as well as a number of parameters allows.

use super::low_rank::low_rank;
use super::mixed::mixed;
use super::moment::Norm;
use super::weighted::weighted_kronecker;
use super::{Fit, Term};
use crate::error::{Error, Result};
use crate::kron::MatrixView;
use crate::permute::{Effort, decompose};
use crate::progress::{Parallelism, Progress};
use crate::spec::{LowRankShape, MatrixSpec, TermSpec};

/// Approximates `view` as `spec` says, in `norm`.
///
/// The result depends on all but `parallelism` and `progress`.
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
    match spec.terms() {
        [TermSpec::LowRank { rank }] => {
            let term = low_rank(view, *rank, norm, progress)?;
            Ok(Fit { spec: spec.clone(), lost_energy: term.lost_energy, terms: vec![Term::LowRank(term)] })
        }
        [TermSpec::Kronecker(kronecker)] if norm.is_frobenius() => {
            let term = in_own_order(view, |w| {
                decompose(w, (view.rows(), view.columns()), kronecker, effort, seed, parallelism, progress)
            })?;
            Ok(Fit { spec: spec.clone(), lost_energy: term.sum.lost_energy, terms: vec![Term::Kronecker(term)] })
        }
        [TermSpec::Kronecker(kronecker)] => {
            let term = weighted_kronecker(view, *kronecker, norm, effort, progress)?;
            Ok(Fit { spec: spec.clone(), lost_energy: term.sum.lost_energy, terms: vec![Term::Kronecker(term)] })
        }
        terms => {
            let (terms, lost_energy) = mixed(view, terms, norm, effort, progress)?;
            Ok(Fit { spec: spec.clone(), terms, lost_energy })
        }
    }
}

/// The best approximation of `view` with at most `parameters` parameters, in `norm`.
///
/// # Errors
/// [`Error::Shape`] if not even rank 1 fits; otherwise as [`fit`].
///
/// # Cost
/// That of [`low_rank`].
pub fn fit_within(
    view: MatrixView<'_>,
    parameters: usize,
    norm: &Norm,
    effort: Effort,
    seed: u64,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<Fit> {
    let (m, n) = (view.rows(), view.columns());
    let rank = LowRankShape::largest_rank(m, n, parameters);
    if rank == 0 {
        return Err(Error::Shape {
            operation: "parameters",
            expected: format!("at least {} for a matrix of shape ({m}, {n})", m + n - 1),
            got: parameters.to_string(),
        });
    }
    fit(view, &MatrixSpec::low_rank(rank), norm, effort, seed, parallelism, progress)
}

/// Calls `work` with the view's values in the view's order, row-major.
fn in_own_order<T>(view: MatrixView<'_>, work: impl FnOnce(&[f32]) -> T) -> T {
    let plain =
        (0..view.rows()).all(|i| view.source_row(i) == i) && (0..view.columns()).all(|j| view.source_column(j) == j);
    if plain { work(view.data()) } else { work(&view.to_vec()) }
}
