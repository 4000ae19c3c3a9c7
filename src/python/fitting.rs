//! `fit_many` and `fit_within`: approximation of matrices in the norms of their moments.

use std::time::Instant;

use numpy::PyReadonlyArray2;
use pyo3::prelude::*;

use super::arrays::matrix;
use super::jobs;
use super::moments::{MomentArrays, moments, place, same_length};
use super::specs::spec_from_python;
use super::terms::Fitted;
use crate::compress::{self, Task, Timed};
use crate::fit::{self, Limits, Norm, Spectrum};
use crate::kron::MatrixView;
use crate::permute::Effort;
use crate::spec::Usage;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(fit_many, module)?)?;
    module.add_function(wrap_pyfunction!(fit_within, module)?)
}

#[pyfunction]
#[pyo3(signature = (matrices, names, specs, moments, *, effort, seed, threads, progress))]
#[allow(clippy::too_many_arguments)]
fn fit_many<'py>(
    py: Python<'py>,
    matrices: Vec<PyReadonlyArray2<'py, f32>>,
    names: Vec<String>,
    specs: Vec<Bound<'py, PyAny>>,
    moments: Vec<MomentArrays<'py>>,
    effort: &str,
    seed: u64,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Fitted>> {
    let effort = Effort::from_name(effort)?;
    same_length(matrices.len(), &[names.len(), specs.len(), moments.len()])?;
    let (mut tasks, mut data) = (Vec::with_capacity(names.len()), Vec::with_capacity(names.len()));
    for (((array, name), spec), arrays) in matrices.iter().zip(names).zip(specs).zip(&moments) {
        let spec = spec_from_python(&spec)?;
        let (place, values) = place(array, &name, arrays)?;
        // Check all matrices before the first fit.
        spec.parameters(place.rows, place.columns)
            .and_then(|_| MatrixView::new(values, place.rows, place.columns)?.check_finite())
            .map_err(|error| error.in_tensor(&name))?;
        tasks.push(Task { place, spec });
        data.push(values);
    }
    let pool = jobs::rayon_pool(threads)?;
    let fits = jobs::run(py, progress, |progress| {
        pool.install(|| compress::decompose_many(&tasks, &data, effort, seed, progress))
    })?;
    fits.into_iter().map(|timed| Fitted::new(py, timed)).collect()
}

#[pyfunction]
#[pyo3(signature = (w, moment_pair, *, parameters, max_macs, effort, threads, progress))]
#[allow(clippy::too_many_arguments)]
fn fit_within<'py>(
    py: Python<'py>,
    w: PyReadonlyArray2<'py, f32>,
    moment_pair: MomentArrays<'py>,
    parameters: usize,
    max_macs: Option<f64>,
    effort: &str,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Fitted> {
    let effort = Effort::from_name(effort)?;
    let (data, (m, n)) = matrix(&w)?;
    let norm = Norm::prepare(moments(&moment_pair)?, m, n)?;
    let limits = match max_macs {
        Some(f64::INFINITY) => Limits::of_parameters(parameters),
        share => {
            let most = share.unwrap_or(1.0) * Usage::Map.dense_macs(m, n) as f64;
            Limits { parameters, macs: Some((most as usize, Usage::Map)) }
        }
    };
    let pool = jobs::rayon_pool(threads)?;
    let start = Instant::now();
    let fit = jobs::run(py, progress, |progress| {
        let view = MatrixView::new(data, m, n)?;
        pool.install(|| {
            let spectrum = Spectrum::new(view, &norm, progress)?;
            fit::fit_within(view, limits, &norm, &spectrum, effort, progress)
        })
    })?;
    Fitted::new(py, Timed { fit, seconds: start.elapsed().as_secs_f64() })
}
