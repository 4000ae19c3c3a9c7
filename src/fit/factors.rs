//! A permuted Kronecker sum as the descent sees it: two f64 matrices whose product is the rearranged matrix.

use faer::{Mat, MatRef};

use super::moment::{Real, product};
use crate::error::Result;
use crate::kron::{KroneckerSum, eigenvectors};
use crate::permute::{Decomposition, Permutation};
use crate::spec::{KroneckerShape, Permute};

/// `K[p][:, q] = Σ_k A_k ⊗ B_k`, or `R(K[p][:, q]) = a bᵀ` for the rearranged matrix `R` of Van Loan and Pitsianis.
///
/// A low-rank matrix `a bᵀ` is the sum of block `(1, n)`.
#[derive(Clone, Debug)]
pub(super) struct Factors {
    pub shape: KroneckerShape,
    /// `p` as gather indices.
    pub row_permutation: Vec<usize>,
    /// `q`, likewise.
    pub column_permutation: Vec<usize>,
    /// One column for each `A_k`, column-major within: `(m1·n1, rank)`.
    pub a: Mat<f64>,
    /// One column for each `B_k`, column-major within: `(m2·n2, rank)`.
    pub b: Mat<f64>,
}

impl Factors {
    /// Zero factors in the matrix's own order.
    pub fn zeros(shape: KroneckerShape) -> Self {
        Self {
            shape,
            row_permutation: (0..shape.rows()).collect(),
            column_permutation: (0..shape.columns()).collect(),
            a: Mat::zeros(shape.blocks(), shape.rank),
            b: Mat::zeros(shape.block_entries(), shape.rank),
        }
    }

    /// Factors of `a bᵀ`.
    pub fn low_rank(a: Mat<f64>, b: Mat<f64>) -> Self {
        let shape = KroneckerShape { m1: a.nrows(), n1: 1, m2: 1, n2: b.nrows(), rank: a.ncols() };
        Self {
            shape,
            row_permutation: (0..shape.rows()).collect(),
            column_permutation: (0..shape.columns()).collect(),
            a,
            b,
        }
    }

    /// The factors of a finished decomposition.
    pub fn from_decomposition(decomposition: &Decomposition) -> Self {
        let sum = &decomposition.sum;
        let KroneckerShape { m1, n1, m2, n2, rank } = sum.shape;
        let mut factors = Self::zeros(sum.shape);
        for (order, found) in [
            (&mut factors.row_permutation, &decomposition.row_permutation),
            (&mut factors.column_permutation, &decomposition.column_permutation),
        ] {
            if let Some(found) = found {
                order.copy_from_slice(found.as_slice());
            }
        }
        let column_major = |values: &[f32], (height, width): (usize, usize)| {
            Mat::from_fn(height * width, rank, |at, k| {
                f64::from(values[k * height * width + at % height * width + at / height])
            })
        };
        factors.a = column_major(&sum.a, (m1, n1));
        factors.b = column_major(&sum.b, (m2, n2));
        factors
    }

    /// Calls `visit` with the indices of every entry in the rearranged matrix and in the matrix, column by column.
    fn for_each_place(&self, mut visit: impl FnMut(usize, usize, usize, usize)) {
        let KroneckerShape { m1, n1, m2, n2, .. } = self.shape;
        for j2 in 0..n2 {
            for i2 in 0..m2 {
                for j1 in 0..n1 {
                    let column = self.column_permutation[j1 * n2 + j2];
                    for i1 in 0..m1 {
                        visit(i1 + m1 * j1, i2 + m2 * j2, self.row_permutation[i1 * m2 + i2], column);
                    }
                }
            }
        }
    }

    /// `R(X[p][:, q])`, of shape `(m1·n1, m2·n2)`.
    pub fn gather<T: Real>(&self, x: MatRef<'_, T>) -> Mat<T> {
        let mut gathered = Mat::zeros(self.shape.blocks(), self.shape.block_entries());
        self.for_each_place(|block, entry, row, column| gathered[(block, entry)] = x[(row, column)]);
        gathered
    }

    /// `X −= K`.
    pub fn subtract_from(&self, x: &mut Mat<f64>) {
        let product = product(self.a.as_ref(), self.b.transpose());
        self.for_each_place(|block, entry, row, column| x[(row, column)] -= product[(block, entry)]);
    }

