//! `times_low_rank` and `times_kronecker`: layers of torch for a few rows.

use half::vec::HalfFloatVecExt as _;
use numpy::PyReadonlyArray1;
use numpy::ndarray::{Ix1, Ix2, Ix3};
use pyo3::prelude::*;

use super::arrays::{FloatArray, contiguous, shaped};
use super::jobs;
use crate::error::{Error, Result};
use crate::numeric::OwnedValues;
use crate::runtime::{Factor, Sides, ThreadPool, times_kronecker, times_low_rank};

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(low_rank_rows, module)?)?;
    module.add_function(wrap_pyfunction!(kronecker_rows, module)?)
}

#[pyfunction]
#[pyo3(name = "times_low_rank")]
#[allow(clippy::too_many_arguments)]
fn low_rank_rows<'py>(
    py: Python<'py>,
    x: FloatArray<'py, Ix2>,
    left: FloatArray<'py, Ix2>,
    right: FloatArray<'py, Ix2>,
    input: Option<PyReadonlyArray1<'py, i64>>,
    output: Option<PyReadonlyArray1<'py, i64>>,
    bias: Option<FloatArray<'py, Ix1>>,
    dtype: &str,
    transposed: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let ((left, (m, k)), (right, (l, n))) = (left.values(dtype)?, right.values(dtype)?);
    let (left, right) = (Factor::new(left, 1, m, k)?, Factor::new(right, 1, l, n)?);
    let sides = Arguments { input: &input, output: &output, bias: &bias, dtype, transposed };
    layer(py, &x, sides, |x, count, sides, pool| times_low_rank(x, count, left, right, sides, pool))
}

#[pyfunction]
#[pyo3(name = "times_kronecker")]
#[allow(clippy::too_many_arguments)]
fn kronecker_rows<'py>(
    py: Python<'py>,
    x: FloatArray<'py, Ix2>,
    a: FloatArray<'py, Ix3>,
    b: FloatArray<'py, Ix3>,
    input: Option<PyReadonlyArray1<'py, i64>>,
    output: Option<PyReadonlyArray1<'py, i64>>,
    bias: Option<FloatArray<'py, Ix1>>,
    dtype: &str,
    transposed: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let ((a, (rank, m1, n1)), (b, (b_rank, m2, n2))) = (a.values(dtype)?, b.values(dtype)?);
    let (a, b) = (Factor::new(a, rank, m1, n1)?, Factor::new(b, b_rank, m2, n2)?);
    let sides = Arguments { input: &input, output: &output, bias: &bias, dtype, transposed };
    layer(py, &x, sides, |x, count, sides, pool| times_kronecker(x, count, a, b, sides, pool))
}

/// What surrounds the products, as it comes from Python.
struct Arguments<'a, 'py> {
    input: &'a Option<PyReadonlyArray1<'py, i64>>,
    output: &'a Option<PyReadonlyArray1<'py, i64>>,
    bias: &'a Option<FloatArray<'py, Ix1>>,
    dtype: &'a str,
    transposed: bool,
}

/// Runs a layer, and returns its result in the dtype of its input.
fn layer<'py>(
    py: Python<'py>,
    x: &FloatArray<'py, Ix2>,
    arguments: Arguments<'_, 'py>,
    run: impl FnOnce(&[f32], usize, Sides<'_>, &ThreadPool) -> Result<Vec<f32>> + Send,
) -> PyResult<Bound<'py, PyAny>> {
    let Arguments { input, output, bias, dtype, transposed } = arguments;
    let (x, (count, _)) = x.values(dtype)?;
    let (input, output) = (indices(input)?, indices(output)?);
    let bias = bias.as_ref().map(|bias| bias.values(dtype).map(|(values, _)| values)).transpose()?;
    let sides = Sides { input, output, bias, transposed };
    // Torch's threads spin for milliseconds after its own operations: helpers would share the cores with them.
    let y = jobs::run_here(py, |_| {
        let alone = ThreadPool::new(1).map_err(|error| Error::Config(format!("threads: {error}")))?;
        run(x.as_f32(&mut Vec::new()), count, sides, &alone)
    })?;
    let width = y.len().checked_div(count).unwrap_or(0);
    Ok(match OwnedValues::rounded(x.float(), y) {
        OwnedValues::F32(y) => shaped(py, (count, width), y).into_any(),
        OwnedValues::F16(y) => shaped::<u16, _>(py, (count, width), y.reinterpret_into()).into_any(),
        OwnedValues::Bf16(y) => shaped::<u16, _>(py, (count, width), y.reinterpret_into()).into_any(),
    })
}

fn indices<'a>(array: &'a Option<PyReadonlyArray1<'_, i64>>) -> Result<Option<&'a [i64]>> {
    array.as_ref().map(|array| contiguous(array.as_slice().ok(), "indices")).transpose()
}
