//! Decomposition of many matrices in parallel, with at most one of them per thread in memory.

use std::ops::Deref;
use std::sync::Mutex;
use std::time::Instant;

use super::place::Place;
use super::queue::largest_first;
use crate::error::Result;
use crate::fit::{Fit, fit};
use crate::permute::{Effort, work};
use crate::progress::Progress;
use crate::spec::{MatrixSpec, TermSpec};

/// One matrix to decompose.
#[derive(Clone, Debug, PartialEq)]
pub struct Task<'a> {
    /// The matrix.
    pub place: Place<'a>,
    /// Its spec.
    pub spec: MatrixSpec,
}

/// A decomposition and its duration.
#[derive(Clone, Debug, PartialEq)]
pub struct Timed {
    /// The decomposition.
    pub fit: Fit,
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// Decomposes matrices held in memory, row-major, in × out, on the current rayon pool. Results are in the order of
/// `tasks`.
///
/// The result for a matrix depends only on its values, its spec, `effort` and `seed`. It depends neither on the number
/// of threads nor on the other matrices.
///
/// # Errors
/// Those of [`fit`], in the matrix. Of several errors, that of the first matrix is returned.
///
/// # Panics
/// If there are not as many matrices as tasks.
pub fn decompose_many(
    tasks: &[Task<'_>],
    matrices: &[&[f32]],
    effort: Effort,
    seed: u64,
    progress: &Progress,
) -> Result<Vec<Timed>> {
    assert_eq!(tasks.len(), matrices.len());
    let load = |i: usize| Ok(matrices[i]);
    in_order(tasks.len(), |keep| decompose_each(tasks, effort, seed, progress, load, keep))
}

/// The results of `count` jobs in order. `run` calls its argument with each result when it is ready.
pub(super) fn in_order(
    count: usize,
    run: impl FnOnce(&(dyn Fn(usize, Timed) -> Result<()> + Sync)) -> Result<()>,
) -> Result<Vec<Timed>> {
    let results: Vec<Mutex<Option<Timed>>> = (0..count).map(|_| Mutex::new(None)).collect();
    run(&|i, timed| {
        *results[i].lock().expect("no thread panicked") = Some(timed);
        Ok(())
    })?;
    let taken = results.into_iter().map(|result| result.into_inner().expect("no thread panicked"));
    Ok(taken.map(|timed| timed.expect("every job was done")).collect())
}

/// Decomposes, on the current rayon pool, matrices that `load` reads by their index in `tasks`. The thread that loads a
/// matrix decomposes it and calls `finish` with the result. A matrix is dropped as soon as it is factored.
///
/// # Errors
/// Those of [`fit`] and `load`, in the matrix, and those of `finish`. After the first error, `progress` is cancelled
/// and the other threads stop soon.
pub fn decompose_each<V: Deref<Target = [f32]>>(
    tasks: &[Task<'_>],
    effort: Effort,
    seed: u64,
    progress: &Progress,
    load: impl Fn(usize) -> Result<V> + Sync,
    finish: impl Fn(usize, Timed) -> Result<()> + Sync,
) -> Result<()> {
    progress.expect(tasks.iter().map(|task| units(task, effort)).sum());
    let sizes: Vec<_> = tasks.iter().map(|task| task.place.size()).collect();
    largest_first(&sizes, progress, |i, parallelism| {
        let Task { place, spec } = &tasks[i];
        let start = Instant::now();
        let matrix = load(i)?;
        let fit = place.with(&matrix, |view, norm| fit(view, spec, norm, effort, seed, parallelism, progress))?;
        drop(matrix);
        progress.advance(low_rank_units(&tasks[i]));
        finish(i, Timed { fit, seconds: start.elapsed().as_secs_f64() })
    })?;
    progress.finish();
    Ok(())
}

/// Approximate cost of the eigendecompositions of a low-rank term, in the units of the permutation search.
fn low_rank_units(Task { place, spec }: &Task<'_>) -> u64 {
    let terms = spec.terms().iter().filter(|term| !matches!(term, TermSpec::Kronecker(_))).count();
    (terms * place.size()) as u64
}

/// The work of a task. The permutation searches advance their own progress.
fn units(task: &Task<'_>, effort: Effort) -> u64 {
    let Task { place, spec } = task;
    let term = |term: &TermSpec| match term {
        // A spec that does not fit counts as no work: `fit` returns the error.
        TermSpec::Kronecker(spec) => {
            spec.shape(place.rows, place.columns).map_or(0, |shape| work(shape, spec.permute, effort))
        }
        TermSpec::LowRank { .. } | TermSpec::Grouped(_) => 0,
    };
    low_rank_units(task) + spec.terms().iter().map(term).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::fit::Moments;
    use crate::spec::{KroneckerSpec, Permute};
    use crate::testing::noise;

    fn task(name: &str, rows: usize, columns: usize) -> Task<'static> {
        let spec = KroneckerSpec { block: (2, 2), rank: 1, permute: Permute::Both }.into();
        Task { place: Place { name: name.into(), rows, columns, moments: Moments::default() }, spec }
    }

    #[test]
    fn results_come_in_order_and_do_not_depend_on_threads_or_company() {
        let tasks = [task("a", 8, 12), task("b", 24, 16), task("c", 4, 4)];
        let matrices: Vec<_> = tasks.iter().zip(1..).map(|(task, i)| noise(task.place.size(), i)).collect();
        let slices: Vec<_> = matrices.iter().map(Vec::as_slice).collect();
        let run = |tasks: &[Task<'_>], slices: &[&[f32]], threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let timed = pool.install(|| decompose_many(tasks, slices, Effort::Balanced, 3, &Progress::default()));
            timed.unwrap().into_iter().map(|timed| timed.fit).collect::<Vec<_>>()
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
        tasks[13].spec = KroneckerSpec { block: (3, 2), rank: 1, permute: Permute::Both }.into();
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
