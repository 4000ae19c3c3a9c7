//! The nearest matrix of a given rank in a weighted norm, in interpolative form.
//!
//! With `S = C_in^½` and `G = S W C_out Wᵀ S`, whose leading eigenvectors are `U`, the nearest matrix of rank `k` is
//! `Ŵ = S⁻¹ U Uᵀ S W` and loses the eigenvalues beyond the `k`-th (Eckart and Young, 1936, after whitening). Only the shorter
//! side is ever whitened, so that a wide matrix costs one eigendecomposition of its narrow side more.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::matmul::matmul;
use faer::linalg::qr::col_pivoting::factor::{qr_in_place, qr_in_place_scratch};
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Accum, Auto, Mat, MatRef, Par, Spec};

use super::moment::{Norm, Weight, eigenvectors};
use crate::error::Result;
use crate::kron::MatrixView;
use crate::permute::Permutation;
use crate::progress::Progress;
use crate::spec::LowRankShape;

/// Values of the matrix that are widened to f64 at a time.
const CHUNK_VALUES: usize = 1 << 20;

/// A low-rank matrix in interpolative form: `Ŵ[p] = [I; left] right`, or `Ŵ[:, q] = left [I right]` where the columns are
/// the shorter side.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// Its shape and rank.
    pub shape: LowRankShape,
    /// `left`, row-major.
    pub left: Vec<f32>,
    /// `right`, row-major.
    pub right: Vec<f32>,
    /// `p` or `q`: the pivots come first.
    pub order: Permutation,
    /// `‖W − Ŵ‖² / ‖W‖²` in the norm that it was found in; 0 for a zero matrix.
    pub lost_energy: f64,
}

/// The matrix of rank `rank` that is nearest to `view` in `norm`. f32 in and out, f64 inside.
///
/// # Errors
/// [`Error::Shape`] for a rank that saves nothing, [`Error::NonFinite`], [`Error::Convergence`], [`Error::Cancelled`].
///
/// # Cost
/// With the shorter side `s` and the longer `l`: an eigendecomposition of size `s` (two with a full weight on the shorter
/// side) and `2·s²·l` multiplies, `s·l²` more with a full weight on the longer side.
pub fn low_rank(view: MatrixView<'_>, rank: usize, norm: &Norm, progress: &Progress) -> Result<LowRank> {
    let shape = LowRankShape::new(view.rows(), view.columns(), rank)?;
    view.check_finite()?;
    let sides = Sides::new(view, norm);
    let whitened = sides.whiten(progress)?;
    let (short, first) = (sides.short(), sides.short() - rank);
    // Eigenvalues ascend: the leading vectors are the last ones.
    let leading = whitened.vectors.subcols(first, rank);
    let basis = whitened.inverse_root.times(leading, Par::Seq);
    let coordinates = whitened.root.times(leading, Par::Seq);
    progress.check()?;
    let (order, coefficients) = interpolate(basis.as_ref());

    // The pivot rows of Ŵ: basis[pivots] coordinatesᵀ W.
    let pivots = Mat::from_fn(rank, rank, |i, k| basis[(order.as_slice()[i], k)]);
    let mut projection = Mat::zeros(rank, short);
    matmul(projection.as_mut(), Accum::Replace, pivots.as_ref(), coordinates.transpose(), 1.0, Par::Seq);
    let mut skeleton = vec![0.0_f32; rank * sides.long()];
    let mut product = Mat::zeros(0, 0);
    sides.for_each_chunk(progress, |start, chunk| {
        product.resize_with(rank, chunk.ncols(), |_, _| 0.0);
        matmul(product.as_mut(), Accum::Replace, projection.as_ref(), chunk, 1.0, Par::Seq);
        for j in 0..chunk.ncols() {
            for k in 0..rank {
                let at = if sides.transposed { (start + j) * rank + k } else { k * sides.long() + start + j };
                skeleton[at] = product[(k, j)] as f32;
            }
        }
        Ok(())
    })?;
    let rest = short - rank;
    let (left, right) = if sides.transposed {
        let right = (0..rank * rest).map(|at| coefficients[(at / rest, at % rest)] as f32).collect();
        (skeleton, right)
    } else {
        let left = (0..rest * rank).map(|at| coefficients[(at % rank, at / rank)] as f32).collect();
        (left, skeleton)
    };
    let lost_energy = lost_share(&whitened.energies[..first], &whitened.energies);
    Ok(LowRank { shape, left, right, order, lost_energy })
}

