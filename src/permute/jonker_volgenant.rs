//! The linear assignment problem by shortest augmenting paths.
//!
//! R. Jonker and A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
//! Computing 38 (1987).

use crate::error::{Error, Result};
use crate::numeric::range::in_safe_range;
use crate::numeric::simd::{LANES, dispatched};
use crate::progress::Progress;

const NONE: usize = usize::MAX;

/// The assignment of columns to rows of least total cost. Element `i` of the result is the column of row `i`.
///
/// Minimises `Σ_i cost[i, columns[i]]` over permutations; `cost` is `(size, size)`, row-major, of any scale. Dual values are
/// stored in f32, so rounding may raise the total above the minimum by some `1e-6` of the largest cost for each row.
///
/// # Errors
/// [`Error::NonFinite`] for a cost that is not finite, [`Error::Cancelled`].
///
/// # Cost
/// `O(size³)` in the worst case. The first passes assign most rows and cost `O(size²)`.
///
/// # Panics
/// If `cost` is not square.
pub fn solve_assignment(cost: &[f32], size: usize, progress: &Progress) -> Result<Vec<usize>> {
    assert_eq!(cost.len(), size * size, "a square cost matrix");
    if size <= 1 {
        return Ok(vec![0; size]);
    }
    if let Some(at) = cost.iter().position(|cost| !cost.is_finite()) {
        return Err(Error::NonFinite { value: cost[at], row: at / size, column: at % size });
    }
    // The differences of costs near the ends of the range are beyond it.
    let (cost, _) = in_safe_range(cost);
    let cost = cost.as_ref();
    let mut matching =
        Matching { cost, size, price: vec![0.0; size], column_of: vec![NONE; size], row_of: vec![NONE; size] };
    let mut free_rows = matching.reduce_columns();
    for _ in 0..2 {
        free_rows = matching.reduce_rows(free_rows, progress)?;
    }
    let mut search = PathSearch::new(size);
    for row in free_rows {
        progress.check()?;
        matching.augment(row, &mut search, progress)?;
    }
    Ok(matching.column_of)
}

/// A partial assignment with the dual value ("price") of each column.
struct Matching<'a> {
    cost: &'a [f32],
    size: usize,
    price: Vec<f32>,
    column_of: Vec<usize>,
    row_of: Vec<usize>,
}

/// Scratch space of the shortest-path search.
struct PathSearch {
    distance: Vec<f32>,
    predecessor: Vec<u32>,
    /// 0 for a column that may still be reached, infinity for a column with a settled distance.
    closed: Vec<f32>,
    settled: Vec<usize>,
}

impl PathSearch {
    fn new(size: usize) -> Self {
        Self { distance: vec![0.0; size], predecessor: vec![0; size], closed: vec![0.0; size], settled: Vec::new() }
    }
}

