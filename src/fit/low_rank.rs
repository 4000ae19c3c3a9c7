//! The nearest matrix of a given rank in a weighted norm, in interpolative form.
//!
//! With `S = C_in^½` and `G = S W C_out Wᵀ S`, whose leading eigenvectors are `U`, the nearest matrix of rank `k` is `Ŵ
//! = S⁻¹ U Uᵀ S W`. It loses the eigenvalues beyond the `k`-th (Eckart and Young, 1936, after whitening). Only the
//! shorter side is whitened, so a wide matrix needs only one more eigendecomposition, of the size of its narrow side.

use std::sync::Arc;

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::matmul::matmul;
use faer::linalg::qr::col_pivoting::factor::{qr_in_place, qr_in_place_scratch};
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Accum, Auto, Mat, MatRef, Par, Spec};

use super::moment::{Norm, Weight, inner, product};
use crate::error::Result;
use crate::kron::{MatrixView, eigenvectors};
use crate::numeric::range::{Rescale, scale};
use crate::permute::Permutation;
use crate::progress::Progress;
use crate::spec::LowRankShape;

/// Values of the matrix converted to f64 at a time.
const CHUNK_VALUES: usize = 1 << 20;

/// A low-rank matrix in interpolative form: `Ŵ[p] = [I; left] right`, or `Ŵ[:, q] = left [I right]` where the columns
/// are the shorter side.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// Its shape and rank.
    pub shape: LowRankShape,
    /// `left`, row-major.
    pub left: Vec<f32>,
    /// `right`, row-major.
    pub right: Vec<f32>,
    /// `p` or `q`, with the pivots first.
    pub order: Permutation,
    /// `‖W − Ŵ‖² / ‖W‖²` in the norm of the fit; 0 for a zero matrix.
    pub lost_energy: f64,
}

/// The matrix of rank `rank` that is nearest to `view` in `norm`. Input and output are f32, the computation is f64.
///
/// # Errors
/// [`Error::Shape`] for a rank that saves no parameters, [`Error::NonFinite`], [`Error::Convergence`],
/// [`Error::Cancelled`].
///
/// # Cost
/// With the shorter side `s` and the longer `l`: an eigendecomposition of size `s` (two with a full weight on the
/// shorter side) and `2·s²·l` MACs. A full weight on the longer side adds `s·l²` MACs.
pub fn low_rank(view: MatrixView<'_>, rank: usize, norm: &Norm, progress: &Progress) -> Result<LowRank> {
    Spectrum::new(view, norm, progress)?.low_rank(view, rank, progress)
}

/// The eigendecomposition of a matrix in a norm. The nearest matrices of every rank follow from it, so it is computed
/// once for any number of ranks.
#[derive(Clone)]
pub struct Spectrum {
    pub(super) roots: Arc<Roots>,
    pub(super) whitened: Whitened,
    scale: f64,
}

impl Spectrum {
    /// Decomposes `view` in `norm`.
    ///
    /// # Errors
    /// [`Error::NonFinite`], [`Error::Convergence`], [`Error::Cancelled`].
    ///
    /// # Cost
    /// As [`low_rank`], with half of the products.
    pub fn new(view: MatrixView<'_>, norm: &Norm, progress: &Progress) -> Result<Self> {
        view.check_finite()?;
        let roots = Roots::new((view.rows(), view.columns()), norm)?;
        Self::with_roots(view, norm, Arc::new(roots), progress)
    }

    /// As [`new`](Self::new) for a finite matrix, with the roots of the weight of its shorter side.
    pub(super) fn with_roots(
        view: MatrixView<'_>,
        norm: &Norm,
        roots: Arc<Roots>,
        progress: &Progress,
    ) -> Result<Self> {
        let whitened = Sides::new(Operand::View(view)).whiten(norm, &roots, progress)?;
        Ok(Self { roots, whitened, scale: norm.scale })
    }

    /// The energies in descending order and in the units of the moments. The nearest matrix of rank `k` loses the sum
    /// of all but the first `k`.
    #[must_use]
    pub fn energies(&self) -> Vec<f64> {
        self.whitened.energies.iter().rev().map(|energy| energy * self.scale).collect()
    }