    /// `K`.
    pub fn dense(&self) -> Mat<f64> {
        let product = product(self.a.as_ref(), self.b.transpose());
        let mut dense = Mat::zeros(self.shape.rows(), self.shape.columns());
        self.for_each_place(|block, entry, row, column| dense[(row, column)] = product[(block, entry)]);
        dense
    }

    /// Sets the factors to those nearest to the rearranged matrix `gathered` in the Frobenius norm.
    ///
    /// Cost: a Gram matrix and an eigendecomposition of its shorter side.
    pub fn set_nearest(&mut self, gathered: MatRef<'_, f64>) -> Result<()> {
        let flat = gathered.nrows() < gathered.ncols();
        let tall = if flat { gathered.transpose() } else { gathered };
        let (_, vectors) = eigenvectors(product(tall.transpose(), tall).as_ref())?;
        let leading = vectors.subcols(vectors.ncols() - self.shape.rank, self.shape.rank).to_owned();
        let projected = product(tall, leading.as_ref());
        (self.a, self.b) = if flat { (leading, projected) } else { (projected, leading) };
        self.balance();
        Ok(())
    }

    /// Whether nothing has been fitted yet.
    pub fn is_zero(&self) -> bool {
        let zero = |factor: &Mat<f64>| factor.col_iter().all(|column| column.iter().all(|&value| value == 0.0));
        zero(&self.a) || zero(&self.b)
    }

    /// Multiplies the sum by `scale`.
    pub fn scale(&mut self, scale: f64) {
        self.b.col_iter_mut().for_each(|column| column.iter_mut().for_each(|value| *value *= scale));
        self.balance();
    }

    /// Gives the two factors of each term the same norm.
    pub fn balance(&mut self) {
        for k in 0..self.shape.rank {
            let square = |factor: &Mat<f64>| factor.col(k).iter().map(|value| value * value).sum::<f64>();
            let (a, b) = (square(&self.a), square(&self.b));
            // A term with a zero factor is zero. Square roots of powers of two are exact, other powers need not be.
            let (to_a, to_b) =
                if a > 0.0 && b > 0.0 { ((b / a).sqrt().sqrt(), (a / b).sqrt().sqrt()) } else { (0.0, 0.0) };
            self.a.col_mut(k).iter_mut().for_each(|value| *value *= to_a);
            self.b.col_mut(k).iter_mut().for_each(|value| *value *= to_b);
        }
    }

    /// The result in f32: terms in descending order of norm, balanced, with the first entry of largest magnitude of
    /// each `B_k` positive, as [`crate::kron::nearest_kronecker_sum`] gives them.
    pub fn decomposition(&self, permute: Permute, lost_energy: f64) -> Result<Decomposition> {
        let mut balanced = self.clone();
        balanced.balance();
        let KroneckerShape { m1, n1, m2, n2, rank } = self.shape;
        let mut order: Vec<(f64, usize)> =
            (0..rank).map(|k| (balanced.a.col(k).iter().map(|value| value * value).sum(), k)).collect();
        order.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1)));
        let (mut a, mut b) = (Vec::with_capacity(rank * m1 * n1), Vec::with_capacity(rank * m2 * n2));
        for (_, k) in order {
            let (mut largest, first) = (0.0_f64, b.len());
            b.extend((0..m2 * n2).map(|at| balanced.b[(at / n2 + m2 * (at % n2), k)] as f32));
            for &value in &b[first..] {
                if f64::from(value).abs() > largest.abs() {
                    largest = f64::from(value);
                }
            }
            let sign = if largest < 0.0 { -1.0 } else { 1.0 };
            b[first..].iter_mut().for_each(|value| *value *= sign);
            a.extend((0..m1 * n1).map(|at| balanced.a[(at / n1 + m1 * (at % n1), k)] as f32 * sign));
        }
        let order = |wanted: bool, order: &[usize]| wanted.then(|| Permutation::new(order.to_vec())).transpose();
        Ok(Decomposition {
            sum: KroneckerSum { shape: self.shape, a, b, lost_energy },
            row_permutation: order(permute.rows(), &self.row_permutation)?,
            column_permutation: order(permute.columns(), &self.column_permutation)?,
        })
    }
}