/// The energies of `view` in `norm`, in descending order and in the units of the moments: the nearest matrix of rank `k`
/// loses the sum of all but the first `k`.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Convergence`], [`Error::Cancelled`].
///
/// # Cost
/// As [`low_rank`], half of the products.
pub fn spectrum(view: MatrixView<'_>, norm: &Norm, progress: &Progress) -> Result<Vec<f64>> {
    view.check_finite()?;
    let energies = Sides::new(view, norm).whiten(progress)?.energies;
    Ok(energies.iter().rev().map(|energy| energy * norm.scale).collect())
}

fn lost_share(lost: &[f64], all: &[f64]) -> f64 {
    let total: f64 = all.iter().sum();
    if total > 0.0 { (lost.iter().sum::<f64>() / total).clamp(0.0, 1.0) } else { 0.0 }
}

/// A matrix seen as short × long, transposed if it has more rows than columns.
struct Sides<'a> {
    view: MatrixView<'a>,
    transposed: bool,
    short_weight: &'a Weight,
    long_weight: &'a Weight,
}

/// What the leading directions are found from.
struct Whitened {
    root: Weight,
    inverse_root: Weight,
    /// Eigenvalues of `G` in ascending order, none negative.
    energies: Vec<f64>,
    vectors: Mat<f64>,
}

impl<'a> Sides<'a> {
    fn new(view: MatrixView<'a>, norm: &'a Norm) -> Self {
        let transposed = view.rows() > view.columns();
        let (short_weight, long_weight) =
            if transposed { (&norm.output, &norm.input) } else { (&norm.input, &norm.output) };
        Self { view, transposed, short_weight, long_weight }
    }

    fn short(&self) -> usize {
        self.view.rows().min(self.view.columns())
    }

    fn long(&self) -> usize {
        self.view.rows().max(self.view.columns())
    }

