//! The nearest Kronecker sum to a matrix (Van Loan and Pitsianis, "Approximation with Kronecker products", 1993).

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Auto, Mat, Par, Spec};

use super::gram::{block_gram, for_each_chunk, top_eigenvectors};
use super::view::MatrixView;
use crate::error::{Error, Result};
use crate::numeric::range::{Rescale, scale};
use crate::progress::Progress;
use crate::spec::KroneckerShape;

/// Up to this many block entries the Gram matrix is used. It is in f64, so that squaring loses no digit of f32. Beyond,
/// a thin SVD of `R(W)` takes no longer.
const GRAM_ENTRIES: usize = 1024;

/// A Kronecker sum `Σ_k A_k ⊗ B_k` with balanced factors.
#[derive(Clone, Debug, PartialEq)]
pub struct KroneckerSum {
    /// The factor shapes.
    pub shape: KroneckerShape,
    /// `A`, shape `(rank, m1, n1)`, row-major.
    pub a: Vec<f32>,
    /// `B`, shape `(rank, m2, n2)`, row-major.
    pub b: Vec<f32>,
    /// `‖W − Σ_k A_k ⊗ B_k‖² / ‖W‖²` of the matrix that it was made from; 0 for a zero matrix.
    pub lost_energy: f64,
}

/// The Kronecker sum of the given shape that is nearest to `view` in the Frobenius norm.
///
/// Minimises `‖W − Σ_k A_k ⊗ B_k‖_F` over `A_k : (m1, n1)` and `B_k : (m2, n2)`: the truncated SVD of the rearranged
/// matrix `R(W) : (m1·n1, m2·n2)`. `block = (1, n)` gives the truncated SVD of `W` itself.
/// Terms come in descending order of norm, balanced (`‖A_k‖ = ‖B_k‖`), with the entry of `B_k` of largest magnitude
/// positive. f32 in and out, f64 inside.
///
/// # Errors
/// [`Error::Shape`] if `shape` is not the view's, [`Error::NonFinite`], [`Error::Convergence`], [`Error::Cancelled`].
///
/// # Cost
/// With `k = min(m1·n1, m2·n2)`: two passes over `W`, `m·n·k` MACs for the Gram matrix and `O(k³)` for its
/// eigenvectors; a thin SVD of `R(W)` when `k` is large.
///
/// ```
/// use tqcompressor::kron::{MatrixView, nearest_kronecker_sum};
/// use tqcompressor::{progress::Progress, spec::KroneckerShape};
/// // The identity is a Kronecker product of identities, so nothing is lost.
/// let identity = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0];
/// let shape = KroneckerShape::new(4, 4, (2, 2), 1)?;
/// let sum = nearest_kronecker_sum(MatrixView::new(&identity, 4, 4)?, shape, &Progress::default())?;
/// assert!(sum.lost_energy < 1e-12);
/// assert_eq!(sum.a.len() + sum.b.len(), shape.parameters());
/// # Ok::<(), tqcompressor::Error>(())
/// ```
pub fn nearest_kronecker_sum(view: MatrixView<'_>, shape: KroneckerShape, progress: &Progress) -> Result<KroneckerSum> {
    check_shape(view, &shape)?;
    view.in_safe_range(|view| nearest(view, shape, progress))
}

/// [`nearest_kronecker_sum`] for finite values in the safe range.
fn nearest(view: MatrixView<'_>, shape: KroneckerShape, progress: &Progress) -> Result<KroneckerSum> {
    if shape.large_blocks() {
        return with_factors_exchanged(view, shape, |view, shape| nearest(view, shape, progress));
    }
    let (vectors, energies) = if shape.block_entries() <= GRAM_ENTRIES {
        top_eigenvectors(&block_gram(view, &shape, progress)?, shape.rank)?
    } else {
        right_singular_vectors(view, &shape, progress)?
    };
    project(view, shape, &vectors, energies.iter().sum(), progress)
}

