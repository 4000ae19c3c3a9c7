//! `plan`, `plan_checkpoint` and `compress_checkpoint`.

use std::path::PathBuf;

use pyo3::prelude::*;

use super::fitting::{MomentArrays, calibration};
use super::jobs;
use crate::checkpoint::names::Kind;
use crate::compress::{self, Options, Report};
use crate::error::Result;
use crate::numeric::Float;
use crate::plan::{Input, Plan, TQConfig};

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(plan, module)?)?;
    module.add_function(wrap_pyfunction!(plan_checkpoint, module)?)?;
    module.add_function(wrap_pyfunction!(compress_checkpoint, module)?)
}

#[pyfunction]
fn plan(tensors: Vec<(String, Vec<usize>, String)>, tied_head: bool, config: &str) -> PyResult<String> {
    let inputs = tensors.into_iter().map(|(name, shape, kind)| {
        let kind = if kind == "other" { None } else { Some(Kind::from_name(&kind)?) };
        let parameters = shape.iter().fold(1, |product: usize, &extent| product.saturating_mul(extent));
        Ok(Input { name, shape, kind, parameters })
    });
    let inputs = inputs.collect::<Result<Vec<_>>>()?;
    let plan = Plan::resolve(&inputs, tied_head, &TQConfig::from_json(config)?)?;
    Ok(Report::planned(&plan).to_json(false))
}

#[pyfunction]
fn plan_checkpoint(py: Python<'_>, source: PathBuf, config: &str) -> PyResult<String> {
    let config = TQConfig::from_json(config)?;
    let report = jobs::run(py, None, move |_| compress::plan_checkpoint(&source, &config))?;
    Ok(report.to_json(false))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn compress_checkpoint(
    py: Python<'_>,
    source: PathBuf,
    destination: PathBuf,
    config: &str,
    moment_arrays: Vec<(String, MomentArrays<'_>)>,
    dtype: Option<&str>,
    overwrite: bool,
    max_shard_bytes: u64,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let config = TQConfig::from_json(config)?;
    let options = Options { dtype: dtype.map(Float::from_name).transpose()?, overwrite, max_shard_bytes };
    let calibration = calibration(&moment_arrays)?;
    let pool = jobs::rayon_pool(threads)?;
    let report = jobs::run(py, progress, |progress| {
        pool.install(|| compress::compress_checkpoint(&source, &destination, &config, &calibration, &options, progress))
    })?;
    Ok(report.to_json(false))
}
