//! `distillation_loss`, `topk_distillation_loss`, `hidden_state_loss` and `head_loss`.

use half::slice::HalfBitsSliceExt as _;
use numpy::ndarray::{Dimension, Ix2};
use numpy::{Element, PyReadonlyArray, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray2};
use pyo3::prelude::*;

use super::arrays::{FloatArray, contiguous, unlike};
use super::jobs;
use crate::error::{Error, Result};
use crate::loss::{self, Direction, Objective};
use crate::numeric::{Float, Values, ValuesMut};
use crate::progress::{Parallelism, Progress};

/// Calls of up to this many values run on the calling thread: they take less than 2 ms, and starting threads takes
/// longer.
const SMALL: usize = 1 << 20;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(distillation_loss, module)?)?;
    module.add_function(wrap_pyfunction!(topk_distillation_loss, module)?)?;
    module.add_function(wrap_pyfunction!(hidden_state_loss, module)?)?;
    module.add_function(wrap_pyfunction!(head_loss, module)?)
}

/// A matrix of float32, or the bits of one of float16 or bfloat16.
type Matrix<'py> = FloatArray<'py, Ix2>;

/// The same, to be written.
#[derive(FromPyObject)]
enum MatrixMut<'py> {
    Single(PyReadwriteArray2<'py, f32>),
    Half(PyReadwriteArray2<'py, u16>),
}

impl MatrixMut<'_> {
    /// The values, to be written, and their shape.
    fn values_mut(&mut self, dtype: &str) -> Result<(ValuesMut<'_>, [usize; 2])> {
        match (self, Float::from_name(dtype)?) {
            (Self::Single(array), Float::F32) => {
                let shape = array.as_array().dim().into();
                Ok((ValuesMut::F32(contiguous_mut(array.as_slice_mut().ok())?), shape))
            }
            (Self::Half(array), float @ (Float::F16 | Float::Bf16)) => {
                let shape = array.as_array().dim().into();
                let bits = contiguous_mut(array.as_slice_mut().ok())?;
                let values = match float {
                    Float::F16 => ValuesMut::F16(bits.reinterpret_cast_mut()),
                    _ => ValuesMut::Bf16(bits.reinterpret_cast_mut()),
                };
                Ok((values, shape))
            }
            (Self::Single(_), other) => Err(unlike("float32", other)),
            (Self::Half(_), other) => Err(unlike("float16 or bfloat16", other)),
        }
    }
}

/// As [`contiguous`], to be written.
fn contiguous_mut<T>(slice: Option<&mut [T]>) -> Result<&mut [T]> {
    slice.ok_or_else(|| Error::Shape {
        operation: "out",
        expected: "a C-contiguous array".into(),
        got: "another memory layout".into(),
    })
}

