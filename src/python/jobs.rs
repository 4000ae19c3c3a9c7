//! Long jobs run on their own threads without the GIL, while the calling thread handles signals and progress.
//!
//! A job, and not the import, fails for an instruction set that the processor lacks: the command line then prints the error
//! as any other, and a program that does not use this package goes on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::error::Result;
use crate::numeric::simd;
use crate::progress::{Parallelism, Progress};
use crate::runtime::ThreadPool;

/// Interval at which the calling thread checks for Ctrl-C and reports progress.
const TICK: Duration = Duration::from_millis(50);

/// A pool of `threads` threads, one per core by default, for a job to install.
///
/// Every job has a pool of its own: rayon's global one would hang in a forked child.
pub(super) fn rayon_pool(threads: Option<usize>) -> PyResult<rayon::ThreadPool> {
    let count = threads.unwrap_or(0);
    rayon::ThreadPoolBuilder::new()
        .num_threads(count)
        .build()
        .map_err(|error| PyRuntimeError::new_err(format!("cannot start {count} threads: {error}")))
}

/// The threads of a forward pass, one per core by default.
pub(super) fn thread_pool(threads: Option<usize>) -> PyResult<ThreadPool> {
    let count = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    ThreadPool::new(count).map_err(|error| PyRuntimeError::new_err(format!("cannot start {count} threads: {error}")))
}

/// Runs `job` on a thread of its own, without the GIL, and returns its result.
///
/// Every [`TICK`] and once at the end, the calling thread checks for Ctrl-C and calls `callback` with `(done, total)`.
/// After Ctrl-C or an exception of `callback` it cancels the job and waits for it. The job ends at its next
/// [`Progress::check`] and may remove its output first.
pub(super) fn run<T: Send>(
    py: Python<'_>,
    callback: Option<Py<PyAny>>,
    job: impl FnOnce(&Progress) -> Result<T> + Send,
) -> PyResult<T> {
    let report = |py: Python<'_>, progress: &Progress| match &callback {
        Some(callback) => callback.call1(py, progress.counts()).map(|_| ()),
        None => Ok(()),
    };
    run_watched(py, report, job)
}

/// As [`run`], with any `report` in place of a callback.
pub(super) fn run_watched<T: Send>(
    py: Python<'_>,
    report: impl Fn(Python<'_>, &Progress) -> PyResult<()>,
    job: impl FnOnce(&Progress) -> Result<T> + Send,
) -> PyResult<T> {
    simd::check()?;
    let progress = Progress::default();
    // `detach` needs a `Sync` receiver, hence the mutex. Only this thread locks it.
    let (sender, receiver) = channel();
    let receiver = Mutex::new(receiver);
    let receive = |wait| receiver.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(wait);
    std::thread::scope(|scope| {
        let work = || {
            // State that a panic left incomplete is not used again.
            let outcome = catch_unwind(AssertUnwindSafe(|| job(&progress)));
            // The receiver lives as long as this scope.
            let _ = sender.send(outcome);
        };
        std::thread::Builder::new().name("tqcompressor".into()).spawn_scoped(scope, work).map_err(no_thread)?;
        loop {
            match py.detach(|| receive(TICK)) {
                Ok(outcome) => {
                    let result = result_of(outcome)?;
                    report(py, &progress)?;
                    return Ok(result);
                }
                Err(RecvTimeoutError::Disconnected) => return Err(PyRuntimeError::new_err("the worker thread died")),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Err(stop) = py.check_signals().and_then(|()| report(py, &progress)) {
                progress.cancel();
                // Wait here without the GIL: the end of the scope would wait with it.
                py.detach(|| while matches!(receive(TICK), Err(RecvTimeoutError::Timeout)) {});
                return Err(stop);
            }
        }
    })
}

/// As [`run`], for a job that cannot be cancelled. After Ctrl-C it runs to its end in the background.
pub(super) fn run_detached<T: Send + 'static>(
    py: Python<'_>,
    job: impl FnOnce() -> Result<T> + Send + 'static,
) -> PyResult<T> {
    simd::check()?;
    let (sender, receiver) = channel();
    let receiver = Mutex::new(receiver);
    let work = move || {
        // The receiver is gone after Ctrl-C.
        let _ = sender.send(catch_unwind(AssertUnwindSafe(job)));
    };
    std::thread::Builder::new().name("tqcompressor".into()).spawn(work).map_err(no_thread)?;
    loop {
        match py.detach(|| receiver.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(TICK)) {
            Ok(outcome) => return result_of(outcome),
            Err(RecvTimeoutError::Disconnected) => return Err(PyRuntimeError::new_err("the worker thread died")),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
        }
    }
}

fn no_thread(error: std::io::Error) -> PyErr {
    PyRuntimeError::new_err(format!("cannot start a thread: {error}"))
}

/// Runs a job that takes no longer than a few milliseconds on the calling thread, without the GIL.
pub(super) fn run_here<T: Send>(py: Python<'_>, job: impl FnOnce(&Progress) -> Result<T> + Send) -> PyResult<T> {
    simd::check()?;
    result_of(py.detach(|| catch_unwind(AssertUnwindSafe(|| job(&Progress::default())))))
}

/// Runs a job on the calling thread if it is small, else on `threads` threads of its own.
pub(super) fn run_by_size<T: Send>(
    py: Python<'_>,
    small: bool,
    threads: Option<usize>,
    job: impl FnOnce(Parallelism, &Progress) -> Result<T> + Send,
) -> PyResult<T> {
    if small {
        return run_here(py, |progress| job(Parallelism::Sequential, progress));
    }
    let pool = rayon_pool(threads)?;
    run(py, None, |progress| pool.install(|| job(Parallelism::Rayon, progress)))
}

fn result_of<T>(outcome: std::thread::Result<Result<T>>) -> PyResult<T> {
    Ok(outcome.map_err(|panic| internal_error(panic.as_ref()))??)
}

/// A panic is a bug. It becomes a Python exception that asks for a report.
fn internal_error(panic: &(dyn std::any::Any + Send)) -> PyErr {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    PyRuntimeError::new_err(format!("internal error in tqcompressor, please report it: {message}"))
}
