//! An approximate inverse of the curvature of `‖W − K‖²` in the factors of a Kronecker sum.
//!
//! If the norm's weights were Kronecker products that follow the blocks, `C_in[p][:, p] = C1 ⊗ C2` and
//! `C_out[q][:, q] = D1 ⊗ D2`, the curvature in `a` for a fixed `b` would be `(D1 ⊗ C1) a ⟨b, (D2 ⊗ C2) b⟩`: two small
//! matrices and a Gram matrix of size `rank`. Partial traces give the `C1`, `C2`, `D1`, `D2` that are nearest to this.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::{factor, solve};
use faer::{Auto, Mat, MatRef, Par, Spec};

use super::factors::Factors;
use super::moment::{Norm, Real, Weight, product, single};
use crate::error::Result;
use crate::spec::KroneckerShape;

/// Regularisation of a factor's Gram matrix, as a share of its mean eigenvalue. Without it, terms far below the mean
/// take steps that are too long in the true norm.
const REGULARISATION: f64 = 1e-3;

/// The two factors of each side's weight.
pub(super) struct BlockWeights {
    c1: Weight,
    c2: Weight,
    d1: Weight,
    d2: Weight,
}

impl BlockWeights {
    /// The partial traces of the weights of `norm` in the order of `factors`.
    pub fn new(factors: &Factors, norm: &Norm) -> Self {
        let KroneckerShape { m1, n1, m2, n2, .. } = factors.shape;
        let (c1, c2) = partial_traces(&norm.input, &factors.row_permutation, m1, m2);
        let (d1, d2) = partial_traces(&norm.output, &factors.column_permutation, n1, n2);
        Self { c1, c2, d1, d2 }
    }

    /// Sets `factors` to those nearest to the rearranged matrix `gathered` in the norm of these weights.
    pub fn set_nearest(&self, factors: &mut Factors, gathered: MatRef<'_, f64>) -> Result<()> {
        let KroneckerShape { m1, n1, m2, n2, rank } = factors.shape;
        let ((c1, inverse_c1), (c2, inverse_c2)) = (self.c1.roots()?, self.c2.roots()?);
        let ((d1, inverse_d1), (d2, inverse_d2)) = (self.d1.roots()?, self.d2.roots()?);
        let whitened = both_sides(gathered, (m1, n1), &c1, &d1);
        let whitened = both_sides(whitened.transpose().to_owned().as_ref(), (m2, n2), &c2, &d2);
        factors.set_nearest(whitened.transpose())?;
        debug_assert_eq!(factors.a.ncols(), rank);
        factors.a = both_sides(factors.a.as_ref(), (m1, n1), &inverse_c1, &inverse_d1);
        factors.b = both_sides(factors.b.as_ref(), (m2, n2), &inverse_c2, &inverse_d2);
        factors.balance();
        Ok(())
    }

    /// The approximate inverse curvature at `factors`.
    pub fn preconditioner(&self, factors: &Factors) -> Preconditioner {
        let KroneckerShape { m1, n1, m2, n2, .. } = factors.shape;
        let gram = |factor: &Mat<f64>, shape, left, right| {
            let weighted = both_sides(factor.as_ref(), shape, left, right);
            let mut gram = product(factor.transpose(), weighted.as_ref());
            let size = gram.nrows();
            let mean = (0..size).map(|k| gram[(k, k)]).sum::<f64>() / size as f64;
            // A zero factor has no curvature, so any positive number works.
            let added = if mean > 0.0 { REGULARISATION * mean } else { 1.0 };
            (0..size).for_each(|k| gram[(k, k)] += added);
            single(inverse(gram).as_ref())
        };
        Preconditioner {
            a_shape: (m1, n1),
            b_shape: (m2, n2),
            a_sides: (inverse_weight(&self.c1), inverse_weight(&self.d1)),
            b_sides: (inverse_weight(&self.c2), inverse_weight(&self.d2)),
            a_gram: gram(&factors.b, (m2, n2), &self.c2, &self.d2),
            b_gram: gram(&factors.a, (m1, n1), &self.c1, &self.d1),
        }
    }
}