/// The lost energy of [`nearest_kronecker_sum`], without making its factors.
///
/// # Errors
/// As [`nearest_kronecker_sum`].
///
/// # Cost
/// About half of [`nearest_kronecker_sum`]'s.
pub fn lost_energy(view: MatrixView<'_>, shape: KroneckerShape, progress: &Progress) -> Result<f64> {
    check_shape(view, &shape)?;
    if shape.large_blocks() {
        return with_views_exchanged(view, shape, |view, shape| lost_energy(view, shape, progress));
    }
    if shape.block_entries() > GRAM_ENTRIES {
        return Ok(nearest_kronecker_sum(view, shape, progress)?.lost_energy);
    }
    let (_, values) = top_eigenvectors(&block_gram(view, &shape, progress)?, 0)?;
    Ok(lost_share(values[..shape.rank].iter().sum(), values.iter().sum()))
}

fn check_shape(view: MatrixView<'_>, shape: &KroneckerShape) -> Result<()> {
    if (view.rows(), view.columns()) == (shape.rows(), shape.columns()) {
        return Ok(());
    }
    Err(Error::Shape {
        operation: "Kronecker sum",
        expected: format!("a matrix of shape ({}, {})", shape.rows(), shape.columns()),
        got: format!("({}, {})", view.rows(), view.columns()),
    })
}

