//! The Gram matrix of a matrix's blocks, straight from the matrix, and its leading eigenvectors.
//!
//! The rearranged matrix `R(W)` of Van Loan and Pitsianis holds one block of `W` per row: `(m1·n1, m2·n2)`. With a small
//! block it is very tall, so its `m2·n2 × m2·n2` Gram matrix `G = RᵀR` holds all that is needed of it.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Auto, Mat, MatMut, MatRef, Par, Spec};

use super::view::MatrixView;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::shape::KroneckerShape;

/// Rows of `R` that are widened to f64 at a time: the chunk stays in cache, and its product is long enough to be fast.
const CHUNK_ENTRIES: usize = 32 * 1024;

/// Walks `R(W)` in chunks of consecutive rows, widened to f64.
///
/// `visit(first, chunk)` gets the number of the chunk's first block and the chunk itself, row-major with `m2·n2`
/// columns. Blocks are numbered `i1·n1 + j1`.
pub(super) fn for_each_chunk(
    view: MatrixView<'_>,
    shape: &KroneckerShape,
    progress: &Progress,
    mut visit: impl FnMut(usize, MatRef<'_, f64>),
) -> Result<()> {
    let (n1, m2, n2, entries) = (shape.n1, shape.m2, shape.n2, shape.block_entries());
    let block_rows = (CHUNK_ENTRIES / (n1 * entries)).clamp(1, shape.m1);
    let mut chunk = vec![0.0_f64; block_rows * n1 * entries];
    let mut row = vec![0.0_f32; view.columns()];
    for first in (0..shape.m1).step_by(block_rows) {
        progress.check()?;
        let last = (first + block_rows).min(shape.m1);
        for i1 in first..last {
            let blocks = &mut chunk[(i1 - first) * n1 * entries..][..n1 * entries];
            for i2 in 0..m2 {
                view.copy_row(i1 * m2 + i2, &mut row);
                for (block, values) in blocks.chunks_exact_mut(entries).zip(row.chunks_exact(n2)) {
                    for (entry, &value) in block[i2 * n2..].iter_mut().zip(values) {
                        *entry = f64::from(value);
                    }
                }
            }
        }
        let rows = (last - first) * n1;
        visit(first * n1, MatRef::from_row_major_slice(&chunk[..rows * entries], rows, entries));
    }
    Ok(())
}

/// The block Gram matrix `G = R(W)ᵀ R(W)` in f64, lower triangle only.
///
/// # Errors
/// [`Error::Cancelled`].
///
/// # Cost
/// Reads `W` once; `m·n·m2·n2` multiplies. Memory beyond the result: a chunk of some 256 KB, or one row of blocks.
pub fn block_gram(view: MatrixView<'_>, shape: &KroneckerShape, progress: &Progress) -> Result<Mat<f64>> {
    let entries = shape.block_entries();
    let mut gram = Mat::zeros(entries, entries);
    for_each_chunk(view, shape, progress, |_, chunk| {
        triangular::matmul(
            gram.as_mut(),
            BlockStructure::TriangularLower,
            Accum::Add,
            chunk.transpose(),
            BlockStructure::Rectangular,
            chunk,
            BlockStructure::Rectangular,
            1.0,
            Par::Seq,
        );
    })?;
    Ok(gram)
}

/// The `rank` leading eigenvectors of the symmetric `gram` (lower triangle read), one per column, and its eigenvalues,
/// both in descending order.
///
/// # Errors
/// [`Error::Convergence`] if the eigensolver gives up.
///
/// # Cost
/// `O(k³)` for a `k × k` matrix.
pub fn top_eigenvectors(gram: &Mat<f64>, rank: usize) -> Result<(Mat<f64>, Vec<f64>)> {
    let size = gram.nrows();
    let mut values = vec![0.0; size];
    let mut vectors = Mat::zeros(size, size);
    let parameters = Spec::<_, f64>::new(Auto::<f64>::auto());
    let scratch = self_adjoint_evd_scratch::<f64>(size, ComputeEigenvectors::Yes, Par::Seq, parameters);
    self_adjoint_evd(
        gram.as_ref(),
        faer::diag::DiagMut::from_slice_mut(&mut values),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        parameters,
    )
    .map_err(|_| Error::Convergence { operation: "the symmetric eigensolver" })?;
    values.reverse();
    let leading = Mat::from_fn(size, rank, |i, k| vectors[(i, size - 1 - k)]);
    Ok((leading, values))
}

/// `product = left · right`, all row-major slices of f64.
pub(super) fn multiply_rows(product: &mut [f64], left: MatRef<'_, f64>, right: &Mat<f64>) {
    let (rows, columns) = (left.nrows(), right.ncols());
    let product = MatMut::from_row_major_slice_mut(&mut product[..rows * columns], rows, columns);
    faer::linalg::matmul::matmul(product, Accum::Replace, left, right, 1.0, Par::Seq);
}
