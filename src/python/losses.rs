//! `distillation_loss`, `distillation_loss_in_place`, `topk_distillation_loss`, `hidden_state_loss` and `head_loss`.

use half::slice::HalfBitsSliceExt as _;
use half::vec::HalfFloatVecExt as _;
use numpy::ndarray::Dimension;
use numpy::{Element, PyArray2, PyReadonlyArray, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray2};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use super::arrays::{contiguous, shaped};
use super::jobs;
use crate::error::{Error, Result};
use crate::loss::{self, Direction, Objective};
use crate::numeric::{Float, OwnedValues, Values};
use crate::progress::{Parallelism, Progress};

/// Calls of up to this many values run on the calling thread: they take less than 2 ms, and starting threads takes
/// longer.
const SMALL: usize = 1 << 20;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(distillation_loss, module)?)?;
    module.add_function(wrap_pyfunction!(distillation_loss_in_place, module)?)?;
    module.add_function(wrap_pyfunction!(topk_distillation_loss, module)?)?;
    module.add_function(wrap_pyfunction!(hidden_state_loss, module)?)?;
    module.add_function(wrap_pyfunction!(head_loss, module)?)
}

/// A matrix of float32, or the bits of one of float16 or bfloat16.
#[derive(FromPyObject)]
enum Matrix<'py> {
    Single(PyReadonlyArray2<'py, f32>),
    Half(PyReadonlyArray2<'py, u16>),
}

impl Matrix<'_> {
    /// The values and their shape.
    fn values(&self, dtype: &str) -> Result<(Values<'_>, [usize; 2])> {
        let shape = |dimensions: (usize, usize)| dimensions.into();
        match (self, Float::from_name(dtype)?) {
            (Self::Single(array), Float::F32) => {
                let array = array.as_array();
                Ok((Values::F32(contiguous(array.to_slice(), "logits")?), shape(array.dim())))
            }
            (Self::Half(array), float @ (Float::F16 | Float::Bf16)) => {
                let array = array.as_array();
                let bits = contiguous(array.to_slice(), "logits")?;
                let values = match float {
                    Float::F16 => Values::F16(bits.reinterpret_cast()),
                    _ => Values::Bf16(bits.reinterpret_cast()),
                };
                Ok((values, shape(array.dim())))
            }
            (Self::Single(_), other) => Err(unlike("float32", other)),
            (Self::Half(_), other) => Err(unlike("float16 or bfloat16", other)),
        }
    }
}

fn unlike(array: &str, float: Float) -> Error {
    Error::Dtype { expected: array.into(), got: float.name().into() }
}

/// Checks that teacher and student have the same shape.
fn same_shape(operation: &'static str, student: [usize; 2], teacher: [usize; 2]) -> Result<()> {
    if student == teacher {
        return Ok(());
    }
    Err(Error::Shape { operation, expected: format!("the student's {student:?}"), got: format!("{teacher:?}") })
}

/// The values of an array that may be missing.
fn optional<'a, T: Element, D: Dimension>(
    array: &'a Option<PyReadonlyArray<'_, T, D>>,
    name: &'static str,
) -> Result<Option<&'a [T]>> {
    array.as_ref().map(|array| contiguous(array.as_array().to_slice(), name)).transpose()
}

fn objective(temperature: f64, divergence: f64, cross_entropy: f64, reverse: bool) -> Result<Objective> {
    let direction = if reverse { Direction::Reverse } else { Direction::Forward };
    Objective::new(temperature, divergence, cross_entropy, direction)
}

/// Runs a loss. It borrows the arrays, whose copies would take more memory than everything else.
fn run<T: Send>(
    py: Python<'_>,
    size: usize,
    threads: Option<usize>,
    job: impl FnOnce(Parallelism, &Progress) -> Result<T> + Send,
) -> PyResult<T> {
    jobs::run_by_size(py, size <= SMALL, threads, job)
}

