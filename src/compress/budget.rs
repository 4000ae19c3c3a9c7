//! From a budget to a fit for every matrix: spectra, allocation, and the best kind of approximation for each.
//!
//! A [`SpentBudget`] carries what planning computed, so that nothing is computed again when the plan is carried out:
//! beyond the effort "fast" the fits themselves, and at "fast" the eigendecompositions, as far as [`KEPT_SPECTRA`] reaches.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Mutex;
use std::time::Instant;

use super::fit_store::FitStore;
use super::parallel::{Timed, in_order};
use super::place::Place;
use super::queue::largest_first;
use crate::error::Result;
use crate::fit::{Fit, Limits, LowRank, Spectrum, Term, fit_within};
use crate::kron::MatrixView;
use crate::permute::Effort;
use crate::plan::{Candidate, Choice, Target, Weighting, allocate};
use crate::progress::Progress;
use crate::spec::{MatrixSpec, Usage};

/// Bytes of eigendecompositions that are kept between planning and fitting; beyond them they are computed again.
pub const KEPT_SPECTRA: usize = 768 << 20;

/// A matrix that a budget may be spent on.
#[derive(Clone, Debug, PartialEq)]
pub struct BudgetMatrix<'a> {
    /// The matrix.
    pub place: Place<'a>,
    /// Its module. The parts of a fused weight have one module, and are compressed all or none.
    pub module: String,
    /// What is done with it for every token.
    pub usage: Usage,
}

/// What a budget is, and how hard to look.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetOptions {
    /// How far to go.
    pub target: Target,
    /// A cap on the MACs for one token of all matrices together, as a share of those that they take dense.
    pub max_macs: Option<f64>,
    /// "fast" takes low rank; beyond it, each matrix takes the best of any kind with no more parameters.
    pub effort: Effort,
}

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

/// A budget that was spent: a plan for every matrix, and what is needed to carry it out.
pub struct SpentBudget {
    planned: Vec<Planned>,
    work: Vec<Mutex<Work>>,
    fits: FitStore,
}

/// What planning left of the work on one matrix.
enum Work {
    /// The matrix stays dense, or its fit is in the store or was taken.
    Nothing,
    /// A low rank, to be fitted; with the eigendecomposition if that was kept.
    LowRank(usize, Option<Spectrum>),
}

impl SpentBudget {
    /// Spends one budget over matrices that `load` yields by their index, on the current rayon pool: the rank of each
    /// follows from a spectrum that is computed once, and, beyond the effort "fast", each matrix then takes the best
    /// approximation of any kind that has no more parameters.
    ///
    /// Where some parts of a fused weight are compressed, a part that would stay dense gets all but one of its ranks, which
    /// has one parameter less and loses next to nothing. What the ranks leave of a cap on MACs is shared out in proportion
    /// to what each takes, and no matrix's best may take more. With `keep`, [`fit_each`](Self::fit_each) can follow.
    ///
    /// # Errors
    /// Those of `load`, of [`Spectrum::new`] and [`fit_within`], in the matrix, and of [`allocate`].
    ///
    /// # Cost
    /// Memory: one matrix a thread; with `keep` up to [`KEPT_SPECTRA`], or [`FitStore`]'s bound, beside it.
    pub fn spend<'a>(
        matrices: &[BudgetMatrix<'_>],
        options: BudgetOptions,
        keep: bool,
        progress: &Progress,
        load: impl Fn(usize) -> Result<Cow<'a, [f32]>> + Sync,
    ) -> Result<Self> {
        let refine = options.effort != Effort::Fast;
        let sizes: Vec<_> = matrices.iter().map(|matrix| matrix.place.size()).collect();
        let all = sizes.iter().sum::<usize>() as u64;
        progress.expect(if refine { all * (1 + REFINEMENT) } else { all });
        let kept = Kept::new(if keep || refine { KEPT_SPECTRA } else { 0 });
        let results: Vec<Mutex<(Vec<f64>, Option<Spectrum>)>> = sizes.iter().map(|_| Mutex::default()).collect();
        largest_first(&sizes, progress, |i, _| {
            let result = matrices[i].place.with(&load(i)?, |view, norm| {
                let spectrum = Spectrum::new(view, norm, progress)?;
                Ok((spectrum.energies(), kept.keep(spectrum)))
            })?;
            *results[i].lock().expect("no thread panicked") = result;
            progress.advance(sizes[i] as u64);
            Ok(())
        })?;
        let (energies, spectra): (Vec<_>, Vec<_>) =
            results.into_iter().map(|result| result.into_inner().expect("no thread panicked")).unzip();
        let candidates: Vec<_> = matrices
            .iter()
            .zip(energies)
            .map(|(BudgetMatrix { place, usage, .. }, energies)| Candidate {
                rows: place.rows,
                columns: place.columns,
                usage: *usage,
                energies,
            })
            .collect();
        let sensitive = matrices.iter().all(|matrix| matrix.place.moments.output.is_some());
        let weighting = if sensitive { Weighting::Absolute } else { Weighting::Relative };
        let dense: usize = candidates.iter().map(Candidate::dense_macs).sum();
        let most_macs = options.max_macs.map(|share| (share * dense as f64) as usize);
        let mut choices = allocate(&candidates, weighting, options.target, most_macs)?;
        fuse(matrices, &candidates, &mut choices)?;
        let shares = most_macs.map(|most| shared_out(most, &choices));
        let planned: Vec<_> = candidates
            .into_iter()
            .zip(&choices)
            .map(|(candidate, choice)| {
                let (spec, macs_before, energies) = (choice.spec(), candidate.dense_macs(), candidate.energies);
                let &Choice { parameters, macs, lost_energy, .. } = choice;
                Planned { spec, parameters, macs_before, macs, lost_energy, energies }
            })
            .collect();
        let work = choices.iter().zip(spectra).map(|(choice, spectrum)| match choice.rank {
            Some(rank) => Mutex::new(Work::LowRank(rank, spectrum)),
            None => Mutex::new(Work::Nothing),
        });
        let mut spent = Self { planned, work: work.collect(), fits: FitStore::new(matrices.len()) };
        if refine {
            spent.refine(matrices, options.effort, &choices, shares.as_deref(), keep, progress, load)?;
        }
        progress.finish();
        Ok(spent)
    }

