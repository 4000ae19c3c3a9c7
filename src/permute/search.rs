//! The search pipeline: norm sort, alternating assignment, annealing; effort levels, restarts and seeds.

use rayon::prelude::*;

use super::anneal::{Schedule, anneal};
use super::assign::alternate_assignment;
use super::decomposition::Decomposition;
use super::effort::Effort;
use super::norm_sort::norm_sort;
use super::orders::Orders;
use super::permutation::Permutation;
use super::phase_gram::PhaseGram;
use super::side::Side;
use crate::error::Result;
use crate::kron::{MatrixView, lost_energy, nearest_kronecker_sum};
use crate::numeric::range::Rescale;
use crate::progress::{Parallelism, Progress};
use crate::spec::{KroneckerShape, KroneckerSpec, Permute};

/// The sides that may be permuted, whose order matters, and whose [`PhaseGram`] fits in memory.
///
/// With one slot or one block on a side, permuting it only permutes `A` or `B`.
fn searchable_sides(shape: &KroneckerShape, permute: Permute) -> Vec<Side> {
    let allowed = |side| match side {
        Side::Rows => permute.rows(),
        Side::Columns => permute.columns(),
    };
    let matters = |side: Side| {
        let (slots, phases) = side.slots_and_phases(shape);
        let elements = side.elements(shape);
        slots > 1 && slots < elements && PhaseGram::bytes(elements, phases) <= PHASE_GRAM_BYTES
    };
    [Side::Rows, Side::Columns].into_iter().filter(|&side| allowed(side) && matters(side)).collect()
}

/// The most memory of a [`PhaseGram`]. A side that needs more (a vocabulary, or a block with many entries on the other
/// side) is sorted by norm only.
const PHASE_GRAM_BYTES: usize = 512 << 20;

/// Temperature, as a share of an element's mean energy, at the end of the slow cooling. Nearly all energy is gained
/// between 1e-2 and this. Above 1e-2 the norm sort is undone.
const COLD: f64 = 1e-3;
/// Temperature at the end of the final quench, where no swap that loses energy is accepted.
const FROZEN: f64 = 1e-5;
/// Rounds of annealing on one side before the other side follows; the projector is refitted after each.
const ROUNDS: usize = 5;
/// Consecutive assignments on one side before the other side follows.
const ASSIGNMENTS: usize = 2;
/// Longer sides are only annealed: an assignment problem costs more than the annealing that gains as much.
const ASSIGNMENT_ELEMENTS: usize = 1024;

/// One annealing, from `hot` down to [`COLD`] and a quench.
#[derive(Clone, Copy, Debug)]
struct Cooling {
    /// First temperature, as a share of an element's mean energy.
    hot: f64,
    /// Temperature levels down to [`COLD`]; every level visits both sides.
    levels: usize,
    /// Swaps tried in a round, for each element.
    moves: usize,
}

impl Effort {
    /// The annealings of this level, each with its own seed. The best result is kept. A higher level includes those of
    /// the lower ones, so its result is never worse.
    fn coolings(self) -> &'static [Cooling] {
        const ALL: [Cooling; 4] = [
            Cooling { hot: 4e-3, levels: 1, moves: 40 },
            Cooling { hot: 1e-2, levels: 5, moves: 80 },
            Cooling { hot: 1e-2, levels: 96, moves: 200 },
            Cooling { hot: 1e-2, levels: 96, moves: 200 },
        ];
        match self {
            Self::Fast => &ALL[..1],
            Self::Balanced => &ALL[..2],
            Self::Best => &ALL,
        }
    }
}

/// Units of [`Progress`] that [`find_permutation`] and [`decompose`] advance by for one matrix.
///
/// A job adds the units of all matrices before it starts, so that its total is fixed.
#[must_use]
pub fn work(shape: KroneckerShape, permute: Permute, effort: Effort) -> u64 {
    let shape = if shape.large_blocks() { shape.exchanged() } else { shape };
    let elements: usize = searchable_sides(&shape, permute).iter().map(|side| side.elements(&shape)).sum();
    let rounds: usize = effort.coolings().iter().map(|cooling| (cooling.levels + 1) * ROUNDS).sum();
    1 + (elements * rounds) as u64
}

