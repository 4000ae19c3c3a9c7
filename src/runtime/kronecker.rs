//! Products with a permuted Kronecker sum: by its factors, or by its matrix, expanded on the fly.

use faer::{MatMut, MatRef};

use super::buffers::Buffer;
use super::kernels::add_scaled;
use super::order::Order;
use super::rows::{Rows, Stored, Weights, product_by_panels};
use super::thread_pool::ThreadPool;
use crate::error::Result;
use crate::numeric::simd::add_combination;
use crate::permute::Permutation;
use crate::spec::KroneckerShape;

/// Cost of one MAC in a product with few columns, in MACs of a large matrix product.
const COMBINED: f64 = 8.0;
/// Cost of expanding one entry of one term, in MACs of a large matrix product.
const EXPANDED: f64 = 4.0;

/// How the product with a Kronecker sum is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// By its factors.
    Factors,
    /// By its matrix, expanded on the fly.
    Matrix,
    /// By whichever of the two is expected to be faster.
    Cheapest,
}

/// `Σ_k A_k ⊗ B_k` between two orders: `X : (m1, m2)` is gathered from `x`, and `Y = Σ_k A_kᵀ X B_k : (n1, n2)`.
#[derive(Clone, Debug)]
pub(super) struct Kronecker {
    pub shape: KroneckerShape,
    /// Whether `A` is applied before `B`. Eight-bit rows have one scale each, so that they cannot hold several terms.
    pub a_first: bool,
    /// `A_kᵀ`: with `a_first` `(rank·n1, m1)`, else `(n1, rank·m1)`.
    pub a: Rows,
    /// `(rank, m2, n2)`
    pub b: Vec<f32>,
    /// Where `X`, stored as `(m2, m1)`, is in `x`.
    pub input: Order,
    /// Where `y` is in `Y`, stored as `(n2, n1)`.
    pub output: Order,
}

impl Kronecker {
    /// The map `y = x W` for `W[p][:, q] = Σ_k A_k ⊗ B_k`: `a : (rank, m1, n1)`, `b : (rank, m2, n2)`, `input` is `p`
    /// and `output` the inverse of `q`.
    pub fn new(
        shape: KroneckerShape,
        a: &Weights,
        b: &Weights,
        input: &Permutation,
        output: &Permutation,
    ) -> Result<Self> {
        // A ⊗ B is B ⊗ A in another order of rows and columns; the larger factor goes into the matrix product.
        let exchanged = shape.large_blocks();
        let KroneckerShape { m2, n2, .. } = shape;
        let (shape, a, b) = if exchanged { (shape.exchanged(), b, a) } else { (shape, a, b) };
        // Row i1·m2 + i2 of A ⊗ B; after the exchange the blocks' rows are those of the old A.
        let input = (0..shape.m2 * shape.m1).map(|at| {
            let (minor, major) = (at / shape.m1, at % shape.m1);
            input.as_slice()[if exchanged { minor * m2 + major } else { major * m2 + minor }]
        });
        let output = output.as_slice().iter().map(|at| {
            let (j1, j2) = (at / n2, at % n2);
            if exchanged { j1 * shape.n1 + j2 } else { j2 * shape.n1 + j1 }
        });
        let KroneckerShape { m1, n1, rank, .. } = shape;
        let a_first = shape.a_first() || (a.is_int8() && rank > 1);
        let a = if a_first {
            Rows::of_three_dimensions(&a.transposed(), rank * n1, m1)
        } else {
            Rows::of_three_dimensions(&a.permuted((2, 0, 1)), n1, rank * m1)
        };
        Ok(Self { a: a?, b: b.floats()?, a_first, input: Order::new(input), output: Order::new(output), shape })
    }

    /// Writes the products `(count, n)` with `x : (count, m)` to `y`, or adds them.
    pub fn times(&self, x: &[f32], y: MatMut<'_, f32>, adds: bool, strategy: Strategy, pool: &ThreadPool) {
        let count = y.nrows();
        let gathered = self.input.gather(x, pool);
        let x = gathered.as_deref().unwrap_or(x);
        if strategy == Strategy::Matrix || strategy == Strategy::Cheapest && self.expands(count) {
            self.expand_and_multiply(x, y, adds, pool);
        } else {
            self.output.place(&self.times_by_factors(x, count, pool), y, adds, pool);
        }
    }

