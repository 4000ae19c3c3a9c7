//! Parallelism, progress and cancellation of long jobs.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::error::{Error, Result};

/// Whether a job may use the current rayon pool. The result is the same either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parallelism {
    /// Use the calling thread only: for small jobs, and for callers that run many jobs in parallel.
    Sequential,
    /// Use all threads of the current rayon pool.
    Rayon,
}

/// Work done, work expected, and a cancel flag, shared by all threads of a job. Only the ratio of the two counts
/// matters.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    phase: Mutex<&'static str>,
}

impl Progress {
    /// Adds `units` to the expected work.
    pub fn expect(&self, units: u64) {
        self.total.fetch_add(units, Relaxed);
    }

    /// Records `units` of work as done.
    pub fn advance(&self, units: u64) {
        self.done.fetch_add(units, Relaxed);
    }

    /// Marks all expected work as done. A search may end before it has used all of its units.
    pub fn finish(&self) {
        let (done, total) = self.counts();
        self.advance(total.saturating_sub(done));
    }

    /// `(done, total)`.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.done.load(Relaxed), self.total.load(Relaxed))
    }

    /// Begins another phase, whose work is counted anew. No thread may be at work.
    ///
    /// # Panics
    /// If a thread panicked in it.
    pub fn begin(&self, phase: &'static str) {
        self.done.store(0, Relaxed);
        self.total.store(0, Relaxed);
        *self.phase.lock().expect("no thread panicked") = phase;
    }

    /// The phase that began last; "" before any.
    ///
    /// # Panics
    /// If a thread panicked in [`begin`](Self::begin).
    #[must_use]
    pub fn phase(&self) -> &'static str {
        *self.phase.lock().expect("no thread panicked")
    }

    /// Stops the job at its next [`check`](Self::check).
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
    }

    /// Call this in every loop that can last longer than about 10 ms.
    ///
    /// # Errors
    /// [`Error::Cancelled`] once [`cancel`](Self::cancel) was called.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}
