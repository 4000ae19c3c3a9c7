//! `decompose_many`, `nearest_kronecker_sum`, `find_permutation`, `reconstruct` and `apply`.

use numpy::{PyArray1, PyArray2, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3};
use pyo3::prelude::*;

use super::arrays::{contiguous, factor_shape, indices, matrix, permutation, shaped};
use super::jobs;
use crate::compress::{self, Task, Timed};
use crate::error::{Error, Result};
use crate::kron::{KroneckerSum, MatrixView};
use crate::permute::{self, Decomposition, Effort, Permutation};
use crate::progress::Parallelism;
use crate::shape::{KroneckerShape, KroneckerSpec, Permute};

type Factors<'py> = (Bound<'py, PyArray3<f32>>, Bound<'py, PyArray3<f32>>);
/// `(A, B, lost_energy)`.
type NearestSum<'py> = (Bound<'py, PyArray3<f32>>, Bound<'py, PyArray3<f32>>, f64);
/// `(p, q, lost_energy)`.
type FoundOrders<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>, f64);
/// `(A, B, p, q, lost_energy, seconds)`.
type Decomposed<'py> = (
    Bound<'py, PyArray3<f32>>,
    Bound<'py, PyArray3<f32>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    f64,
    f64,
);

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(nearest_kronecker_sum, module)?)?;
    module.add_function(wrap_pyfunction!(find_permutation, module)?)?;
    module.add_function(wrap_pyfunction!(decompose_many, module)?)?;
    module.add_function(wrap_pyfunction!(reconstruct, module)?)?;
    module.add_function(wrap_pyfunction!(apply, module)?)
}

fn factor_arrays(py: Python<'_>, sum: KroneckerSum) -> Factors<'_> {
    let KroneckerShape { m1, n1, m2, n2, rank } = sum.shape;
    (shaped(py, (rank, m1, n1), sum.a), shaped(py, (rank, m2, n2), sum.b))
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
    let pool = jobs::pool(threads)?;
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

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn decompose_many<'py>(
    py: Python<'py>,
    matrices: Vec<PyReadonlyArray2<'py, f32>>,
    names: Vec<String>,
    blocks: Vec<(usize, usize)>,
    ranks: Vec<usize>,
    permutes: Vec<String>,
    effort: &str,
    seed: u64,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Decomposed<'py>>> {
    let effort = Effort::from_name(effort)?;
    let count = matrices.len();
    if [names.len(), blocks.len(), ranks.len(), permutes.len()].iter().any(|&length| length != count) {
        return Err(Error::Shape {
            operation: "decompose_many",
            expected: format!("{count} names, blocks, ranks and permutes"),
            got: format!("{}, {}, {} and {}", names.len(), blocks.len(), ranks.len(), permutes.len()),
        }
        .into());
    }
    let (mut tasks, mut data) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for (((array, name), (block, rank)), permute) in
        matrices.iter().zip(names).zip(blocks.into_iter().zip(ranks)).zip(permutes)
    {
        let (values, (rows, columns)) = matrix(array)?;
        let spec = KroneckerSpec { block, rank, permute: Permute::from_name(&permute)? };
        // All of them, before the first is worked on.
        spec.shape(rows, columns)
            .and_then(|_| MatrixView::new(values, rows, columns)?.check_finite())
            .map_err(|error| error.in_tensor(&name))?;
        tasks.push(Task { name, rows, columns, spec });
        data.push(values);
    }
    let pool = jobs::pool(threads)?;
    let decompositions = jobs::run(py, progress, |progress| {
        pool.install(|| compress::decompose_many(&tasks, &data, effort, seed, progress))
    })?;
    Ok(decompositions.into_iter().map(|timed| to_python(py, timed)).collect())
}

fn to_python(py: Python<'_>, timed: Timed) -> Decomposed<'_> {
    let Timed { decomposition: Decomposition { sum, rows, columns }, seconds } = timed;
    let (m, n, lost_energy) = (sum.shape.rows(), sum.shape.columns(), sum.lost_energy);
    let order = |side: Option<Permutation>, length| match side {
        Some(permutation) => indices(py, permutation.as_slice().iter().copied()),
        None => indices(py, 0..length),
    };
    let (p, q) = (order(rows, m), order(columns, n));
    let (a, b) = factor_arrays(py, sum);
    (a, b, p, q, lost_energy, seconds)
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
    let (rows, columns) = (permutation(p, shape.rows())?, permutation(q, shape.columns())?);
    Ok(Decomposition { sum, rows: Some(rows), columns: Some(columns) })
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