/// Solves for the exchanged sum: `A ⊗ B` is `B ⊗ A` with rows and columns in another order, and has the smaller block.
fn with_views_exchanged<T>(
    view: MatrixView<'_>,
    shape: KroneckerShape,
    solve: impl FnOnce(MatrixView<'_>, KroneckerShape) -> Result<T>,
) -> Result<T> {
    let KroneckerShape { m1, n1, m2, n2, .. } = shape;
    let rows: Vec<usize> = (0..m1 * m2).map(|i| view.source_row(i % m1 * m2 + i / m1)).collect();
    let columns: Vec<usize> = (0..n1 * n2).map(|j| view.source_column(j % n1 * n2 + j / n1)).collect();
    solve(view.ordered(Some(&rows), Some(&columns)), shape.exchanged())
}

fn with_factors_exchanged(
    view: MatrixView<'_>,
    shape: KroneckerShape,
    solve: impl FnOnce(MatrixView<'_>, KroneckerShape) -> Result<KroneckerSum>,
) -> Result<KroneckerSum> {
    let sum = with_views_exchanged(view, shape, solve)?;
    let mut exchanged = KroneckerSum { shape, a: sum.b, b: sum.a, lost_energy: sum.lost_energy };
    exchanged.fix_signs();
    Ok(exchanged)
}

fn lost_share(kept: f64, total: f64) -> f64 {
    if total > 0.0 { (1.0 - kept / total).clamp(0.0, 1.0) } else { 0.0 }
}

/// Leading right singular vectors of `R(W)`, and the squares of all its singular values, by a thin SVD of all of it.
fn right_singular_vectors(
    view: MatrixView<'_>,
    shape: &KroneckerShape,
    progress: &Progress,
) -> Result<(Mat<f64>, Vec<f64>)> {
    let (blocks, entries) = (shape.blocks(), shape.block_entries());
    let mut rearranged = Mat::<f64>::zeros(blocks, entries);
    for_each_chunk(view, shape, progress, |chunk| {
        let rows = chunk.transposed().transpose();
        rearranged.as_mut().subrows_mut(chunk.first, rows.nrows()).copy_from(rows);
    })?;
    let mut values = vec![0.0; entries];
    let mut vectors = Mat::zeros(entries, entries);
    let parameters = Spec::<_, f64>::new(Auto::<f64>::auto());
    // Only the vectors of the small side: a product gives those of the large side.
    let scratch =
        svd_scratch::<f64>(blocks, entries, ComputeSvdVectors::No, ComputeSvdVectors::Full, Par::Seq, parameters);
    svd(
        rearranged.as_ref(),
        faer::diag::DiagMut::from_slice_mut(&mut values),
        None,
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        parameters,
    )
    .map_err(|_| Error::Convergence { operation: "the singular value decomposition" })?;
    let energies = values.iter().map(|value| value * value).collect();
    Ok((vectors.subcols(0, shape.rank).to_owned(), energies))
}

/// The sum `Σ_k (R v_k) ⊗ v_k` for orthonormal block directions `v_k`, balanced; `energy` is `‖W‖²`.
fn project(
    view: MatrixView<'_>,
    shape: KroneckerShape,
    vectors: &Mat<f64>,
    energy: f64,
    progress: &Progress,
) -> Result<KroneckerSum> {
    let (blocks, entries, rank) = (shape.blocks(), shape.block_entries(), shape.rank);
    let mut a = vec![0.0_f32; rank * blocks];
    let mut squares = vec![0.0_f64; rank];
    for_each_chunk(view, &shape, progress, |chunk| {
        let width = chunk.transposed().ncols();
        let mut columns: Vec<_> = a.chunks_exact_mut(blocks).map(|a| &mut a[chunk.first..][..width]).collect();
        chunk.project(vectors, &mut columns, &mut squares);
    })?;
    let mut b = vec![0.0_f32; rank * entries];
    for (k, &square) in squares.iter().enumerate() {
        // ‖R v_k‖ = σ_k and ‖v_k‖ = 1: each factor gets √σ_k. A term of norm zero has zero factors.
        let root = square.sqrt().sqrt();
        let shrink = if root > 0.0 { root.recip() } else { 0.0 };
        for value in &mut a[k * blocks..][..blocks] {
            *value = (f64::from(*value) * shrink) as f32;
        }
        for (i, value) in b[k * entries..][..entries].iter_mut().enumerate() {
            *value = (vectors[(i, k)] * root) as f32;
        }
    }
    let mut sum = KroneckerSum { shape, a, b, lost_energy: lost_share(squares.iter().sum(), energy) };
    sum.fix_signs();
    Ok(sum)
}

impl Rescale for KroneckerSum {
    fn rescaled(mut self, exponent: i32) -> Option<Self> {
        // Half for each factor, so that they stay balanced.
        (scale(&mut self.a, exponent / 2) && scale(&mut self.b, exponent / 2)).then_some(self)
    }
}

impl KroneckerSum {
    /// Makes the first entry of largest magnitude of each `B_k` positive: the signs of an SVD are arbitrary.
    fn fix_signs(&mut self) {
        let (blocks, entries) = (self.shape.blocks(), self.shape.block_entries());
        for (a, b) in self.a.chunks_exact_mut(blocks).zip(self.b.chunks_exact_mut(entries)) {
            let largest =
                b.iter().fold(0.0_f32, |largest, &value| if value.abs() > largest.abs() { value } else { largest });
            if largest < 0.0 {
                for value in a.iter_mut().chain(b) {
                    *value = -*value;
                }
            }
        }
    }

    /// The dense matrix `Σ_k A_k ⊗ B_k`, row-major `(m, n)`; sums over `k` in f64.
    ///
    /// # Cost
    /// `rank·m·n` MACs.
    #[must_use]
    pub fn to_dense(&self) -> Vec<f32> {
        let KroneckerShape { n1, m2, n2, rank, .. } = self.shape;
        let (n, blocks, entries) = (self.shape.columns(), self.shape.blocks(), self.shape.block_entries());
        let mut dense = vec![0.0_f32; self.shape.rows() * n];
        for (i, row) in dense.chunks_exact_mut(n).enumerate() {
            let (i1, i2) = (i / m2, i % m2);
            for (j1, values) in row.chunks_exact_mut(n2).enumerate() {
                for (j2, value) in values.iter_mut().enumerate() {
                    *value = (0..rank)
                        .map(|k| {
                            f64::from(self.a[k * blocks + i1 * n1 + j1]) * f64::from(self.b[k * entries + i2 * n2 + j2])
                        })
                        .sum::<f64>() as f32;
                }
            }
        }
        dense
    }
}
