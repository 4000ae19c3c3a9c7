//! From a budget to a spec for every matrix: spectra, allocation, and the best kind of approximation for each.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Mutex;

use super::place::{Calibration, Place, place};
use super::queue::largest_first;
use crate::checkpoint::names::{Kind, Matrix, TOKEN_EMBEDDING, bare};
use crate::checkpoint::read::Checkpoint;
use crate::error::{Error, Result};
use crate::fit::{Limits, Norm, fit_within, spectrum};
use crate::kron::MatrixView;
use crate::permute::Effort;
use crate::plan::{Candidate, Choice, Plan, TQConfig, Target, Weighting, allocate};
use crate::progress::{Parallelism, Progress};
use crate::spec::{MatrixSpec, Usage};

/// What a matrix is to become.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Its spec; `None` if it stays dense.
    pub spec: Option<MatrixSpec>,
    /// Its parameters then.
    pub parameters: usize,
    /// Its MACs for one token while it is dense.
    pub macs_before: usize,
    /// Its MACs for one token then.
    pub macs: usize,
    /// The energy that it then loses, in its norm.
    pub lost_energy: f64,
    /// Its energies in descending order: rank `k` loses all but the first `k`.
    pub energies: Vec<f64>,
}

/// Spends one budget over matrices that `load` yields by their index, on the current rayon pool: the rank of each
/// follows from spectra that are computed once, and, beyond the effort "fast", each matrix then takes the best
/// approximation of any kind that has no more parameters.
///
/// `max_macs` caps the MACs for one token of all matrices together, as a share of those that they take dense.
/// What the ranks leave of it is shared out in proportion to what each takes, and no matrix's best may take more.
///
/// # Errors
/// Those of `load`, of [`spectrum`] and [`fit_within`], in the matrix, and of [`allocate`].
pub fn choose_specs<'a>(
    matrices: &[(Place<'_>, Usage)],
    target: Target,
    max_macs: Option<f64>,
    effort: Effort,
    seed: u64,
    progress: &Progress,
    load: impl Fn(usize) -> Result<Cow<'a, [f32]>> + Sync,
) -> Result<Vec<Planned>> {
    let refine = effort != Effort::Fast;
    let sizes: Vec<_> = matrices.iter().map(|(place, _)| place.size()).collect();
    let all = sizes.iter().sum::<usize>() as u64;
    progress.expect(if refine { all * (1 + REFINEMENT) } else { all });
    // Gives each thread the matrix and its norm, and puts what comes of it in its place.
    let on_each = |one: &(dyn Fn(usize, MatrixView<'_>, &Norm) -> Result<()> + Sync), units: u64| {
        largest_first(&sizes, progress, |i, _| {
            matrices[i].0.with(&load(i)?, |view, norm| one(i, view, norm))?;
            progress.advance(sizes[i] as u64 * units);
            Ok(())
        })
    };
    let candidates: Vec<_> = matrices
        .iter()
        .map(|&(Place { rows, columns, .. }, usage)| Candidate { rows, columns, usage, energies: Vec::new() })
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
    let sensitive = matrices.iter().all(|(place, _)| place.moments.output.is_some());
    let weighting = if sensitive { Weighting::Absolute } else { Weighting::Relative };
    let dense: usize = candidates.iter().map(Candidate::dense_macs).sum();
    let most_macs = max_macs.map(|share| (share * dense as f64) as usize);
    let choices = allocate(&candidates, weighting, target, most_macs)?;
    let shares = most_macs.map(|most| shared_out(most, &choices));
    let planned = candidates.into_iter().zip(&choices).map(|(candidate, choice)| {
        let (spec, macs_before, energies) = (choice.spec(), candidate.dense_macs(), candidate.energies);
        let &Choice { parameters, macs, lost_energy, .. } = choice;
        Mutex::new(Planned { spec, parameters, macs_before, macs, lost_energy, energies })
    });
    let planned: Vec<_> = planned.collect();
    if refine {
        on_each(
            &|i, view, norm| {
                if choices[i].spec().is_none() {
                    return Ok(());
                }
                let usage = matrices[i].1;
                let macs = shares.as_ref().map(|shares| (shares[i], usage));
                let limits = Limits { parameters: choices[i].parameters, macs };
                let fit = fit_within(view, limits, norm, effort, seed, Parallelism::Sequential, progress)?;
                let mut planned = planned[i].lock().expect("no thread panicked");
                planned.parameters = fit.spec.parameters(view.rows(), view.columns())?;
                planned.macs = fit.spec.macs(view.rows(), view.columns(), usage)?;
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

/// What each matrix may take of `most` MACs: as many as its choice does, and of what all choices together leave a
/// part in proportion to that. Dense matrices have no use for it.
fn shared_out(most: usize, choices: &[Choice]) -> Vec<usize> {
    let left = most - choices.iter().map(|choice| choice.macs).sum::<usize>();
    let used = |choice: &Choice| if choice.rank.is_some() { choice.macs } else { 0 };
    let all = choices.iter().map(used).sum::<usize>().max(1);
    // Rounded down, and in more bits, since a product of two counts may not fit.
    let part = |choice: &Choice| (left as u128 * used(choice) as u128 / all as u128) as usize;
    choices.iter().map(|choice| choice.macs + part(choice)).collect()
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
    max_macs: Option<f64>,
    progress: &Progress,
) -> Result<Vec<(String, Planned)>> {
    let checkpoint = Checkpoint::open(source)?;
    let plan = Plan::for_checkpoint(&checkpoint, config)?;
    let matrices: Vec<_> =
        plan.jobs.iter().map(|job| (place(&job.matrix, calibration), usage(&checkpoint, &job.matrix))).collect();
    if matrices.is_empty() {
        return Err(Error::Config("budget: no matrix to spend it on".into()));
    }
    let load = |i: usize| checkpoint.matrix(&plan.jobs[i].matrix);
    let planned = choose_specs(&matrices, target, max_macs, config.effort, config.seed, progress, load)?;
    Ok(matrices.into_iter().map(|(place, _)| place.name).zip(planned).collect())
}

fn usage(checkpoint: &Checkpoint, matrix: &Matrix) -> Usage {
    match matrix.kind {
        Kind::Conv1d | Kind::Linear => Usage::Map,
        Kind::Embedding if checkpoint.has_tied_head() && bare(&matrix.tensor) == TOKEN_EMBEDDING => Usage::TiedLookup,
        Kind::Embedding => Usage::Lookup,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::Moments;
    use crate::testing::noise;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_shared_out_is_no_more_than_there_is(
            counts in prop::collection::vec((any::<bool>(), 0..1_usize << 40), 1..6), extra in 0..1_usize << 45,
        ) {
            let choice = |&(dense, macs): &(bool, usize)| {
                Choice { rank: (!dense).then_some(1), parameters: macs, macs, lost_energy: 0.0 }
            };
            let choices: Vec<_> = counts.iter().map(choice).collect();
            let used: usize = choices.iter().map(|choice| choice.macs).sum();
            let shares = shared_out(used + extra, &choices);
            prop_assert!(shares.iter().sum::<usize>() <= used + extra);
            for (share, choice) in shares.iter().zip(&choices) {
                prop_assert!(*share >= choice.macs && (choice.rank.is_some() || *share == choice.macs));
            }
        }
    }

    #[test]
    fn the_best_of_any_kind_keep_within_a_cap_on_macs() {
        let sizes = [(48, 32, Usage::Map), (64, 32, Usage::TiedLookup), (32, 48, Usage::Map), (40, 32, Usage::Lookup)];
        let values: Vec<_> = sizes.iter().zip(1..).map(|(&(m, n, _), seed)| noise(m * n, seed)).collect();
        let matrices = sizes.map(|(rows, columns, usage)| {
            (Place { name: "w".into(), rows, columns, moments: Moments::default() }, usage)
        });
        let dense: usize = sizes.iter().map(|&(m, n, usage)| usage.dense_macs(m, n)).sum();
        let target = Target::Parameters(3400);
        let choose = |cap| {
            let load = |i: usize| Ok(Cow::Borrowed(values[i].as_slice()));
            choose_specs(&matrices, target, cap, Effort::Best, 1, &Progress::default(), load)
        };
        let sum = |planned: &[Planned]| planned.iter().map(|each| each.macs).sum::<usize>();
        let free = choose(None).unwrap();
        assert!(sum(&free) as f64 > 0.8 * dense as f64);
        for share in [0.25, 0.5, 0.8, 1.5] {
            let planned = choose(Some(share)).unwrap();
            assert!(sum(&planned) as f64 <= share * dense as f64);
            assert_eq!(planned, choose(Some(share)).unwrap());
            for (each, &(m, n, usage)) in planned.iter().zip(&sizes) {
                assert_eq!(each.macs_before, usage.dense_macs(m, n));
                let takes = |spec: &MatrixSpec| spec.macs(m, n, usage).unwrap();
                assert_eq!(each.macs, each.spec.as_ref().map_or(each.macs_before, takes));
            }
        }
        assert_eq!(choose(Some(1e9)).unwrap(), free);
        for hopeless in [0.001, 0.0, -1.0, f64::NAN] {
            assert!(matches!(choose(Some(hopeless)), Err(Error::Config(_))));
        }
    }
}
