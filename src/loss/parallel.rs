//! Distribution of rows over threads.

use std::sync::{Mutex, PoisonError};

use super::student::Student;
use crate::error::{Error, Result};
use crate::progress::{Parallelism, Progress};

/// `scale` times the sum of the losses of the student's rows; their gradients are scaled alike.
///
/// `work` takes a scratch, a row's number, the factor of its gradient (`None` without a gradient) and the row. It
/// returns the row's loss: 0 for a row that does not count.
pub(super) fn sum_over_rows<S: Default>(
    student: Student<'_>,
    width: usize,
    scale: f64,
    parallelism: Parallelism,
    progress: &Progress,
    work: impl Fn(&mut S, usize, Option<f64>, Student<'_>) -> Result<f64> + Sync,
) -> Result<f64> {
    let gradient = student.wants_gradient().then_some(scale);
    let rows = student.split(width);
    let mut losses = vec![0.0; rows.len()];
    let items = losses.iter_mut().zip(rows).enumerate();
    for_each(items, parallelism, progress, S::default, |scratch, (row, (loss, student))| {
        *loss = work(scratch, row, gradient, student)?;
        Ok(())
    })?;
    Ok(losses.iter().sum::<f64>() * scale)
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