impl<'a> Matching<'a> {
    fn row(&self, i: usize) -> &'a [f32] {
        &self.cost[i * self.size..][..self.size]
    }

    fn assign(&mut self, row: usize, column: usize) {
        self.column_of[row] = column;
        self.row_of[column] = row;
    }

    /// Prices every column at its least cost and assigns it to the row of that cost, if the row is free. Then lowers
    /// the price of each column whose row is the cheapest of no other column. Returns the free rows.
    fn reduce_columns(&mut self) -> Vec<usize> {
        let mut cheapest = vec![0_usize; self.size];
        self.price.copy_from_slice(&self.cost[..self.size]);
        for i in 1..self.size {
            let row = self.row(i);
            for ((price, cheapest), &cost) in self.price.iter_mut().zip(&mut cheapest).zip(row) {
                if cost < *price {
                    *price = cost;
                    *cheapest = i;
                }
            }
        }
        let mut claims = vec![0_u32; self.size];
        for (j, &i) in cheapest.iter().enumerate().rev() {
            claims[i] += 1;
            if claims[i] == 1 {
                self.assign(i, j);
            }
        }
        for i in (0..self.size).filter(|&i| claims[i] == 1) {
            let j = self.column_of[i];
            let (least, at, second) = two_smallest(self.row(i), &self.price);
            self.price[j] -= if at == j { second } else { least };
        }
        (0..self.size).filter(|&i| claims[i] == 0).collect()
    }

    /// Augmenting row reduction. Each free row gets its cheapest column, at a price that makes its second choice
    /// equally good. If the price fell, the displaced row is processed at once. Returns the rows that are still free.
    fn reduce_rows(&mut self, free_rows: Vec<usize>, progress: &Progress) -> Result<Vec<usize>> {
        let mut displaced_later = Vec::new();
        // Rounding can make prices fall by tiny amounts without end. Past this number of steps, the remaining rows are
        // left to the path search.
        let mut steps_left = 16 * self.size;
        for row in free_rows {
            let mut current = row;
            loop {
                progress.check()?;
                let (least, mut column, second) = two_smallest(self.row(current), &self.price);
                let lowered = self.price[column] - (second - least);
                let falls = lowered < self.price[column];
                if falls {
                    self.price[column] = lowered;
                } else if self.row_of[column] != NONE {
                    column = self.equally_good(current, column, second);
                }
                let displaced = self.row_of[column];
                self.assign(current, column);
                if displaced == NONE {
                    break;
                }
                self.column_of[displaced] = NONE;
                if !falls || steps_left == 0 {
                    displaced_later.push(displaced);
                    break;
                }
                steps_left -= 1;
                current = displaced;
            }
        }
        Ok(displaced_later)
    }

    /// A column other than `column` with the reduced cost `value` in the row, if there is one.
    fn equally_good(&self, row: usize, column: usize, value: f32) -> usize {
        let reduced = self.row(row).iter().zip(&self.price).map(|(&cost, &price)| cost - price);
        reduced.enumerate().find(|&(j, reduced)| j != column && reduced == value).map_or(column, |(j, _)| j)
    }

    /// Finds a shortest alternating path from the free row to a free column and flips it.
    fn augment(&mut self, free_row: usize, search: &mut PathSearch, progress: &Progress) -> Result<()> {
        search.closed.fill(0.0);
        search.settled.clear();
        for ((distance, &cost), &price) in search.distance.iter_mut().zip(self.row(free_row)).zip(&self.price) {
            *distance = cost - price;
        }
        search.predecessor.fill(free_row as u32);
        let mut nearest = smallest_open(&search.distance, &search.closed);
        let end = loop {
            progress.check()?;
            let (distance, column) = nearest;
            if self.row_of[column] == NONE {
                break column;
            }
            search.closed[column] = f32::INFINITY;
            search.settled.push(column);
            let row = self.row_of[column];
            let offset = self.row(row)[column] - self.price[column] - distance;
            let (distances, predecessors) = (&mut search.distance, &mut search.predecessor);
            relax(self.row(row), &self.price, offset, row as u32, distances, predecessors, &search.closed);
            nearest = smallest_open(&search.distance, &search.closed);
        };
        for &column in &search.settled {
            self.price[column] += search.distance[column] - nearest.0;
        }
        let mut column = end;
        loop {
            let row = search.predecessor[column] as usize;
            let next = self.column_of[row];
            self.assign(row, column);
            if row == free_row {
                return Ok(());
            }
            column = next;
        }
    }
}

dispatched! {
    /// The least and second least of `cost − price`, and the first index of the least.
    fn two_smallest(cost: &[f32], price: &[f32]) -> (f32, usize, f32) {
        let mut least = [f32::INFINITY; LANES];
        let mut second = [f32::INFINITY; LANES];
        let (costs, cost_rest) = cost.as_chunks::<LANES>();
        let (prices, price_rest) = price.as_chunks::<LANES>();
        for (cost, price) in costs.iter().zip(prices) {
            for lane in 0..LANES {
                let value = cost[lane] - price[lane];
                let larger = if value > least[lane] { value } else { least[lane] };
                second[lane] = if larger < second[lane] { larger } else { second[lane] };
                least[lane] = if value < least[lane] { value } else { least[lane] };
            }
        }
        let (mut smallest, mut next) = (f32::INFINITY, f32::INFINITY);
        let rest = cost_rest.iter().zip(price_rest).map(|(cost, price)| cost - price);
        for value in least.into_iter().chain(second).chain(rest) {
            if value < smallest {
                next = smallest;
                smallest = value;
            } else if value < next {
                next = value;
            }
        }
        let mut at = 0;
        for (index, (cost, price)) in cost.iter().zip(price).enumerate() {
            if cost - price == smallest {
                at = index;
                break;
            }
        }
        (smallest, at, next)
    }
}

dispatched! {
    /// The least distance of an open column, and the first column at that distance.
    fn smallest_open(distance: &[f32], closed: &[f32]) -> (f32, usize) {
        let mut least = [f32::INFINITY; LANES];
        let (distances, distance_rest) = distance.as_chunks::<LANES>();
        let (closings, closed_rest) = closed.as_chunks::<LANES>();
        for (distance, closed) in distances.iter().zip(closings) {
            for lane in 0..LANES {
                let value = distance[lane] + closed[lane];
                least[lane] = if value < least[lane] { value } else { least[lane] };
            }
        }
        let rest = distance_rest.iter().zip(closed_rest).map(|(distance, closed)| distance + closed);
        let smallest = least.into_iter().chain(rest).fold(f32::INFINITY, f32::min);
        let mut at = 0;
        for (index, (distance, closed)) in distance.iter().zip(closed).enumerate() {
            if distance + closed == smallest {
                at = index;
                break;
            }
        }
        (smallest, at)
    }
}

