//! Long jobs: the work runs on threads of its own without the GIL, while the calling thread stays responsive.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::error::Result;
use crate::progress::Progress;

/// How often the calling thread looks for Ctrl-C and reports progress.
const TICK: Duration = Duration::from_millis(50);

/// How long a cancelled job is waited for before the caller gets its exception all the same.
pub(super) enum Grace {
    /// Hardly at all: the job leaves nothing behind.
    Short,
    /// Until it has removed what it has written: a script that ends now would stop it halfway.
    UntilTidy,
}

impl Grace {
    fn duration(&self) -> Duration {
        match self {
            Self::Short => Duration::from_millis(40),
            Self::UntilTidy => Duration::from_secs(10),
        }
    }
}

/// A pool of `threads` threads, one per core by default, for a job to install.
///
/// Every job has a pool of its own: rayon's global one would hang in a forked child.
pub(super) fn pool(threads: Option<usize>) -> PyResult<rayon::ThreadPool> {
    let count = threads.unwrap_or(0);
    rayon::ThreadPoolBuilder::new()
        .num_threads(count)
        .build()
        .map_err(|error| PyRuntimeError::new_err(format!("cannot start {count} threads: {error}")))
}

/// Runs `job` on a thread of its own and returns its result.
///
/// The job owns what it works on: after Ctrl-C, or an exception from `callback`, the caller goes on after `grace`, and
/// the job ends by itself at its next [`Progress::check`]. `callback` gets `(done, total)` every [`TICK`] and once at the
/// end.
pub(super) fn run<T: Send + 'static>(
    py: Python<'_>,
    callback: Option<Py<PyAny>>,
    grace: Grace,
    job: impl FnOnce(&Progress) -> Result<T> + Send + 'static,
) -> PyResult<T> {
    let progress = Arc::new(Progress::default());
    // A mutex only makes the receiver shareable, which `detach` asks for; nobody else ever locks it.
    let (sender, receiver) = channel();
    let receiver = Mutex::new(receiver);
    let shared = Arc::clone(&progress);
    let worker = std::thread::Builder::new().name("tqcompressor".into()).spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(|| job(&shared)));
        // The receiver is gone if the caller was interrupted: then nobody wants the result.
        let _ = sender.send(outcome);
    });
    let worker = worker.map_err(|error| PyRuntimeError::new_err(format!("cannot start a thread: {error}")))?;
    loop {
        match py.detach(|| receiver.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(TICK)) {
            Ok(outcome) => {
                // The result is here; what the thread still does is to end.
                drop(worker);
                let result = outcome.map_err(|panic| internal_error(panic.as_ref()))??;
                report(py, &progress, callback.as_ref())?;
                return Ok(result);
            }
            Err(RecvTimeoutError::Disconnected) => return Err(PyRuntimeError::new_err("the worker thread died")),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Err(stop) = py.check_signals().and_then(|()| report(py, &progress, callback.as_ref())) {
            progress.cancel();
            let deadline = Instant::now() + grace.duration();
            py.detach(|| {
                while !worker.is_finished() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            return Err(stop);
        }
    }
}

fn report(py: Python<'_>, progress: &Progress, callback: Option<&Py<PyAny>>) -> PyResult<()> {
    if let Some(callback) = callback {
        callback.call1(py, progress.counts())?;
    }
    Ok(())
}

/// A panic is a bug of ours; it reaches Python as an exception that says so.
fn internal_error(panic: &(dyn std::any::Any + Send)) -> PyErr {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    PyRuntimeError::new_err(format!("internal error in tqcompressor, please report it: {message}"))
}
