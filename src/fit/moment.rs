//! The norm of an approximation: the distribution of a layer's inputs, and the loss's sensitivity to each output.
//!
//! `‖E‖² = tr(C_in E C_out Eᵀ)` for an error `E = W − Ŵ` of shape `(m, n)`, with the second moment of the layer's
//! inputs `C_in = E[x xᵀ]` (SVD-LLM, arXiv 2403.07378) and that of the gradients at its outputs `C_out = E[g gᵀ]`: the
//! Kronecker-factored Gauss–Newton matrix (Martens and Grosse, arXiv 1503.05671), which approximates the growth of the
//! model's loss under an error of this layer. A side without a moment is the identity; without both it is the Frobenius
//! norm.

use std::ops::Mul;

use faer::linalg::matmul::matmul;
use faer::traits::RealField;
use faer::{Accum, Mat, MatRef, Par};

use crate::error::{Error, Result};
use crate::kron::eigenvectors;

/// Shrinkage of a moment towards its mean eigenvalue times the identity. Few samples leave some directions unobserved;
/// shrinkage keeps their weight above zero, so that singular moments need no special case. Between 1e-6 and 0.1 the
/// perplexity of compressed models hardly depends on it.
const SHRINKAGE: f64 = 0.01;

/// A second moment of one side: symmetric and positive semidefinite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moment<'a> {
    /// Only its diagonal is known, or it has no other entries.
    Diagonal(&'a [f32]),
    /// The whole matrix, row-major `(d, d)`. It is averaged with its transpose.
    Full(&'a [f32]),
}

impl Moment<'_> {
    /// Checks a moment of a side of `length`: the shape, finite values, no negative diagonal.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Config`].
    pub fn check(&self, which: &'static str, length: usize) -> Result<()> {
        let (values, expected, step) = match self {
            Self::Diagonal(values) => (values, length, 1),
            Self::Full(values) => (values, length * length, length + 1),
        };
        if values.len() != expected {
            return Err(Error::Shape {
                operation: which,
                expected: format!("({length}, {length}), or ({length}) for a diagonal"),
                got: format!("{} values", values.len()),
            });
        }
        if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::Config(format!("{which}: expected finite values, got {bad}")));
        }
        if let Some(bad) = values.iter().step_by(step).find(|&&value| value < 0.0) {
            return Err(Error::Config(format!("{which}: expected a diagonal without negative values, got {bad}")));
        }
        Ok(())
    }
}

/// The two moments of a norm, as given; see [`Norm::prepare`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments<'a> {
    /// `C_in`, of the rows' side.
    pub input: Option<Moment<'a>>,
    /// `C_out`, of the columns' side.
    pub output: Option<Moment<'a>>,
}

/// One side of a [`Norm`], shrunk and scaled to a mean diagonal of 1; [`Norm::scale`] keeps the scale.
#[derive(Clone, Debug)]
pub enum Weight<T = f64> {
    /// The identity.
    Identity,
    /// Positive entries.
    Diagonal(Vec<T>),
    /// A positive definite matrix.
    Full(Mat<T>),
}

/// A norm for matrices of shape `(m, n)`: `‖E‖² = tr(C_in E C_out Eᵀ)`.
#[derive(Clone, Debug)]
pub struct Norm<T = f64> {
    /// `C_in`.
    pub input: Weight<T>,
    /// `C_out`.
    pub output: Weight<T>,
    /// The factor from squared norms to the units of the given moments.
    pub scale: f64,
}

impl Norm {
    /// The Frobenius norm.
    #[must_use]
    pub fn frobenius() -> Self {
        Self { input: Weight::Identity, output: Weight::Identity, scale: 1.0 }
    }

    /// Checks and shrinks the moments for a matrix of shape `(m, n)`. A moment of zero (a layer that never saw an
    /// input) counts as none.
    ///
    /// # Errors
    /// Those of [`Moment::check`].
    pub fn prepare(moments: Moments<'_>, m: usize, n: usize) -> Result<Self> {
        let (input, input_scale) = Weight::prepare(moments.input, "input moment", m)?;
        let (output, output_scale) = Weight::prepare(moments.output, "output moment", n)?;
        Ok(Self { input, output, scale: input_scale * output_scale })
    }

    /// Whether it is the Frobenius norm.
    #[must_use]
    pub fn is_frobenius(&self) -> bool {
        matches!((&self.input, &self.output), (Weight::Identity, Weight::Identity))
    }

    /// `‖E‖²`, in the units of the shrunk norm.
    #[must_use]
    pub fn energy(&self, error: MatRef<'_, f64>) -> f64 {
        inner(self.apply(error).as_ref(), error)
    }

    /// The same norm with weights in f32, in which products take half the time.
    pub(super) fn to_single(&self) -> Norm<f32> {
        Norm { input: self.input.to_single(), output: self.output.to_single(), scale: self.scale }
    }
}

