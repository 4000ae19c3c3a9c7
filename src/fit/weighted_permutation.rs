//! Better orders for the rows and columns of a Kronecker sum with fixed factors, in the norm of the fit.
//!
//! With `E = W − K`, two matrix products give the change of `‖E‖²` for every move of a row of `K`. With a diagonal weight
//! the best order of a side is a linear assignment problem. With a full weight rows depend on each other, and pairs are
//! swapped. Products are in f32, as those of the descent.

use faer::{Mat, MatRef};

use super::factors::Factors;
use super::moment::{Norm, Weight, inner, product, single};
use crate::error::Result;
use crate::permute::{Side, solve_assignment};
use crate::progress::Progress;
use crate::spec::Permute;

/// Longest side (a vocabulary is longer) whose order is improved: the pairs take eight bytes each.
const LONGEST: usize = 4096;
/// Longest side for an assignment problem; beyond, swaps gain nearly as much in less time.
const LONGEST_ASSIGNMENT: usize = 1024;
/// A smaller relative gain is rounding.
const ROUNDING: f64 = 1e-6;
/// Swaps tried per row.
const TRIES: usize = 8;

/// Improves both orders of `factors` as far as `permute` allows; returns whether anything has changed.
///
/// `‖target − K‖²` never rises.
///
/// # Cost
/// On each side with `e` rows: three products of `e·m·n` MACs, then an assignment problem of size `e`, or `m·n`
/// MACs for every swap.
pub(super) fn improve_orders(
    factors: &mut Factors,
    target: MatRef<'_, f64>,
    norm: &Norm,
    permute: Permute,
    progress: &Progress,
) -> Result<bool> {
    let mut changed = false;
    let norm = norm.to_single();
    for side in [Side::Columns, Side::Rows] {
        progress.check()?;
        let (allowed, blocks, slots) = match side {
            Side::Rows => (permute.rows(), factors.shape.m1, factors.shape.m2),
            Side::Columns => (permute.columns(), factors.shape.n1, factors.shape.n2),
        };
        // With one slot or one block, permuting this side only permutes a factor.
        if !allowed || slots == 1 || blocks == 1 || blocks * slots > LONGEST {
            continue;
        }
        let dense = factors.dense();
        // Rounded as a difference: it may be far smaller than both.
        let error = Mat::from_fn(dense.nrows(), dense.ncols(), |i, j| (target[(i, j)] - dense[(i, j)]) as f32);
        let dense = single(dense.as_ref());
        let (moved, order) = match side {
            Side::Rows => {
                let rows = Rows { error: error.as_ref(), sum: dense.as_ref(), own: &norm.input, other: &norm.output };
                (rows.best_places(progress)?, &mut factors.row_permutation)
            }
            Side::Columns => {
                let (error, sum) = (error.transpose(), dense.transpose());
                let rows = Rows { error, sum, own: &norm.output, other: &norm.input };
                (rows.best_places(progress)?, &mut factors.column_permutation)
            }
        };
        if let Some(places) = moved {
            order.iter_mut().for_each(|index| *index = places[*index]);
            changed = true;
        }
    }
    Ok(changed)
}

/// An approximation and its error, both in the matrix's own order and transposed if columns are to be moved.
struct Rows<'a> {
    error: MatRef<'a, f32>,
    sum: MatRef<'a, f32>,
    own: &'a Weight<f32>,
    other: &'a Weight<f32>,
}

