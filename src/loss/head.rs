//! The output head and the loss together, one chunk of tokens at a time, so that the logits are never all in memory.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::distillation::{Batch, Part, distillation_loss_of_part};
use super::labels::Labels;
use super::objective::Objective;
use super::parallel::for_each;
use super::student::Student;
use crate::error::{Error, Result};
use crate::numeric::memory::{prefer_huge_pages, zeros};
use crate::numeric::{Values, ValuesMut};
use crate::progress::{Parallelism, Progress};

/// Bytes of logits in memory, student and teacher together. More bytes mean fewer passes over the head's gradient.
const LOGITS_BYTES: usize = 28 << 20;
/// Vocabulary entries per product. Fixed, so that results do not depend on the number of threads.
const VOCABULARY_TILE: usize = 2048;
/// Columns of the hidden states' gradient per product.
const WIDTH_TILE: usize = 256;

/// Hidden states and an output head: the logits are `hidden · weightᵀ`.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// `(rows, width)`, row-major.
    pub hidden: &'a [f32],
    /// `(vocabulary, width)`, row-major, as in a token embedding or an `nn.Linear`.
    pub weight: &'a [f32],
    /// Values per hidden state.
    pub width: usize,
}

/// What [`head_loss`] compares.
#[derive(Clone, Copy, Debug)]
pub struct HeadBatch<'a> {
    /// The student.
    pub student: Head<'a>,
    /// The teacher, whose width may differ.
    pub teacher: Option<Head<'a>>,
    /// One token per row; without labels every row counts.
    pub labels: Option<&'a [i64]>,
    /// Tokens.
    pub rows: usize,
    /// Entries of the vocabulary.
    pub vocabulary: usize,
    /// The label of rows that do not count.
    pub ignore_index: i64,
}

/// Places of the gradients by the student's hidden states and head, whatever they hold before.
#[derive(Debug)]
pub struct HeadGradients<'a> {
    /// By the hidden states, `(rows, width)`.
    pub hidden: &'a mut [f32],
    /// By the head, `(vocabulary, width)`.
    pub weight: &'a mut [f32],
}

/// [`distillation_loss`](super::distillation_loss) of `hidden · weightᵀ`; `gradients` are written where they are wanted.
///
/// # Errors
/// As [`distillation_loss`](super::distillation_loss): what is not finite is named by its place among the logits.
///
/// # Cost
/// One matrix product for each of student, teacher, and gradient. Memory beyond the gradients: 28 MiB of logits (or one
/// row of them, if that is more), and what the loss and the products need per thread.
pub fn head_loss(
    batch: &HeadBatch<'_>,
    objective: &Objective,
    mut gradients: Option<HeadGradients<'_>>,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<f64> {
    let labels = Labels { labels: batch.labels, ignore_index: batch.ignore_index };
    batch.check(objective, &labels)?;
    if let Some(gradients) = &mut gradients {
        gradients.check(&batch.student)?;
        prefer_huge_pages(gradients.weight);
        gradients.weight.fill(0.0);
    }
    let HeadBatch { student, rows, vocabulary, .. } = *batch;
    let teacher = batch.teacher.filter(|_| objective.divergence > 0.0);
    let scale = 1.0 / labels.counted(rows).max(1) as f64;
    let models = 1 + usize::from(teacher.is_some());
    let chunk = (LOGITS_BYTES / (models * vocabulary * size_of::<f32>())).clamp(1, rows.max(1));
    let mut student_logits = zeros(chunk * vocabulary);
    let mut teacher_logits = zeros(if teacher.is_some() { chunk * vocabulary } else { 0 });
    let mut total = 0.0;
    progress.expect(rows as u64);
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        let student_logits = &mut student_logits[..count * vocabulary];
        student.logits(first, count, student_logits, parallelism, progress)?;
        if let Some(teacher) = teacher {
            teacher.logits(first, count, &mut teacher_logits[..count * vocabulary], parallelism, progress)?;
        }
        let compared = Batch {
            teacher: teacher.map(|_| Values::F32(&teacher_logits[..count * vocabulary])),
            labels: batch.labels.map(|labels| &labels[first..first + count]),
            vocabulary,
            ignore_index: batch.ignore_index,
        };
        let logits = if gradients.is_some() {
            Student::Overwritten(ValuesMut::F32(student_logits))
        } else {
            Student::Read(Values::F32(student_logits))
        };
        let part = Part { first, scale };
        total += distillation_loss_of_part(logits, &compared, part, objective, parallelism, progress)?;
        // The gradient has overwritten the logits.
        if let Some(gradients) = &mut gradients {
            student.add_gradients(first, count, student_logits, gradients, parallelism, progress)?;
        }
    }
    Ok(total)
}

impl HeadGradients<'_> {
    fn check(&self, student: &Head<'_>) -> Result<()> {
        for (values, out) in [(student.hidden, &*self.hidden), (student.weight, &*self.weight)] {
            if values.len() != out.len() {
                let expected = format!("the student's {} values", values.len());
                return Err(Error::Shape { operation: "out", expected, got: out.len().to_string() });
            }
        }
        Ok(())
    }
}