fn to_python(py: Python<'_>, values: OwnedValues, shape: [usize; 2]) -> Bound<'_, PyAny> {
    match values {
        OwnedValues::F32(values) => shaped(py, shape, values).into_any(),
        OwnedValues::F16(values) => shaped(py, shape, values.reinterpret_into()).into_any(),
        OwnedValues::Bf16(values) => shaped(py, shape, values.reinterpret_into()).into_any(),
    }
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn distillation_loss<'py>(
    py: Python<'py>,
    student: Matrix<'py>,
    student_dtype: &str,
    teacher: Option<Matrix<'py>>,
    teacher_dtype: &str,
    labels: Option<PyReadonlyArray1<'py, i64>>,
    temperature: f64,
    divergence: f64,
    cross_entropy: f64,
    reverse: bool,
    ignore_index: i64,
    gradient: bool,
    threads: Option<usize>,
) -> PyResult<(f64, Option<Bound<'py, PyAny>>)> {
    let (student, shape) = student.values(student_dtype)?;
    let teacher = teacher.as_ref().map(|teacher| teacher.values(teacher_dtype)).transpose()?;
    if let Some((_, teacher_shape)) = teacher {
        same_shape("teacher_logits", shape, teacher_shape)?;
    }
    let labels = optional(&labels, "labels")?;
    let objective = objective(temperature, divergence, cross_entropy, reverse)?;
    let teacher = teacher.map(|(values, _)| values);
    let batch = loss::Batch { student, teacher, labels, vocabulary: shape[1], ignore_index };
    let (value, written) = run(py, student.len(), threads, |parallelism, progress| {
        loss::distillation_loss(&batch, &objective, gradient, parallelism, progress)
    })?;
    Ok((value, written.map(|values| to_python(py, values, shape))))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn distillation_loss_in_place<'py>(
    py: Python<'py>,
    mut student: PyReadwriteArray2<'py, f32>,
    teacher: Option<PyReadonlyArray2<'py, f32>>,
    labels: Option<PyReadonlyArray1<'py, i64>>,
    temperature: f64,
    divergence: f64,
    cross_entropy: f64,
    reverse: bool,
    ignore_index: i64,
    first: usize,
    scale: f64,
    gradient: bool,
    threads: Option<usize>,
) -> PyResult<f64> {
    let shape: [usize; 2] = student.as_array().dim().into();
    let teacher_shape = teacher.as_ref().map(|teacher| teacher.as_array().dim().into());
    same_shape("teacher_logits", shape, teacher_shape.unwrap_or(shape))?;
    let teacher = optional(&teacher, "teacher_logits")?;
    let labels = optional(&labels, "labels")?;
    let objective = objective(temperature, divergence, cross_entropy, reverse)?;
    let chunk = loss::Chunk { teacher, labels, vocabulary: shape[1], ignore_index, first, scale };
    contiguous(student.as_slice().ok(), "student_logits")?;
    let student = student.as_slice_mut().map_err(|_| PyRuntimeError::new_err("student_logits: not writable"))?;
    run(py, student.len(), threads, |parallelism, progress| {
        loss::distillation_loss_in_place(student, &chunk, &objective, gradient, parallelism, progress)
    })
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn topk_distillation_loss<'py>(
    py: Python<'py>,
    student: Matrix<'py>,
    student_dtype: &str,
    tokens: PyReadonlyArray2<'py, i64>,
    probabilities: PyReadonlyArray2<'py, f32>,
    labels: Option<PyReadonlyArray1<'py, i64>>,
    temperature: f64,
    divergence: f64,
    cross_entropy: f64,
    ignore_index: i64,
    gradient: bool,
    threads: Option<usize>,
) -> PyResult<(f64, Option<Bound<'py, PyAny>>)> {
    let (student, shape) = student.values(student_dtype)?;
    let count = tokens.as_array().ncols();
    let tokens = contiguous(tokens.as_array().to_slice(), "teacher_tokens")?;
    let probabilities = contiguous(probabilities.as_array().to_slice(), "teacher_probabilities")?;
    let labels = optional(&labels, "labels")?;
    let objective = objective(temperature, divergence, cross_entropy, false)?;
    let batch = loss::TopKBatch { student, tokens, probabilities, count, labels, vocabulary: shape[1], ignore_index };
    let (value, written) = run(py, student.len(), threads, |parallelism, progress| {
        loss::topk_distillation_loss(&batch, &objective, gradient, parallelism, progress)
    })?;
    Ok((value, written.map(|values| to_python(py, values, shape))))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn hidden_state_loss<'py>(
    py: Python<'py>,
    student: Matrix<'py>,
    student_dtype: &str,
    teacher: Matrix<'py>,
    teacher_dtype: &str,
    mask: Option<PyReadonlyArray1<'py, bool>>,
    kind: &str,
    gradient: bool,
    threads: Option<usize>,
) -> PyResult<(f64, Option<Bound<'py, PyAny>>)> {
    let (student, shape) = student.values(student_dtype)?;
    let (teacher, teacher_shape) = teacher.values(teacher_dtype)?;
    same_shape("teacher_hidden", shape, teacher_shape)?;
    let mask = optional(&mask, "mask")?;
    let distance = loss::HiddenDistance::from_name(kind)?;
    let batch = loss::HiddenBatch { student, teacher, width: shape[1], mask };
    let (value, written) = run(py, student.len(), threads, |parallelism, progress| {
        loss::hidden_state_loss(&batch, distance, gradient, parallelism, progress)
    })?;
    Ok((value, written.map(|values| to_python(py, values, shape))))
}

/// `(hidden, head)`.
type HeadArrays<'py> = (PyReadonlyArray2<'py, f32>, PyReadonlyArray2<'py, f32>);
type HeadGradientArrays<'py> = (Bound<'py, PyArray2<f32>>, Bound<'py, PyArray2<f32>>);

/// A head with its number of rows and its vocabulary.
fn head<'a>((hidden, weight): &'a HeadArrays<'_>, names: [&'static str; 2]) -> Result<(loss::Head<'a>, [usize; 2])> {
    let ((rows, width), (vocabulary, head_width)) = (hidden.as_array().dim(), weight.as_array().dim());
    if width != head_width {
        return Err(Error::Shape {
            operation: names[1],
            expected: format!("(vocabulary, {width}), for hidden states of width {width}"),
            got: format!("({vocabulary}, {head_width})"),
        });
    }
    let hidden = contiguous(hidden.as_array().to_slice(), names[0])?;
    let weight = contiguous(weight.as_array().to_slice(), names[1])?;
    Ok((loss::Head { hidden, weight, width }, [rows, vocabulary]))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn head_loss<'py>(
    py: Python<'py>,
    student: HeadArrays<'py>,
    teacher: Option<HeadArrays<'py>>,
    labels: Option<PyReadonlyArray1<'py, i64>>,
    temperature: f64,
    divergence: f64,
    cross_entropy: f64,
    reverse: bool,
    ignore_index: i64,
    gradient: bool,
    threads: Option<usize>,
) -> PyResult<(f64, Option<HeadGradientArrays<'py>>)> {
    let (student, shape) = head(&student, ["student_hidden", "student_head"])?;
    let teacher = teacher.as_ref().map(|arrays| head(arrays, ["teacher_hidden", "teacher_head"])).transpose()?;
    if let Some((_, teacher_shape)) = teacher {
        same_shape("rows and vocabulary of the teacher", shape, teacher_shape)?;
    }
    let labels = optional(&labels, "labels")?;
    let objective = objective(temperature, divergence, cross_entropy, reverse)?;
    let [rows, vocabulary] = shape;
    let teacher = teacher.map(|(head, _)| head);
    let batch = loss::HeadBatch { student, teacher, labels, rows, vocabulary, ignore_index };
    // What takes long is the products.
    let size = rows.saturating_mul(vocabulary).saturating_mul(student.width) / 16;
    let (value, gradients) = run(py, size, threads, |parallelism, progress| {
        loss::head_loss(&batch, &objective, gradient, parallelism, progress)
    })?;
    let gradients = gradients.map(|gradients| {
        let width = student.width;
        (shaped(py, (rows, width), gradients.hidden), shaped(py, (vocabulary, width), gradients.weight))
    });
    Ok((value, gradients))
}
