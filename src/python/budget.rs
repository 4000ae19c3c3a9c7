//! `MatrixInfo`, `Choice`, `spend_budget` and `SpentBudget`: one budget for the matrices of a model in memory.

use std::sync::Arc;

use numpy::{PyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::jobs;
use super::moments::{MomentArrays, place, same_length};
use super::specs::{spec_from_python, spec_to_python};
use super::terms::Fitted;
use crate::compress::{self, BudgetMatrix, BudgetOptions, Keep, Place};
use crate::error::{Error, Result};
use crate::family::Matrix;
use crate::permute::Effort;
use crate::plan::Target;
use crate::spec::Usage;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Choice>()?;
    module.add_class::<MatrixInfo>()?;
    module.add_class::<SpectrumStore>()?;
    module.add_class::<SpentBudget>()?;
    module.add_function(wrap_pyfunction!(macs, module)?)?;
    module.add_function(wrap_pyfunction!(least_parameters, module)?)?;
    module.add_function(wrap_pyfunction!(spend_budget, module)?)
}

/// A matrix that can be compressed.
#[pyclass(frozen, get_all, module = "tqcompressor._core")]
pub(super) struct MatrixInfo {
    /// Its name in configs and reports.
    name: String,
    /// The bare name of its module.
    module: String,
    /// The stored name of its tensor.
    tensor: String,
    /// "conv1d", "linear" or "embedding".
    kind: &'static str,
    /// Its shape, in × out.
    shape: (usize, usize),
    /// Its first column in the in × out tensor.
    first_column: usize,
    /// Its parameters while it is dense.
    parameters_before: usize,
    /// Its spec, an object of `tqcompressor.config.specs`; `None` where it stays dense.
    spec: Option<Py<PyAny>>,
    /// Its parameters after compression.
    parameters_after: usize,
}

impl MatrixInfo {
    pub fn dense(matrix: &Matrix) -> Self {
        Self::new(matrix, None, matrix.parameters())
    }

    pub fn new(matrix: &Matrix, spec: Option<Py<PyAny>>, parameters_after: usize) -> Self {
        Self {
            name: matrix.name.clone(),
            module: matrix.module.clone(),
            tensor: matrix.tensor.clone(),
            kind: matrix.kind.name(),
            shape: (matrix.rows, matrix.columns),
            first_column: matrix.first_column,
            parameters_before: matrix.parameters(),
            spec,
            parameters_after,
        }
    }
}

/// The choice of a budget for one matrix.
#[pyclass(frozen, get_all, module = "tqcompressor._core")]
pub(super) struct Choice {
    /// Its spec; `None` where it stays dense.
    spec: Option<Py<PyAny>>,
    /// Its parameters after compression.
    parameters: usize,
    /// Its MACs for one token while it is dense.
    macs_before: usize,
    /// Its MACs for one token after compression.
    macs: usize,
    /// The share of its energy that it loses.
    lost_energy: f64,
    /// Its energies in descending order, float64.
    energies: Py<PyArray1<f64>>,
}

/// The spectra of the matrices of one model in one norm, which several budgets share.
#[pyclass(frozen, module = "tqcompressor._core")]
pub(super) struct SpectrumStore {
    pub store: Arc<compress::SpectrumStore>,
}

#[pymethods]
impl SpectrumStore {
    #[new]
    fn new(matrices: usize) -> Self {
        Self { store: Arc::new(compress::SpectrumStore::shared(matrices)) }
    }
}

/// `(before, after)`: the MACs for one token of a matrix of this shape, in × out, while it is dense and by its spec.
#[pyfunction]
fn macs(spec: &Bound<'_, PyAny>, shape: (usize, usize), usage: &str) -> PyResult<(usize, usize)> {
    let (spec, usage) = (spec_from_python(spec)?, Usage::from_name(usage)?);
    Ok((usage.dense_macs(shape.0, shape.1), spec.macs(shape.0, shape.1, usage)?))
}

/// The fewest parameters to which a budget can compress a matrix of this shape, in × out: those of rank 1, of each group
/// of rows where `counted` says that it is an embedding whose tokens have frequencies.
#[pyfunction]
fn least_parameters(shape: (usize, usize), counted: bool) -> PyResult<usize> {
    Ok(compress::least_parameters(shape.0, shape.1, counted)?)
}

