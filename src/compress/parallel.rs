//! Decomposing many matrices at once, with no more of them in memory than there are threads.

use std::borrow::Cow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use crate::error::{Error, Result};
use crate::permute::{Decomposition, Effort, decompose, work};
use crate::progress::{Parallelism, Progress};
use crate::shape::KroneckerSpec;

/// One matrix to decompose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its name, for error messages.
    pub name: String,
    /// Its rows (in features).
    pub rows: usize,
    /// Its columns (out features).
    pub columns: usize,
    /// What is asked of it.
    pub spec: KroneckerSpec,
}

/// A decomposition and the time that it took.
#[derive(Clone, Debug, PartialEq)]
pub struct Timed {
    /// The decomposition.
    pub decomposition: Decomposition,
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// Decomposes matrices held in memory, row-major, in × out, on the current rayon pool. Results come in the order of
/// `tasks`.
///
/// The result of a matrix depends on its values, its spec, `effort` and `seed` only: not on the number of threads, nor
/// on the other matrices.
///
/// # Errors
/// Those of [`decompose`], in the matrix; of several, that of the first matrix.
///
/// # Panics
/// If there are not as many matrices as tasks.
pub fn decompose_many(
    tasks: &[Task],
    matrices: &[&[f32]],
    effort: Effort,
    seed: u64,
    progress: &Progress,
) -> Result<Vec<Timed>> {
    assert_eq!(tasks.len(), matrices.len());
    let results: Vec<Mutex<Option<Timed>>> = tasks.iter().map(|_| Mutex::new(None)).collect();
    let load = |i: usize| Ok(Cow::Borrowed(matrices[i]));
    let keep = |i: usize, timed| {
        *results[i].lock().expect("no thread panicked") = Some(timed);
        Ok(())
    };
    decompose_each(tasks, effort, seed, progress, load, keep)?;
    let taken = results.into_iter().map(|result| result.into_inner().expect("no thread panicked"));
    Ok(taken.map(|timed| timed.expect("every task was done")).collect())
}

/// Decomposes, on the current rayon pool, matrices that `load` yields by their index in `tasks`, and hands each result to
/// `finish` at once, both on the thread that did the work. A matrix is dropped as soon as it is factored.
///
/// # Errors
/// Those of [`decompose`] and `load`, in the matrix, and those of `finish`. After the first, `progress` is cancelled, so
/// that the other threads stop soon.
pub fn decompose_each<'a>(
    tasks: &[Task],
    effort: Effort,
    seed: u64,
    progress: &Progress,
    load: impl Fn(usize) -> Result<Cow<'a, [f32]>> + Sync,
    finish: impl Fn(usize, Timed) -> Result<()> + Sync,
) -> Result<()> {
    // The largest first: a large one that begins last would leave the other threads idle.
    let mut order: Vec<_> = (0..tasks.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(tasks[i].rows.saturating_mul(tasks[i].columns)));
    // With fewer matrices than threads, the threads work together on each. With more, each works on its own: a thread
    // that waits for a part of one matrix would otherwise begin another, and hold both.
    let threads = rayon::current_num_threads();
    let parallelism = if threads > tasks.len() { Parallelism::Rayon } else { Parallelism::Sequential };
    let one = |i: usize| -> Result<()> {
        progress.check()?;
        let Task { name, rows, columns, spec } = &tasks[i];
        let start = Instant::now();
        let matrix = load(i)?;
        let decomposition = decompose(&matrix, (*rows, *columns), spec, effort, seed, parallelism, progress)
            .map_err(|error| error.in_tensor(name))?;
        drop(matrix);
        finish(i, Timed { decomposition, seconds: start.elapsed().as_secs_f64() })
    };
    // What does not fit is no work: `decompose` refuses it.
    let units = |Task { rows, columns, spec, .. }: &Task| {
        spec.shape(*rows, *columns).map_or(0, |shape| work(shape, spec.permute, effort))
    };
    progress.expect(tasks.iter().map(units).sum());
    let next = AtomicUsize::new(0);
    let errors = Mutex::new(Vec::new());
    rayon::broadcast(|_| {
        while let Some(&i) = order.get(next.fetch_add(1, Relaxed)) {
            if let Err(error) = one(i) {
                errors.lock().expect("no thread panicked").push((i, error));
                progress.cancel();
                break;
            }
        }
    });
    let mut errors = errors.into_inner().expect("no thread panicked");
    // What came of cancelling the others is not the cause.
    errors.sort_by_key(|(i, error)| (matches!(error, Error::Cancelled), *i));
    if let Some((_, error)) = errors.into_iter().next() {
        return Err(error);
    }
    progress.finish();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Permute;
    use crate::testing::noise;

    fn task(name: &str, rows: usize, columns: usize) -> Task {
        let spec = KroneckerSpec { block: (2, 2), rank: 1, permute: Permute::Both };
        Task { name: name.into(), rows, columns, spec }
    }

    #[test]
    fn results_come_in_order_and_do_not_depend_on_threads_or_company() {
        let tasks = [task("a", 8, 12), task("b", 24, 16), task("c", 4, 4)];
        let matrices: Vec<_> = tasks.iter().zip(1..).map(|(task, i)| noise(task.rows * task.columns, i)).collect();
        let slices: Vec<_> = matrices.iter().map(Vec::as_slice).collect();
        let run = |tasks: &[Task], slices: &[&[f32]], threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let timed = pool.install(|| decompose_many(tasks, slices, Effort::Balanced, 3, &Progress::default()));
            timed.unwrap().into_iter().map(|timed| timed.decomposition).collect::<Vec<_>>()
        };
        let expected = run(&tasks, &slices, 1);
        for threads in [2, 5] {
            assert_eq!(run(&tasks, &slices, threads), expected);
        }
        for i in 0..3 {
            assert_eq!(run(&tasks[i..=i], &slices[i..=i], 2)[0], expected[i]);
        }
    }

    #[test]
    fn the_cause_is_reported_not_the_cancelling_that_it_brought() {
        let mut tasks: Vec<_> = (0..20).map(|i| task(&format!("t{i}"), 16, 16)).collect();
        tasks[13].spec.block = (3, 2);
        let matrix = noise(256, 1);
        let matrices = vec![matrix.as_slice(); 20];
        let error = decompose_many(&tasks, &matrices, Effort::Fast, 0, &Progress::default()).unwrap_err();
        assert!(error.to_string().contains("'t13'"), "{error}");
    }

    #[test]
    fn a_cancelled_job_stops() {
        let matrix = noise(256, 1);
        let progress = Progress::default();
        progress.cancel();
        let error = decompose_many(&[task("a", 16, 16)], &[&matrix], Effort::Fast, 0, &progress).unwrap_err();
        assert!(matches!(error, Error::Cancelled));
    }
}
