//! The rows of a batch: how many there are, which of them count, and their labels.

use super::objective::Objective;
use crate::error::{Error, Result};
use crate::numeric::Values;

/// The number of rows of the student's logits.
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

    /// `None` for a row that does not count, `Some(None)` for a row without a label. Labels must have been checked.
    pub(super) fn of(&self, row: usize) -> Option<Option<usize>> {
        match self.labels {
            None => Some(None),
            Some(labels) if labels[row] == self.ignore_index => None,
            Some(labels) => Some(Some(labels[row] as usize)),
        }
    }

    /// Checks for one label per row, each in the vocabulary or ignored. Only a cross-entropy needs labels.
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
