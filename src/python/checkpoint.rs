//! `Checkpoint`, `plan` and `list_matrices`: configs and budgets for the matrices of a checkpoint or of a model in memory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::arrays::contiguous;
use super::budget::{MatrixInfo, SpectrumStore, SpentBudget, target};
use super::errors::warn;
use super::jobs;
use super::moments::{MomentArrays, calibration, same_length};
use super::specs::{config_from_python, spec_to_python};
use crate::checkpoint::read;
use crate::checkpoint::staging::Destination;
use crate::checkpoint::write::Slot;
use crate::compress::{
    self, BudgetOptions, Calibration, CalibrationRecord, Fits, Given, Keep, Options, Origin, Report,
};
use crate::error::{Error, Result};
use crate::family::{self, Kind};
use crate::numeric::Float;
use crate::permute::Effort;
use crate::plan::{Input, Job, Model, Plan};
use crate::progress::Progress;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("MODEL_TYPES", family::model_types().collect::<Vec<_>>())?;
    module.add_class::<Checkpoint>()?;
    module.add_class::<Journal>()?;
    module.add_class::<ModelPlan>()?;
    module.add_class::<Written>()?;
    module.add_function(wrap_pyfunction!(hub_id, module)?)?;
    module.add_function(wrap_pyfunction!(source_name, module)?)?;
    module.add_function(wrap_pyfunction!(plan, module)?)?;
    module.add_function(wrap_pyfunction!(expand_checkpoint, module)?)?;
    module.add_function(wrap_pyfunction!(check_destination, module)?)?;
    module.add_function(wrap_pyfunction!(write_checkpoint, module)?)?;
    module.add_function(wrap_pyfunction!(list_matrices, module)?)?;
    module.add_function(wrap_pyfunction!(split_part, module)?)?;
    module.add_function(wrap_pyfunction!(fused_parts, module)?)
}

/// The attributes of a Python `Calibration` that a report has.
#[derive(FromPyObject)]
struct Measured {
    tokens: u64,
    seed: u64,
    sensitivity: bool,
    texts: BTreeMap<String, u64>,
}

impl From<Measured> for CalibrationRecord {
    fn from(measured: Measured) -> Self {
        let Measured { tokens, seed, sensitivity, texts } = measured;
        Self { tokens, seed, sensitivity, texts }
    }
}

/// A config resolved against the matrices of a model.
#[pyclass(frozen, get_all, module = "tqcompressor._core")]
pub(super) struct ModelPlan {
    /// The compressed matrices, in model order, each with its spec.
    matrices: Vec<Py<MatrixInfo>>,
    /// The plan as the JSON of a report.
    report: String,
}

impl ModelPlan {
    fn new(py: Python<'_>, plan: &Plan, report: &Report) -> PyResult<Self> {
        let matrix = |job: &Job| {
            let spec = spec_to_python(py, &job.spec)?.unbind();
            Py::new(py, MatrixInfo::new(&job.matrix, Some(spec), job.parameters))
        };
        let matrices = plan.jobs.iter().map(matrix).collect::<PyResult<_>>()?;
        Ok(Self { matrices, report: report.to_json(false) })
    }
}

/// `(stored name, bare name, shape, kind)` of a weight.
type Weight = (String, String, Vec<usize>, String);

/// A model in memory.
fn model(tensors: Vec<Weight>, base_prefix: String, tied: Vec<(String, String)>) -> Result<Model> {
    let inputs = tensors.into_iter().map(|(name, bare, shape, kind)| {
        let parameters = shape.iter().fold(1, |product: usize, &extent| product.saturating_mul(extent));
        Ok(Input { name, bare, kind: Some(Kind::from_name(&kind)?), shape, parameters })
    });
    Ok(Model { inputs: inputs.collect::<Result<_>>()?, base_prefix, tied })
}

#[pyfunction]
fn plan(
    py: Python<'_>,
    tensors: Vec<Weight>,
    base_prefix: String,
    tied: Vec<(String, String)>,
    config: &Bound<'_, PyAny>,
) -> PyResult<ModelPlan> {
    let plan = Plan::resolve(&model(tensors, base_prefix, tied)?, &config_from_python(config)?)?;
    ModelPlan::new(py, &plan, &Report::planned(&plan))
}

