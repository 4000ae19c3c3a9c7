//! The Python boundary: converts and checks arguments and results. It computes nothing.

mod arrays;
mod checkpoint;
mod errors;
mod fitting;
mod jobs;
mod kernels;
mod losses;
mod runtime;

use pyo3::prelude::*;

/// The extension module `tqcompressor._core`.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    kernels::register(module)?;
    fitting::register(module)?;
    checkpoint::register(module)?;
    losses::register(module)?;
    runtime::register(module)
}