    /// The products of `X`s, each `(m2, m1)`, from which `y` is gathered.
    fn times_by_factors(&self, x: &[f32], count: usize, pool: &ThreadPool) -> Buffer {
        let KroneckerShape { m1, n1, m2, n2, rank } = self.shape;
        if self.a_first {
            // Z = X A : (count, m2, rank, n1), then Y[j2] = Σ B[k, i2, j2] Z[i2, k].
            let inner = self.a.times(x, count * m2, pool);
            let mut y = pool.buffer(count * n2 * n1);
            pool.for_each(y.chunks_exact_mut(n2 * n1).zip(inner.chunks_exact(m2 * rank * n1)), |(y, inner)| {
                for (j2, y) in y.chunks_exact_mut(n1).enumerate() {
                    y.fill(0.0);
                    for (i2, inner) in inner.chunks_exact(rank * n1).enumerate() {
                        for (k, inner) in inner.chunks_exact(n1).enumerate() {
                            add_scaled(y, self.b(k, i2, j2), inner);
                        }
                    }
                }
            });
            return y;
        }
        // Z[j2, k] = Σ B[k, i2, j2] X[i2] : (count, n2, rank, m1), then Y = Z A.
        let mut inner = pool.buffer(count * n2 * rank * m1);
        pool.for_each(inner.chunks_exact_mut(n2 * rank * m1).zip(x.chunks_exact(m2 * m1)), |(inner, x)| {
            for (j2, inner) in inner.chunks_exact_mut(rank * m1).enumerate() {
                for (k, inner) in inner.chunks_exact_mut(m1).enumerate() {
                    inner.fill(0.0);
                    for (i2, x) in x.chunks_exact(m1).enumerate() {
                        add_scaled(inner, self.b(k, i2, j2), x);
                    }
                }
            }
        });
        self.a.times(&inner, count * n2, pool)
    }

    /// Adds column `column` of the matrix to `out`.
    pub fn add_column(&self, column: usize, out: &mut [f32]) {
        let mut gathered = vec![0.0; out.len()];
        self.a.with(|a| self.add_gathered(a, self.output.at(column), &mut gathered));
        self.input.scatter_add(&gathered, out);
    }

    /// Whether expanding the matrix is expected to be faster.
    fn expands(&self, count: usize) -> bool {
        let KroneckerShape { m1, n1, m2, n2, rank } = self.shape;
        let entries = self.shape.rows() * self.shape.columns();
        let outer = rank * m1 * n1 * m2.min(n2);
        let combined = self.shape.macs() - outer;
        let factored = count as f64 * (outer as f64 + COMBINED * combined as f64);
        factored > entries as f64 * (count as f64 + EXPANDED * rank as f64)
    }

    /// The product of `X`s, each `(m2, m1)`, with the matrix, which is made some outputs at a time and never as a
    /// whole.
    fn expand_and_multiply(&self, x: &[f32], y: MatMut<'_, f32>, adds: bool, pool: &ThreadPool) {
        let m = self.shape.rows();
        let x = MatRef::from_row_major_slice(x, y.nrows(), m);
        product_by_panels(x, y, adds, 1, pool, |range, buffers, multiply| {
            let mut rows = buffers.get(range.len() * m);
            rows.fill(0.0);
            self.a.with(|a| {
                for (row, j) in rows.chunks_exact_mut(m).zip(range) {
                    self.add_gathered(a, self.output.at(j), row);
                }
            });
            multiply(&rows);
        });
    }

    /// Adds to `out`, in the order of `X`, the column of the matrix that makes place `at` of `Y`.
    fn add_gathered(&self, a: Stored<'_>, at: usize, out: &mut [f32]) {
        let KroneckerShape { m1, n1, rank, .. } = self.shape;
        let (j2, j1) = (at / n1, at % n1);
        let mut scratch = vec![Vec::new(); rank];
        let rows: Vec<_> = if self.a_first {
            scratch.iter_mut().enumerate().map(|(k, scratch)| a.row(k * n1 + j1, m1, scratch)).collect()
        } else {
            a.row(j1, rank * m1, &mut scratch[0]).chunks_exact(m1).collect()
        };
        let mut factors = vec![0.0; rank];
        for (i2, out) in out.chunks_exact_mut(m1).enumerate() {
            factors.iter_mut().enumerate().for_each(|(k, factor)| *factor = self.b(k, i2, j2));
            add_combination(out, &factors, &rows);
        }
    }

    fn b(&self, k: usize, i2: usize, j2: usize) -> f32 {
        self.b[(k * self.shape.m2 + i2) * self.shape.n2 + j2]
    }
}
