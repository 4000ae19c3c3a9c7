//! Cross-entropy and Kullback–Leibler divergence over rows of logits.

use super::labels::{Labels, rows_of_logits};
use super::logits::{Exponentials, NotFinite, Row, row_loss};
use super::objective::Objective;
use super::parallel::sum_over_rows;
use super::student::Student;
use crate::error::{Error, Result};
use crate::numeric::Values;
use crate::progress::{Parallelism, Progress};

/// What the logits of `rows` tokens are compared with.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The teacher's logits, `(rows, vocabulary)`; any of the dtypes.
    pub teacher: Option<Values<'a>>,
    /// One token per row; without labels every row counts.
    pub labels: Option<&'a [i64]>,
    /// Columns.
    pub vocabulary: usize,
    /// The label of rows that do not count: their logits are not read, and their gradient is exactly zero.
    pub ignore_index: i64,
}

/// Which rows of a larger batch these are.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The first row's number in the whole batch, for errors.
    pub first: usize,
    /// The factor of each row's loss and gradient: 1 over the number of rows of the whole batch that count.
    pub scale: f64,
}

/// The mean over the rows that count of an [`Objective`]; its gradient by the student's logits is written where
/// [`Student`] says.
///
/// With `p` and `q` the softmax of `t/T` and `z/T`, and `s` that of `z`, the gradient of a row is `(q − p)/T` for the
/// forward divergence, `q·(ln q − ln p − KL)/T` for the reverse one, and `s − onehot(label)` for the cross-entropy.
/// No row that counts: the loss is 0. Exponentials, sums of eight of them, and gradients are f32; all other sums f64.
/// The gradient has the same bits wherever it is written.
///
/// # Errors
/// [`Error::Shape`] and [`Error::Dtype`], [`Error::Label`], [`Error::Config`] if a term of the objective lacks the
/// teacher or labels, with nothing written. [`Error::NonFinite`] in "student_logits" or "teacher_logits" and
/// [`Error::Cancelled`] may come when the gradients of other rows are written.
///
/// # Cost
/// Logits are read once from memory; two exponentials per entry at temperatures 1 and 2, else three. Memory: up to five
/// rows of f32 per thread.
pub fn distillation_loss(
    student: Student<'_>,
    batch: &Batch<'_>,
    objective: &Objective,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<f64> {
    let labels = Labels { labels: batch.labels, ignore_index: batch.ignore_index };
    let rows = rows_of_logits(student.values(), batch.vocabulary)?;
    progress.expect(rows as u64);
    let part = Part { first: 0, scale: 1.0 / labels.counted(rows).max(1) as f64 };
    distillation_loss_of_part(student, batch, part, objective, parallelism, progress)
}

/// The contribution of some rows to [`distillation_loss`], whose errors it has.
pub fn distillation_loss_of_part(
    student: Student<'_>,
    batch: &Batch<'_>,
    part: Part,
    objective: &Objective,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<f64> {
    let Part { first, scale } = part;
    batch.check(&student, objective).map_err(|error| match error {
        Error::Label { label, row, vocabulary } => Error::Label { label, row: first + row, vocabulary },
        other => other,
    })?;
    let labels = Labels { labels: batch.labels, ignore_index: batch.ignore_index };
    let teacher = batch.teacher.filter(|_| objective.divergence > 0.0);
    let work = |scratch: &mut Scratch, row: usize, scale, student: Student<'_>| {
        progress.advance(1);
        let Some(label) = labels.of(row) else {
            student.clear_gradient();
            return Ok(0.0);
        };
        let Scratch { student: buffers, teacher: buffer, exponentials } = scratch;
        let teacher = teacher.map(|values| values.row(row, batch.vocabulary, buffer));
        student.work(buffers, |student, out| {
            let logits = Row { student, teacher, label };
            row_loss(&logits, objective, scale, out, exponentials)
                .map_err(|which| non_finite(which, first + row, &logits))
        })
    };
    sum_over_rows(student, batch.vocabulary, scale, parallelism, progress, work)
}

/// Buffers that a thread reuses for all of its rows.
#[derive(Default)]
struct Scratch {
    student: [Vec<f32>; 2],
    teacher: Vec<f32>,
    exponentials: Exponentials,
}

/// Names the first value of a row that is not finite.
pub(super) fn non_finite(which: NotFinite, row: usize, logits: &Row<'_>) -> Error {
    let (name, values) = match which {
        NotFinite::Student => ("student_logits", logits.student),
        NotFinite::Teacher => ("teacher_logits", logits.teacher.unwrap_or_default()),
    };
    let column = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
    Error::NonFinite { value: values[column], row, column }.in_tensor(name)
}

impl Batch<'_> {
    /// Checks everything but the values.
    fn check(&self, student: &Student<'_>, objective: &Objective) -> Result<()> {
        let rows = rows_of_logits(student.values(), self.vocabulary)?;
        student.check()?;
        let values = student.values().len();
        match self.teacher {
            Some(teacher) if teacher.len() != values => {
                return Err(Error::Shape {
                    operation: "teacher_logits",
                    expected: format!("the student's {values} values"),
                    got: teacher.len().to_string(),
                });
            }
            None if objective.divergence > 0.0 => {
                return Err(Error::Config("teacher_logits: a divergence needs them".into()));
            }
            _ => {}
        }
        Labels { labels: self.labels, ignore_index: self.ignore_index }.check(rows, self.vocabulary, objective)
    }
}