    /// The nearest matrix of rank `rank` to the same `view`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a rank that saves no parameters, [`Error::Overflow`], [`Error::Cancelled`].
    pub fn low_rank(&self, view: MatrixView<'_>, rank: usize, progress: &Progress) -> Result<LowRank> {
        view.in_safe_range(|view| {
            low_rank_in(&Sides::new(Operand::View(view)), rank, &self.roots, &self.whitened, progress)
        })
    }

    /// Its size in memory, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let size = self.whitened.energies.len();
        size * size * size_of::<f64>() + self.bytes_of_roots()
    }

    /// Its matrices, for a caller who keeps them elsewhere meanwhile.
    pub fn matrices(&mut self) -> Vec<&mut Mat<f64>> {
        let Roots(root, inverse) = Arc::make_mut(&mut self.roots);
        let roots = [root, inverse].into_iter().filter_map(|root| match root {
            Weight::Full(matrix) => Some(matrix),
            _ => None,
        });
        roots.chain([&mut self.whitened.vectors]).collect()
    }

    pub(super) fn vectors(&mut self) -> &mut Mat<f64> {
        &mut self.whitened.vectors
    }

    /// The part of [`bytes`](Self::bytes) that spectra in one norm share.
    pub(super) fn bytes_of_roots(&self) -> usize {
        let size = self.whitened.energies.len();
        let full = [&self.roots.0, &self.roots.1].iter().filter(|root| matches!(root, Weight::Full(_))).count();
        full * size * size * size_of::<f64>()
    }
}

/// The spectrum of a finite matrix in f64.
pub(super) fn whiten(target: MatRef<'_, f64>, norm: &Norm, roots: &Roots, progress: &Progress) -> Result<Whitened> {
    Sides::new(Operand::Dense(target)).whiten(norm, roots, progress)
}

/// [`low_rank`] for a whitened matrix in f64.
pub(super) fn low_rank_of(
    target: MatRef<'_, f64>,
    rank: usize,
    roots: &Roots,
    whitened: &Whitened,
    progress: &Progress,
) -> Result<LowRank> {
    low_rank_in(&Sides::new(Operand::Dense(target)), rank, roots, whitened, progress)
}

/// The two factors of the same matrix before its conversion to interpolative form: `a : (m, rank)` and `b : (n, rank)`
/// with `Ŵ = a bᵀ`.
pub(super) fn plain_factors(
    target: MatRef<'_, f64>,
    rank: usize,
    roots: &Roots,
    whitened: &Whitened,
) -> (Mat<f64>, Mat<f64>) {
    let Directions { basis, coordinates, .. } = whitened.directions(rank, roots);
    let transposed = target.nrows() > target.ncols();
    let short = if transposed { target.transpose() } else { target };
    let other = product(short.transpose(), coordinates.as_ref());
    if transposed { (other, basis) } else { (basis, other) }
}

fn low_rank_in(
    sides: &Sides<'_>,
    rank: usize,
    roots: &Roots,
    whitened: &Whitened,
    progress: &Progress,
) -> Result<LowRank> {
    let shape = LowRankShape::new(sides.shape.0, sides.shape.1, rank)?;
    let short = sides.short();
    let Directions { basis, coordinates, lost_energy } = whitened.directions(rank, roots);
    progress.check()?;
    let (order, coefficients) = interpolate(basis.as_ref());

    // The pivot rows of Ŵ: basis[pivots] coordinatesᵀ W.
    let pivots = Mat::from_fn(rank, rank, |i, k| basis[(order.as_slice()[i], k)]);
    let projection = product(pivots.as_ref(), coordinates.transpose());
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
    Ok(LowRank { shape, left, right, order, lost_energy })
}

fn lost_share(lost: &[f64], all: &[f64]) -> f64 {
    let total: f64 = all.iter().sum();
    if total > 0.0 { (lost.iter().sum::<f64>() / total).clamp(0.0, 1.0) } else { 0.0 }
}

/// The source of the values of a matrix.
#[derive(Clone, Copy)]
enum Operand<'a> {
    View(MatrixView<'a>),
    Dense(MatRef<'a, f64>),
}

/// A matrix as short × long, transposed if it has more rows than columns.
struct Sides<'a> {
    operand: Operand<'a>,
    shape: (usize, usize),
    transposed: bool,
}

/// `(C^½, C^−½)` of the weight of the shorter side.
#[derive(Clone)]
pub(super) struct Roots(Weight, Weight);

