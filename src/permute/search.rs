//! The search pipeline: norm sort, alternating assignment, annealing; effort levels, restarts and seeds.

use rayon::prelude::*;

use super::anneal::{Schedule, anneal};
use super::assign::alternate_assignment;
use super::norm_sort::norm_sort;
use super::phase_gram::PhaseGram;
use super::{Decomposition, Permutation};
use crate::error::{Error, Result};
use crate::kron::{MatrixView, lost_energy, nearest_kronecker_sum};
use crate::progress::Progress;
use crate::shape::{KroneckerShape, KroneckerSpec, Permute};

/// How long to search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Effort {
    /// Norm sort and alternating assignment.
    Fast,
    /// The same, then annealing.
    #[default]
    Balanced,
    /// Longer annealing from several seeds; the best is kept.
    Best,
}

impl Effort {
    /// Every level, with the name that configurations use.
    pub const NAMES: [(&'static str, Self); 3] =
        [("fast", Self::Fast), ("balanced", Self::Balanced), ("best", Self::Best)];

    /// Reads a configuration's name for it.
    ///
    /// # Errors
    /// [`Error::Config`] if the name is none of [`Self::NAMES`].
    pub fn from_name(name: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|&(_, effort)| effort).ok_or_else(|| {
            Error::Config(format!("effort: expected \"fast\", \"balanced\" or \"best\", got {name:?}"))
        })
    }

    /// The name that configurations use.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].0
    }
}

/// Whether one matrix's work is spread over rayon's threads. The result is the same either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parallelism {
    /// On the calling thread: for callers that are parallel over matrices themselves.
    Sequential,
    /// On the current rayon thread pool.
    Rayon,
}

/// A side of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its rows (input features).
    Rows,
    /// Its columns (output features).
    Columns,
}

/// An order of rows and one of columns, as gather indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orders {
    /// Row order `p`.
    pub rows: Vec<usize>,
    /// Column order `q`.
    pub columns: Vec<usize>,
}

impl Orders {
    /// The orders that change nothing.
    #[must_use]
    pub fn identity(m: usize, n: usize) -> Self {
        Self { rows: (0..m).collect(), columns: (0..n).collect() }
    }
}

/// Memory that a [`PhaseGram`] may take. A side for which it would not do (a vocabulary, or a block with many entries on
/// the other side) is sorted by norm only.
const PHASE_GRAM_BYTES: usize = 512 << 20;

/// Where annealing starts, as a share of an element's mean energy: hotter, it undoes the norm sort.
const HOT: f64 = 1e-2;
/// Where the slow part of the cooling ends. Nearly all the energy is gained between [`HOT`] and here, so time is spent here.
const COLD: f64 = 1e-3;
/// Where the final quench ends: no swap that loses energy is accepted any more.
const FROZEN: f64 = 1e-5;

/// What an effort level does.
#[derive(Clone, Copy, Debug)]
struct Recipe {
    /// Rounds of alternating assignment over the sides.
    assignment_rounds: usize,
    /// Assignments in a row on one side before the other side's turn.
    assignments: usize,
    /// Temperature levels between [`HOT`] and [`COLD`]; every level visits both sides.
    levels: usize,
    /// Stages of a visit; the projector is refreshed after each.
    stages: usize,
    /// Swaps tried in a stage, for each element.
    moves: usize,
    /// Independent annealings; the best is kept.
    restarts: u64,
}

impl Effort {
    fn recipe(self) -> Recipe {
        let recipe = Recipe { assignment_rounds: 2, assignments: 2, levels: 0, stages: 5, moves: 120, restarts: 1 };
        match self {
            Self::Fast => Recipe { assignment_rounds: 4, restarts: 0, ..recipe },
            Self::Balanced => Recipe { levels: 6, ..recipe },
            Self::Best => Recipe { levels: 64, moves: 200, restarts: 2, ..recipe },
        }
    }
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
    let view = MatrixView::new(w, m, n)?;
    let shape = spec.shape(m, n)?;
    let (orders, _) = find_permutation(view, shape, spec.permute, effort, seed, parallelism, progress)?;
    let rows = spec.permute.rows().then(|| Permutation::new(orders.rows)).transpose()?;
    let columns = spec.permute.columns().then(|| Permutation::new(orders.columns)).transpose()?;
    let ordered = view.ordered(rows.as_ref().map(Permutation::as_slice), columns.as_ref().map(Permutation::as_slice));
    Ok(Decomposition { sum: nearest_kronecker_sum(ordered, shape, progress)?, rows, columns })
}

