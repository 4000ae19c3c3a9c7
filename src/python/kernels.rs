//! `nearest_kronecker_sum`, `find_permutation`, `reconstruct`, `expand`, `expand_gradients`, `apply` and `quantize`.

use half::bf16;
use numpy::{PyArray1, PyArray2, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3};
use pyo3::prelude::*;

use super::arrays::{contiguous, factor_arrays, factor_shape, indices, matrix, permutation, shaped};
use super::jobs;
use crate::error::{Error, Result};
use crate::kron::{KroneckerSum, MatrixView};
use crate::numeric::int8::{self, Quantized, Scales};
use crate::permute::{self, Decomposition, Effort, Permutation};
use crate::progress::Parallelism;
use crate::spec::{KroneckerShape, Permute};

/// `(A, B, lost_energy)`.
type NearestSum<'py> = (Bound<'py, PyArray3<f32>>, Bound<'py, PyArray3<f32>>, f64);
/// `(p, q, lost_energy)`.
type FoundOrders<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>, f64);

/// Matrices of up to this many entries are expanded on the calling thread, in a few milliseconds.
const SMALL: usize = 1 << 22;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(nearest_kronecker_sum, module)?)?;
    module.add_function(wrap_pyfunction!(find_permutation, module)?)?;
    module.add_function(wrap_pyfunction!(reconstruct, module)?)?;
    module.add_function(wrap_pyfunction!(expand, module)?)?;
    module.add_function(wrap_pyfunction!(expand_gradients, module)?)?;
    module.add_function(wrap_pyfunction!(apply, module)?)?;
    module.add_function(wrap_pyfunction!(quantize, module)?)
}

/// `(codes, the bits of the bfloat16 scales)`.
type Codes<'py> = (Bound<'py, PyArray1<i8>>, Bound<'py, PyArray1<u16>>);

#[pyfunction]
fn quantize<'py>(
    py: Python<'py>,
    values: PyReadonlyArray1<'py, f32>,
    rows: usize,
    columns: usize,
    by_rows: bool,
) -> PyResult<Codes<'py>> {
    let values = contiguous(values.as_slice().ok(), "values")?;
    let size = rows.saturating_mul(columns);
    if size == 0 || !values.len().is_multiple_of(size) {
        let expected = format!("matrices of {rows} × {columns}, neither of them 0");
        return Err(Error::Shape { operation: "quantize", expected, got: format!("{} values", values.len()) }.into());
    }
    let per = if by_rows { Scales::Rows } else { Scales::Columns };
    let Quantized { codes, scales } = jobs::run(py, None, |_| {
        int8::quantize(values, rows, columns, per).map_err(|(at, value)| Error::NonFinite {
            value,
            row: at / columns,
            column: at % columns,
        })
    })?;
    Ok((PyArray1::from_vec(py, codes), PyArray1::from_iter(py, scales.into_iter().map(bf16::to_bits))))
}

#[pyfunction]
fn nearest_kronecker_sum<'py>(
    py: Python<'py>,
    w: PyReadonlyArray2<'py, f32>,
    block: (usize, usize),
    rank: usize,
) -> PyResult<NearestSum<'py>> {
    let (data, (m, n)) = matrix(&w)?;
    let shape = KroneckerShape::new(m, n, block, rank)?;
    let sum = jobs::run(py, None, |progress| {
        crate::kron::nearest_kronecker_sum(MatrixView::new(data, m, n)?, shape, progress)
    })?;
    let lost_energy = sum.lost_energy;
    let (a, b) = factor_arrays(py, sum);
    Ok((a, b, lost_energy))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn find_permutation<'py>(
    py: Python<'py>,
    w: PyReadonlyArray2<'py, f32>,
    block: (usize, usize),
    rank: usize,
    permute: &str,
    effort: &str,
    seed: u64,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<FoundOrders<'py>> {
    let (data, (m, n)) = matrix(&w)?;
    let shape = KroneckerShape::new(m, n, block, rank)?;
    let (permute, effort) = (Permute::from_name(permute)?, Effort::from_name(effort)?);
    let pool = jobs::rayon_pool(threads)?;
    let (orders, lost_energy) = jobs::run(py, progress, |progress| {
        let view = MatrixView::new(data, m, n)?;
        progress.expect(permute::work(shape, permute, effort));
        let search = || permute::find_permutation(view, shape, permute, effort, seed, Parallelism::Rayon, progress);
        let found = pool.install(search)?;
        progress.finish();
        Ok(found)
    })?;
    Ok((indices(py, orders.rows.into_iter()), indices(py, orders.columns.into_iter()), lost_energy))
}

