//! Handing out rows to threads.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::progress::{Parallelism, Progress};

/// Calls `work` on every item, each thread with a scratch of its own that it uses again for its next item.
///
/// Items are taken in order and a begun item is always completed, so that of several errors the first item's is returned,
/// whatever the number of threads.
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
