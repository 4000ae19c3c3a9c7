//! Linear maps of a forward pass: dense, or a sum of factored terms, or several such side by side.

use super::kernels::add_scaled;
use super::rows::Rows;
use super::workers::Workers;
use crate::shape::KroneckerShape;

/// `y = x W + bias` for a `W` in × out.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    /// In features.
    pub rows: usize,
    /// Out features.
    pub columns: usize,
    /// Side by side, in the order of their columns.
    pub parts: Vec<Part>,
    /// Empty if there is none.
    pub bias: Vec<f32>,
}

/// Some columns of a linear map: a sum of terms.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub columns: usize,
    pub terms: Vec<Term>,
}

/// One term of a matrix in × out. Its rows are stored as they are read: out × in.
#[derive(Clone, Debug)]
pub(super) enum Term {
    Dense(Rows),
    Kronecker(Kronecker),
    LowRank(LowRank),
}

/// `Σ_k A_k ⊗ B_k` between a gather and another: `X : (m1, m2)` is gathered from `x`, `Y = Σ_k A_kᵀ X B_k : (n1, n2)`.
#[derive(Clone, Debug)]
pub(super) struct Kronecker {
    pub shape: KroneckerShape,
    /// `A_kᵀ`: with `A` first `(rank·n1, m1)`, else `(n1, rank·m1)`.
    pub a: Rows,
    /// `(rank, m2, n2)`
    pub b: Vec<f32>,
    /// Where `X[i1, i2]` is in `x`, at `i2·m1 + i1`.
    pub gather: Vec<u32>,
    /// Where `y[j]` is in `Y`, stored as `(n2, n1)`.
    pub output: Vec<u32>,
}

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
        gather: Vec<u32>,
    },
    /// `W[:, q] = left [I right]`
    OnColumns {
        /// `leftᵀ : (k, m)`
        left: Rows,
        /// `rightᵀ : (n − k, k)`
        right: Rows,
        /// The inverse of `q`.
        output: Vec<u32>,
    },
}

impl Linear {
    /// `y : (count, columns)` for `x : (count, rows)`.
    ///
    /// # Cost
    /// For few vectors every factor is read once; for many, a Kronecker sum is formed if that is the cheaper way.
    pub fn forward(&self, x: &[f32], count: usize, workers: &Workers) -> Vec<f32> {
        debug_assert_eq!(x.len(), count * self.rows);
        let mut y = vec![0.0; count * self.columns];
        let mut first = 0;
        for part in &self.parts {
            match part.terms.as_slice() {
                // The largest are like this: nothing is written twice.
                [Term::Dense(rows)] if part.columns == self.columns => rows.times(x, count, &mut y, workers),
                terms => terms.iter().for_each(|term| term.add_to(x, count, (&mut y, first, self.columns), workers)),
            }
            first += part.columns;
        }
        if !self.bias.is_empty() {
            for y in y.chunks_exact_mut(self.columns) {
                add_scaled(y, 1.0, &self.bias);
            }
        }
        y
    }

    /// Adds column `column` of `W` to `out`: what an embedding that is stored as the map to its logits looks up.
    pub fn add_column(&self, column: usize, out: &mut [f32]) {
        let mut first = 0;
        for part in &self.parts {
            if (first..first + part.columns).contains(&column) {
                part.terms.iter().for_each(|term| term.add_column(column - first, out));
            }
            first += part.columns;
        }
    }
}

impl Term {
    /// Adds the product with `x : (count, m)` to the columns of `y : (count, width)` from `first` on.
    fn add_to(&self, x: &[f32], count: usize, (y, first, width): (&mut [f32], usize, usize), workers: &Workers) {
        let times = |rows: &Rows, x: &[f32]| {
            let mut out = vec![0.0; count * rows.rows];
            rows.times(x, count, &mut out, workers);
            out
        };
        let mut add = |product: &[f32], output: Option<&[u32]>| {
            let columns = product.len() / count;
            for (y, product) in y.chunks_exact_mut(width).zip(product.chunks_exact(columns)) {
                match output {
                    None => add_scaled(&mut y[first..first + columns], 1.0, product),
                    Some(output) => {
                        for (y, &at) in y[first..].iter_mut().zip(output) {
                            *y += product[at as usize];
                        }
                    }
                }
            }
        };
        match self {
            Self::Dense(rows) => add(&times(rows, x), None),
            Self::Kronecker(kronecker) => match kronecker.expanded(count, workers) {
                Some(rows) => add(&times(&rows, &kronecker.gathered(x)), None),
                None => add(&kronecker.times(x, count, workers), Some(&kronecker.output)),
            },
            Self::LowRank(LowRank::OnRows { left, right, gather }) => {
                let rank = left.rows;
                let (mut pivots, mut others) = (Vec::with_capacity(count * rank), Vec::new());
                for x in x.chunks_exact(gather.len()) {
                    pivots.extend(gather[..rank].iter().map(|&at| x[at as usize]));
                    others.extend(gather[rank..].iter().map(|&at| x[at as usize]));
                }
                add_scaled(&mut pivots, 1.0, &times(left, &others));
                add(&times(right, &pivots), None);
            }
            Self::LowRank(LowRank::OnColumns { left, right, output }) => {
                let inner = times(left, x);
                let rest = times(right, &inner);
                let mut both = Vec::with_capacity(count * output.len());
                for t in 0..count {
                    both.extend_from_slice(&inner[t * left.rows..][..left.rows]);
                    both.extend_from_slice(&rest[t * right.rows..][..right.rows]);
                }
                add(&both, Some(output));
            }
        }
    }

    /// Adds a column to `out`.
    fn add_column(&self, column: usize, out: &mut [f32]) {
        match self {
            Self::Dense(rows) => rows.with_row(column, |row| add_scaled(out, 1.0, row)),
            Self::Kronecker(kronecker) => kronecker.add_column(column, out),
            Self::LowRank(LowRank::OnRows { left, right, gather }) => right.with_row(column, |weights| {
                let mut others = vec![0.0; left.length];
                for (k, &weight) in weights.iter().enumerate() {
                    left.with_row(k, |row| add_scaled(&mut others, weight, row));
                }
                for (&to, value) in gather.iter().zip(weights.iter().chain(&others)) {
                    out[to as usize] += value;
                }
            }),
            Self::LowRank(LowRank::OnColumns { left, right, output }) => {
                let at = output[column] as usize;
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