#[pyfunction]
fn list_matrices(
    tensors: Vec<Weight>,
    base_prefix: String,
    tied: Vec<(String, String)>,
    patterns: Option<Vec<String>>,
) -> PyResult<Vec<MatrixInfo>> {
    let matrices = model(tensors, base_prefix, tied)?.matrices(patterns.as_deref())?;
    Ok(matrices.iter().map(MatrixInfo::dense).collect())
}

#[pyfunction]
fn split_part(matrix: &str) -> (&str, Option<&str>) {
    family::split_part(matrix)
}

#[pyfunction]
fn fused_parts(module: &str, kind: &str, rows: usize, columns: usize) -> PyResult<Option<Vec<String>>> {
    let parts = family::fused_parts(module, Kind::from_name(kind)?, rows, columns);
    Ok(parts.map_err(|error| error.in_tensor(module))?.map(<[String]>::to_vec))
}

#[pyfunction]
#[pyo3(signature = (source, out, *, dtype, overwrite, max_shard_bytes, threads, progress))]
#[allow(clippy::too_many_arguments)]
fn expand_checkpoint(
    py: Python<'_>,
    source: PathBuf,
    out: PathBuf,
    dtype: Option<&str>,
    overwrite: bool,
    max_shard_bytes: u64,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<()> {
    let dtype = dtype.map(Float::from_name).transpose()?;
    let options = Options { dtype, overwrite, max_shard_bytes, ..Options::default() };
    let pool = jobs::rayon_pool(threads)?;
    jobs::run(py, progress, |progress| {
        let opened = read::Checkpoint::open_any(&source)?;
        pool.install(|| compress::expand_checkpoint(&opened, &out, &options, progress))
    })
}

/// `(directory, weight files, whether every file of the directory belongs to the model)`.
type OriginArguments = (PathBuf, Vec<PathBuf>, bool);

fn origin((directory, files, whole): OriginArguments) -> Origin {
    Origin { directory, files, whole }
}

#[pyfunction]
fn check_destination(out: PathBuf, source: OriginArguments, overwrite: bool) -> PyResult<()> {
    origin(source).destination(&out, overwrite)?;
    Ok(())
}

/// `(name, dtype, shape, bytes)` of a tensor.
type TensorArguments<'py> = (String, String, Vec<usize>, PyReadonlyArray1<'py, u8>);

#[pyfunction]
#[pyo3(signature = (out, source, tensors, config, report, *, overwrite, max_shard_bytes, progress))]
#[allow(clippy::too_many_arguments)]
fn write_checkpoint(
    py: Python<'_>,
    out: PathBuf,
    source: OriginArguments,
    tensors: Vec<TensorArguments<'_>>,
    config: &str,
    report: Option<&str>,
    overwrite: bool,
    max_shard_bytes: u64,
    progress: Option<Py<PyAny>>,
) -> PyResult<()> {
    let mut given = Vec::with_capacity(tensors.len());
    for (name, dtype, shape, bytes) in &tensors {
        let bytes = contiguous(bytes.as_slice().ok(), "tensor").map_err(|error| error.in_tensor(name))?;
        let dtype = match dtype.as_str() {
            "int64" => Dtype::I64,
            "uint8" => Dtype::U8,
            float => Float::from_name(float).map_err(|error| error.in_tensor(name))?.dtype(),
        };
        given.push(Given { slot: Slot { name: name.clone(), dtype, shape: shape.clone() }, bytes });
    }
    let report = report.map(serde_json::from_str::<Map<String, Value>>).transpose();
    let report = report.map_err(|error| Error::Config(format!("report: {error}")))?;
    let source = origin(source);
    jobs::run(py, progress, |progress| {
        let destination = source.destination(&out, overwrite)?;
        compress::write_checkpoint(destination, &source, &given, config, report, max_shard_bytes, progress)
    })
}

/// The finished work of a run, beside its destination, with the claim on it.
#[pyclass(frozen, module = "tqcompressor._core")]
struct Journal {
    kept: Arc<compress::Journal>,
}

#[pymethods]
impl Journal {
    /// Its directory, in which a caller may keep files of its own.
    #[getter]
    fn directory(&self) -> PathBuf {
        self.kept.directory().to_owned()
    }