    /// Calls `visit` with the place on the long side and the values, short × some of the long side.
    fn for_each_chunk(
        &self,
        progress: &Progress,
        mut visit: impl FnMut(usize, MatRef<'_, f64>) -> Result<()>,
    ) -> Result<()> {
        let (short, long) = (self.short(), self.long());
        let step = (CHUNK_VALUES / short).clamp(1, long);
        let mut row = vec![0.0_f32; self.view.columns()];
        let mut chunk = Mat::<f64>::zeros(short, step);
        for first in (0..long).step_by(step) {
            progress.check()?;
            let count = step.min(long - first);
            if self.transposed {
                for j in 0..count {
                    self.view.copy_row(first + j, &mut row);
                    for (i, &value) in row.iter().enumerate() {
                        chunk[(i, j)] = f64::from(value);
                    }
                }
            } else {
                for i in 0..short {
                    self.view.copy_row(i, &mut row);
                    for (j, &value) in row[first..first + count].iter().enumerate() {
                        chunk[(i, j)] = f64::from(value);
                    }
                }
            }
            visit(first, chunk.as_ref().subcols(0, count))?;
        }
        Ok(())
    }

    /// `W C Wᵀ` over the long side.
    fn gram(&self, progress: &Progress) -> Result<Mat<f64>> {
        let (short, long) = (self.short(), self.long());
        let mut gram = Mat::zeros(short, short);
        if let Weight::Full(_) = self.long_weight {
            let mut whole = Mat::zeros(short, long);
            self.for_each_chunk(progress, |first, chunk| {
                whole.as_mut().subcols_mut(first, chunk.ncols()).copy_from(chunk);
                Ok(())
            })?;
            let weighted = self.long_weight.times(whole.transpose(), Par::Seq);
            progress.check()?;
            matmul(gram.as_mut(), Accum::Replace, whole.as_ref(), weighted.as_ref(), 1.0, Par::Seq);
        } else {
            self.for_each_chunk(progress, |first, chunk| {
                let weighted = match self.long_weight {
                    Weight::Diagonal(values) => {
                        Mat::from_fn(chunk.nrows(), chunk.ncols(), |i, j| chunk[(i, j)] * values[first + j])
                    }
                    _ => chunk.to_owned(),
                };
                matmul(gram.as_mut(), Accum::Add, weighted.as_ref(), chunk.transpose(), 1.0, Par::Seq);
                Ok(())
            })?;
        }
        Ok(gram)
    }

    fn whiten(&self, progress: &Progress) -> Result<Whitened> {
        let (root, inverse_root) = self.short_weight.roots()?;
        progress.check()?;
        let half = root.times(self.gram(progress)?.as_ref(), Par::Seq);
        let gram = root.times(half.transpose(), Par::Seq);
        progress.check()?;
        let (mut energies, vectors) = eigenvectors(gram.as_ref())?;
        // Rounding leaves zeros on either side of zero.
        energies.iter_mut().for_each(|energy| *energy = energy.max(0.0));
        progress.check()?;
        Ok(Whitened { root, inverse_root, energies, vectors })
    }
}

/// An order of the rows of `basis : (s, k)` that puts `k` well-conditioned ones first, and the coefficients
/// `T : (k, s − k)` that make the others of them: `basis[order[k..]] = Tᵀ basis[order[..k]]`.
///
/// The pivots of a QR decomposition of the transpose: greedy, but in practice no coefficient is much beyond 1.
fn interpolate(basis: MatRef<'_, f64>) -> (Permutation, Mat<f64>) {
    let (size, rank) = (basis.nrows(), basis.ncols());
    let mut triangle = basis.transpose().to_owned();
    let mut householder = Mat::zeros(1, rank);
    let (mut order, mut inverse) = (vec![0_usize; size], vec![0_usize; size]);
    let parameters = Spec::<_, f64>::new(Auto::<f64>::auto());
    let scratch = qr_in_place_scratch::<usize, f64>(rank, size, 1, Par::Seq, parameters);
    qr_in_place(
        triangle.as_mut(),
        householder.as_mut(),
        &mut order,
        &mut inverse,
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        parameters,
    );
    let mut coefficients = triangle.subcols(rank, size - rank).to_owned();
    solve_upper_triangular_in_place(triangle.subcols(0, rank), coefficients.as_mut(), Par::Seq);
    (Permutation::new(order).expect("the pivots of a decomposition are a permutation"), coefficients)
}

impl LowRank {
    /// The dense matrix, row-major `(m, n)`, the permutation undone; sums in f64.
    ///
    /// # Cost
    /// `rank·(s − rank)·l` multiplies for the sides `s ≤ l`.
    #[must_use]
    pub fn to_dense(&self) -> Vec<f32> {
        let LowRankShape { rows, columns, rank } = self.shape;
        let order = self.order.as_slice();
        let mut dense = vec![0.0_f32; rows * columns];
        if self.shape.pivots_on_rows() {
            for (at, &row) in order.iter().enumerate() {
                let to = &mut dense[row * columns..][..columns];
                if at < rank {
                    to.copy_from_slice(&self.right[at * columns..][..columns]);
                } else {
                    combine(&self.left[(at - rank) * rank..][..rank], &self.right, to);
                }
            }
        } else {
            let mut rest = vec![0.0_f32; columns - rank];
            for (left, to) in self.left.chunks_exact(rank).zip(dense.chunks_exact_mut(columns)) {
                combine(left, &self.right, &mut rest);
                for (&column, value) in order.iter().zip(left.iter().chain(&rest)) {
                    to[column] = *value;
                }
            }
        }
        dense
    }
}

/// `to = scales · rows` for row-major `rows`.
fn combine(scales: &[f32], rows: &[f32], to: &mut [f32]) {
    let mut sums = vec![0.0_f64; to.len()];
    for (&scale, row) in scales.iter().zip(rows.chunks_exact(to.len().max(1))) {
        for (sum, &value) in sums.iter_mut().zip(row) {
            *sum += f64::from(scale) * f64::from(value);
        }
    }
    for (to, sum) in to.iter_mut().zip(sums) {
        *to = sum as f32;
    }
}