/// Factors and permutations from Python, checked and copied.
fn decomposition(
    a: &PyReadonlyArray3<'_, f32>,
    b: &PyReadonlyArray3<'_, f32>,
    p: &PyReadonlyArray1<'_, i64>,
    q: &PyReadonlyArray1<'_, i64>,
) -> Result<Decomposition> {
    let shape = factor_shape(a, b)?;
    let sum = KroneckerSum {
        shape,
        a: contiguous(a.as_array().as_slice(), "A")?.to_vec(),
        b: contiguous(b.as_array().as_slice(), "B")?.to_vec(),
        lost_energy: 0.0,
    };
    let (p, q) = (permutation(p, shape.rows())?, permutation(q, shape.columns())?);
    Ok(Decomposition { sum, row_permutation: Some(p), column_permutation: Some(q) })
}

#[pyfunction]
fn reconstruct<'py>(
    py: Python<'py>,
    a: PyReadonlyArray3<'py, f32>,
    b: PyReadonlyArray3<'py, f32>,
    p: PyReadonlyArray1<'py, i64>,
    q: PyReadonlyArray1<'py, i64>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let decomposition = decomposition(&a, &b, &p, &q)?;
    let shape = decomposition.sum.shape;
    let dense = jobs::run(py, None, |_| Ok(decomposition.to_dense()))?;
    Ok(shaped(py, (shape.rows(), shape.columns()), dense))
}

#[pyfunction]
fn expand<'py>(
    py: Python<'py>,
    a: PyReadonlyArray3<'py, f32>,
    b: PyReadonlyArray3<'py, f32>,
    rows: Option<PyReadonlyArray1<'py, i64>>,
    columns: Option<PyReadonlyArray1<'py, i64>>,
    threads: usize,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let shape = factor_shape(&a, &b)?;
    let (rows, columns) = (order(rows, shape.rows())?, order(columns, shape.columns())?);
    let (a, b) = (contiguous(a.as_slice().ok(), "A")?, contiguous(b.as_slice().ok(), "B")?);
    let (rows, columns) = (rows.as_ref().map(Permutation::as_slice), columns.as_ref().map(Permutation::as_slice));
    // Small matrices run on this thread: torch's threads spin for a while after a product and would compete with
    // others.
    let small = shape.rows() * shape.columns() <= SMALL;
    let matrix = jobs::run_by_size(py, small, Some(threads), |parallelism, progress| {
        crate::kron::expand(shape, a, b, rows, columns, parallelism, progress)
    })?;
    Ok(shaped(py, (shape.rows(), shape.columns()), matrix))
}

/// `(by A, by B)`.
type FactorGradients<'py> = (Bound<'py, PyArray3<f32>>, Bound<'py, PyArray3<f32>>);

#[pyfunction]
fn expand_gradients<'py>(
    py: Python<'py>,
    gradient: PyReadonlyArray2<'py, f32>,
    a: PyReadonlyArray3<'py, f32>,
    b: PyReadonlyArray3<'py, f32>,
    rows: Option<PyReadonlyArray1<'py, i64>>,
    columns: Option<PyReadonlyArray1<'py, i64>>,
    threads: usize,
) -> PyResult<FactorGradients<'py>> {
    let shape = factor_shape(&a, &b)?;
    let (rows, columns) = (order(rows, shape.rows())?, order(columns, shape.columns())?);
    let factors = [contiguous(a.as_slice().ok(), "A")?, contiguous(b.as_slice().ok(), "B")?];
    let (gradient, _) = matrix(&gradient)?;
    let (rows, columns) = (rows.as_ref().map(Permutation::as_slice), columns.as_ref().map(Permutation::as_slice));
    let small = shape.rows() * shape.columns() <= SMALL;
    let [by_a, by_b] = jobs::run_by_size(py, small, Some(threads), |parallelism, progress| {
        crate::kron::expand_gradients(shape, factors, gradient, rows, columns, parallelism, progress)
    })?;
    let KroneckerShape { m1, n1, m2, n2, rank } = shape;
    Ok((shaped(py, (rank, m1, n1), by_a), shaped(py, (rank, m2, n2), by_b)))
}

/// A permutation that may be missing.
fn order(indices: Option<PyReadonlyArray1<'_, i64>>, length: usize) -> Result<Option<Permutation>> {
    indices.map(|indices| permutation(&indices, length)).transpose()
}

#[pyfunction]
fn apply<'py>(
    py: Python<'py>,
    x: PyReadonlyArray2<'py, f32>,
    a: PyReadonlyArray3<'py, f32>,
    b: PyReadonlyArray3<'py, f32>,
    p: PyReadonlyArray1<'py, i64>,
    q: PyReadonlyArray1<'py, i64>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let decomposition = decomposition(&a, &b, &p, &q)?;
    let columns = decomposition.sum.shape.columns();
    let (x, (batch, width)) = matrix(&x)?;
    if width != decomposition.sum.shape.rows() {
        return Err(Error::Shape {
            operation: "apply",
            expected: format!("x of shape (batch, {})", decomposition.sum.shape.rows()),
            got: format!("({batch}, {width})"),
        }
        .into());
    }
    let y = jobs::run(py, None, |_| decomposition.apply(x, batch))?;
    Ok(shaped(py, (batch, columns), y))
}