    /// Replaces the low rank of every matrix by the best of any kind within the same limits.
    #[allow(clippy::too_many_arguments)]
    fn refine<'a>(
        &mut self,
        matrices: &[BudgetMatrix<'_>],
        effort: Effort,
        choices: &[Choice],
        shares: Option<&[usize]>,
        keep: bool,
        progress: &Progress,
        load: impl Fn(usize) -> Result<Cow<'a, [f32]>> + Sync,
    ) -> Result<()> {
        let sizes: Vec<_> = matrices.iter().map(|matrix| matrix.place.size()).collect();
        let planned: Vec<_> = std::mem::take(&mut self.planned).into_iter().map(Mutex::new).collect();
        let done = largest_first(&sizes, progress, |i, _| {
            let BudgetMatrix { place, usage, .. } = &matrices[i];
            let work = std::mem::replace(&mut *self.work[i].lock().expect("no thread panicked"), Work::Nothing);
            if let Work::LowRank(_, spectrum) = work {
                let start = Instant::now();
                let limits =
                    Limits { parameters: choices[i].parameters, macs: shares.map(|shares| (shares[i], *usage)) };
                let fit = place.with(&load(i)?, |view, norm| {
                    let spectrum = spectrum.map_or_else(|| Spectrum::new(view, norm, progress), Ok)?;
                    fit_within(view, limits, norm, &spectrum, effort, progress)
                })?;
                let mut planned = planned[i].lock().expect("no thread panicked");
                planned.parameters = fit.spec.parameters(place.rows, place.columns)?;
                planned.macs = fit.spec.macs(place.rows, place.columns, *usage)?;
                planned.lost_energy = fit.lost_energy;
                planned.spec = Some(fit.spec.clone());
                if keep {
                    self.fits.put(i, Timed { fit, seconds: start.elapsed().as_secs_f64() })?;
                }
            }
            progress.advance(sizes[i] as u64 * REFINEMENT);
            Ok(())
        });
        self.planned = planned.into_iter().map(|planned| planned.into_inner().expect("no thread panicked")).collect();
        done
    }

