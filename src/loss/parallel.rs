//! Distribution of rows over threads.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::numeric::{OwnedValues, Values, ValuesMut};
use crate::progress::{Parallelism, Progress};

/// Where the gradient of one row goes.
pub(super) enum RowMut<'a> {
    Wanted(ValuesMut<'a>),
    /// Nowhere; the row has so many values.
    Unwanted(usize),
}

impl RowMut<'_> {
    /// Calls `write` with a buffer of f32 for the row. An unwanted row stays in `scratch`.
    pub fn fill<T>(self, scratch: &mut Vec<f32>, write: impl FnOnce(&mut [f32]) -> T) -> T {
        match self {
            Self::Wanted(values) => values.fill(scratch, write),
            Self::Unwanted(width) => {
                scratch.resize(width, 0.0);
                write(scratch)
            }
        }
    }
}

/// The mean of a loss over the `counted` ones of the student's rows, and its gradient in the student's dtype if wanted.
///
/// `work` takes a scratch, a row's number, the factor of its gradient (`None` without a gradient) and the gradient's
/// place. It returns the row's loss: 0 for a row that does not count.
pub(super) fn mean_over_rows<S: Default>(
    student: Values<'_>,
    width: usize,
    counted: usize,
    gradient: bool,
    parallelism: Parallelism,
    progress: &Progress,
    work: impl Fn(&mut S, usize, Option<f64>, RowMut<'_>) -> Result<f64> + Sync,
) -> Result<(f64, Option<OwnedValues>)> {
    let scale = 1.0 / counted.max(1) as f64;
    let mut losses = vec![0.0; student.len() / width];
    let mut written = gradient.then(|| student.zeros());
    let outputs: Vec<_> = match &mut written {
        Some(written) => written.rows_mut(width).into_iter().map(RowMut::Wanted).collect(),
        None => losses.iter().map(|_| RowMut::Unwanted(width)).collect(),
    };
    progress.expect(losses.len() as u64);
    let items = losses.iter_mut().zip(outputs).enumerate();
    for_each(items, parallelism, progress, S::default, |scratch, (row, (loss, out))| {
        progress.advance(1);
        *loss = work(scratch, row, gradient.then_some(scale), out)?;
        Ok(())
    })?;
    Ok((losses.iter().sum::<f64>() * scale, written))
}

/// Calls `work` on every item. Each thread reuses a scratch of its own.
///
/// Items start in order, and a started item always completes. Of several errors the first item's is returned, for any
/// number of threads.
pub(super) fn for_each<T: Send, S>(
    items: impl Iterator<Item = T> + Send,
    parallelism: Parallelism,
    progress: &Progress,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) -> Result<()> + Sync,
) -> Result<()> {
    let queue = Mutex::new(Some(items.enumerate()));
    let first_error: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).as_mut().and_then(Iterator::next);
    let worker = || {
        let mut scratch = scratch();
        while let Some((index, item)) = next() {
            if let Err(error) = progress.check().and_then(|()| work(&mut scratch, item)) {
                *queue.lock().unwrap_or_else(PoisonError::into_inner) = None;
                let mut first = first_error.lock().unwrap_or_else(PoisonError::into_inner);
                if first.as_ref().is_none_or(|&(other, _)| index < other) {
                    *first = Some((index, error));
                }
            }
        }
    };
    match parallelism {
        Parallelism::Sequential => worker(),
        Parallelism::Rayon => {
            rayon::broadcast(|_| worker());
        }
    }
    first_error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), |(_, error)| Err(error))
}
