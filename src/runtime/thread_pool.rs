//! Threads for the many short steps of a forward pass, and memory for their results.
//!
//! One step of a decoded token takes about a hundred microseconds, and waking a sleeping thread takes a tenth of that.
//! rayon's threads sleep too soon. These helpers spin before they park.

use std::cell::Cell;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::buffers::{Buffer, Buffers};

/// Spins of a helper before it parks: some hundred microseconds.
const SPINS: u32 = 1 << 14;

/// No helper may begin to work on the job.
const CLOSED: usize = usize::MAX;

/// The calling thread and its helpers, which end when the pool is dropped.
#[derive(Debug)]
pub struct ThreadPool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    buffers: Buffers,
    /// Not `Sync`: one job at a time, and no job within another.
    _one_caller: PhantomData<Cell<()>>,
}

/// A borrowed closure without its lifetime; [`ThreadPool::run`] ends the borrow.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn() + Sync));

// SAFETY: the closure is `Sync` and outlives its use (see `ThreadPool::run`).
unsafe impl Send for Job {}

struct Shared {
    /// Incremented for every job.
    round: AtomicUsize,
    job: Mutex<Option<Job>>,
    /// Helpers that are at work on the job, or [`CLOSED`].
    working: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Shared").field("round", &self.round).finish_non_exhaustive()
    }
}

impl ThreadPool {
    /// Starts `threads − 1` helpers.
    ///
    /// # Errors
    /// The system's error if a thread does not start.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            round: AtomicUsize::new(0),
            job: Mutex::new(None),
            working: AtomicUsize::new(CLOSED),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared, helpers: Vec::new(), buffers: Buffers::default(), _one_caller: PhantomData };
        for _ in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = thread::Builder::new().name("tqcompressor helper".into());
            pool.helpers.push(builder.spawn(move || shared.help())?);
        }
        Ok(pool)
    }

    /// How many threads there are, the calling one included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Memory for a result of so many values, which are arbitrary until they are written.
    pub(super) fn buffer(&self, length: usize) -> Buffer {
        self.buffers.get(length)
    }

    /// Where that memory comes from, for tasks on other threads.
    pub(super) fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// Calls `work` on every item, in any order and on any thread.
    ///
    /// Each thread takes consecutive items while no thread is idle. Hardware prefetching then works, and memory is read
    /// a sixth faster than with interleaved items.
    pub fn for_each<T: Send>(&self, mut items: impl ExactSizeIterator<Item = T>, work: impl Fn(T) + Sync) {
        let (count, threads) = (items.len(), self.threads());
        if threads == 1 || count < 2 {
            return items.for_each(work);
        }
        let share = |thread: usize| (thread + 1) * count / threads - thread * count / threads;
        let shares: Vec<Mutex<VecDeque<T>>> =
            (0..threads).map(|thread| Mutex::new(items.by_ref().take(share(thread)).collect())).collect();
        let started = AtomicUsize::new(0);
        self.run(&|| {
            let own = started.fetch_add(1, Relaxed);
            // Items of another thread are taken from its end, far from that thread's position.
            let next = || {
                (0..threads).find_map(|other| {
                    let mut share = shares[(own + other) % threads].lock().unwrap_or_else(PoisonError::into_inner);
                    if other == 0 { share.pop_front() } else { share.pop_back() }
                })
            };
            while let Some(item) = next() {
                work(item);
            }
        });
    }

    /// Calls `job` on this thread and on every helper that wakes before this thread is done, and returns when all have
    /// returned. A helper that is not scheduled in time is not waited for.
    fn run(&self, job: &(dyn Fn() + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Helpers call the job only between `open` and `close`, which is reached
        // even if the job panics on this thread.
        let erased = Job(unsafe { std::mem::transmute::<&(dyn Fn() + Sync), *const (dyn Fn() + Sync)>(job) });
        shared.open(erased);
        for helper in &self.helpers {
            helper.thread().unpark();
        }
        let own = catch_unwind(AssertUnwindSafe(job));
        shared.close();
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Relaxed), "a helper panicked");
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.shared.round.fetch_add(1, SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // `run` has already reported panics.
            let _ = helper.join();
        }
    }
}

impl Shared {
    /// Lets helpers work on a job.
    fn open(&self, job: Job) {
        *self.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
        self.working.store(0, Release);
        self.round.fetch_add(1, SeqCst);
    }

    /// Waits for the helpers that have begun, and lets no other begin.
    fn close(&self) {
        let mut spins = 0;
        while self.working.compare_exchange(0, CLOSED, AcqRel, Relaxed).is_err() {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
        *self.job.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn help(&self) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            while self.round.load(Acquire) == seen {
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                } else {
                    // Returns at once if `unpark` was called since the check.
                    thread::park();
                }
            }
            seen = self.round.load(Acquire);
            if self.stop.load(SeqCst) {
                return;
            }
            let begin = |working| if working == CLOSED { None } else { Some(working + 1) };
            if self.working.fetch_update(AcqRel, Relaxed, begin).is_err() {
                continue;
            }
            let job = *self.job.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(Job(job)) = job {
                // SAFETY: `close` waits for this thread.
                if catch_unwind(AssertUnwindSafe(|| unsafe { (*job)() })).is_err() {
                    self.panicked.store(true, Relaxed);
                }
            }
            self.working.fetch_sub(1, Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = ThreadPool::new(threads).unwrap();
            for length in [0, 1, 2, 100] {
                for _ in 0..50 {
                    let mut values = vec![0; length];
                    pool.for_each(values.iter_mut().enumerate(), |(i, value)| *value += i + 1);
                    assert!(values.iter().enumerate().all(|(i, &value)| value == i + 1));
                }
            }
            // By then the helpers are parked, and must wake.
            std::thread::sleep(std::time::Duration::from_millis(20));
            let count = AtomicUsize::new(0);
            pool.for_each(0..1000, |_| _ = count.fetch_add(1, Relaxed));
            assert_eq!(count.into_inner(), 1000);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_workers_go_on() {
        let pool = ThreadPool::new(3).unwrap();
        for bad in 0..20 {
            let run = || pool.for_each(0..20, |i| assert_ne!(i, bad));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        let count = AtomicUsize::new(0);
        pool.for_each(0..100, |_| _ = count.fetch_add(1, Relaxed));
        assert_eq!(count.into_inner(), 100);
    }
}
