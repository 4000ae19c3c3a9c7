//! What of the processor is used.

use pyo3::prelude::*;

use crate::numeric::simd;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(instruction_set, module)?)?;
    module.add_function(wrap_pyfunction!(instruction_sets, module)?)
}

#[pyfunction]
fn instruction_set() -> PyResult<&'static str> {
    Ok(simd::check()?.name())
}

#[pyfunction]
fn instruction_sets() -> Vec<&'static str> {
    simd::InstructionSet::available().map(simd::InstructionSet::name).collect()
}
