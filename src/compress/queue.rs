//! Jobs of different sizes on a thread pool, the largest first.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::error::{Error, Result};
use crate::progress::{Parallelism, Progress};

/// Runs `one(i, parallelism)` for every size, on the current rayon pool.
///
/// The largest jobs start first, because a large job that starts last would leave the other threads idle. With fewer jobs
/// than threads, `parallelism` lets each job use all threads. With more, each job uses one thread: otherwise a thread that
/// waits for a part of one matrix would start another and hold both in memory.
///
/// # Errors
/// Of several, the first by number that isn't [`Error::Cancelled`]. After the first error, `progress` is cancelled and
/// the other threads stop soon.
pub(super) fn largest_first(
    sizes: &[usize],
    progress: &Progress,
    one: impl Fn(usize, Parallelism) -> Result<()> + Sync,
) -> Result<()> {
    let mut order: Vec<_> = (0..sizes.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(sizes[i]));
    let threads = rayon::current_num_threads();
    let parallelism = if threads > sizes.len() { Parallelism::Rayon } else { Parallelism::Sequential };
    let next = AtomicUsize::new(0);
    let errors = Mutex::new(Vec::new());
    rayon::broadcast(|_| {
        while let Some(&i) = order.get(next.fetch_add(1, Relaxed)) {
            if let Err(error) = progress.check().and_then(|()| one(i, parallelism)) {
                errors.lock().expect("no thread panicked").push((i, error));
                progress.cancel();
                break;
            }
        }
    });
    let mut errors = errors.into_inner().expect("no thread panicked");
    // Report the original error, not the cancellations it triggered.
    errors.sort_by_key(|(i, error)| (matches!(error, Error::Cancelled), *i));
    errors.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
}