impl Roots {
    /// The roots for matrices of shape `(m, n)`.
    pub fn new((m, n): (usize, usize), norm: &Norm) -> Result<Self> {
        let (root, inverse) = if m > n { norm.output.roots()? } else { norm.input.roots()? };
        Ok(Self(root, inverse))
    }
}

/// The nearest matrix of a given rank: `basis coordinatesᵀ X` for the short × long matrix `X`.
struct Directions {
    basis: Mat<f64>,
    coordinates: Mat<f64>,
    lost_energy: f64,
}

/// Eigenvalues of `S X C Xᵀ S` for the roots `S` of the shorter side's weight, in ascending order and not negative, and
/// its eigenvectors.
#[derive(Clone)]
pub(super) struct Whitened {
    energies: Vec<f64>,
    vectors: Mat<f64>,
}

impl Whitened {
    /// The norm of a change of the matrix beyond what a low rank that follows it makes up for: with the leading singular
    /// vectors `U` and `V` of the whitened matrix, `‖(I − U Uᵀ) C_in^½ E C_out^½ (I − V Vᵀ)‖`. In this norm, the matrix
    /// itself is as far from zero as from its low rank.
    ///
    /// # Cost
    /// `rank·(m·n + 2·m² + 2·n²)` MACs, twice that on the longer side.
    pub fn beyond(&self, target: MatRef<'_, f64>, rank: usize, norm: &Norm, roots: &Roots) -> Norm {
        let transposed = target.nrows() > target.ncols();
        let (short, short_weight, long_weight) = if transposed {
            (target.transpose(), &norm.output, &norm.input)
        } else {
            (target, &norm.input, &norm.output)
        };
        let first = self.energies.len() - rank;
        let coordinates = roots.0.times(self.vectors.subcols(first, rank));
        // `T V Σ` for `C_out = T²`: no root of the longer side is needed.
        let other = product(short.transpose(), coordinates.as_ref());
        let mut along = long_weight.times(other.as_ref());
        // `Σ²` at the scale of the target, which that of the spectrum need not be.
        let energies: Vec<f64> = (0..rank).map(|k| inner(other.subcols(k, 1), along.as_ref().subcols(k, 1))).collect();
        let largest = energies.iter().copied().fold(0.0, f64::max);
        for (column, energy) in along.col_iter_mut().zip(energies) {
            let inverse = if energy > NOTHING * largest { energy.sqrt().recip() } else { 0.0 };
            column.iter_mut().for_each(|value| *value *= inverse);
        }
        let (short_weight, long_weight) =
            (without(short_weight, coordinates.as_ref()), without(long_weight, along.as_ref()));
        let (input, output) = if transposed { (long_weight, short_weight) } else { (short_weight, long_weight) };
        Norm { input, output, scale: norm.scale }
    }

    fn directions(&self, rank: usize, roots: &Roots) -> Directions {
        // Eigenvalues ascend, so the leading vectors are last.
        let first = self.energies.len() - rank;
        let leading = self.vectors.subcols(first, rank);
        Directions {
            basis: roots.1.times(leading),
            coordinates: roots.0.times(leading),
            lost_energy: lost_share(&self.energies[..first], &self.energies),
        }
    }
}

/// Energies below this share of the largest are rounding.
const NOTHING: f64 = 1e-14;
/// The part of its mean diagonal that is added to a weight without its leading directions: it would be singular.
const RIDGE: f64 = 1e-3;

/// `C − X Xᵀ`, with a ridge.
fn without(weight: &Weight, x: MatRef<'_, f64>) -> Weight {
    let mut left = product(x, x.transpose());
    let size = left.nrows();
    let entry = |i: usize, j: usize| match weight {
        Weight::Full(matrix) => matrix[(i, j)],
        Weight::Diagonal(values) if i == j => values[i],
        Weight::Identity if i == j => 1.0,
        _ => 0.0,
    };
    for j in 0..size {
        for i in 0..size {
            left[(i, j)] = entry(i, j) - left[(i, j)];
        }
    }
    let ridge = RIDGE * (0..size).map(|i| left[(i, i)]).sum::<f64>().max(0.0) / size as f64;
    // Rounding may have left a little less than nothing of a direction that had all the weight.
    (0..size).for_each(|i| left[(i, i)] = left[(i, i)].max(0.0) + ridge);
    Weight::Full(left)
}

