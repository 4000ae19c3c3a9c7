//! Cross-entropy and Kullback–Leibler divergence over rows of logits.

use super::logits::{Exponentials, NotFinite, Row, row_loss};
use super::parallel::{for_each, mean_over_rows};
use super::values::{OwnedValues, RowMut, Values};
use crate::error::{Error, Result};
use crate::progress::{Parallelism, Progress};

/// Which distribution a Kullback–Leibler divergence is taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `KL(teacher ‖ student)`: the student must cover whatever the teacher finds likely.
    Forward,
    /// `KL(student ‖ teacher)`: the student must avoid whatever the teacher finds unlikely.
    Reverse,
}

/// `divergence · KL_T + cross_entropy · CE`: what is minimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    pub(super) temperature: f64,
    pub(super) divergence: f64,
    pub(super) cross_entropy: f64,
    pub(super) direction: Direction,
}

impl Objective {
    /// Temperatures beyond these leave nothing of the logits, or nothing but their largest.
    const TEMPERATURES: std::ops::RangeInclusive<f64> = 1e-4..=1e4;

    /// Any weights. A term of weight 0 is not computed, nor its input read.
    ///
    /// # Errors
    /// [`Error::Config`] if the temperature is not between 1e-4 and 1e4, or a weight is negative or not finite.
    pub fn new(temperature: f64, divergence: f64, cross_entropy: f64, direction: Direction) -> Result<Self> {
        if !Self::TEMPERATURES.contains(&temperature) {
            return Err(Error::Config(format!("temperature: expected a number from 1e-4 to 1e4, got {temperature}")));
        }
        for (name, weight) in [("divergence", divergence), ("cross_entropy", cross_entropy)] {
            if !(0.0..f64::INFINITY).contains(&weight) {
                return Err(Error::Config(format!("{name}: expected a weight of at least 0, got {weight}")));
            }
        }
        Ok(Self { temperature, divergence, cross_entropy, direction })
    }

    /// `alpha·T²·KL(teacher ‖ student at T) + (1 − alpha)·CE` (Hinton, Vinyals and Dean, arXiv 1503.02531). The factor
    /// `T²` keeps the gradient of the first term about as large whatever the temperature.
    ///
    /// # Errors
    /// [`Error::Config`] if `alpha` is not between 0 and 1, or the temperature is refused.
    pub fn distillation(temperature: f64, alpha: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&alpha) {
            return Err(Error::Config(format!("alpha: expected a number from 0 to 1, got {alpha}")));
        }
        Self::new(temperature, alpha * temperature * temperature, 1.0 - alpha, Direction::Forward)
    }
}

/// Logits of `rows` tokens and what they are compared with.
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
/// Logits are read once from memory; two exponentials per entry at temperatures 1 and 2, else three. Memory beyond the gradient:
/// up to four rows of f32 per thread.
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
        let Scratch { student, teacher, out: narrow, exponentials } = scratch;
        let logits = Row {
            student: batch.student.row(row, batch.vocabulary, student),
            teacher: batch.teacher.map(|values| values.row(row, batch.vocabulary, teacher)),
            label,
        };
        out.fill(narrow, |out| row_loss(&logits, objective, scale, out, exponentials))
            .map_err(|which| non_finite(which, row, &logits))
    };
    mean_over_rows(batch.student, batch.vocabulary, labels.counted(rows), gradient, parallelism, progress, work)
}

/// Some rows of a batch whose logits are never held whole, and what they are compared with.
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
    /// The number of the first row in the whole batch, which errors name.
    pub first: usize,
    /// What each row's loss and gradient is multiplied by: one over the number of rows of the batch that count.
    pub scale: f64,
}

/// The part that a chunk's rows have in [`distillation_loss`]; their gradient takes the place of the student's `logits`.
///
/// Without `gradient` the logits stay as they are. Errors as [`distillation_loss`]; the logits are then worth nothing.
/// Memory: a few rows of f32 per thread.
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

/// How many rows of a vocabulary the student's logits are.
pub(super) fn rows_of_logits(student: Values<'_>, vocabulary: usize) -> Result<usize> {
    let values = student.len();
    if vocabulary == 0 || !values.is_multiple_of(vocabulary) {
        return Err(Error::Shape {
            operation: "student_logits",
            expected: format!("rows of a vocabulary of at least one token, here {vocabulary}"),
            got: format!("{values} values"),
        });
    }
    Ok(values / vocabulary)
}

/// What a thread uses again for each of its rows.
#[derive(Default)]
struct Scratch {
    student: Vec<f32>,
    teacher: Vec<f32>,
    out: Vec<f32>,
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

/// Which rows count, and their labels.
#[derive(Clone, Copy)]
pub(super) struct Labels<'a> {
    pub labels: Option<&'a [i64]>,
    pub ignore_index: i64,
}

impl Labels<'_> {
    /// How many rows count.
    pub(super) fn counted(&self, rows: usize) -> usize {
        self.labels.map_or(rows, |labels| labels.iter().filter(|&&label| label != self.ignore_index).count())
    }

    /// `None` for a row that does not count, `Some(None)` for one that has no label. Labels are checked before.
    pub(super) fn of(&self, row: usize) -> Option<Option<usize>> {
        match self.labels {
            None => Some(None),
            Some(labels) if labels[row] == self.ignore_index => None,
            Some(labels) => Some(Some(labels[row] as usize)),
        }
    }

    /// That there is one label per row, each in the vocabulary or ignored, and that the objective can do without.
    pub(super) fn check(&self, rows: usize, vocabulary: usize, objective: &Objective) -> Result<()> {
        let Some(labels) = self.labels else {
            if objective.cross_entropy > 0.0 {
                return Err(Error::Config("labels: a cross-entropy needs them".into()));
            }
            return Ok(());
        };
        if labels.len() != rows {
            return Err(Error::Shape {
                operation: "labels",
                expected: format!("{rows}, one per row of logits"),
                got: labels.len().to_string(),
            });
        }
        let wrong = labels.iter().position(|&label| {
            label != self.ignore_index && usize::try_from(label).map_or(true, |label| label >= vocabulary)
        });
        wrong.map_or(Ok(()), |row| Err(Error::Label { label: labels[row], row, vocabulary }))
    }
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