impl<T: Real> Norm<T> {
    /// `C_in E C_out`: half of the gradient of `‖E‖²`.
    ///
    /// # Cost
    /// `m·n·(m + n)` MACs with two full sides.
    #[must_use]
    pub fn apply(&self, error: MatRef<'_, T>) -> Mat<T> {
        let left = self.input.times(error);
        match &self.output {
            Weight::Identity => left,
            Weight::Diagonal(values) => Mat::from_fn(left.nrows(), left.ncols(), |i, j| left[(i, j)] * values[j]),
            Weight::Full(matrix) => product(left.as_ref(), matrix.as_ref()),
        }
    }
}

/// `Σ_ij X_ij Y_ij`, with products and sums in f64.
#[must_use]
pub fn inner<T: Copy + Into<f64>>(x: MatRef<'_, T>, y: MatRef<'_, T>) -> f64 {
    (0..x.ncols()).map(|j| (0..x.nrows()).map(|i| x[(i, j)].into() * y[(i, j)].into()).sum::<f64>()).sum()
}

impl Weight {
    fn prepare(moment: Option<Moment<'_>>, which: &'static str, length: usize) -> Result<(Self, f64)> {
        let Some(moment) = moment else { return Ok((Self::Identity, 1.0)) };
        moment.check(which, length)?;
        let diagonal = |i: usize| match moment {
            Moment::Diagonal(values) => f64::from(values[i]),
            Moment::Full(values) => f64::from(values[i * (length + 1)]),
        };
        let mean = (0..length).map(diagonal).sum::<f64>() / length as f64;
        if mean <= 0.0 {
            return Ok((Self::Identity, 0.0));
        }
        let keep = (1.0 - SHRINKAGE) / mean;
        let weight = match moment {
            Moment::Diagonal(values) => {
                Self::Diagonal(values.iter().map(|&value| f64::from(value) * keep + SHRINKAGE).collect())
            }
            Moment::Full(values) => Self::Full(Mat::from_fn(length, length, |i, j| {
                let both = 0.5 * (f64::from(values[i * length + j]) + f64::from(values[j * length + i]));
                both * keep + if i == j { SHRINKAGE } else { 0.0 }
            })),
        };
        Ok((weight, mean))
    }

    /// The same weight in f32.
    pub(super) fn to_single(&self) -> Weight<f32> {
        match self {
            Self::Identity => Weight::Identity,
            Self::Diagonal(values) => Weight::Diagonal(values.iter().map(|&value| value as f32).collect()),
            Self::Full(matrix) => Weight::Full(single(matrix.as_ref())),
        }
    }

    /// `(C^½, C^−½)`.
    ///
    /// # Errors
    /// [`Error::Convergence`].
    ///
    /// # Cost
    /// One eigendecomposition for a full weight.
    pub fn roots(&self) -> Result<(Self, Self)> {
        Ok(match self {
            Self::Identity => (Self::Identity, Self::Identity),
            Self::Diagonal(values) => (
                Self::Diagonal(values.iter().map(|value| value.sqrt()).collect()),
                Self::Diagonal(values.iter().map(|value| value.sqrt().recip()).collect()),
            ),
            Self::Full(matrix) => {
                let (values, vectors) = eigenvectors(matrix.as_ref())?;
                // Rounding may leave an eigenvalue below what was added to it.
                let roots: Vec<f64> = values.iter().map(|value| value.max(0.1 * SHRINKAGE).sqrt()).collect();
                let power = |power: &dyn Fn(f64) -> f64| {
                    let scaled =
                        Mat::from_fn(vectors.nrows(), vectors.ncols(), |i, j| vectors[(i, j)] * power(roots[j]));
                    product(scaled.as_ref(), vectors.transpose())
                };
                (Self::Full(power(&|root| root)), Self::Full(power(&|root| root.recip())))
            }
        })
    }
}

impl<T: Real> Weight<T> {
    /// `C X`.
    #[must_use]
    pub fn times(&self, x: MatRef<'_, T>) -> Mat<T> {
        match self {
            Self::Identity => x.to_owned(),
            Self::Diagonal(values) => Mat::from_fn(x.nrows(), x.ncols(), |i, j| values[i] * x[(i, j)]),
            Self::Full(matrix) => product(matrix.as_ref(), x),
        }
    }
}

/// f32, or f64 where it is not said otherwise.
pub trait Real: RealField + Copy + Mul<Output = Self> {}

impl<T: RealField + Copy + Mul<Output = T>> Real for T {}

/// `x y`, on the calling thread: jobs run their matrices in parallel.
#[must_use]
pub(super) fn product<T: Real>(x: MatRef<'_, T>, y: MatRef<'_, T>) -> Mat<T> {
    let mut product = Mat::zeros(x.nrows(), y.ncols());
    matmul(product.as_mut(), Accum::Replace, x, y, T::one_impl(), Par::Seq);
    product
}

/// `x` in f32.
#[must_use]
pub(super) fn single(x: MatRef<'_, f64>) -> Mat<f32> {
    Mat::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] as f32)
}