    /// The fits of matrices held in memory, in the order of `which`; see [`fit_each`](Self::fit_each).
    ///
    /// # Errors
    /// Those of [`fit_each`](Self::fit_each).
    pub fn fit_many(
        &self,
        which: &[usize],
        places: &[Place<'_>],
        matrices: &[&[f32]],
        progress: &Progress,
    ) -> Result<Vec<Timed>> {
        let load = |at: usize| Ok(Cow::Borrowed(matrices[at]));
        in_order(which.len(), |keep| self.fit_each(which, places, progress, load, keep))
    }

    /// What every matrix is to become, in the order in which they were given.
    #[must_use]
    pub fn planned(&self) -> &[Planned] {
        &self.planned
    }

    /// Hands the fits of compressed matrices to `finish`, on the current rayon pool, each of them once: those that planning
    /// found, and those of low rank that it only chose. `which` are their indices among the matrices of
    /// [`spend`](Self::spend); `places`, `load` and `finish` count as `which` does.
    ///
    /// # Errors
    /// Those of `load` and of the fit, in the matrix, those of `finish`, and [`Error::Io`] of the store of fits.
    ///
    /// # Panics
    /// If there are not as many places as indices, or a matrix stays dense or was fitted before.
    pub fn fit_each<'a>(
        &self,
        which: &[usize],
        places: &[Place<'_>],
        progress: &Progress,
        load: impl Fn(usize) -> Result<Cow<'a, [f32]>> + Sync,
        finish: impl Fn(usize, Timed) -> Result<()> + Sync,
    ) -> Result<()> {
        assert_eq!(which.len(), places.len());
        let sizes: Vec<_> = places.iter().map(Place::size).collect();
        progress.expect(sizes.iter().sum::<usize>() as u64);
        largest_first(&sizes, progress, |at, _| {
            let work = std::mem::replace(&mut *self.work[which[at]].lock().expect("no thread panicked"), Work::Nothing);
            let timed = match work {
                Work::Nothing => self.fits.take(which[at])?,
                Work::LowRank(rank, spectrum) => {
                    let start = Instant::now();
                    let term = low_rank(&places[at], &load(at)?, rank, spectrum, progress)?;
                    let (spec, lost_energy) = (MatrixSpec::low_rank(rank), term.lost_energy);
                    let fit = Fit { spec, lost_energy, terms: vec![Term::LowRank(term)] };
                    Timed { fit, seconds: start.elapsed().as_secs_f64() }
                }
            };
            progress.advance(sizes[at] as u64);
            finish(at, timed)
        })?;
        progress.finish();
        Ok(())
    }
}

fn low_rank(
    place: &Place<'_>,
    values: &[f32],
    rank: usize,
    spectrum: Option<Spectrum>,
    progress: &Progress,
) -> Result<LowRank> {
    match spectrum {
        // The norm is in the spectrum: preparing it again would cost as much as the rest.
        Some(spectrum) => MatrixView::new(values, place.rows, place.columns)
            .and_then(|view| spectrum.low_rank(view, rank, progress))
            .map_err(|error| error.in_tensor(&place.name)),
        None => place.with(values, |view, norm| Spectrum::new(view, norm, progress)?.low_rank(view, rank, progress)),
    }
}

/// Eigendecompositions that are kept, as far as their memory reaches.
struct Kept {
    room: Mutex<usize>,
}

impl Kept {
    fn new(room: usize) -> Self {
        Self { room: Mutex::new(room) }
    }

    fn keep(&self, spectrum: Spectrum) -> Option<Spectrum> {
        let mut room = self.room.lock().expect("no thread panicked");
        *room = room.checked_sub(spectrum.bytes())?;
        Some(spectrum)
    }
}

/// Compresses those parts of a fused weight that would stay dense beside others that do not.
fn fuse(matrices: &[BudgetMatrix<'_>], candidates: &[Candidate], choices: &mut [Choice]) -> Result<()> {
    let fitted = matrices.iter().zip(&*choices).filter(|(_, choice)| choice.rank.is_some());
    let compressed: HashSet<_> = fitted.map(|(matrix, _)| &matrix.module).collect();
    for ((matrix, candidate), choice) in matrices.iter().zip(candidates).zip(choices.iter_mut()) {
        if choice.rank.is_none() && compressed.contains(&matrix.module) {
            *choice = candidate.choice_of_rank(candidate.rows.min(candidate.columns) - 1)?;
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
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
            let place = Place { name: "w".into(), rows, columns, moments: Moments::default() };
            BudgetMatrix { place, module: format!("{rows} {columns}"), usage }
        });
        let dense: usize = sizes.iter().map(|&(m, n, usage)| usage.dense_macs(m, n)).sum();
        let target = Target::Parameters(3400);
        let choose = |cap| {
            let load = |i: usize| Ok(Cow::Borrowed(values[i].as_slice()));
            let options = BudgetOptions { target, max_macs: cap, effort: Effort::Best };
            SpentBudget::spend(&matrices, options, false, &Progress::default(), load)
                .map(|spent| spent.planned().to_vec())
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
