//! The Python boundary: converts and checks arguments and results. It computes nothing.

mod arrays;
mod budget;
mod checkpoint;
mod errors;
mod factors;
mod fitting;
mod jobs;
mod kernels;
mod losses;
mod moments;
mod processor;
mod runtime;
mod specs;
mod terms;
mod text;

use pyo3::prelude::*;

/// The extension module `tqcompressor._core`.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // The first use of numpy's interface panics on a Ctrl-C that is pending then: it is here, and none is pending.
    module.py().check_signals()?;
    numpy::dtype::<f32>(module.py());
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("UNCALIBRATED_BUDGET", crate::compress::UNCALIBRATED_BUDGET)?;
    module.add("KEPT_SPECTRA", crate::compress::KEPT_SPECTRA)?;
    text::register(module)?;
    kernels::register(module)?;
    factors::register(module)?;
    specs::register(module)?;
    terms::register(module)?;
    fitting::register(module)?;
    budget::register(module)?;
    checkpoint::register(module)?;
    losses::register(module)?;
    processor::register(module)?;
    runtime::register(module)
}
