//! Applying a Kronecker sum to vectors without forming it.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::decompose::KroneckerSum;
use crate::error::{Error, Result};
use crate::spec::KroneckerShape;

impl KroneckerSum {
    /// `y = x (Σ_k A_k ⊗ B_k)` for `batch` row vectors.
    ///
    /// Each row of `x` is read as a matrix `X : (m1, m2)`, and `Y = Σ_k A_kᵀ X B_k : (n1, n2)` is written out as a row;
    /// whichever of `A_kᵀ X` and `X B_k` costs fewer MACs is formed first.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not hold `batch·m` values.
    ///
    /// # Cost
    /// [`KroneckerShape::macs`] per row; as much memory as the intermediate product.
    pub fn apply(&self, x: &[f32], batch: usize) -> Result<Vec<f32>> {
        if batch.checked_mul(self.shape.rows()) != Some(x.len()) {
            return Err(Error::Shape {
                operation: "apply",
                expected: format!("rows of {} values", self.shape.rows()),
                got: format!("{} values for {batch} rows", x.len()),
            });
        }
        Ok(if self.shape.a_first() { self.apply_a_first(x, batch) } else { self.apply_b_first(x, batch) })
    }

    fn apply_a_first(&self, x: &[f32], batch: usize) -> Vec<f32> {
        let KroneckerShape { m1, n1, m2, n2, rank } = self.shape;
        // x as (m1, batch·m2), so that one product serves the whole batch.
        let gathered = reorder([batch, m1, m2], x, |[s, i1, i2]| (i1 * batch + s) * m2 + i2);
        let mut product = vec![0.0; n1 * batch * rank * m2];
        let mut term = vec![0.0; n1 * batch * m2];
        for (k, a) in self.a.chunks_exact(m1 * n1).enumerate() {
            multiply(&mut term, n1, batch * m2, matrix(a, m1, n1).transpose(), matrix(&gathered, m1, batch * m2));
            for (to, from) in product.chunks_exact_mut(rank * m2).zip(term.chunks_exact(m2)) {
                to[k * m2..][..m2].copy_from_slice(from);
            }
        }
        // (n1·batch, rank·m2) · (rank·m2, n2): B is stored as the right operand already.
        let mut y = vec![0.0; n1 * batch * n2];
        multiply(&mut y, n1 * batch, n2, matrix(&product, n1 * batch, rank * m2), matrix(&self.b, rank * m2, n2));
        reorder([n1, batch, n2], &y, |[j1, s, j2]| (s * n1 + j1) * n2 + j2)
    }

    fn apply_b_first(&self, x: &[f32], batch: usize) -> Vec<f32> {
        let KroneckerShape { m1, n1, m2, n2, rank } = self.shape;
        let mut product = vec![0.0; rank * m1 * batch * n2];
        let mut term = vec![0.0; batch * m1 * n2];
        for (k, b) in self.b.chunks_exact(m2 * n2).enumerate() {
            multiply(&mut term, batch * m1, n2, matrix(x, batch * m1, m2), matrix(b, m2, n2));
            for (row, from) in term.chunks_exact(n2).enumerate() {
                let (s, i1) = (row / m1, row % m1);
                product[((k * m1 + i1) * batch + s) * n2..][..n2].copy_from_slice(from);
            }
        }
        // (n1, rank·m1) · (rank·m1, batch·n2): A, read as (rank·m1, n1), transposed.
        let mut y = vec![0.0; n1 * batch * n2];
        let a = matrix(&self.a, rank * m1, n1).transpose();
        multiply(&mut y, n1, batch * n2, a, matrix(&product, rank * m1, batch * n2));
        reorder([n1, batch, n2], &y, |[j1, s, j2]| (s * n1 + j1) * n2 + j2)
    }
}

fn matrix(data: &[f32], rows: usize, columns: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(data, rows, columns)
}

fn multiply(product: &mut [f32], rows: usize, columns: usize, left: MatRef<'_, f32>, right: MatRef<'_, f32>) {
    let product = MatMut::from_row_major_slice_mut(product, rows, columns);
    matmul(product, Accum::Replace, left, right, 1.0, Par::Seq);
}

/// Copies a three-dimensional array to the places that `place` gives its indices.
fn reorder(shape: [usize; 3], data: &[f32], place: impl Fn([usize; 3]) -> usize) -> Vec<f32> {
    let [first, second, third] = shape;
    let mut reordered = vec![0.0; data.len()];
    let mut values = data.iter();
    for i in 0..first {
        for j in 0..second {
            for (k, &value) in (0..third).zip(&mut values) {
                reordered[place([i, j, k])] = value;
            }
        }
    }
    reordered
}
