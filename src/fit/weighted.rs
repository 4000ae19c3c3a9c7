//! A permuted Kronecker sum fitted in a weighted norm.
//!
//! There is no closed form. Orders and factors start from a norm that has one. Then two steps alternate: descent on both
//! factors for fixed orders, and better orders for fixed factors. No step raises the lost energy.

use std::slice;

use faer::{Mat, MatRef};

use super::descent::{descend, left_to};
use super::factors::Factors;
use super::moment::{Norm, Weight, inner};
use super::preconditioner::BlockWeights;
use super::weighted_permutation::improve_orders;
use crate::error::Result;
use crate::kron::MatrixView;
use crate::permute::{Decomposition, Effort, Orders, norm_sort};
use crate::progress::Progress;
use crate::spec::{KroneckerSpec, Permute};

/// The length of a fit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turns {
    /// Fits of a low rank to what the other terms leave, each followed by all of the below on the other terms.
    pub rounds: usize,
    /// Alternations of descent and orders.
    pub turns: usize,
    /// Steps of descent per alternation.
    pub steps: usize,
    /// Steps of descent at the end.
    pub last_steps: usize,
}

impl Turns {
    /// Enough to rule out bad specs.
    pub const SCREENING: Self = Self { rounds: 1, turns: 1, steps: 4, last_steps: 4 };
    /// Enough to find the best of the remaining specs.
    pub const SECOND_SCREENING: Self = Self { rounds: 1, turns: 1, steps: 7, last_steps: 7 };

    /// For terms in the norm itself.
    pub fn new(effort: Effort) -> Self {
        match effort {
            Effort::Fast => Self { rounds: 1, turns: 1, steps: 10, last_steps: 20 },
            Effort::Balanced => Self { rounds: 1, turns: 3, steps: 8, last_steps: 36 },
            Effort::Best => Self { rounds: 1, turns: 16, steps: 10, last_steps: 200 },
        }
    }

    /// For terms beside a low rank that follows them, which leaves little to descend.
    pub fn beside(effort: Effort) -> Self {
        match effort {
            Effort::Fast | Effort::Balanced => Self { rounds: 1, turns: 1, steps: 8, last_steps: 8 },
            Effort::Best => Self { rounds: 3, turns: 2, steps: 10, last_steps: 20 },
        }
    }
}

/// The most alternating assignments of the start.
pub(super) const ASSIGNMENTS: usize = 6;

/// The Kronecker sum of the given spec that is near to `view` in `norm`; its lost energy is that of `norm`.
///
/// Minimises `tr(C_in E C_out Eᵀ)` for `E = W − Ŵ`, `Ŵ[p][:, q] = Σ_k A_k ⊗ B_k`. f32 in and out, f64 inside.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if `spec` does not fit, [`Error::NonFinite`](crate::Error::NonFinite),
/// [`Error::Convergence`](crate::Error::Convergence), [`Error::Cancelled`](crate::Error::Cancelled).
///
/// # Cost
/// At balanced effort some 80 evaluations of `m·n·(m + n) + 3·rank·m·n` MACs, and ten assignment problems or rounds
/// of swaps for each side.
pub fn weighted_kronecker(
    view: MatrixView<'_>,
    spec: KroneckerSpec,
    norm: &Norm,
    effort: Effort,
    progress: &Progress,
) -> Result<Decomposition> {
    spec.shape(view.rows(), view.columns())?;
    view.in_safe_range(|view| weighted_kronecker_safely(view, spec, norm, effort, progress))
}

/// [`weighted_kronecker`] for finite values in the safe range.
fn weighted_kronecker_safely(
    view: MatrixView<'_>,
    spec: KroneckerSpec,
    norm: &Norm,
    effort: Effort,
    progress: &Progress,
) -> Result<Decomposition> {
    let target = upcast(view);
    let mut factors = start(target.as_ref(), &spec, norm, ASSIGNMENTS, progress)?;
    improve(slice::from_mut(&mut factors), &[spec.permute], target.as_ref(), norm, Turns::new(effort), progress)?;
    let mut decomposition = factors.decomposition(spec.permute, 0.0)?;
    let dense = decomposition.to_dense();
    decomposition.sum.lost_energy = lost_energy(target.as_ref(), &[dense], norm);
    Ok(decomposition)
}

