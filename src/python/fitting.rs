//! `fit_many`, `fit_within`, `choose_specs` and `choose_specs_of_checkpoint`: matrices approximated in the norms of
//! their moments.

use std::borrow::Cow;
use std::path::PathBuf;

use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::arrays::{contiguous, factor_arrays, indices, matrix, shaped};
use super::jobs;
use crate::compress::{self, Calibration, Place, Planned, Task, Timed};
use crate::error::{Error, Result};
use crate::fit::{self, Fit, Limits, LowRank, Moment, Moments, Norm, Term};
use crate::kron::MatrixView;
use crate::permute::{Decomposition, Effort, Permutation};
use crate::plan::{TQConfig, Target};
use crate::progress::Parallelism;
use crate::spec::{MatrixSpec, Usage, matrix_spec, matrix_spec_json};

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(fit_many, module)?)?;
    module.add_function(wrap_pyfunction!(fit_within, module)?)?;
    module.add_function(wrap_pyfunction!(choose_specs, module)?)?;
    module.add_function(wrap_pyfunction!(choose_specs_of_checkpoint, module)?)
}

/// A second moment: `(d,)`, its diagonal, or `(d, d)`.
#[derive(FromPyObject)]
pub(super) enum MomentArray<'py> {
    Diagonal(PyReadonlyArray1<'py, f32>),
    Full(PyReadonlyArray2<'py, f32>),
}

impl MomentArray<'_> {
    fn moment(&self) -> Result<Moment<'_>> {
        match self {
            Self::Diagonal(values) => Ok(Moment::Diagonal(contiguous(values.as_slice().ok(), "moment")?)),
            Self::Full(values) => {
                let (values, (rows, columns)) = matrix(values)?;
                if rows != columns {
                    let (expected, got) = ("a square matrix".into(), format!("({rows}, {columns})"));
                    return Err(Error::Shape { operation: "moment", expected, got });
                }
                Ok(Moment::Full(values))
            }
        }
    }
}

/// The input and output moment of one matrix.
pub(super) type MomentArrays<'py> = (Option<MomentArray<'py>>, Option<MomentArray<'py>>);

fn moments<'a>((input, output): &'a MomentArrays<'_>) -> Result<Moments<'a>> {
    let moment = |array: &'a Option<MomentArray<'_>>| array.as_ref().map(MomentArray::moment).transpose();
    Ok(Moments { input: moment(input)?, output: moment(output)? })
}

/// Moments by the names of their matrices.
pub(super) fn calibration<'a>(arrays: &'a [(String, MomentArrays<'_>)]) -> Result<Calibration<'a>> {
    arrays
        .iter()
        .map(|(name, arrays)| Ok((name.clone(), moments(arrays).map_err(|error| error.in_tensor(name))?)))
        .collect()
}

/// A matrix and its values.
fn place<'a>(
    array: &'a PyReadonlyArray2<'_, f32>,
    name: String,
    arrays: &'a MomentArrays<'_>,
) -> Result<(Place<'a>, &'a [f32])> {
    let (values, (rows, columns)) = matrix(array)?;
    let moments = moments(arrays).map_err(|error| error.in_tensor(&name))?;
    Ok((Place { name, rows, columns, moments }, values))
}

/// One array for every name, or an error that says which are missing.
fn same_length(count: usize, others: &[usize]) -> Result<()> {
    if others.iter().all(|&length| length == count) {
        return Ok(());
    }
    let (expected, got) = (format!("{count} of everything"), format!("{others:?}"));
    Err(Error::Shape { operation: "lists of matrices", expected, got })
}

fn spec(json: &str) -> Result<MatrixSpec> {
    let value = serde_json::from_str(json).map_err(|error| error.to_string());
    value.and_then(matrix_spec).map_err(|words| Error::Config(format!("spec: {words}")))
}

/// `(terms, lost_energy, seconds)`.
type Fitted<'py> = (Vec<Bound<'py, PyAny>>, f64, f64);

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn fit_many<'py>(
    py: Python<'py>,
    matrices: Vec<PyReadonlyArray2<'py, f32>>,
    names: Vec<String>,
    specs: Vec<String>,
    moment_arrays: Vec<MomentArrays<'py>>,
    effort: &str,
    seed: u64,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Fitted<'py>>> {
    let effort = Effort::from_name(effort)?;
    same_length(matrices.len(), &[names.len(), specs.len(), moment_arrays.len()])?;
    let (mut tasks, mut data) = (Vec::with_capacity(names.len()), Vec::with_capacity(names.len()));
    for (((array, name), json), arrays) in matrices.iter().zip(names).zip(specs).zip(&moment_arrays) {
        let spec = spec(&json)?;
        let (place, values) = place(array, name, arrays)?;
        // All of them, before the first is worked on.
        spec.parameters(place.rows, place.columns)
            .and_then(|_| MatrixView::new(values, place.rows, place.columns)?.check_finite())
            .map_err(|error| error.in_tensor(&place.name))?;
        tasks.push(Task { place, spec });
        data.push(values);
    }
    let pool = jobs::rayon_pool(threads)?;
    let fits = jobs::run(py, progress, |progress| {
        pool.install(|| compress::decompose_many(&tasks, &data, effort, seed, progress))
    })?;
    fits.into_iter().map(|timed| to_python(py, timed)).collect()
}

