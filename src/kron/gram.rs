//! The Gram matrix of a matrix's blocks, straight from the matrix, and its leading eigenvectors.
//!
//! The rearranged matrix `R(W)` of Van Loan and Pitsianis holds one block of `W` per row: `(m1·n1, m2·n2)`. With a
//! small block it is very tall, and its `m2·n2 × m2·n2` Gram matrix `G = RᵀR` suffices.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Auto, Mat, MatMut, MatRef, Par, Spec};

use super::view::MatrixView;
use crate::error::{Error, Result};
use crate::numeric::simd::{LANES, dispatched};
use crate::progress::Progress;
use crate::spec::KroneckerShape;

/// Entries of `R` that are upcast to f64 at a time: the chunk stays in cache, and its products are long enough to be
/// fast.
const CHUNK_ENTRIES: usize = 32 * 1024;

/// Up to this many block entries, products are summed directly: a general matrix product would spend its time on
/// packing.
const FEW_ENTRIES: usize = 16;

/// Consecutive rows of `R(W)`, that is blocks of `W`, upcast to f64 and transposed: one row for each entry of a block.
pub(super) struct Chunk<'a> {
    /// The number of the first block; blocks are numbered `i1·n1 + j1`.
    pub first: usize,
    values: &'a [f64],
    entries: usize,
    blocks: usize,
}

impl Chunk<'_> {
    /// The values that all blocks have at one entry.
    fn entry(&self, entry: usize) -> &[f64] {
        &self.values[entry * self.blocks..][..self.blocks]
    }

    /// `(m2·n2, blocks)`.
    pub fn transposed(&self) -> MatRef<'_, f64> {
        MatRef::from_row_major_slice(self.values, self.entries, self.blocks)
    }

    /// Adds `RᵀR` of these rows to the lower triangle of `gram`.
    fn add_gram(&self, gram: &mut Mat<f64>) {
        if self.entries > FEW_ENTRIES {
            let transposed = self.transposed();
            triangular::matmul(
                gram.as_mut(),
                BlockStructure::TriangularLower,
                Accum::Add,
                transposed,
                BlockStructure::Rectangular,
                transposed.transpose(),
                BlockStructure::Rectangular,
                1.0,
                Par::Seq,
            );
            return;
        }
        for j in 0..self.entries {
            for first in (j..self.entries).step_by(4) {
                // Past the last entry, the last one again.
                let rows = [0, 1, 2, 3].map(|i| self.entry((first + i).min(self.entries - 1)));
                let products = four_products(rows, self.entry(j));
                for (i, product) in (first..self.entries).zip(products) {
                    gram[(i, j)] += product;
                }
            }
        }
    }

    /// `R V` of these rows for the directions `vectors : (m2·n2, rank)`. Column `k` goes to `columns[k]`, rounded to
    /// f32; its squared norm, not rounded, is added to `squares[k]`.
    pub fn project(&self, vectors: &Mat<f64>, columns: &mut [&mut [f32]], squares: &mut [f64]) {
        if self.entries > FEW_ENTRIES {
            let mut products = vec![0.0; vectors.ncols() * self.blocks];
            let products_view = MatMut::from_row_major_slice_mut(&mut products, vectors.ncols(), self.blocks);
            matmul(products_view, Accum::Replace, vectors.transpose(), self.transposed(), 1.0, Par::Seq);
            for ((products, column), square) in products.chunks_exact(self.blocks).zip(columns).zip(squares) {
                *square += round_to_f32(products, column);
            }
            return;
        }
        let mut products = vec![0.0; self.blocks];
        for (k, (column, square)) in columns.iter_mut().zip(squares).enumerate() {
            products.fill(0.0);
            for entry in 0..self.entries {
                add_scaled(&mut products, self.entry(entry), vectors[(entry, k)]);
            }
            *square += round_to_f32(&products, column);
        }
    }
}

