//! Rust errors as the exceptions of `tqcompressor.errors`.

use std::ffi::CString;

use pyo3::exceptions::{PyKeyboardInterrupt, PyUserWarning};
use pyo3::prelude::*;

use crate::error::Error;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::attach(|py| to_exception(py, &error).unwrap_or_else(|failure| failure))
    }
}

/// Warns the caller, if there is something to say.
pub(super) fn warn(py: Python<'_>, words: Option<&str>) -> PyResult<()> {
    let Some(words) = words else { return Ok(()) };
    // A path holds no zero byte.
    PyErr::warn(py, &py.get_type::<PyUserWarning>(), &CString::new(words)?, 2)
}

fn to_exception(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    if matches!(error, Error::Cancelled) {
        return Ok(PyKeyboardInterrupt::new_err(()));
    }
    let class = py.import("tqcompressor.errors")?.getattr(class_name(error))?;
    let exception = match root(error) {
        // OSError fills in `errno` and `filename` from its arguments.
        Error::Io { path, source } => class.call1((source.raw_os_error(), source.to_string(), path))?,
        _ => class.call1((error.to_string(),))?,
    };
    Ok(PyErr::from_value(exception))
}

fn root(error: &Error) -> &Error {
    match error {
        Error::InTensor { source, .. } => root(source),
        other => other,
    }
}

fn class_name(error: &Error) -> &'static str {
    match root(error) {
        Error::Shape { .. } | Error::Permutation { .. } => "ShapeError",
        Error::NonFinite { .. } | Error::Overflow { .. } => "NonFiniteError",
        Error::Label { .. } | Error::SoftLabel { .. } => "LabelError",
        Error::Dtype { .. } => "DtypeError",
        Error::Config(_) => "ConfigError",
        Error::Checkpoint { .. } => "CheckpointError",
        Error::Destination { .. } => "DestinationError",
        Error::Io { .. } => "StorageError",
        Error::Convergence { .. } => "ConvergenceError",
        Error::Cancelled | Error::InTensor { .. } => "TQError",
    }
}
