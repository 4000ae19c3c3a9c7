//! Threads for the many short steps of a forward pass, and memory for their results.
//!
//! One step of a decoded token takes about a hundred microseconds, and waking a sleeping thread takes a tenth of that.
//! rayon's threads sleep too soon. These helpers spin before they park.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
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
    /// Of each thread in the present job.
    shares: Box<[Share]>,
    buffers: Buffers,
    /// Not `Sync`: one job at a time, and no job within another.
    _one_caller: PhantomData<Cell<()>>,
}

/// The indices that a thread has not taken yet: the first one, and in the upper half the end.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn set(&self, indices: Range<u32>) {
        self.0.store(Self::packed(indices), Relaxed);
    }

    /// Takes the first index.
    fn first(&self) -> Option<usize> {
        self.take(|left| (left.start, left.start + 1..left.end))
    }

    /// Takes the last index.
    fn last(&self) -> Option<usize> {
        self.take(|left| (left.end - 1, left.start..left.end - 1))
    }

    /// Takes an index, and leaves the others, as `split` parts those that are left.
    fn take(&self, split: impl Fn(Range<u32>) -> (u32, Range<u32>)) -> Option<usize> {
        let indices = |share: u64| share as u32..(share >> 32) as u32;
        let others =
            |share| Some(indices(share)).filter(|left| !left.is_empty()).map(|left| Self::packed(split(left).1));
        // Results are published by the end of the job.
        let before = self.0.fetch_update(Relaxed, Relaxed, others).ok()?;
        Some(split(indices(before)).0 as usize)
    }

    fn packed(indices: Range<u32>) -> u64 {
        u64::from(indices.end) << 32 | u64::from(indices.start)
    }
}

/// Calls `work` with the indices of one share and then of the others, from their ends: far from their threads' positions.
fn take_all(shares: &[Share], started: &AtomicUsize, work: &impl Fn(usize)) {
    // A helper that was late for the job before this one may begin twice.
    let own = started.fetch_add(1, Relaxed) % shares.len();
    while let Some(index) = shares[own].first() {
        work(index);
    }
    let others = || (1..shares.len()).find_map(|other| shares[(own + other) % shares.len()].last());
    while let Some(index) = others() {
        work(index);
    }
}

/// A borrowed slice in pieces of one size, of which the last may be smaller.
struct Pieces<'a, T> {
    values: *mut T,
    length: usize,
    size: usize,
    _borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: threads get pieces of their own alone (see `Pieces::piece`).
unsafe impl<T: Send> Sync for Pieces<'_, T> {}

impl<'a, T> Pieces<'a, T> {
    fn new(values: &'a mut [T], size: usize) -> Self {
        Self { values: values.as_mut_ptr(), length: values.len(), size: size.max(1), _borrowed: PhantomData }
    }

    fn count(&self) -> usize {
        self.length.div_ceil(self.size)
    }

    /// # Safety
    /// A piece may be borrowed once at a time.
    #[allow(clippy::mut_from_ref)]
    unsafe fn piece(&self, piece: usize) -> &mut [T] {
        assert!(piece < self.count());
        let first = piece * self.size;
        // SAFETY: it is within the slice, which is borrowed, and no other piece has a part of it.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(first), self.size.min(self.length - first)) }
    }
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
        let shares = (0..threads.max(1)).map(|_| Share::default()).collect();
        let mut pool =
            Self { shared, helpers: Vec::new(), shares, buffers: Buffers::default(), _one_caller: PhantomData };
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

    /// Calls `work` on every item, in any order and on any thread, as [`for_each_index`](Self::for_each_index).
    pub fn for_each<T: Send>(&self, items: impl ExactSizeIterator<Item = T>, work: impl Fn(T) + Sync) {
        if self.threads() == 1 || items.len() < 2 {
            return items.for_each(work);
        }
        let items: Vec<_> = items.map(|item| Mutex::new(Some(item))).collect();
        self.for_each_index(items.len(), |index| {
            let item = items[index].lock().unwrap_or_else(PoisonError::into_inner).take();
            work(item.expect("an index comes once"));
        });
    }

    /// Calls `work` on pieces of slices, each of the size that stands beside its slice, or less at the end: with the
    /// number of the slice and that of the piece in it.
    pub(super) fn for_each_piece<T: Send>(
        &self,
        slices: &mut [(&mut [T], usize)],
        work: impl Fn(usize, usize, &mut [T]) + Sync,
    ) {
        let slices: Vec<_> = slices.iter_mut().map(|(slice, size)| Pieces::new(slice, *size)).collect();
        self.for_each_index(slices.iter().map(Pieces::count).sum(), |index| {
            let (mut slice, mut piece) = (0, index);
            while piece >= slices[slice].count() {
                piece -= slices[slice].count();
                slice += 1;
            }
            // SAFETY: an index comes once.
            work(slice, piece, unsafe { slices[slice].piece(piece) });
        });
    }

    /// Calls `work` once with every index below `count`, in any order and on any thread.
    ///
    /// Each thread takes consecutive indices while no thread is idle. Hardware prefetching then works, and memory is read
    /// a sixth faster than with interleaved ones.
    fn for_each_index(&self, count: usize, work: impl Fn(usize) + Sync) {
        let threads = self.threads();
        if threads == 1 || count < 2 {
            return (0..count).for_each(work);
        }
        let begin = |thread: usize| u32::try_from(thread * count / threads).expect("fewer than 2³² tasks");
        let shares = &*self.shares;
        shares.iter().enumerate().for_each(|(thread, share)| share.set(begin(thread)..begin(thread + 1)));
        let started = AtomicUsize::new(0);
        self.run(&|| take_all(shares, &started, &work));
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
    fn pieces_are_those_of_every_slice() {
        for threads in [1, 2, 3] {
            let pool = ThreadPool::new(threads).unwrap();
            let mut values = [vec![0; 10], vec![], vec![0; 1], vec![0; 12]];
            let sizes = [3, 5, 4, 4];
            let mut slices: Vec<_> = values.iter_mut().map(Vec::as_mut_slice).zip(sizes).collect();
            pool.for_each_piece(&mut slices, |slice, piece, values| {
                values
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, value)| *value += 100 * slice + piece * sizes[slice] + i + 1);
            });
            for (slice, values) in values.iter().enumerate() {
                assert!(values.iter().enumerate().all(|(i, &value)| value == 100 * slice + i + 1), "{values:?}");
            }
            pool.for_each_piece::<u8>(&mut [], |_, _, _| unreachable!("no piece"));
        }
    }

    #[test]
    fn a_share_gives_each_index_once_from_both_ends() {
        let share = Share::default();
        assert_eq!((share.first(), share.last()), (None, None));
        share.set(3..6);
        assert_eq!(
            [share.last(), share.first(), share.first(), share.first(), share.last()],
            [Some(5), Some(3), Some(4), None, None]
        );
        share.set(u32::MAX - 1..u32::MAX);
        assert_eq!((share.last(), share.first()), (Some(u32::MAX as usize - 1), None));
    }

    #[test]
    fn one_thread_may_take_everything_and_more_may_begin_than_there_are() {
        let (shares, started, taken) = ([Share::default(), Share::default()], AtomicUsize::new(0), Cell::new(0));
        shares[0].set(0..3);
        shares[1].set(3..7);
        for _ in 0..5 {
            take_all(&shares, &started, &|index| taken.set(taken.get() + (1 << (4 * index))));
        }
        assert_eq!(taken.get(), 0x111_1111);
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