/// A budget after planning, with the results that fitting reuses.
#[pyclass(frozen, module = "tqcompressor._core")]
pub(super) struct SpentBudget {
    pub spent: compress::SpentBudget,
}

#[pymethods]
impl SpentBudget {
    /// The choice for every matrix.
    #[getter]
    fn choices(&self, py: Python<'_>) -> PyResult<Vec<Choice>> {
        let choice = |planned: &compress::Planned| {
            let spec = planned.spec.as_ref().map(|spec| spec_to_python(py, spec)).transpose()?;
            Ok(Choice {
                spec: spec.map(Bound::unbind),
                parameters: planned.parameters,
                macs_before: planned.macs_before,
                macs: planned.macs,
                lost_energy: planned.lost_energy,
                energies: PyArray1::from_slice(py, &planned.energies).unbind(),
            })
        };
        self.spent.planned().iter().map(choice).collect()
    }

    /// The fits of the matrices at these positions of the budget. Each fit can be taken once.
    #[pyo3(signature = (which, matrices, names, moments, *, threads, progress))]
    #[allow(clippy::too_many_arguments)]
    fn fit<'py>(
        &self,
        py: Python<'py>,
        which: Vec<usize>,
        matrices: Vec<PyReadonlyArray2<'py, f32>>,
        names: Vec<String>,
        moments: Vec<MomentArrays<'py>>,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Fitted>> {
        let (places, data) = places(&matrices, &names, &moments)?;
        same_length(places.len(), &[which.len()])?;
        let pool = jobs::rayon_pool(threads)?;
        let fits =
            jobs::run(py, progress, |progress| pool.install(|| self.spent.fit_many(&which, &places, &data, progress)))?;
        fits.into_iter().map(|timed| Fitted::new(py, timed)).collect()
    }
}

/// Matrices and their values.
fn places<'a>(
    matrices: &'a [PyReadonlyArray2<'_, f32>],
    names: &[String],
    moments: &'a [MomentArrays<'_>],
) -> Result<(Vec<Place<'a>>, Vec<&'a [f32]>)> {
    same_length(matrices.len(), &[names.len(), moments.len()])?;
    let each = matrices.iter().zip(names).zip(moments).map(|((array, name), arrays)| place(array, name, arrays));
    Ok(each.collect::<Result<Vec<_>>>()?.into_iter().unzip())
}

/// The target of a budget: exactly one of the two.
pub(super) fn target(parameters: Option<usize>, lost_energy: Option<f64>) -> Result<Target> {
    match (parameters, lost_energy) {
        (Some(parameters), None) => Ok(Target::Parameters(parameters)),
        (None, Some(share)) => Ok(Target::LostEnergy(share)),
        _ => Err(Error::Config("budget: expected either parameters or lost_energy".into())),
    }
}

#[pyfunction]
#[pyo3(signature = (
    matrices, names, modules, usages, moments, *, parameters, lost_energy, max_macs, effort, keep, threads, progress
))]
#[allow(clippy::too_many_arguments)]
fn spend_budget<'py>(
    py: Python<'py>,
    matrices: Vec<PyReadonlyArray2<'py, f32>>,
    names: Vec<String>,
    modules: Vec<String>,
    usages: Vec<String>,
    moments: Vec<MomentArrays<'py>>,
    parameters: Option<usize>,
    lost_energy: Option<f64>,
    max_macs: Option<f64>,
    effort: &str,
    keep: bool,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<SpentBudget> {
    let options =
        BudgetOptions { target: target(parameters, lost_energy)?, max_macs, effort: Effort::from_name(effort)? };
    same_length(matrices.len(), &[modules.len(), usages.len()])?;
    let (places, data) = places(&matrices, &names, &moments)?;
    let budgeted = places
        .into_iter()
        .zip(modules)
        .zip(usages)
        .map(|((place, module), usage)| Ok(BudgetMatrix { place, module, usage: Usage::from_name(&usage)? }));
    let budgeted = budgeted.collect::<Result<Vec<_>>>()?;
    let pool = jobs::rayon_pool(threads)?;
    let spent = jobs::run(py, progress, |progress| {
        let load = |i: usize| Ok(data[i]);
        let keep = if keep { Keep::Here } else { Keep::Nothing };
        pool.install(|| compress::SpentBudget::spend(&budgeted, options, &keep, None, progress, load))
    })?;
    Ok(SpentBudget { spent })
}