dispatched! {
    /// Lowers the distances of open columns that are nearer through `row`.
    fn relax(cost: &[f32], price: &[f32], offset: f32, row: u32, distance: &mut [f32], predecessor: &mut [u32], closed: &[f32]) {
        for ((((&cost, &price), distance), predecessor), &closed) in
            cost.iter().zip(price).zip(distance).zip(predecessor).zip(closed)
        {
            let value = cost - price - offset + closed;
            *predecessor = if value < *distance { row } else { *predecessor };
            *distance = if value < *distance { value } else { *distance };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn total(cost: &[f32], size: usize, columns: &[usize]) -> f64 {
        columns.iter().enumerate().map(|(i, &j)| f64::from(cost[i * size + j])).sum()
    }

    /// The least total by dynamic programming over subsets of columns.
    fn least_total(cost: &[f32], size: usize) -> f64 {
        let mut best = vec![f64::INFINITY; 1 << size];
        best[0] = 0.0;
        for used in 0_usize..1 << size {
            let row = used.count_ones() as usize;
            for column in (0..size).filter(|column| row < size && used & (1 << column) == 0) {
                let candidate = best[used] + f64::from(cost[row * size + column]);
                best[used | 1 << column] = best[used | 1 << column].min(candidate);
            }
        }
        best[(1 << size) - 1]
    }

    #[test]
    fn costs_of_any_scale_have_the_assignment_of_their_ratios() {
        let size = 40;
        let cost = crate::testing::noise(size * size, 5);
        let solve = |scale: f32| {
            let scaled: Vec<f32> = cost.iter().map(|&cost| cost * scale).collect();
            solve_assignment(&scaled, size, &Progress::default()).unwrap()
        };
        for exponent in [-100, -60, 60, 100, 127] {
            assert_eq!(solve(2.0_f32.powi(exponent)), solve(1.0), "2^{exponent}");
        }
    }

    #[test]
    fn a_cost_that_is_not_finite_is_refused_by_place() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut cost = vec![1.0; 9];
            cost[5] = bad;
            let error = solve_assignment(&cost, 3, &Progress::default()).unwrap_err();
            assert!(error.to_string().contains("row 1, column 2"), "{error}");
        }
    }

    #[test]
    fn a_cancelled_search_for_paths_stops() {
        // Every row wants the same columns in the same order, so paths are long.
        let size = 32;
        let cost: Vec<f32> = (0..size * size).map(|at| ((at / size + 1) * (at % size + 1)) as f32).collect();
        let matching = |progress: &Progress| {
            let (column_of, row_of) = (vec![NONE; size], vec![NONE; size]);
            let mut matching = Matching { cost: &cost, size, price: vec![0.0; size], column_of, row_of };
            (0..size).try_for_each(|row| matching.augment(row, &mut PathSearch::new(size), progress))
        };
        matching(&Progress::default()).unwrap();
        let cancelled = Progress::default();
        cancelled.cancel();
        assert!(matches!(matching(&cancelled), Err(Error::Cancelled)));
    }

    proptest! {
        #[test]
        fn as_good_as_trying_all(size in 0_usize..9, values in prop::collection::vec(-5.0_f32..5.0, 81), ties in any::<bool>()) {
            let cost: Vec<f32> = values[..size * size].iter().map(|&v| if ties { v.round() } else { v }).collect();
            let columns = solve_assignment(&cost, size, &Progress::default()).unwrap();
            crate::permute::Permutation::new(columns.clone()).unwrap();
            prop_assert!((total(&cost, size, &columns) - least_total(&cost, size)).abs() < 1e-4);
        }

        #[test]
        fn no_swap_improves_a_large_one(seed in 0_u64..1000) {
            // Too large for brute force: in an optimum, exchanging the columns of two rows never lowers the total.
            let size = 70;
            let cost: Vec<f32> = (0..size * size).map(|i| ((i as u64 * 2_654_435_761 + seed * 97) % 1009) as f32).collect();
            let columns = solve_assignment(&cost, size, &Progress::default()).unwrap();
            for (i, &a) in columns.iter().enumerate() {
                for (j, &b) in columns.iter().enumerate() {
                    let (now, then) = (cost[i * size + a] + cost[j * size + b], cost[i * size + b] + cost[j * size + a]);
                    prop_assert!(now <= then + 1e-2);
                }
            }
        }
    }
}