/// Searches row and column orders under which `view` is near to a Kronecker sum; returns them with the lost energy.
///
/// # Errors
/// As [`decompose`].
///
/// # Cost
/// For each visit of a side with `e` elements, slots `s` and phases `f` of the other side: `e·f·m·n` multiplies for the
/// phase Gram and `e²·f²` values of memory; then `e²·s·f²` multiplies and an assignment problem of size `e` for each
/// assignment, `s·f²` multiplies for each swap tried.
pub fn find_permutation(
    view: MatrixView<'_>,
    shape: KroneckerShape,
    permute: Permute,
    effort: Effort,
    seed: u64,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<(Orders, f64)> {
    view.check_finite()?;
    let identity = Orders::identity(view.rows(), view.columns());
    let search = Search { view, shape, permute, energy: view.energy(), parallelism, progress };
    let unpermuted = search.lost_energy(&identity)?;
    if unpermuted == 0.0 || search.sides().is_empty() {
        return Ok((identity, unpermuted));
    }
    let found = search.run(effort.recipe(), seed)?;
    let lost = search.lost_energy(&found)?;
    Ok(if lost < unpermuted { (found, lost) } else { (identity, unpermuted) })
}

struct Search<'a> {
    view: MatrixView<'a>,
    shape: KroneckerShape,
    permute: Permute,
    energy: f64,
    parallelism: Parallelism,
    progress: &'a Progress,
}

impl Search<'_> {
    /// The sides that may be permuted and whose order matters: with one slot or one block on a side, permuting it only
    /// permutes `A` or `B`.
    fn sides(&self) -> Vec<Side> {
        let KroneckerShape { m1, n1, m2, n2, .. } = self.shape;
        let mut sides = Vec::new();
        if self.permute.rows() && m1 > 1 && m2 > 1 {
            sides.push(Side::Rows);
        }
        if self.permute.columns() && n1 > 1 && n2 > 1 {
            sides.push(Side::Columns);
        }
        sides
    }

    fn lost_energy(&self, orders: &Orders) -> Result<f64> {
        lost_energy(self.view.ordered(Some(&orders.rows), Some(&orders.columns)), self.shape, self.progress)
    }

    fn run(&self, recipe: Recipe, seed: u64) -> Result<Orders> {
        let mut orders = norm_sort(self.view, &self.shape, self.permute);
        let mut kept = 0.0;
        for _ in 0..recipe.assignment_rounds {
            let before = kept;
            for side in self.searchable_sides() {
                kept = self.improve(side, &mut orders, |gram, order, slots, rank| {
                    alternate_assignment(gram, order, slots, rank, recipe.assignments, self.progress)
                })?;
            }
            if kept <= before * (1.0 + 1e-5) {
                break;
            }
        }
        if recipe.restarts == 0 {
            return Ok(orders);
        }
        let restart = |restart: u64| self.anneal(orders.clone(), recipe, seed.wrapping_add(restart << 32));
        let tried: Vec<(f64, Orders)> = match self.parallelism {
            Parallelism::Rayon => (0..recipe.restarts).into_par_iter().map(restart).collect::<Result<_>>()?,
            Parallelism::Sequential => (0..recipe.restarts).map(restart).collect::<Result<_>>()?,
        };
        let best = tried.into_iter().reduce(|best, next| if next.0 > best.0 { next } else { best });
        Ok(best.map_or(orders, |(_, orders)| orders))
    }

    /// Cools `orders` slowly, taking turns between the sides at every level, and quenches them; returns the energy kept.
    fn anneal(&self, mut orders: Orders, recipe: Recipe, seed: u64) -> Result<(f64, Orders)> {
        let cooling = (COLD / HOT).powf(1.0 / recipe.levels as f64);
        let levels = (0..recipe.levels).map(|level| {
            let start = HOT * cooling.powi(level as i32);
            (start, start * cooling)
        });
        let mut kept = 0.0;
        for (level, (start, end)) in levels.chain([(COLD, FROZEN)]).enumerate() {
            let schedule = Schedule { start, end, stages: recipe.stages, moves: recipe.moves };
            for side in self.searchable_sides() {
                kept = self.improve(side, &mut orders, |gram, order, slots, rank| {
                    let seed = seed.wrapping_add(level as u64);
                    anneal(gram, order, slots, rank, self.energy, schedule, seed, self.progress)
                })?;
            }
        }
        Ok((kept, orders))
    }

    /// The sides that have a phase Gram of bearable size.
    fn searchable_sides(&self) -> Vec<Side> {
        let bytes = |side| match side {
            Side::Rows => PhaseGram::bytes(self.shape.rows(), self.shape.n2),
            Side::Columns => PhaseGram::bytes(self.shape.columns(), self.shape.m2),
        };
        self.sides().into_iter().filter(|&side| bytes(side) <= PHASE_GRAM_BYTES).collect()
    }

    /// Runs one search step on one side.
    fn improve(
        &self,
        side: Side,
        orders: &mut Orders,
        step: impl FnOnce(&PhaseGram, &mut Vec<usize>, usize, usize) -> Result<f64>,
    ) -> Result<f64> {
        let (slots, phases) = match side {
            Side::Rows => (self.shape.m2, self.shape.n2),
            Side::Columns => (self.shape.n2, self.shape.m2),
        };
        let view = match side {
            Side::Rows => self.view.ordered(None, Some(&orders.columns)),
            Side::Columns => self.view.ordered(Some(&orders.rows), None),
        };
        let gram = PhaseGram::new(view, side, phases, self.parallelism, self.progress)?;
        let order = match side {
            Side::Rows => &mut orders.rows,
            Side::Columns => &mut orders.columns,
        };
        step(&gram, order, slots, self.shape.rank)
    }
}