impl<'a> Sides<'a> {
    fn new(operand: Operand<'a>) -> Self {
        let shape = match operand {
            Operand::View(view) => (view.rows(), view.columns()),
            Operand::Dense(matrix) => (matrix.nrows(), matrix.ncols()),
        };
        Self { operand, shape, transposed: shape.0 > shape.1 }
    }

    fn short(&self) -> usize {
        self.shape.0.min(self.shape.1)
    }

    fn long(&self) -> usize {
        self.shape.0.max(self.shape.1)
    }

    /// Calls `visit` with blocks of the matrix: the position on the long side and the values, short × part of the long
    /// side.
    fn for_each_chunk(
        &self,
        progress: &Progress,
        mut visit: impl FnMut(usize, MatRef<'_, f64>) -> Result<()>,
    ) -> Result<()> {
        let (short, long) = (self.short(), self.long());
        let view = match self.operand {
            Operand::View(view) => view,
            Operand::Dense(matrix) => return visit(0, if self.transposed { matrix.transpose() } else { matrix }),
        };
        let step = (CHUNK_VALUES / short).clamp(1, long);
        let mut row = vec![0.0_f32; view.columns()];
        let mut chunk = Mat::<f64>::zeros(short, step);
        for first in (0..long).step_by(step) {
            progress.check()?;
            let count = step.min(long - first);
            if self.transposed {
                for j in 0..count {
                    view.copy_row(first + j, &mut row);
                    for (i, &value) in row.iter().enumerate() {
                        chunk[(i, j)] = f64::from(value);
                    }
                }
            } else {
                for i in 0..short {
                    view.copy_row(i, &mut row);
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
    fn gram(&self, norm: &Norm, progress: &Progress) -> Result<Mat<f64>> {
        let (short, long) = (self.short(), self.long());
        let long_weight = if self.transposed { &norm.input } else { &norm.output };
        if let Weight::Full(_) = long_weight {
            let mut whole = Mat::zeros(short, long);
            self.for_each_chunk(progress, |first, chunk| {
                whole.as_mut().subcols_mut(first, chunk.ncols()).copy_from(chunk);
                Ok(())
            })?;
            let weighted = long_weight.times(whole.transpose());
            progress.check()?;
            return Ok(product(whole.as_ref(), weighted.as_ref()));
        }
        let mut gram = Mat::zeros(short, short);
        self.for_each_chunk(progress, |first, chunk| {
            let weighted = match long_weight {
                Weight::Diagonal(values) => {
                    Some(Mat::from_fn(chunk.nrows(), chunk.ncols(), |i, j| chunk[(i, j)] * values[first + j]))
                }
                _ => None,
            };
            let weighted = weighted.as_ref().map_or(chunk, Mat::as_ref);
            matmul(gram.as_mut(), Accum::Add, weighted, chunk.transpose(), 1.0, Par::Seq);
            Ok(())
        })?;
        Ok(gram)
    }

    fn whiten(&self, norm: &Norm, roots: &Roots, progress: &Progress) -> Result<Whitened> {
        progress.check()?;
        let half = roots.0.times(self.gram(norm, progress)?.as_ref());
        let gram = roots.0.times(half.transpose());
        progress.check()?;
        let (mut energies, vectors) = eigenvectors(gram.as_ref())?;
        // Rounding can make a zero eigenvalue slightly negative.
        energies.iter_mut().for_each(|energy| *energy = energy.max(0.0));
        progress.check()?;
        Ok(Whitened { energies, vectors })
    }
}

/// An order of the rows of `basis : (s, k)` with `k` well-conditioned rows first, and the coefficients `T : (k, s − k)`
/// of the others: `basis[order[k..]] = Tᵀ basis[order[..k]]`.
///
/// The first rows are the pivots of a QR decomposition of the transpose. The choice is greedy, but in practice no
/// coefficient is much larger than 1.
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

impl Rescale for LowRank {
    fn rescaled(mut self, exponent: i32) -> Option<Self> {
        // The other factor holds coefficients of the pivots, which do not depend on the scale.
        let pivots = if self.shape.pivots_on_rows() { &mut self.right } else { &mut self.left };
        scale(pivots, exponent).then_some(self)
    }
}

impl LowRank {
    /// The dense matrix, row-major `(m, n)`, in the original order of rows and columns; sums in f64.
    ///
    /// # Cost
    /// `rank·(s − rank)·l` MACs for the sides `s ≤ l`.
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
