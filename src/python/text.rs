//! What files of text show in place of UTF-8.

use pyo3::prelude::*;

use crate::checkpoint::foreign;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("TEXT_HEAD", foreign::HEAD)?;
    module.add_function(wrap_pyfunction!(foreign_text, module)?)?;
    module.add_function(wrap_pyfunction!(foreign_json, module)?)
}

#[pyfunction]
fn foreign_text(head: &[u8]) -> Option<&'static str> {
    foreign::foreign_text(head)
}

#[pyfunction]
fn foreign_json(head: &[u8]) -> Option<&'static str> {
    foreign::foreign_json(head)
}