    /// The number of finished files that it took over.
    #[getter]
    fn found(&self) -> usize {
        self.kept.found()
    }

    /// The number of finished files that it removed.
    #[getter]
    fn replaced(&self) -> usize {
        self.kept.replaced()
    }

    /// Releases the destination, and removes the work unless it may be resumed. A second call does nothing.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.kept.close());
    }
}

/// A dense checkpoint on disk, opened and validated once.
#[pyclass(frozen, module = "tqcompressor._core")]
struct Checkpoint {
    opened: read::Checkpoint,
}

#[pymethods]
impl Checkpoint {
    /// `weights` is whether they are used, and not only names and shapes.
    #[staticmethod]
    #[pyo3(signature = (directory, *, weights = true))]
    fn open(py: Python<'_>, directory: PathBuf, weights: bool) -> PyResult<Self> {
        let open = if weights { read::Checkpoint::open } else { read::Checkpoint::open_for_names };
        let opened = jobs::run(py, None, |_| {
            let opened = open(&directory)?;
            // Here the weights are read that this takes, without the GIL.
            let _ = opened.warning();
            Ok(opened)
        })?;
        warn(py, opened.warning())?;
        Ok(Self { opened })
    }

    /// Its parameters, without a tied head.
    #[getter]
    fn parameters(&self) -> usize {
        Model::of_checkpoint(&self.opened).inputs.iter().map(|input| input.parameters).sum()
    }

    /// Size of its weight files, in bytes.
    #[getter]
    fn bytes(&self) -> u64 {
        self.opened.weight_bytes()
    }

    /// `(name, shape, parameters)` of every tensor but a tied head, in model order.
    #[getter]
    fn tensors(&self) -> Vec<(String, Vec<usize>, usize)> {
        let inputs = Model::of_checkpoint(&self.opened).inputs.into_iter();
        inputs.map(|Input { name, shape, parameters, .. }| (name, shape, parameters)).collect()
    }

    fn list_matrices(&self, patterns: Option<Vec<String>>) -> PyResult<Vec<MatrixInfo>> {
        let matrices = Model::of_checkpoint(&self.opened).matrices(patterns.as_deref())?;
        Ok(matrices.iter().map(MatrixInfo::dense).collect())
    }

    fn plan(&self, py: Python<'_>, config: &Bound<'_, PyAny>) -> PyResult<ModelPlan> {
        let plan = Plan::for_checkpoint(&self.opened, &config_from_python(config)?)?;
        ModelPlan::new(py, &plan, &compress::planned_report(&self.opened, &plan))
    }

    /// Raises for a destination that `compress` would refuse.
    fn check_destination(&self, out: PathBuf, overwrite: bool) -> PyResult<()> {
        Destination::check(&out, &self.opened, overwrite)?;
        Ok(())
    }

    /// Claims a destination, and opens the journal of a run whose result depends on `key`, a JSON object.
    #[pyo3(signature = (out, key, *, resume, overwrite))]
    fn journal(&self, out: PathBuf, key: &str, resume: bool, overwrite: bool) -> PyResult<Journal> {
        let key = serde_json::from_str(key).map_err(|error| Error::Config(format!("key: {error}")))?;
        let destination = Destination::check(&out, &self.opened, overwrite)?;
        Ok(Journal { kept: Arc::new(compress::Journal::open(destination, &key, resume)?) })
    }

    /// The files of its weights.
    #[getter]
    fn weight_files(&self) -> Vec<PathBuf> {
        self.opened.weight_files().map(Into::into).collect()
    }