/// Decomposes `w`, row-major `(m, n)`: searches permutations, then takes the nearest Kronecker sum under them.
///
/// `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`. The result depends on `w`, `spec`, `effort` and `seed` only, not on the number of
/// threads, and never loses more energy than no permutation at all.
///
/// # Errors
/// [`Error::Shape`] if `spec` does not fit, [`Error::NonFinite`], [`Error::Convergence`], [`Error::Cancelled`].
///
/// # Cost
/// See [`find_permutation`], then two passes over `w`.
pub fn decompose(
    w: &[f32],
    (m, n): (usize, usize),
    spec: &KroneckerSpec,
    effort: Effort,
    seed: u64,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<Decomposition> {
    let shape = spec.shape(m, n)?;
    MatrixView::new(w, m, n)?
        .in_safe_range(|view| decompose_view(view, shape, spec, effort, seed, parallelism, progress))
}

fn decompose_view(
    view: MatrixView<'_>,
    shape: KroneckerShape,
    spec: &KroneckerSpec,
    effort: Effort,
    seed: u64,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<Decomposition> {
    let (orders, _) = find_permutation(view, shape, spec.permute, effort, seed, parallelism, progress)?;
    let row_permutation = spec.permute.rows().then(|| Permutation::new(orders.rows)).transpose()?;
    let column_permutation = spec.permute.columns().then(|| Permutation::new(orders.columns)).transpose()?;
    let ordered = view.ordered(
        row_permutation.as_ref().map(Permutation::as_slice),
        column_permutation.as_ref().map(Permutation::as_slice),
    );
    let sum = nearest_kronecker_sum(ordered, shape, progress)?;
    progress.advance(1);
    Ok(Decomposition { sum, row_permutation, column_permutation })
}

/// Searches row and column orders under which `view` is near to a Kronecker sum; returns them with the lost energy.
///
/// # Errors
/// As [`decompose`].
///
/// # Cost
/// For each visit of a side with `e` elements, slots `s` and phases `f` of the other side: `e·f·m·n` MACs for the
/// phase Gram and `e²·f²` values of memory; then `e²·s·f²` MACs and an assignment problem of size `e` for each
/// assignment, `s·f²` MACs for each swap tried.
pub fn find_permutation(
    view: MatrixView<'_>,
    shape: KroneckerShape,
    permute: Permute,
    effort: Effort,
    seed: u64,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<(Orders, f64)> {
    view.in_safe_range(|view| search(view, shape, permute, effort, seed, parallelism, progress))
}

impl Rescale for (Orders, f64) {
    fn rescaled(self, _: i32) -> Option<Self> {
        Some(self)
    }
}

/// [`find_permutation`] for finite values in the safe range.
fn search(
    view: MatrixView<'_>,
    shape: KroneckerShape,
    permute: Permute,
    effort: Effort,
    seed: u64,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<(Orders, f64)> {
    let lost_energy =
        |orders: &Orders| lost_energy(view.ordered(Some(&orders.rows), Some(&orders.columns)), shape, progress);
    let identity = Orders::identity(view.rows(), view.columns());
    let unpermuted = lost_energy(&identity)?;
    if unpermuted == 0.0 || permute == Permute::None {
        return Ok((identity, unpermuted));
    }
    let run = |shape, start| {
        let sides = searchable_sides(&shape, permute);
        Search { view, shape, permute, sides, energy: view.energy(), parallelism, progress }.run(start, effort, seed)
    };
    let found = if shape.large_blocks() {
        run(shape.exchanged(), identity.exchanged(&shape))?.exchanged(&shape.exchanged())
    } else {
        run(shape, identity.clone())?
    };
    let lost = lost_energy(&found)?;
    Ok(if lost < unpermuted { (found, lost) } else { (identity, unpermuted) })
}

struct Search<'a> {
    view: MatrixView<'a>,
    shape: KroneckerShape,
    permute: Permute,
    sides: Vec<Side>,
    energy: f64,
    parallelism: Parallelism,
    progress: &'a Progress,
}

impl Search<'_> {
    /// Searches from `start`, whose order is kept on a side that may not be permuted.
    fn run(&self, start: Orders, effort: Effort, seed: u64) -> Result<Orders> {
        let assigned = self.assign(norm_sort(self.view, &self.shape, self.permute, start))?;
        let anneal = |(index, &cooling): (usize, &Cooling)| {
            self.anneal(assigned.1.clone(), cooling, seed.wrapping_add((index as u64) << 32))
        };
        let coolings = effort.coolings();
        let annealed: Vec<(f64, Orders)> = match self.parallelism {
            Parallelism::Rayon => coolings.par_iter().enumerate().map(anneal).collect::<Result<_>>()?,
            Parallelism::Sequential => coolings.iter().enumerate().map(anneal).collect::<Result<_>>()?,
        };
        Ok(annealed.into_iter().fold(assigned, |best, next| if next.0 > best.0 { next } else { best }).1)
    }

    /// Alternating assignment on each side that is short enough; returns the energy kept and the orders.
    fn assign(&self, mut orders: Orders) -> Result<(f64, Orders)> {
        let mut kept = 0.0;
        for &side in self.sides.iter().filter(|side| side.elements(&self.shape) <= ASSIGNMENT_ELEMENTS) {
            kept = self.improve(side, &mut orders, |gram, order| {
                alternate_assignment(gram, order, self.shape.rank, ASSIGNMENTS, self.progress)
            })?;
        }
        Ok((kept, orders))
    }

    /// Cools slowly, alternating between the sides at every level, and quenches; returns the energy kept and the
    /// orders.
    fn anneal(&self, mut orders: Orders, cooling: Cooling, seed: u64) -> Result<(f64, Orders)> {
        let step = (COLD / cooling.hot).powf(1.0 / cooling.levels as f64);
        let levels = (0..cooling.levels).map(|level| {
            let start = cooling.hot * step.powi(level as i32);
            (start, start * step)
        });
        let mut kept = 0.0;
        for (level, (start, end)) in levels.chain([(COLD, FROZEN)]).enumerate() {
            let schedule = Schedule { start, end, rounds: ROUNDS, moves: cooling.moves };
            for &side in &self.sides {
                kept = self.improve(side, &mut orders, |gram, order| {
                    let seed = seed.wrapping_add(level as u64);
                    anneal(gram, order, self.shape.rank, self.energy, schedule, seed, self.progress)
                })?;
            }
        }
        Ok((kept, orders))
    }

    /// Runs one search step on one side.
    fn improve(
        &self,
        side: Side,
        orders: &mut Orders,
        step: impl FnOnce(&PhaseGram, &mut Vec<usize>) -> Result<f64>,
    ) -> Result<f64> {
        let view = match side {
            Side::Rows => self.view.ordered(None, Some(&orders.columns)),
            Side::Columns => self.view.ordered(Some(&orders.rows), None),
        };
        let gram = PhaseGram::new(view, side, &self.shape, self.parallelism, self.progress)?;
        let order = match side {
            Side::Rows => &mut orders.rows,
            Side::Columns => &mut orders.columns,
        };
        step(&gram, order)
    }
}