/// Orders from the norm of the moments' diagonals, by norm sort and alternating assignment, and factors in closed form
/// from the weights' nearest Kronecker products, or from the Frobenius norm if these are better; never worse than zero.
///
/// `assignments` is the most of them on each side.
pub(super) fn start(
    target: MatRef<'_, f64>,
    spec: &KroneckerSpec,
    norm: &Norm,
    assignments: usize,
    progress: &Progress,
) -> Result<Factors> {
    let (shape, permute) = (spec.shape(target.nrows(), target.ncols())?, spec.permute);
    let mut factors = Factors::zeros(shape);
    let scaled = scaled_by_diagonals(target, norm);
    let frobenius = Norm::frobenius();
    if permute != Permute::None {
        let values: Vec<f32> = (0..target.nrows() * target.ncols())
            .map(|at| scaled[(at / target.ncols(), at % target.ncols())] as f32)
            .collect();
        let view = MatrixView::new(&values, target.nrows(), target.ncols())?;
        let orders = norm_sort(
            view,
            &shape,
            permute,
            Orders { rows: factors.row_permutation, columns: factors.column_permutation },
        );
        (factors.row_permutation, factors.column_permutation) = (orders.rows, orders.columns);
        for _ in 0..assignments {
            progress.check()?;
            factors.set_nearest(factors.gather(scaled.as_ref()).as_ref())?;
            if !improve_orders(&mut factors, scaled.as_ref(), &frobenius, permute, progress)? {
                break;
            }
        }
    }
    progress.check()?;
    let gathered = factors.gather(target);
    let mut other = factors.clone();
    other.set_nearest(gathered.as_ref())?;
    BlockWeights::new(&factors, norm).set_nearest(&mut factors, gathered.as_ref())?;
    let (energy, other_energy) = (shrink(&mut factors, target, norm), shrink(&mut other, target, norm));
    Ok(if other_energy < energy { other } else { factors })
}

/// Scales a sum to the least `‖W − K‖²`, which is returned. A sum that is near in one norm may be far off in another.
fn shrink(factors: &mut Factors, target: MatRef<'_, f64>, norm: &Norm) -> f64 {
    let dense = factors.dense();
    let weighted = norm.apply(dense.as_ref());
    let (along, square) = (inner(weighted.as_ref(), target), inner(weighted.as_ref(), dense.as_ref()));
    let scale = if square > 0.0 { along / square } else { 0.0 };
    factors.scale(scale);
    norm.energy(target) - scale * along
}

/// Alternates descent and orders on all terms of a sum; `permutes` says which orders may change. Returns the lost
/// energy, which never rises.
pub(super) fn improve(
    terms: &mut [Factors],
    permutes: &[Permute],
    target: MatRef<'_, f64>,
    norm: &Norm,
    turns: Turns,
    progress: &Progress,
) -> Result<f64> {
    for _ in 0..turns.turns {
        descend(terms, target, norm, turns.steps, progress)?;
        let mut changed = false;
        for (which, &permute) in permutes.iter().enumerate().filter(|(_, permute)| **permute != Permute::None) {
            let left = left_to(which, terms, target);
            changed |= improve_orders(&mut terms[which], left.as_ref(), norm, permute, progress)?;
        }
        if !changed {
            break;
        }
    }
    descend(terms, target, norm, turns.last_steps, progress)
}

/// `W` in f64.
pub(super) fn upcast(view: MatrixView<'_>) -> Mat<f64> {
    let mut target = Mat::zeros(view.rows(), view.columns());
    let mut row = vec![0.0_f32; view.columns()];
    for i in 0..view.rows() {
        view.copy_row(i, &mut row);
        row.iter().enumerate().for_each(|(j, &value)| target[(i, j)] = f64::from(value));
    }
    target
}

/// `‖W − Σ_t Ŵ_t‖² / ‖W‖²` for row-major dense terms; 0 for a zero matrix.
pub(super) fn lost_energy(target: MatRef<'_, f64>, terms: &[Vec<f32>], norm: &Norm) -> f64 {
    let columns = target.ncols();
    let error = Mat::from_fn(target.nrows(), columns, |i, j| {
        target[(i, j)] - terms.iter().map(|term| f64::from(term[i * columns + j])).sum::<f64>()
    });
    let total = inner(norm.apply(target).as_ref(), target);
    if total > 0.0 { norm.energy(error.as_ref()) / total } else { 0.0 }
}

/// `D_in^½ W D_out^½` for the diagonals of the weights.
fn scaled_by_diagonals(target: MatRef<'_, f64>, norm: &Norm) -> Mat<f64> {
    let root = |weight: &Weight, length: usize| -> Vec<f64> {
        match weight {
            Weight::Identity => vec![1.0; length],
            Weight::Diagonal(values) => values.iter().map(|value| value.sqrt()).collect(),
            Weight::Full(matrix) => (0..length).map(|i| matrix[(i, i)].sqrt()).collect(),
        }
    };
    let (rows, columns) = (root(&norm.input, target.nrows()), root(&norm.output, target.ncols()));
    Mat::from_fn(target.nrows(), target.ncols(), |i, j| rows[i] * target[(i, j)] * columns[j])
}

/// Calls `work` with the view's values in the view's order, row-major.
pub(super) fn in_own_order<T>(view: MatrixView<'_>, work: impl FnOnce(&[f32]) -> T) -> T {
    let plain =
        (0..view.rows()).all(|i| view.source_row(i) == i) && (0..view.columns()).all(|j| view.source_column(j) == j);
    if plain { work(view.data()) } else { work(&view.to_vec()) }
}