    #[pyo3(signature = (
        names, moments, *, parameters, lost_energy, max_macs, effort, journal, spectra, threads, progress
    ))]
    #[allow(clippy::too_many_arguments)]
    fn spend_budget<'py>(
        &self,
        py: Python<'py>,
        names: Vec<String>,
        moments: Vec<MomentArrays<'py>>,
        parameters: Option<usize>,
        lost_energy: Option<f64>,
        max_macs: Option<f64>,
        effort: &str,
        journal: Option<&Journal>,
        spectra: Option<&SpectrumStore>,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<SpentBudget> {
        let options =
            BudgetOptions { target: target(parameters, lost_energy)?, max_macs, effort: Effort::from_name(effort)? };
        same_length(names.len(), &[moments.len()])?;
        let moments: Vec<_> = names.iter().cloned().zip(moments).collect();
        let calibration = calibration(&moments)?;
        let pool = jobs::rayon_pool(threads)?;
        let spent = jobs::run(py, progress, |progress| {
            let keep = journal.map_or(Keep::Nothing, |journal| Keep::Journal(Arc::clone(&journal.kept)));
            let spectra = spectra.map(|shared| &shared.store);
            pool.install(|| {
                compress::spend_budget(&self.opened, &names, &calibration, options, &keep, spectra, progress)
            })
        })?;
        Ok(SpentBudget { spent })
    }

    /// Writes the compressed checkpoint beside the destination of a journal. Fits are computed in the norms of `moments`, or
    /// taken from a budget that was planned for the matrices `names` with these moments. `progress` is called with
    /// `(done, total, phase)`.
    #[pyo3(signature = (
        journal, config, names, moments, *, spent, dtype, overwrite, max_shard_bytes, measured, facts, threads, progress
    ))]
    #[allow(clippy::too_many_arguments)]
    fn compress<'py>(
        &self,
        py: Python<'py>,
        journal: &Journal,
        config: &Bound<'py, PyAny>,
        names: Vec<String>,
        moments: Vec<MomentArrays<'py>>,
        spent: Option<&SpentBudget>,
        dtype: Option<&str>,
        overwrite: bool,
        max_shard_bytes: u64,
        measured: Option<Measured>,
        facts: &str,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Written> {
        let config = config_from_python(config)?;
        let measured = measured.map(Into::into);
        let facts = serde_json::from_str(facts).map_err(|error| Error::Config(format!("facts: {error}")))?;
        let options = Options { overwrite, max_shard_bytes, calibration: measured, facts, ..Options::default() }
            .with_dtype(dtype)?;
        same_length(names.len(), &[moments.len()])?;
        let moments: Vec<_> = names.iter().cloned().zip(moments).collect();
        let calibration: Calibration<'_> = calibration(&moments)?;
        let fits = match spent {
            None => Fits::Made(&calibration),
            Some(SpentBudget { spent }) => Fits::Spent { budget: spent, names: &names, calibration: &calibration },
        };
        let pool = jobs::rayon_pool(threads)?;
        let tell = |py: Python<'_>, counts: &Progress| {
            let Some(callback) = &progress else { return Ok(()) };
            let (done, total) = counts.counts();
            let phase = if counts.phase().is_empty() { "compress" } else { counts.phase() };
            callback.call1(py, (done, total, phase)).map(|_| ())
        };
        let kept = &journal.kept;
        let written = jobs::run_watched(py, tell, |progress| {
            pool.install(|| compress::compress_journaled(&self.opened, kept, &config, fits, &options, progress))
        })?;
        Ok(Written { journal: Arc::clone(kept), written: Mutex::new(Some(written)) })
    }
}

/// A compressed checkpoint that is written beside its destination.
#[pyclass(frozen, module = "tqcompressor._core")]
struct Written {
    journal: Arc<compress::Journal>,
    written: Mutex<Option<compress::Written>>,
}

impl Written {
    fn open(&self) -> MutexGuard<'_, Option<compress::Written>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error of a second use.
fn committed() -> Error {
    Error::Config("the checkpoint is in its place already, or was given up".into())
}

#[pymethods]
impl Written {
    /// Its report, as JSON.
    #[getter]
    fn report(&self) -> PyResult<String> {
        Ok(self.open().as_ref().ok_or_else(committed)?.report().to_json(false))
    }

    /// Adds a small file.
    fn add(&self, py: Python<'_>, name: &str, contents: &[u8]) -> PyResult<()> {
        Ok(py.detach(|| self.open().as_ref().ok_or_else(committed)?.add(name, contents))?)
    }

    /// Makes it the destination, all of it in one step, and closes its journal.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.open().take().ok_or_else(committed)?.commit(&self.journal))?;
        Ok(())
    }

    /// Removes it unless it was committed.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.open().take()));
    }
}

#[pyfunction]
fn hub_id(source: PathBuf) -> Option<String> {
    compress::hub_id(&source)
}

#[pyfunction]
fn source_name(source: PathBuf) -> String {
    compress::source_name(&source)
}
