//! A Kronecker sum together with the permutations under which it was found.

use super::permutation::Permutation;
use crate::error::Result;
use crate::kron::KroneckerSum;
use crate::numeric::range::Rescale;

/// `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`.
#[derive(Clone, Debug, PartialEq)]
pub struct Decomposition {
    /// The factors and the lost energy.
    pub sum: KroneckerSum,
    /// The row permutation `p`; `None` if rows were not permuted.
    pub row_permutation: Option<Permutation>,
    /// The column permutation `q`; `None` if columns were not permuted.
    pub column_permutation: Option<Permutation>,
}

impl Rescale for Decomposition {
    fn rescaled(self, exponent: i32) -> Option<Self> {
        Some(Self { sum: self.sum.rescaled(exponent)?, ..self })
    }
}

impl Decomposition {
    /// The dense approximation of `W`, row-major `(m, n)`, with the permutations undone.
    ///
    /// # Cost
    /// `rank·m·n` MACs.
    #[must_use]
    pub fn to_dense(&self) -> Vec<f32> {
        let permuted = self.sum.to_dense();
        let n = self.sum.shape.columns();
        let mut dense = vec![0.0; permuted.len()];
        for (i, from) in permuted.chunks_exact(n).enumerate() {
            let row = self.row_permutation.as_ref().map_or(i, |order| order.as_slice()[i]);
            scatter(from, self.column_permutation.as_ref(), &mut dense[row * n..][..n]);
        }
        dense
    }

    /// `y = x Ŵ` for `batch` row vectors, without forming `Ŵ`: gather by `p`, contract, scatter by `q`.
    ///
    /// # Errors
    /// As [`KroneckerSum::apply`].
    pub fn apply(&self, x: &[f32], batch: usize) -> Result<Vec<f32>> {
        let m = self.sum.shape.rows();
        let y = match &self.row_permutation {
            Some(order) if x.len() == batch * m => {
                let gathered: Vec<f32> = x.chunks_exact(m).flat_map(|row| order.gather(row)).collect();
                self.sum.apply(&gathered, batch)?
            }
            _ => self.sum.apply(x, batch)?,
        };
        if self.column_permutation.is_none() {
            return Ok(y);
        }
        let mut scattered = vec![0.0; y.len()];
        let n = self.sum.shape.columns();
        for (from, to) in y.chunks_exact(n).zip(scattered.chunks_exact_mut(n)) {
            scatter(from, self.column_permutation.as_ref(), to);
        }
        Ok(scattered)
    }
}

fn scatter(from: &[f32], order: Option<&Permutation>, to: &mut [f32]) {
    match order {
        None => to.copy_from_slice(from),
        Some(order) => {
            for (&value, &place) in from.iter().zip(order.as_slice()) {
                to[place] = value;
            }
        }
    }
}