/// `(spec, terms, lost_energy)`.
type FittedWithin<'py> = (String, Vec<Bound<'py, PyAny>>, f64);

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn fit_within<'py>(
    py: Python<'py>,
    w: PyReadonlyArray2<'py, f32>,
    moment_arrays: MomentArrays<'py>,
    parameters: usize,
    effort: &str,
    seed: u64,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<FittedWithin<'py>> {
    let effort = Effort::from_name(effort)?;
    let (data, (m, n)) = matrix(&w)?;
    let norm = Norm::prepare(moments(&moment_arrays)?, m, n)?;
    let limits = Limits::of_parameters(parameters);
    let pool = jobs::rayon_pool(threads)?;
    let fit = jobs::run(py, progress, |progress| {
        let view = MatrixView::new(data, m, n)?;
        pool.install(|| fit::fit_within(view, limits, &norm, effort, seed, Parallelism::Rayon, progress))
    })?;
    let json = serde_json::Value::Object(matrix_spec_json(&fit.spec)).to_string();
    let lost_energy = fit.lost_energy;
    Ok((json, terms_to_python(py, fit)?, lost_energy))
}

fn to_python(py: Python<'_>, Timed { fit, seconds }: Timed) -> PyResult<Fitted<'_>> {
    let lost_energy = fit.lost_energy;
    Ok((terms_to_python(py, fit)?, lost_energy, seconds))
}

fn terms_to_python(py: Python<'_>, fit: Fit) -> PyResult<Vec<Bound<'_, PyAny>>> {
    let terms = fit.terms.into_iter().map(|term| match term {
        Term::Kronecker(Decomposition { sum, row_permutation, column_permutation }) => {
            let (p, q) =
                (order(py, row_permutation, sum.shape.rows()), order(py, column_permutation, sum.shape.columns()));
            let (a, b) = factor_arrays(py, sum);
            Ok(("kronecker", a, b, p, q).into_pyobject(py)?.into_any())
        }
        Term::LowRank(LowRank { shape, left, right, order: pivots, .. }) => {
            let (left, right) = (shaped(py, shape.left(), left), shaped(py, shape.right(), right));
            Ok(("low_rank", left, right, indices(py, pivots.as_slice().iter().copied())).into_pyobject(py)?.into_any())
        }
    });
    terms.collect()
}

fn order(py: Python<'_>, side: Option<Permutation>, length: usize) -> Bound<'_, PyArray1<i64>> {
    match side {
        Some(permutation) => indices(py, permutation.as_slice().iter().copied()),
        None => indices(py, 0..length),
    }
}

/// `("parameters", count)` or `("lost_energy", share)`.
fn target((kind, value): (String, f64)) -> Result<Target> {
    match kind.as_str() {
        "parameters" if value >= 0.0 => Ok(Target::Parameters(value as usize)),
        "lost_energy" => Ok(Target::LostEnergy(value)),
        _ => Err(Error::Config(format!("target: expected parameters or lost_energy, got {kind:?} {value}"))),
    }
}

/// `(spec, parameters, (macs_before, macs), lost_energy, energies)`.
type Chosen<'py> = (Option<String>, usize, (usize, usize), f64, Bound<'py, PyArray1<f64>>);

fn chosen(py: Python<'_>, planned: Planned) -> Chosen<'_> {
    let Planned { spec, parameters, macs_before, macs, lost_energy, energies } = planned;
    let json = spec.map(|spec| serde_json::Value::Object(matrix_spec_json(&spec)).to_string());
    (json, parameters, (macs_before, macs), lost_energy, PyArray1::from_vec(py, energies))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn choose_specs<'py>(
    py: Python<'py>,
    matrices: Vec<PyReadonlyArray2<'py, f32>>,
    names: Vec<String>,
    usages: Vec<String>,
    moment_arrays: Vec<MomentArrays<'py>>,
    target_value: (String, f64),
    max_macs: Option<f64>,
    effort: &str,
    seed: u64,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Chosen<'py>>> {
    let (effort, target) = (Effort::from_name(effort)?, target(target_value)?);
    same_length(matrices.len(), &[names.len(), usages.len(), moment_arrays.len()])?;
    let (mut places, mut data) = (Vec::with_capacity(names.len()), Vec::with_capacity(names.len()));
    for (((array, name), usage), arrays) in matrices.iter().zip(names).zip(usages).zip(&moment_arrays) {
        let (place, values) = place(array, name, arrays)?;
        places.push((place, Usage::from_name(&usage)?));
        data.push(values);
    }
    let pool = jobs::rayon_pool(threads)?;
    let planned = jobs::run(py, progress, |progress| {
        let load = |i: usize| Ok(Cow::Borrowed(data[i]));
        pool.install(|| compress::choose_specs(&places, target, max_macs, effort, seed, progress, load))
    })?;
    Ok(planned.into_iter().map(|planned| chosen(py, planned)).collect())
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn choose_specs_of_checkpoint<'py>(
    py: Python<'py>,
    source: PathBuf,
    config: &str,
    moment_arrays: Vec<(String, MomentArrays<'py>)>,
    target_value: (String, f64),
    max_macs: Option<f64>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<(String, Chosen<'py>)>> {
    let (config, target) = (TQConfig::from_json(config)?, target(target_value)?);
    let calibration = calibration(&moment_arrays)?;
    let pool = jobs::rayon_pool(threads)?;
    let planned = jobs::run(py, progress, |progress| {
        pool.install(|| {
            compress::choose_specs_of_checkpoint(&source, &config, &calibration, target, max_macs, progress)
        })
    })?;
    Ok(planned.into_iter().map(|(name, planned)| (name, chosen(py, planned))).collect())
}
