//! Conversion of specs and configs between the plain objects of `tqcompressor.config` and the types of this crate.
//!
//! Python validates its objects on construction, so the values read here are well formed. A spec that does not fit a
//! matrix is refused once the matrix is known.

use pyo3::prelude::*;
use pyo3::types::{PyMapping, PyTuple};

use crate::permute::Effort;
use crate::plan::TQConfig;
use crate::spec::{KroneckerSpec, MatrixSpec, Permute, RowGroup, TermSpec};

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(read_config, module)?)
}

/// `(pattern, spec)` pairs in order, effort, seed, and the dense modules with eight-bit weights.
type Config = (Vec<(String, Py<PyAny>)>, &'static str, u64, Option<Vec<String>>);

/// Parses the JSON of a config in a checkpoint, with the reader of the native runtime.
#[pyfunction]
fn read_config(py: Python<'_>, text: &str) -> PyResult<Config> {
    let TQConfig { specs, effort, seed, int8 } = TQConfig::from_json(text)?;
    let specs = specs.into_iter().map(|(pattern, spec)| Ok((pattern, spec_to_python(py, &spec)?.unbind())));
    Ok((specs.collect::<PyResult<_>>()?, effort.name(), seed, int8))
}

/// The module of the Python classes.
const MODULE: &str = "tqcompressor.config.specs";

/// Reads a `KroneckerSpec`, `LowRankSpec`, `GroupedSpec` or `MixedSpec`.
pub(super) fn spec_from_python(spec: &Bound<'_, PyAny>) -> PyResult<MatrixSpec> {
    if spec.hasattr("groups")? {
        let groups: Vec<(usize, usize)> = spec.getattr("groups")?.extract()?;
        let groups = groups.into_iter().map(|(rows, rank)| RowGroup { rows, rank }).collect();
        return Ok(TermSpec::Grouped(groups).into());
    }
    if spec.hasattr("terms")? {
        let terms = spec.getattr("terms")?.try_iter()?.map(|term| term_from_python(&term?));
        return Ok(MatrixSpec::new(terms.collect::<PyResult<Vec<_>>>()?)?);
    }
    Ok(term_from_python(spec)?.into())
}

fn term_from_python(spec: &Bound<'_, PyAny>) -> PyResult<TermSpec> {
    let rank = spec.getattr("rank")?.extract()?;
    if !spec.hasattr("block")? {
        return Ok(TermSpec::LowRank { rank });
    }
    let block = spec.getattr("block")?.extract()?;
    let permute = Permute::from_name(&spec.getattr("permute")?.extract::<String>()?)?;
    Ok(TermSpec::Kronecker(KroneckerSpec { block, rank, permute }))
}

/// Converts a spec to its Python object.
pub(super) fn spec_to_python<'py>(py: Python<'py>, spec: &MatrixSpec) -> PyResult<Bound<'py, PyAny>> {
    match spec.terms() {
        [term] => term_to_python(py, term),
        terms => {
            let terms = terms.iter().map(|term| term_to_python(py, term)).collect::<PyResult<Vec<_>>>()?;
            py.import(MODULE)?.getattr("MixedSpec")?.call1((PyTuple::new(py, terms)?,))
        }
    }
}

fn term_to_python<'py>(py: Python<'py>, term: &TermSpec) -> PyResult<Bound<'py, PyAny>> {
    let module = py.import(MODULE)?;
    match term {
        TermSpec::LowRank { rank } => module.getattr("LowRankSpec")?.call1((rank,)),
        TermSpec::Grouped(groups) => {
            let groups = groups.iter().map(|group| (group.rows, group.rank));
            module.getattr("GroupedSpec")?.call1((PyTuple::new(py, groups.collect::<Vec<_>>())?,))
        }
        TermSpec::Kronecker(KroneckerSpec { block, rank, permute }) => {
            module.getattr("KroneckerSpec")?.call1((block, rank, permute.name()))
        }
    }
}

/// Reads a `TQConfig`: its `specs`, `effort`, `seed`, `dtype` and `dense`.
pub(super) fn config_from_python(config: &Bound<'_, PyAny>) -> PyResult<TQConfig> {
    let items = config.getattr("specs")?.cast_into::<PyMapping>()?.items()?;
    let specs = items.iter().map(|item| {
        let (pattern, spec): (String, Bound<'_, PyAny>) = item.extract()?;
        Ok((pattern, spec_from_python(&spec)?))
    });
    let specs = specs.collect::<PyResult<_>>()?;
    let effort = Effort::from_name(&config.getattr("effort")?.extract::<String>()?)?;
    let int8 = match config.getattr("dtype")?.is_none() {
        true => None,
        false => Some(config.getattr("dense")?.extract::<Option<Vec<String>>>()?.unwrap_or_default()),
    };
    Ok(TQConfig { specs, effort, seed: config.getattr("seed")?.extract()?, int8 })
}
