//! Conversion between numpy arrays and slices, with all checks of their layout and shape.

use half::slice::HalfBitsSliceExt as _;
use numpy::ndarray::{Array, Dimension, IntoDimension};
use numpy::{
    Element, PyArray, PyArray1, PyArray3, PyReadonlyArray, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3,
};
use pyo3::prelude::*;

use crate::error::{Error, Result};
use crate::kron::KroneckerSum;
use crate::numeric::{Float, Values};
use crate::permute::Permutation;
use crate::spec::KroneckerShape;

/// The values of a C-contiguous matrix, row-major, and its shape.
pub(super) fn matrix<'a>(array: &'a PyReadonlyArray2<'_, f32>) -> Result<(&'a [f32], (usize, usize))> {
    let (m, n) = array.as_array().dim();
    Ok((contiguous(array.as_slice().ok(), "matrix")?, (m, n)))
}

/// The values of an array that must be C-contiguous.
pub(super) fn contiguous<'a, T>(slice: Option<&'a [T]>, operation: &'static str) -> Result<&'a [T]> {
    slice.ok_or_else(|| Error::Shape {
        operation,
        expected: "a C-contiguous array".into(),
        got: "another memory layout".into(),
    })
}

/// Values of float32, or the bits of float16 or bfloat16.
pub(super) enum FloatArray<'py, D: Dimension> {
    Single(PyReadonlyArray<'py, f32, D>),
    Half(PyReadonlyArray<'py, u16, D>),
}

impl<'a, 'py, D: Dimension + 'static> FromPyObject<'a, 'py> for FloatArray<'py, D> {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        match object.extract() {
            Ok(array) => Ok(Self::Single(array)),
            Err(_) => Ok(Self::Half(object.extract()?)),
        }
    }
}

impl<D: Dimension> FloatArray<'_, D> {
    /// The values and their shape.
    pub(super) fn values(&self, dtype: &str) -> Result<(Values<'_>, D::Pattern)> {
        match (self, Float::from_name(dtype)?) {
            (Self::Single(array), Float::F32) => {
                let array = array.as_array();
                let shape = array.dim();
                Ok((Values::F32(contiguous(array.to_slice(), "values")?), shape))
            }
            (Self::Half(array), float @ (Float::F16 | Float::Bf16)) => {
                let array = array.as_array();
                let shape = array.dim();
                let bits = contiguous(array.to_slice(), "values")?;
                let values = match float {
                    Float::F16 => Values::F16(bits.reinterpret_cast()),
                    _ => Values::Bf16(bits.reinterpret_cast()),
                };
                Ok((values, shape))
            }
            (Self::Single(_), other) => Err(unlike("float32", other)),
            (Self::Half(_), other) => Err(unlike("float16 or bfloat16", other)),
        }
    }
}

pub(super) fn unlike(array: &str, float: Float) -> Error {
    Error::Dtype { expected: array.into(), got: float.name().into() }
}

/// The factor shapes that `A` and `B` have together.
pub(super) fn factor_shape(a: &PyReadonlyArray3<'_, f32>, b: &PyReadonlyArray3<'_, f32>) -> Result<KroneckerShape> {
    let ((rank, m1, n1), (b_rank, m2, n2)) = (a.as_array().dim(), b.as_array().dim());
    if rank != b_rank {
        return Err(Error::Shape {
            operation: "factors",
            expected: format!("B with the {rank} terms of A"),
            got: format!("{b_rank} terms"),
        });
    }
    KroneckerShape::new(m1 * m2, n1 * n2, (m2, n2), rank)
}

/// `A` and `B`.
type FactorArrays<'py> = (Bound<'py, PyArray3<f32>>, Bound<'py, PyArray3<f32>>);

/// The factors of a sum, without a copy.
pub(super) fn factor_arrays(py: Python<'_>, sum: KroneckerSum) -> FactorArrays<'_> {
    let KroneckerShape { m1, n1, m2, n2, rank } = sum.shape;
    (shaped(py, (rank, m1, n1), sum.a), shaped(py, (rank, m2, n2), sum.b))
}

/// A permutation of `length` elements from gather indices.
pub(super) fn permutation(indices: &PyReadonlyArray1<'_, i64>, length: usize) -> Result<Permutation> {
    let view = indices.as_array();
    if view.len() != length {
        return Err(Error::Shape {
            operation: "permutation",
            expected: format!("{length} indices"),
            got: view.len().to_string(),
        });
    }
    // A negative index maps to one that is out of range.
    Permutation::new(view.iter().map(|&index| usize::try_from(index).unwrap_or(usize::MAX)).collect())
}

/// Gather indices as an int64 array.
pub(super) fn indices<'py>(py: Python<'py>, order: impl Iterator<Item = usize>) -> Bound<'py, PyArray1<i64>> {
    PyArray1::from_iter(py, order.map(|index| index as i64))
}

/// `values` as an array of the given shape, without a copy.
pub(super) fn shaped<'py, T: Element, D: Dimension>(
    py: Python<'py>,
    shape: impl IntoDimension<Dim = D>,
    values: Vec<T>,
) -> Bound<'py, PyArray<T, D>> {
    let array = Array::from_shape_vec(shape, values).expect("kernels return as many values as their shape has");
    PyArray::from_owned_array(py, array)
}
