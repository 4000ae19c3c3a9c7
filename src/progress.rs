//! How a long job runs: on which threads, and with two counters and a flag that all of them share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::error::{Error, Result};

/// Whether a job may use the current rayon pool. The result is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parallelism {
    /// Only the calling thread: right for small work, and where the caller runs many jobs side by side.
    Sequential,
    /// All threads of the current rayon pool.
    Rayon,
}

/// Work done so far, work expected, and whether to stop. Units are the job's own; only the ratio means anything.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Announces `units` more of work.
    pub fn expect(&self, units: u64) {
        self.total.fetch_add(units, Relaxed);
    }

    /// Records `units` of work as done.
    pub fn advance(&self, units: u64) {
        self.done.fetch_add(units, Relaxed);
    }

    /// Records all that was announced as done: a search that has nothing to gain ends before it has done it all.
    pub fn finish(&self) {
        let (done, total) = self.counts();
        self.advance(total.saturating_sub(done));
    }

    /// `(done, total)`.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.done.load(Relaxed), self.total.load(Relaxed))
    }

    /// Asks the job to stop at its next [`check`](Self::check).
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
    }

    /// To be called in every loop that can last longer than some 10 ms.
    ///
    /// # Errors
    /// [`Error::Cancelled`] once [`cancel`](Self::cancel) was called.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}