/// `C1[i, i'] = Σ_t C[(i, t), (i', t)] / d2` and `C2[i, i'] = Σ_t C[(t, i), (t, i')] / d1` in the given order.
fn partial_traces(weight: &Weight, order: &[usize], d1: usize, d2: usize) -> (Weight, Weight) {
    let mean = |count: usize, value: &dyn Fn(usize) -> f64| (0..count).map(value).sum::<f64>() / count as f64;
    match weight {
        Weight::Identity => (Weight::Identity, Weight::Identity),
        Weight::Diagonal(values) => (
            Weight::Diagonal((0..d1).map(|i| mean(d2, &|t| values[order[i * d2 + t]])).collect()),
            Weight::Diagonal((0..d2).map(|i| mean(d1, &|t| values[order[t * d2 + i]])).collect()),
        ),
        Weight::Full(c) => (
            Weight::Full(Mat::from_fn(d1, d1, |i, j| mean(d2, &|t| c[(order[i * d2 + t], order[j * d2 + t])]))),
            Weight::Full(Mat::from_fn(d2, d2, |i, j| mean(d1, &|t| c[(order[t * d2 + i], order[t * d2 + j])]))),
        ),
    }
}

/// `left X_k right` for the matrix `X_k` of the given shape in each column of `columns`.
fn both_sides<T: Real>(columns: MatRef<'_, T>, shape: (usize, usize), left: &Weight<T>, right: &Weight<T>) -> Mat<T> {
    let ((height, width), count) = (shape, columns.ncols());
    if let (Weight::Identity, Weight::Identity) = (left, right) {
        return columns.to_owned();
    }
    // One product of all matrices side by side.
    let values: Vec<T> = columns.col_iter().flat_map(|column| column.iter().copied()).collect();
    let mut weighted = left.times(MatRef::from_column_major_slice(&values, height, width * count));
    if height == 1 {
        let rows = Mat::from_fn(width, count, |j, k| weighted[(0, k * width + j)]);
        return right.times(rows.as_ref());
    }
    if !matches!(right, Weight::Identity) {
        for k in 0..count {
            let product = right.times(weighted.as_ref().subcols(k * width, width).transpose());
            weighted.as_mut().subcols_mut(k * width, width).copy_from(product.transpose());
        }
    }
    Mat::from_fn(height * width, count, |at, k| weighted[(at % height, k * width + at / height)])
}

/// The approximate inverse of the curvature at given factors, in f32: it need not be exact.
pub(super) struct Preconditioner {
    a_shape: (usize, usize),
    b_shape: (usize, usize),
    a_sides: (Weight<f32>, Weight<f32>),
    b_sides: (Weight<f32>, Weight<f32>),
    a_gram: Mat<f32>,
    b_gram: Mat<f32>,
}

impl Preconditioner {
    /// Applies it to a gradient with respect to `a` and `b`.
    pub fn apply(&self, a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> (Mat<f32>, Mat<f32>) {
        let a = both_sides(a, self.a_shape, &self.a_sides.0, &self.a_sides.1);
        let b = both_sides(b, self.b_shape, &self.b_sides.0, &self.b_sides.1);
        (product(a.as_ref(), self.a_gram.as_ref()), product(b.as_ref(), self.b_gram.as_ref()))
    }
}

fn inverse_weight(weight: &Weight) -> Weight<f32> {
    let inverse = match weight {
        Weight::Identity => Weight::Identity,
        Weight::Diagonal(values) => Weight::Diagonal(values.iter().map(|value| value.recip()).collect()),
        Weight::Full(matrix) => Weight::Full(inverse(matrix.clone())),
    };
    inverse.to_single()
}

/// The inverse of a positive definite matrix, or of its diagonal if rounding made it indefinite: a preconditioner need
/// not be exact.
fn inverse(mut matrix: Mat<f64>) -> Mat<f64> {
    let size = matrix.nrows();
    let diagonal: Vec<f64> = (0..size).map(|i| matrix[(i, i)]).collect();
    let parameters = Spec::<_, f64>::new(Auto::<f64>::auto());
    let mut memory = MemBuffer::new(factor::cholesky_in_place_scratch::<f64>(size, Par::Seq, parameters));
    let stack = MemStack::new(&mut memory);
    if factor::cholesky_in_place(matrix.as_mut(), factor::LltRegularization::default(), Par::Seq, stack, parameters)
        .is_err()
    {
        return Mat::from_fn(size, size, |i, j| if i == j && diagonal[i] > 0.0 { diagonal[i].recip() } else { 0.0 });
    }
    let mut inverse = Mat::identity(size, size);
    let mut memory = MemBuffer::new(solve::solve_in_place_scratch::<f64>(size, size, Par::Seq));
    solve::solve_in_place(matrix.as_ref(), inverse.as_mut(), Par::Seq, MemStack::new(&mut memory));
    inverse
}