impl Rows<'_> {
    /// Where each row of the sum should go; `None` to leave all in place.
    fn best_places(&self, progress: &Progress) -> Result<Option<Vec<usize>>> {
        let weighted = self.other.times(self.sum.transpose());
        match self.own {
            Weight::Full(own) => self.swap(own.as_ref(), weighted.as_ref(), progress),
            _ if self.sum.nrows() > LONGEST_ASSIGNMENT => {
                let size = self.sum.nrows();
                let own = Mat::from_fn(size, size, |i, j| if i == j { self.own_weight(i) } else { 0.0 });
                self.swap(own.as_ref(), weighted.as_ref(), progress)
            }
            _ => self.assign(weighted.as_ref(), progress),
        }
    }

    fn own_weight(&self, row: usize) -> f32 {
        match self.own {
            Weight::Identity => 1.0,
            Weight::Diagonal(values) => values[row],
            Weight::Full(matrix) => matrix[(row, row)],
        }
    }

    /// All rows at once: row `y` of the sum at row `x` of the matrix costs `c_x ‖E_x + K_x − K_y‖²`, but for what depends
    /// on `x` only. `weighted` is `C Kᵀ` for the other side's weight `C`.
    fn assign(&self, weighted: MatRef<'_, f32>, progress: &Progress) -> Result<Option<Vec<usize>>> {
        let size = self.sum.nrows();
        let matrix = Mat::from_fn(size, self.sum.ncols(), |i, j| self.error[(i, j)] + self.sum[(i, j)]);
        let products = product(matrix.as_ref(), weighted);
        let squares: Vec<f32> = (0..size).map(|y| row_dot(self.sum, y, weighted, y) as f32).collect();
        let cost = |x: usize, y: usize| self.own_weight(x) * (squares[y] - 2.0 * products[(x, y)]);
        progress.check()?;
        let mut costs = vec![0.0_f32; size * size];
        for (y, costs) in costs.chunks_exact_mut(size).enumerate() {
            for (x, value) in costs.iter_mut().enumerate() {
                *value = cost(x, y);
            }
        }
        let places = solve_assignment(&costs, size, progress)?;
        let (before, after) = (0..size).fold((0.0, 0.0), |(before, after), y| {
            (before + f64::from(cost(y, y)), after + f64::from(cost(places[y], y)))
        });
        Ok((before - after > ROUNDING * before.abs()).then_some(places))
    }

    /// Pairs, the best first and every row at most once. `weighted` is as in [`Self::assign`].
    fn swap(&self, own: MatRef<'_, f32>, weighted: MatRef<'_, f32>, progress: &Progress) -> Result<Option<Vec<usize>>> {
        let (size, width) = (self.sum.nrows(), self.sum.ncols());
        let half = self.own.times(self.error);
        // Row-major, since rows are what is read: the transposed C_own E C_other.
        let mut gradient = self.other.times(half.transpose());
        let energy = inner(gradient.transpose(), self.error);
        progress.check()?;
        let slopes = product(gradient.transpose(), self.sum.transpose());
        let squares = product(self.sum, weighted);
        progress.check()?;
        let between = |matrix: MatRef<'_, f32>, a: usize, b: usize| {
            matrix[(a, a)] + matrix[(b, b)] - matrix[(a, b)] - matrix[(b, a)]
        };
        let least = (ROUNDING * energy) as f32;
        let mut pairs = Vec::new();
        for b in 0..size {
            progress.check()?;
            for a in 0..b {
                let gain = -2.0 * between(slopes.as_ref(), a, b) - between(own, a, b) * between(squares.as_ref(), a, b);
                if gain > least {
                    pairs.push((gain, a, b));
                }
            }
        }
        pairs.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
        let mut places: Vec<usize> = (0..size).collect();
        let mut taken = vec![false; size];
        let (mut changed, mut tries) = (false, 0);
        for (_, a, b) in pairs {
            if taken[a] || taken[b] {
                continue;
            }
            tries += 1;
            if tries > TRIES * size {
                break;
            }
            // Rows that were not taken are still where they were; only the gradient has changed.
            let (own_between, at_a, at_b) = (between(own, a, b), gradient.col(a), gradient.col(b));
            let slope: f32 = (0..width).map(|j| (at_a[j] - at_b[j]) * (self.sum[(b, j)] - self.sum[(a, j)])).sum();
            let gain = 2.0 * slope - own_between * between(squares.as_ref(), a, b);
            if gain <= least {
                continue;
            }
            progress.check()?;
            let change: Vec<f32> = (0..width).map(|j| weighted[(j, b)] - weighted[(j, a)]).collect();
            for (x, column) in gradient.col_iter_mut().enumerate() {
                let share = own[(x, a)] - own[(x, b)];
                if share != 0.0 {
                    column.iter_mut().zip(&change).for_each(|(value, change)| *value -= share * change);
                }
            }
            places.swap(a, b);
            (taken[a], taken[b], changed) = (true, true, true);
        }
        Ok(changed.then_some(places))
    }
}

fn row_dot(x: MatRef<'_, f32>, row: usize, y: MatRef<'_, f32>, column: usize) -> f64 {
    (0..x.ncols()).map(|j| f64::from(x[(row, j)]) * f64::from(y[(j, column)])).sum()
}
