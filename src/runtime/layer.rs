//! One linear layer by itself: what benchmarks time.

use candle_core::{Device, Tensor};

use super::kronecker::{Kronecker, Way};
use super::linear::{Linear, Part, Term};
use super::rows::Rows;
use super::thread_pool::Workers;
use crate::error::{Error, Result};
use crate::permute::Permutation;
use crate::spec::KroneckerShape;

/// `y = x W` for a `W` in × out, dense or a permuted Kronecker sum, as a model runs it.
#[derive(Clone, Debug)]
pub struct Layer(Linear);

impl Layer {
    /// A layer of the dense matrix `w : (m, n)`, row-major.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `w` has `m·n` values.
    pub fn dense(w: &[f32], m: usize, n: usize) -> Result<Self> {
        let w = tensor(w, &[m, n])?;
        Ok(Self::of(m, n, Term::Dense(Rows::new(&w.t().expect("two dimensions"))?)))
    }

    /// A layer of `W` with `W[p][:, q] = Σ_k A_k ⊗ B_k`, for `a : (rank, m1, n1)` and `b : (rank, m2, n2)`.
    ///
    /// # Errors
    /// [`Error::Shape`] for factors or permutations of another length than `shape` says.
    pub fn kronecker(shape: KroneckerShape, a: &[f32], b: &[f32], p: &Permutation, q: &Permutation) -> Result<Self> {
        let KroneckerShape { m1, n1, m2, n2, rank } = shape;
        let (a, b) = (tensor(a, &[rank, m1, n1])?, tensor(b, &[rank, m2, n2])?);
        for (permutation, length) in [(p, shape.rows()), (q, shape.columns())] {
            let found = permutation.as_slice().len();
            if found != length {
                return Err(unlike(format!("a permutation of {length}"), format!("one of {found}")));
            }
        }
        let kronecker = Kronecker::new(shape, &a, &b, p, &q.inverse())?;
        Ok(Self::of(shape.rows(), shape.columns(), Term::Kronecker(kronecker)))
    }

    fn of(rows: usize, columns: usize, term: Term) -> Self {
        Self(Linear { rows, columns, parts: vec![Part { columns, terms: vec![term] }], bias: Vec::new() })
    }

    /// Features that go in, and that come out.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        (self.0.rows, self.0.columns)
    }

    /// `x W` for `x : (count, m)`, as `(count, n)`; a Kronecker sum in the way that is asked for.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `x` has `count·m` values.
    pub fn times(&self, x: &[f32], count: usize, way: Way, workers: &Workers) -> Result<Vec<f32>> {
        let values = count.checked_mul(self.0.rows);
        if values != Some(x.len()) {
            return Err(unlike(format!("{count} rows of {} values", self.0.rows), format!("{} values", x.len())));
        }
        Ok(self.0.forward_by(x, count, way, workers))
    }
}

fn tensor(values: &[f32], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &Device::Cpu)
        .map_err(|_| unlike(format!("values of the shape {shape:?}"), format!("{} values", values.len())))
}

fn unlike(expected: String, got: String) -> Error {
    Error::Shape { operation: "layer", expected, got }
}
