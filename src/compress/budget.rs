//! From a budget to a spec for every matrix: spectra, allocation, and the best kind of approximation for each.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Mutex;

use super::place::Place;
use super::queue::largest_first;
use super::{Calibration, place};
use crate::checkpoint::read::Checkpoint;
use crate::error::{Error, Result};
use crate::fit::{Norm, fit_within, spectrum};
use crate::kron::MatrixView;
use crate::permute::Effort;
use crate::plan::{Candidate, Plan, TQConfig, Target, Weighting, allocate};
use crate::progress::{Parallelism, Progress};
use crate::spec::MatrixSpec;

/// What a matrix is to become.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Its spec; `None` if it stays dense.
    pub spec: Option<MatrixSpec>,
    /// Its parameters then.
    pub parameters: usize,
    /// The energy that it then loses, in its norm.
    pub lost_energy: f64,
    /// Its energies in descending order: rank `k` loses all but the first `k`.
    pub energies: Vec<f64>,
}

/// Spends one budget over matrices that `load` yields by their index, on the current rayon pool: the rank of each follows
/// from spectra that are computed once, and, beyond the effort "fast", each matrix then takes the best approximation of
/// any kind that has no more parameters.
///
/// # Errors
/// Those of `load`, of [`spectrum`] and [`fit_within`], in the matrix, and of [`allocate`].
pub fn choose_specs<'a>(
    places: &[Place<'_>],
    target: Target,
    effort: Effort,
    seed: u64,
    progress: &Progress,
    load: impl Fn(usize) -> Result<Cow<'a, [f32]>> + Sync,
) -> Result<Vec<Planned>> {
    let refine = effort != Effort::Fast;
    let sizes: Vec<_> = places.iter().map(Place::size).collect();
    let all = sizes.iter().sum::<usize>() as u64;
    progress.expect(if refine { all * (1 + REFINEMENT) } else { all });
    // Gives each thread the matrix and its norm, and puts what comes of it in its place.
    let on_each = |one: &(dyn Fn(usize, MatrixView<'_>, &Norm) -> Result<()> + Sync), units: u64| {
        largest_first(&sizes, progress, |i, _| {
            places[i].with(&load(i)?, |view, norm| one(i, view, norm))?;
            progress.advance(sizes[i] as u64 * units);
            Ok(())
        })
    };
    let candidates: Vec<_> = places
        .iter()
        .map(|place| Candidate { rows: place.rows, columns: place.columns, energies: Vec::new() })
        .map(Mutex::new)
        .collect();
    on_each(
        &|i, view, norm| {
            candidates[i].lock().expect("no thread panicked").energies = spectrum(view, norm, progress)?;
            Ok(())
        },
        1,
    )?;
    let candidates: Vec<_> =
        candidates.into_iter().map(|candidate| candidate.into_inner().expect("no thread panicked")).collect();
    let sensitive = places.iter().all(|place| place.moments.output.is_some());
    let weighting = if sensitive { Weighting::Absolute } else { Weighting::Relative };
    let choices = allocate(&candidates, weighting, target)?;
    let planned = candidates.into_iter().zip(&choices).map(|(candidate, choice)| {
        let (parameters, lost_energy, energies) = (choice.parameters, choice.lost_energy, candidate.energies);
        Mutex::new(Planned { spec: choice.spec(), parameters, lost_energy, energies })
    });
    let planned: Vec<_> = planned.collect();
    if refine {
        on_each(
            &|i, view, norm| {
                if choices[i].spec().is_none() {
                    return Ok(());
                }
                let (parameters, alone) = (choices[i].parameters, Parallelism::Sequential);
                let fit = fit_within(view, parameters, norm, effort, seed, alone, progress)?;
                let mut planned = planned[i].lock().expect("no thread panicked");
                planned.parameters = fit.spec.parameters(view.rows(), view.columns())?;
                planned.lost_energy = fit.lost_energy;
                planned.spec = Some(fit.spec);
                Ok(())
            },
            REFINEMENT,
        )?;
    }
    progress.finish();
    Ok(planned.into_iter().map(|planned| planned.into_inner().expect("no thread panicked")).collect())
}

/// How many times as long finding the best approximation takes as a spectrum does, roughly, for the progress bar.
const REFINEMENT: u64 = 10;

/// [`choose_specs`] for the matrices of a checkpoint that `config` names; what its specs say is of no account.
///
/// # Errors
/// Those of [`Checkpoint::open`], [`Plan::for_checkpoint`] and [`choose_specs`].
pub fn choose_specs_of_checkpoint(
    source: &Path,
    config: &TQConfig,
    calibration: &Calibration<'_>,
    target: Target,
    progress: &Progress,
) -> Result<Vec<(String, Planned)>> {
    let checkpoint = Checkpoint::open(source)?;
    let plan = Plan::for_checkpoint(&checkpoint, config)?;
    let places: Vec<_> = plan.jobs.iter().map(|job| place(&job.matrix, calibration)).collect();
    if places.is_empty() {
        return Err(Error::Config("budget: no matrix to spend it on".into()));
    }
    let load = |i: usize| checkpoint.matrix(&plan.jobs[i].matrix);
    let planned = choose_specs(&places, target, config.effort, config.seed, progress, load)?;
    Ok(places.into_iter().map(|place| place.name).zip(planned).collect())
}
