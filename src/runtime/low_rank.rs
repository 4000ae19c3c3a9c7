//! Products with a low-rank matrix in interpolative form.

use std::borrow::Cow;

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
    /// The product `(count, n)` of each with `x : (count, m)`, and the order in which `y` is to be gathered from it.
    ///
    /// In two steps of all threads, however many there are.
    pub fn times_together<'a>(
        all: &[&'a Self],
        x: &[f32],
        count: usize,
        pool: &ThreadPool,
    ) -> Vec<(Vec<f32>, Cow<'a, Order>)> {
        let begun: Vec<_> = all.iter().map(|term| term.begin(x, pool)).collect();
        let lefts: Vec<_> = all.iter().zip(&begun).map(|(term, (input, _))| (term.factors().0, &**input)).collect();
        let lefts = times_together(&lefts, count, pool);
        let inner: Vec<_> = begun
            .into_iter()
            .zip(lefts)
            .map(|((_, pivots), mut inner)| {
                if !pivots.is_empty() {
                    add_scaled(&mut inner, 1.0, &pivots);
                }
                inner
            })
            .collect();
        let rights: Vec<_> = all.iter().zip(&inner).map(|(term, inner)| (term.factors().1, &**inner)).collect();
        let rights = times_together(&rights, count, pool);
        all.iter().zip(inner).zip(rights).map(|((term, inner), right)| term.end(inner, right)).collect()
    }

    fn factors(&self) -> (&Rows, &Rows) {
        let (Self::OnRows { left, right, .. } | Self::OnColumns { left, right, .. }) = self;
        (left, right)
    }

    /// What `left` is multiplied with, and what is added to the product; nothing if that is empty.
    fn begin<'a>(&self, x: &'a [f32], pool: &ThreadPool) -> (Cow<'a, [f32]>, Vec<f32>) {
        match self {
            Self::OnRows { left, input, .. } => {
                let x = input.gather(x, pool);
                let vectors = x.chunks_exact(left.rows + left.length).map(|x| x.split_at(left.rows));
                let (pivots, others): (Vec<_>, Vec<_>) = vectors.unzip();
                (others.concat().into(), pivots.concat())
            }
            Self::OnColumns { .. } => (x.into(), Vec::new()),
        }
    }

    fn end(&self, inner: Vec<f32>, rest: Vec<f32>) -> (Vec<f32>, Cow<'_, Order>) {
        match self {
            Self::OnRows { .. } => (rest, Cow::Owned(Order::default())),
            Self::OnColumns { left, right, output } => {
                let both = inner.chunks_exact(left.rows).zip(rest.chunks_exact(right.rows));
                (both.flat_map(|(inner, rest)| [inner, rest]).collect::<Vec<_>>().concat(), Cow::Borrowed(output))
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
                for (k, &weight) in weights.iter().enumerate() {
                    left.with_row(k, |row| add_scaled(others, weight, row));
                }
                input.scatter_add(&product, out);
            }),
            Self::OnColumns { left, right, output } => {
                let at = output.at(column);
                match at.checked_sub(left.rows) {
                    None => left.with_row(at, |row| add_scaled(out, 1.0, row)),
                    Some(at) => right.with_row(at, |weights| {
                        for (k, &weight) in weights.iter().enumerate() {
                            left.with_row(k, |row| add_scaled(out, weight, row));
                        }
                    }),
                }
            }
        }
    }
}