/// The student's matrix, and the place of the gradient if it is wanted.
enum StudentArrays<'py> {
    Read(Matrix<'py>),
    Apart(Matrix<'py>, MatrixMut<'py>),
    Overwritten(MatrixMut<'py>),
}

impl<'py> StudentArrays<'py> {
    /// `out` may be the student's array itself.
    fn new(student: &Bound<'py, PyAny>, out: Option<&Bound<'py, PyAny>>) -> PyResult<Self> {
        Ok(match out {
            None => Self::Read(student.extract()?),
            Some(out) if out.is(student) => Self::Overwritten(out.extract()?),
            Some(out) => Self::Apart(student.extract()?, out.extract()?),
        })
    }

    /// The values with the place of the gradient, and their shape.
    fn student(&mut self, dtype: &str) -> Result<(loss::Student<'_>, [usize; 2])> {
        match self {
            Self::Read(student) => {
                let (values, shape) = matrix_values(student, dtype)?;
                Ok((loss::Student::Read(values), shape))
            }
            Self::Apart(student, out) => {
                let ((values, shape), (out, out_shape)) = (matrix_values(student, dtype)?, out.values_mut(dtype)?);
                same_shape("out", shape, out_shape)?;
                Ok((loss::Student::Apart(values, out), shape))
            }
            Self::Overwritten(student) => {
                let (values, shape) = student.values_mut(dtype)?;
                Ok((loss::Student::Overwritten(values), shape))
            }
        }
    }
}

/// The values of a matrix and its shape.
fn matrix_values<'a>(matrix: &'a Matrix<'_>, dtype: &str) -> Result<(Values<'a>, [usize; 2])> {
    let (values, shape) = matrix.values(dtype)?;
    Ok((values, shape.into()))
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

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn distillation_loss<'py>(
    py: Python<'py>,
    student: &Bound<'py, PyAny>,
    student_dtype: &str,
    out: Option<&Bound<'py, PyAny>>,
    teacher: Option<Matrix<'py>>,
    teacher_dtype: &str,
    labels: Option<PyReadonlyArray1<'py, i64>>,
    temperature: f64,
    divergence: f64,
    cross_entropy: f64,
    reverse: bool,
    ignore_index: i64,
    part: Option<(usize, f64)>,
    threads: Option<usize>,
) -> PyResult<f64> {
    let mut arrays = StudentArrays::new(student, out)?;
    let (student, shape) = arrays.student(student_dtype)?;
    let teacher = teacher.as_ref().map(|teacher| matrix_values(teacher, teacher_dtype)).transpose()?;
    if let Some((_, teacher_shape)) = teacher {
        same_shape("teacher_logits", shape, teacher_shape)?;
    }
    let labels = optional(&labels, "labels")?;
    let objective = objective(temperature, divergence, cross_entropy, reverse)?;
    let teacher = teacher.map(|(values, _)| values);
    let batch = loss::Batch { teacher, labels, vocabulary: shape[1], ignore_index };
    run(py, student.values().len(), threads, |parallelism, progress| match part {
        None => loss::distillation_loss(student, &batch, &objective, parallelism, progress),
        Some((first, scale)) => {
            let part = loss::Part { first, scale };
            loss::distillation_loss_of_part(student, &batch, part, &objective, parallelism, progress)
        }
    })
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn topk_distillation_loss<'py>(
    py: Python<'py>,
    student: &Bound<'py, PyAny>,
    student_dtype: &str,
    out: Option<&Bound<'py, PyAny>>,
    tokens: PyReadonlyArray2<'py, i64>,
    probabilities: PyReadonlyArray2<'py, f32>,
    labels: Option<PyReadonlyArray1<'py, i64>>,
    temperature: f64,
    divergence: f64,
    cross_entropy: f64,
    ignore_index: i64,
    threads: Option<usize>,
) -> PyResult<f64> {
    let mut arrays = StudentArrays::new(student, out)?;
    let (student, shape) = arrays.student(student_dtype)?;
    let count = tokens.as_array().ncols();
    let tokens = contiguous(tokens.as_array().to_slice(), "teacher_tokens")?;
    let probabilities = contiguous(probabilities.as_array().to_slice(), "teacher_probabilities")?;
    let labels = optional(&labels, "labels")?;
    let objective = objective(temperature, divergence, cross_entropy, false)?;
    let batch = loss::TopKBatch { tokens, probabilities, count, labels, vocabulary: shape[1], ignore_index };
    run(py, student.values().len(), threads, |parallelism, progress| {
        loss::topk_distillation_loss(student, &batch, &objective, parallelism, progress)
    })
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn hidden_state_loss<'py>(
    py: Python<'py>,
    student: &Bound<'py, PyAny>,
    student_dtype: &str,
    out: Option<&Bound<'py, PyAny>>,
    teacher: Matrix<'py>,
    teacher_dtype: &str,
    mask: Option<PyReadonlyArray1<'py, bool>>,
    kind: &str,
    threads: Option<usize>,
) -> PyResult<f64> {
    let mut arrays = StudentArrays::new(student, out)?;
    let (student, shape) = arrays.student(student_dtype)?;
    let (teacher, teacher_shape) = matrix_values(&teacher, teacher_dtype)?;
    same_shape("teacher_hidden", shape, teacher_shape)?;
    let mask = optional(&mask, "mask")?;
    let distance = loss::HiddenDistance::from_name(kind)?;
    let batch = loss::HiddenBatch { teacher, width: shape[1], mask };
    run(py, student.values().len(), threads, |parallelism, progress| {
        loss::hidden_state_loss(student, &batch, distance, parallelism, progress)
    })
}

/// `(hidden, head)`.
type HeadArrays<'py> = (PyReadonlyArray2<'py, f32>, PyReadonlyArray2<'py, f32>);
type HeadGradientArrays<'py> = (PyReadwriteArray2<'py, f32>, PyReadwriteArray2<'py, f32>);

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
    mut out: Option<HeadGradientArrays<'py>>,
    threads: Option<usize>,
) -> PyResult<f64> {
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
    let gradients = match &mut out {
        None => None,
        Some((hidden, weight)) => {
            same_shape("out", [rows, student.width], hidden.as_array().dim().into())?;
            same_shape("out", [vocabulary, student.width], weight.as_array().dim().into())?;
            let (hidden, weight) = (hidden.as_slice_mut().ok(), weight.as_slice_mut().ok());
            Some(loss::HeadGradients { hidden: contiguous_mut(hidden)?, weight: contiguous_mut(weight)? })
        }
    };
    // What takes long is the products.
    let size = rows.saturating_mul(vocabulary).saturating_mul(student.width) / 16;
    run(py, size, threads, |parallelism, progress| {
        loss::head_loss(&batch, &objective, gradients, parallelism, progress)
    })
}
