//! Multiplying by a permuted Kronecker sum: by its factors, or by the matrix, made for the occasion.

use candle_core::{Device, Tensor};

use super::kernels::add_scaled;
use super::linear::Kronecker;
use super::rows::Rows;
use super::workers::Workers;
use crate::shape::KroneckerShape;

/// What one multiplication in a product of few columns costs, in those of a large matrix product.
const COMBINED: f64 = 8.0;
/// What one entry of one term of the matrix costs to make, in multiplications of a large matrix product.
const EXPANDED: f64 = 4.0;

impl Kronecker {
    /// `Y : (count, n2, n1)` for `x : (count, m)`.
    pub fn times(&self, x: &[f32], count: usize, workers: &Workers) -> Vec<f32> {
        let KroneckerShape { m1, n1, m2, n2, rank } = self.shape;
        if self.shape.a_first() {
            // Z = X A : (count, m2, rank, n1), then Y[j2] = Σ B[k, i2, j2] Z[i2, k].
            let gathered = self.gathered(x);
            let mut inner = vec![0.0; count * m2 * rank * n1];
            self.a.times(&gathered, count * m2, &mut inner, workers);
            let mut y = vec![0.0; count * n2 * n1];
            workers.for_each(y.chunks_exact_mut(n2 * n1).zip(inner.chunks_exact(m2 * rank * n1)), |(y, inner)| {
                for (j2, y) in y.chunks_exact_mut(n1).enumerate() {
                    for (i2, inner) in inner.chunks_exact(rank * n1).enumerate() {
                        for (k, inner) in inner.chunks_exact(n1).enumerate() {
                            add_scaled(y, self.b[(k * m2 + i2) * n2 + j2], inner);
                        }
                    }
                }
            });
            return y;
        }
        // Z = Xᵀ B : (count, n2, rank, m1), then Y = Z A.
        let mut inner = vec![0.0; count * n2 * rank * m1];
        workers.for_each(inner.chunks_exact_mut(n2 * rank * m1).zip(x.chunks_exact(m1 * m2)), |(inner, x)| {
            let mut gathered = vec![0.0; m1];
            for i2 in 0..m2 {
                for (value, &at) in gathered.iter_mut().zip(&self.gather[i2 * m1..]) {
                    *value = x[at as usize];
                }
                for (j2, inner) in inner.chunks_exact_mut(rank * m1).enumerate() {
                    for (k, inner) in inner.chunks_exact_mut(m1).enumerate() {
                        add_scaled(inner, self.b[(k * m2 + i2) * n2 + j2], &gathered);
                    }
                }
            }
        });
        let mut y = vec![0.0; count * n2 * n1];
        self.a.times(&inner, count * n2, &mut y, workers);
        y
    }

    /// The matrix, its rows in the order of `y` and its columns in that of `gather`, if that is the cheaper way to multiply
    /// `count` vectors.
    pub fn expanded(&self, count: usize, workers: &Workers) -> Option<Rows> {
        let KroneckerShape { m1, n1, m2, n2, rank } = self.shape;
        let (m, n) = (self.shape.rows(), self.shape.columns());
        let outer = rank * m1 * n1 * m2.min(n2);
        let combined = self.shape.multiplies() - outer;
        let factored = count as f64 * (outer as f64 + COMBINED * combined as f64);
        let dense = (m * n) as f64 * (count as f64 + EXPANDED * rank as f64);
        if factored <= dense {
            return None;
        }
        let mut rows = vec![0.0; m * n];
        workers.for_each(rows.chunks_exact_mut(m).zip(&self.output), |(row, &at)| self.add_gathered(at as usize, row));
        let rows = Tensor::from_vec(rows, (n, m), &Device::Cpu).and_then(|tensor| Ok(Rows::new(&tensor)));
        Some(rows.expect("the shape is that of the values").expect("f32 on the processor"))
    }

    /// Adds column `column` of the matrix to `out`.
    pub fn add_column(&self, column: usize, out: &mut [f32]) {
        let mut gathered = vec![0.0; out.len()];
        self.add_gathered(self.output[column] as usize, &mut gathered);
        for (&at, value) in self.gather.iter().zip(gathered) {
            out[at as usize] += value;
        }
    }

    /// Adds to `out`, in the order of `gather`, the column of the matrix that is at `j2·n1 + j1 = at` in `Y`.
    fn add_gathered(&self, at: usize, out: &mut [f32]) {
        let KroneckerShape { m1, n1, m2, n2, rank } = self.shape;
        let (j2, j1) = (at / n1, at % n1);
        let mut add = |k: usize, a: &[f32]| {
            for (i2, out) in out.chunks_exact_mut(m1).enumerate() {
                add_scaled(out, self.b[(k * m2 + i2) * n2 + j2], a);
            }
        };
        if self.shape.a_first() {
            (0..rank).for_each(|k| self.a.with_row(k * n1 + j1, |a| add(k, a)));
        } else {
            self.a.with_row(j1, |a| a.chunks_exact(m1).enumerate().for_each(|(k, a)| add(k, a)));
        }
    }

    /// `x : (count, m)` in the order of `gather`.
    pub fn gathered(&self, x: &[f32]) -> Vec<f32> {
        x.chunks_exact(self.gather.len()).flat_map(|x| self.gather.iter().map(|&at| x[at as usize])).collect()
    }
}
