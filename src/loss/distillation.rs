//! Cross-entropy and Kullback–Leibler divergence over rows of logits.

use super::labels::{Labels, rows_of_logits};
use super::logits::{Exponentials, NotFinite, Row, row_loss};
use super::objective::Objective;
use super::parallel::{RowMut, for_each, mean_over_rows};
use crate::error::{Error, Result};
use crate::numeric::{OwnedValues, Values};
use crate::progress::{Parallelism, Progress};

/// Logits of `rows` tokens, with the teacher's logits and labels.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The student's logits, `(rows, vocabulary)`.
    pub student: Values<'a>,
    /// The teacher's, of the same shape; any of the dtypes.
    pub teacher: Option<Values<'a>>,
    /// One token per row; without labels every row counts.
    pub labels: Option<&'a [i64]>,
    /// Columns.
    pub vocabulary: usize,
    /// The label of rows that do not count: their logits are not read, and their gradient is exactly zero.
    pub ignore_index: i64,
}

/// The mean over the rows that count of an [`Objective`], and its gradient by the student's logits, in their dtype.
///
/// With `p` and `q` the softmax of `t/T` and `z/T`, and `s` that of `z`, the gradient of a row is `(q − p)/T` for the
/// forward divergence, `q·(ln q − ln p − KL)/T` for the reverse one, and `s − onehot(label)` for the cross-entropy.
/// No row that counts: the loss is 0. Exponentials, sums of eight of them, and gradients are f32; all other sums f64.
///
/// # Errors
/// [`Error::Shape`], [`Error::Label`], [`Error::Config`] if a term of the objective lacks the teacher or labels,
/// [`Error::NonFinite`] in "student_logits" or "teacher_logits", [`Error::Cancelled`].
///
/// # Cost
/// Logits are read once from memory; two exponentials per entry at temperatures 1 and 2, else three. Memory beyond the
/// gradient: up to four rows of f32 per thread.
pub fn distillation_loss(
    batch: &Batch<'_>,
    objective: &Objective,
    gradient: bool,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<(f64, Option<OwnedValues>)> {
    let rows = batch.check(objective)?;
    let labels = Labels { labels: batch.labels, ignore_index: batch.ignore_index };
    let work = |scratch: &mut Scratch, row: usize, scale, out: RowMut<'_>| {
        let Some(label) = labels.of(row) else { return Ok(0.0) };
        let Scratch { student, teacher, gradient, exponentials } = scratch;
        let logits = Row {
            student: batch.student.row(row, batch.vocabulary, student),
            teacher: batch.teacher.map(|values| values.row(row, batch.vocabulary, teacher)),
            label,
        };
        out.fill(gradient, |out| row_loss(&logits, objective, scale, out, exponentials))
            .map_err(|which| non_finite(which, row, &logits))
    };
    mean_over_rows(batch.student, batch.vocabulary, labels.counted(rows), gradient, parallelism, progress, work)
}

/// Consecutive rows of a batch whose logits are never all in memory, with the teacher's logits and labels.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// The teacher's logits, `(rows, vocabulary)`.
    pub teacher: Option<&'a [f32]>,
    /// The labels of these rows.
    pub labels: Option<&'a [i64]>,
    /// Columns.
    pub vocabulary: usize,
    /// The label of rows that do not count.
    pub ignore_index: i64,
    /// The first row's number in the whole batch, for errors.
    pub first: usize,
    /// The factor of each row's loss and gradient: 1 over the number of rows of the batch that count.
    pub scale: f64,
}

/// The contribution of a chunk to [`distillation_loss`]. The gradient overwrites the student's `logits`.
///
/// Without `gradient` the logits stay unchanged. Errors are those of [`distillation_loss`]; the logits are then
/// undefined. Memory: a few rows of f32 per thread.
pub fn distillation_loss_in_place(
    logits: &mut [f32],
    chunk: &Chunk<'_>,
    objective: &Objective,
    gradient: bool,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<f64> {
    let Chunk { teacher, vocabulary, first, scale, ignore_index, .. } = *chunk;
    let teacher = teacher.filter(|_| objective.divergence > 0.0);
    let batch = Batch {
        student: Values::F32(logits),
        teacher: teacher.map(Values::F32),
        labels: chunk.labels,
        vocabulary,
        ignore_index,
    };
    let rows = batch.check(objective).map_err(|error| match error {
        Error::Label { label, row, vocabulary } => Error::Label { label, row: first + row, vocabulary },
        other => other,
    })?;
    let mut losses = vec![0.0; rows];
    let labels = Labels { labels: chunk.labels, ignore_index };
    let items = logits.chunks_mut(vocabulary).zip(&mut losses).enumerate();
    let scratch = || (vec![0.0; vocabulary], Exponentials::default());
    for_each(items, parallelism, progress, scratch, |(out, exponentials), (index, (logits, loss))| {
        let Some(label) = labels.of(index) else {
            logits.fill(0.0);
            return Ok(());
        };
        let row = Row {
            student: logits,
            teacher: teacher.map(|teacher| &teacher[index * vocabulary..][..vocabulary]),
            label,
        };
        *loss = row_loss(&row, objective, gradient.then_some(scale), out, exponentials)
            .map_err(|which| non_finite(which, first + index, &row))?;
        if gradient {
            logits.copy_from_slice(out);
        }
        Ok(())
    })?;
    Ok(losses.iter().sum::<f64>() * scale)
}

/// Buffers that a thread reuses for all of its rows.
#[derive(Default)]
struct Scratch {
    student: Vec<f32>,
    teacher: Vec<f32>,
    gradient: Vec<f32>,
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
    /// Checks everything but the values, and returns the number of rows.
    fn check(&self, objective: &Objective) -> Result<usize> {
        let rows = rows_of_logits(self.student, self.vocabulary)?;
        let values = self.student.len();
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
        Labels { labels: self.labels, ignore_index: self.ignore_index }.check(rows, self.vocabulary, objective)?;
        Ok(rows)
    }
}
