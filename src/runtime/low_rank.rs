//! Products with a low-rank matrix in interpolative form.

use std::borrow::Cow;

use faer::{MatMut, MatRef};

use super::buffers::Buffer;
use super::kernels::add_scaled;
use super::order::Order;
use super::rows::{Rows, times_together};
use super::thread_pool::ThreadPool;

/// A matrix of low rank in interpolative form.
#[derive(Clone, Debug)]
pub(super) enum LowRank {
    /// `W[p] = [I; left] right`
    OnRows {
        /// `leftᵀ : (k, m − k)`
        left: Rows,
        /// `rightᵀ : (n, k)`
        right: Rows,
        /// `p`
        input: Order,
    },
    /// `W[:, q] = left [I right]`
    OnColumns {
        /// `leftᵀ : (k, m)`
        left: Rows,
        /// `rightᵀ : (n − k, k)`
        right: Rows,
        /// The inverse of `q`.
        output: Order,
    },
}

impl LowRank {
    /// The products `(count, n)` of several with few vectors `x : (count, m)`, and the order in which each `y` is to be
    /// gathered from its product.
    ///
    /// In two steps of all threads, however many there are.
    pub fn times_together<'a>(
        all: &[&'a Self],
        x: &[f32],
        count: usize,
        pool: &ThreadPool,
    ) -> Vec<(Buffer, Cow<'a, Order>)> {
        let begun: Vec<_> = all.iter().map(|term| term.begin(x, count, pool)).collect();
        let lefts = all.iter().zip(&begun).map(|(term, begun)| {
            let others = begun.as_ref().map_or(x, |(_, others)| &**others);
            (term.factors().0, others)
        });
        let lefts = times_together(&lefts.collect::<Vec<_>>(), count, pool);
        let inner: Vec<_> = begun
            .iter()
            .zip(lefts)
            .map(|(begun, mut inner)| {
                if let Some((pivots, _)) = begun {
                    add_scaled(&mut inner, 1.0, pivots);
                }
                inner
            })
            .collect();
        let rights: Vec<_> = all.iter().zip(&inner).map(|(term, inner)| (term.factors().1, &**inner)).collect();
        let rights = times_together(&rights, count, pool);
        all.iter().zip(inner).zip(rights).map(|((term, inner), right)| term.end(inner, right, count, pool)).collect()
    }

    /// Writes the products `(count, n)` with many vectors `x : (count, m)` to `y`, or adds them.
    pub fn times_many(&self, x: &[f32], mut y: MatMut<'_, f32>, adds: bool, pool: &ThreadPool) {
        let count = y.nrows();
        let (left, right) = self.factors();
        // Into the identity's part of the product, and from there into the rest of it.
        let both = |y: MatMut<'_, f32>| {
            let (mut inner, rest) = y.split_at_col_mut(left.rows);
            left.times_many(MatRef::from_row_major_slice(x, count, left.length), inner.as_mut(), false, pool);
            right.times_many(inner.as_ref(), rest, false, pool);
        };
        match self {
            Self::OnRows { .. } => {
                let (mut inner, others) = self.begin(x, count, pool).expect("pivots and others");
                left.times_many(others.matrix(count, left.length), inner.matrix_mut(count, left.rows), true, pool);
                right.times_many(inner.matrix(count, left.rows), y, adds, pool);
            }
            Self::OnColumns { output, .. } if output.is_identity() && !adds => both(y.as_mut()),
            Self::OnColumns { output, .. } => {
                let mut product = pool.buffer(count * y.ncols());
                both(product.matrix_mut(count, y.ncols()));
                output.place(&product, y, adds, pool);
            }
        }
    }

    fn factors(&self) -> (&Rows, &Rows) {
        let (Self::OnRows { left, right, .. } | Self::OnColumns { left, right, .. }) = self;
        (left, right)
    }

    /// What is added to the product with `left`, and what that is multiplied with; nothing if that is `x`.
    fn begin(&self, x: &[f32], count: usize, pool: &ThreadPool) -> Option<(Buffer, Buffer)> {
        let Self::OnRows { left, input, .. } = self else { return None };
        let (mut pivots, mut others) = (pool.buffer(count * left.rows), pool.buffer(count * left.length));
        let parts = pivots.chunks_exact_mut(left.rows).zip(others.chunks_exact_mut(left.length));
        pool.for_each(parts.zip(x.chunks_exact(left.rows + left.length)), |((pivots, others), x)| {
            input.gather_from(x, 0, pivots);
            input.gather_from(x, left.rows, others);
        });
        Some((pivots, others))
    }

    fn end(&self, inner: Buffer, rest: Buffer, count: usize, pool: &ThreadPool) -> (Buffer, Cow<'_, Order>) {
        match self {
            Self::OnRows { .. } => (rest, Cow::Owned(Order::default())),
            Self::OnColumns { left, right, output } => {
                let width = left.rows + right.rows;
                let mut both = pool.buffer(count * width);
                let parts = inner.chunks_exact(left.rows).zip(rest.chunks_exact(right.rows));
                for (both, (inner, rest)) in both.chunks_exact_mut(width).zip(parts) {
                    both[..left.rows].copy_from_slice(inner);
                    both[left.rows..].copy_from_slice(rest);
                }
                (both, Cow::Borrowed(output))
            }
        }
    }

    /// Adds column `column` of the matrix to `out`.
    pub fn add_column(&self, column: usize, out: &mut [f32]) {
        match self {
            Self::OnRows { left, right, input } => right.with_row(column, |weights| {
                // [I; left] times a column of `right`.
                let mut product = vec![0.0; left.rows + left.length];
                let (pivots, others) = product.split_at_mut(left.rows);
                pivots.copy_from_slice(weights);
                left.add_combination(weights, others);
                input.scatter_add(&product, out);
            }),
            Self::OnColumns { left, right, output } => {
                let at = output.at(column);
                match at.checked_sub(left.rows) {
                    None => left.with_row(at, |row| add_scaled(out, 1.0, row)),
                    Some(at) => right.with_row(at, |weights| left.add_combination(weights, out)),
                }
            }
        }
    }
}