impl<'a> Head<'a> {
    fn states(&self, first: usize, count: usize) -> MatRef<'a, f32> {
        MatRef::from_row_major_slice(&self.hidden[first * self.width..][..count * self.width], count, self.width)
    }

    fn vocabulary(&self) -> usize {
        self.weight.len() / self.width
    }

    fn logits(
        &self,
        first: usize,
        count: usize,
        out: &mut [f32],
        parallelism: Parallelism,
        progress: &Progress,
    ) -> Result<()> {
        let states = self.states(first, count);
        let weight = self.weight.chunks(VOCABULARY_TILE * self.width);
        let out = MatMut::from_row_major_slice_mut(out, count, self.vocabulary());
        let tiles = column_tiles_mut(out, VOCABULARY_TILE).zip(weight);
        for_each(
            tiles,
            parallelism,
            progress,
            || (),
            |(), (out, weight)| {
                let weight = MatRef::from_row_major_slice(weight, weight.len() / self.width, self.width);
                matmul(out, Accum::Replace, states, weight.transpose(), 1.0, Par::Seq);
                Ok(())
            },
        )
    }

    /// Writes `G·weight` for these rows, and adds `Gᵀ·hidden`, where `G` is the gradient by the logits.
    fn add_gradients(
        &self,
        first: usize,
        count: usize,
        logits: &[f32],
        gradients: &mut HeadGradients<'_>,
        parallelism: Parallelism,
        progress: &Progress,
    ) -> Result<()> {
        let logits = MatRef::from_row_major_slice(logits, count, self.vocabulary());
        let weight = MatRef::from_row_major_slice(self.weight, self.vocabulary(), self.width);
        let hidden = &mut gradients.hidden[first * self.width..][..count * self.width];
        let hidden = MatMut::from_row_major_slice_mut(hidden, count, self.width);
        let tiles = column_tiles_mut(hidden, WIDTH_TILE).zip(column_tiles(weight, WIDTH_TILE));
        for_each(
            tiles,
            parallelism,
            progress,
            || (),
            |(), (out, weight)| {
                matmul(out, Accum::Replace, logits, weight, 1.0, Par::Seq);
                Ok(())
            },
        )?;
        let states = self.states(first, count);
        let tiles = gradients.weight.chunks_mut(VOCABULARY_TILE * self.width);
        let tiles = tiles.zip(column_tiles(logits, VOCABULARY_TILE));
        for_each(
            tiles,
            parallelism,
            progress,
            || (),
            |(), (out, logits)| {
                let out = MatMut::from_row_major_slice_mut(out, logits.ncols(), self.width);
                matmul(out, Accum::Add, logits.transpose(), states, 1.0, Par::Seq);
                Ok(())
            },
        )
    }
}

/// Tiles of `width` columns, the last one narrower.
fn column_tiles(matrix: MatRef<'_, f32>, width: usize) -> impl Iterator<Item = MatRef<'_, f32>> {
    let columns = matrix.ncols();
    (0..columns).step_by(width).map(move |first| matrix.subcols(first, width.min(columns - first)))
}

/// The same, each to be written by one thread.
fn column_tiles_mut(matrix: MatMut<'_, f32>, width: usize) -> impl Iterator<Item = MatMut<'_, f32>> {
    let mut rest = Some(matrix);
    std::iter::from_fn(move || {
        let matrix = rest.take().filter(|matrix| matrix.ncols() > 0)?;
        let width = width.min(matrix.ncols());
        let (tile, others) = matrix.split_at_col_mut(width);
        rest = Some(others);
        Some(tile)
    })
}

impl HeadBatch<'_> {
    fn check(&self, objective: &Objective, labels: &Labels<'_>) -> Result<()> {
        let shape = |operation, expected, got: String| Err(Error::Shape { operation, expected, got });
        if self.vocabulary == 0 {
            return shape("student_head", "a vocabulary of at least one token".into(), "none".into());
        }
        if self.teacher.is_none() && objective.divergence > 0.0 {
            return Err(Error::Config("teacher_hidden: a divergence needs them".into()));
        }
        let student = [("student_hidden", "student_head", self.student)];
        let teacher = self.teacher.map(|head| ("teacher_hidden", "teacher_head", head));
        for (hidden, weight, head) in student.into_iter().chain(teacher) {
            if head.width == 0 || self.rows.checked_mul(head.width) != Some(head.hidden.len()) {
                let expected = format!("{} rows of {} values", self.rows, head.width.max(1));
                return shape(hidden, expected, format!("{} values", head.hidden.len()));
            }
            if self.vocabulary.checked_mul(head.width) != Some(head.weight.len()) {
                let expected = format!("{} rows of {} values", self.vocabulary, head.width);
                return shape(weight, expected, format!("{} values", head.weight.len()));
            }
        }
        labels.check(self.rows, self.vocabulary, objective)
    }
}