/// Walks `R(W)` in chunks.
///
/// # Errors
/// [`Error::Cancelled`].
pub(super) fn for_each_chunk(
    view: MatrixView<'_>,
    shape: &KroneckerShape,
    progress: &Progress,
    mut visit: impl FnMut(&Chunk<'_>),
) -> Result<()> {
    let (n1, m2, n2, entries) = (shape.n1, shape.m2, shape.n2, shape.block_entries());
    let block_rows = (CHUNK_ENTRIES / (n1 * entries)).clamp(1, shape.m1);
    let mut values = vec![0.0_f64; block_rows * n1 * entries];
    let mut row = vec![0.0_f32; view.columns()];
    for first in (0..shape.m1).step_by(block_rows) {
        progress.check()?;
        let last = (first + block_rows).min(shape.m1);
        let blocks = (last - first) * n1;
        for i1 in first..last {
            for i2 in 0..m2 {
                view.copy_row(i1 * m2 + i2, &mut row);
                for j2 in 0..n2 {
                    let to = &mut values[(i2 * n2 + j2) * blocks + (i1 - first) * n1..][..n1];
                    match n2 {
                        1 => upcast_phase::<1>(&row, n2, j2, to),
                        2 => upcast_phase::<2>(&row, n2, j2, to),
                        4 => upcast_phase::<4>(&row, n2, j2, to),
                        8 => upcast_phase::<8>(&row, n2, j2, to),
                        _ => upcast_phase::<0>(&row, n2, j2, to),
                    }
                }
            }
        }
        visit(&Chunk { first: first * n1, values: &values[..blocks * entries], entries, blocks });
    }
    Ok(())
}

dispatched! {
    /// `to[j] = row[j·step + phase]`; `STEP` is `step`, or 0 for any.
    fn upcast_phase<const STEP: usize>(row: &[f32], step: usize, phase: usize, to: &mut [f64]) {
        if STEP == 0 {
            for (to, values) in to.iter_mut().zip(row.chunks_exact(step)) {
                *to = f64::from(values[phase]);
            }
        } else {
            for (to, values) in to.iter_mut().zip(row.as_chunks::<STEP>().0) {
                *to = f64::from(values[phase]);
            }
        }
    }
}

dispatched! {
    /// The inner products of four rows with another.
    fn four_products(rows: [&[f64]; 4], other: &[f64]) -> [f64; 4] {
        const WIDTH: usize = LANES / 2;
        let mut sums = [[0.0_f64; WIDTH]; 4];
        let [(a, a_rest), (b, b_rest), (c, c_rest), (d, d_rest)] = rows.map(|row| row.as_chunks::<WIDTH>());
        let (others, other_rest) = other.as_chunks::<WIDTH>();
        for ((((a, b), c), d), other) in a.iter().zip(b).zip(c).zip(d).zip(others) {
            for lane in 0..WIDTH {
                sums[0][lane] += a[lane] * other[lane];
                sums[1][lane] += b[lane] * other[lane];
                sums[2][lane] += c[lane] * other[lane];
                sums[3][lane] += d[lane] * other[lane];
            }
        }
        let mut products = sums.map(|lanes| lanes.iter().sum::<f64>());
        for (product, rest) in products.iter_mut().zip([a_rest, b_rest, c_rest, d_rest]) {
            *product += rest.iter().zip(other_rest).map(|(value, other)| value * other).sum::<f64>();
        }
        products
    }
}

dispatched! {
    /// `to += scale·from`.
    fn add_scaled(to: &mut [f64], from: &[f64], scale: f64) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += scale * from;
        }
    }
}

dispatched! {
    /// Rounds `from` to f32 and returns the sum of its squares.
    fn round_to_f32(from: &[f64], to: &mut [f32]) -> f64 {
        const WIDTH: usize = LANES / 2;
        let mut sums = [0.0_f64; WIDTH];
        let (chunks, rest) = from.as_chunks::<WIDTH>();
        let (to_chunks, to_rest) = to.as_chunks_mut::<WIDTH>();
        for (from, to) in chunks.iter().zip(to_chunks) {
            for lane in 0..WIDTH {
                sums[lane] += from[lane] * from[lane];
                to[lane] = from[lane] as f32;
            }
        }
        let mut sum = sums.iter().sum::<f64>();
        for (from, to) in rest.iter().zip(to_rest) {
            sum += from * from;
            *to = *from as f32;
        }
        sum
    }
}

/// The block Gram matrix `G = R(W)ᵀ R(W)` in f64, lower triangle only.
///
/// # Errors
/// [`Error::Cancelled`].
///
/// # Cost
/// Reads `W` once; `m·n·m2·n2` MACs. Memory beyond the result: a chunk of some 256 KB, or one row of blocks.
pub fn block_gram(view: MatrixView<'_>, shape: &KroneckerShape, progress: &Progress) -> Result<Mat<f64>> {
    let entries = shape.block_entries();
    let mut gram = Mat::zeros(entries, entries);
    for_each_chunk(view, shape, progress, |chunk| chunk.add_gram(&mut gram))?;
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
    let (mut values, vectors) = eigenvectors(gram.as_ref())?;
    values.reverse();
    let size = gram.nrows();
    let leading = Mat::from_fn(size, rank, |i, k| vectors[(i, size - 1 - k)]);
    Ok((leading, values))
}

/// All eigenvalues of a symmetric matrix (lower triangle read), in ascending order, and its eigenvectors, one per
/// column.
///
/// # Errors
/// [`Error::Convergence`] if the eigensolver gives up.
///
/// # Cost
/// `O(k³)` for a `k × k` matrix.
pub fn eigenvectors(matrix: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let size = matrix.nrows();
    let mut values = vec![0.0; size];
    let mut vectors = Mat::zeros(size, size);
    let parameters = Spec::<_, f64>::new(Auto::<f64>::auto());
    let scratch = self_adjoint_evd_scratch::<f64>(size, ComputeEigenvectors::Yes, Par::Seq, parameters);
    self_adjoint_evd(
        matrix,
        faer::diag::DiagMut::from_slice_mut(&mut values),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        parameters,
    )
    .map_err(|_| Error::Convergence { operation: "the symmetric eigensolver" })?;
    Ok((values, vectors))
}
