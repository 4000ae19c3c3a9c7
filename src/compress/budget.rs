//! From a budget to a fit for every matrix: spectra, allocation, and the best kind of approximation for each.
//!
//! A [`SpentBudget`] keeps the results of planning, so that compression need not repeat them. Above the effort "fast"
//! these are the fits themselves; at "fast" they are the eigendecompositions, up to [`KEPT_SPECTRA`] bytes.

use std::collections::HashSet;
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::fit_store::FitStore;
use super::journal::Journal;
use super::parallel::{Timed, in_order};
use super::place::Place;
use super::queue::largest_first;
use super::spectrum_store::{KEPT_SPECTRA, Spectra, SpectrumStore};
use crate::error::{Error, Result};
use crate::fit::{Fit, Limits, Moment, Norm, Spectrum, Term, fit, fit_within};
use crate::kron::MatrixView;
use crate::permute::Effort;
use crate::plan::{Candidate, Choice, Target, Weighting, allocate};
use crate::progress::{Parallelism, Progress};
use crate::spec::{GroupedShape, MatrixSpec, RowGroup, TermSpec, Usage};

/// A matrix that a budget may compress.
#[derive(Clone, Debug, PartialEq)]
pub struct BudgetMatrix<'a> {
    /// The matrix.
    pub place: Place<'a>,
    /// Its module. The parts of a fused weight have the same module; either all of them are compressed or none.
    pub module: String,
    /// The operation in which the model uses it for every token.
    pub usage: Usage,
}

/// A budget and the effort of the search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetOptions {
    /// The target.
    pub target: Target,
    /// A cap on the MACs for one token of all matrices together, as a share of their MACs while dense; infinity for none.
    /// By default, a sum takes no more MACs than its matrix while dense.
    pub max_macs: Option<f64>,
    /// At "fast", every fit is low rank. Above, each matrix gets the best fit of any kind with no more parameters.
    pub effort: Effort,
}

/// The plan for one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Its spec; `None` if it stays dense.
    pub spec: Option<MatrixSpec>,
    /// Its parameters after compression.
    pub parameters: usize,
    /// Its MACs for one token while it is dense.
    pub macs_before: usize,
    /// Its MACs for one token after compression.
    pub macs: usize,
    /// Its lost energy after compression, in its norm.
    pub lost_energy: f64,
    /// Its energies in descending order, of all groups of rows together. Without groups, rank `k` loses all but the first
    /// `k`.
    pub energies: Vec<f64>,
}

/// A budget after planning: the plan for every matrix, and the results that fitting reuses.
pub struct SpentBudget {
    planned: Vec<Planned>,
    /// The low rank that remains to be fitted; none where the matrix stays dense, or its fit is in the store or was taken.
    work: Vec<Mutex<Option<TermSpec>>>,
    spectra: Arc<SpectrumStore>,
    fits: FitStore,
    journal: Option<Arc<Journal>>,
}

/// What remains of planning for the fits that follow.
#[derive(Clone, Debug)]
pub enum Keep {
    /// Nothing: there is only the plan.
    Nothing,
    /// Eigendecompositions and fits, in memory and in a temporary file.
    Here,
    /// Eigendecompositions in memory; energies and fits in the journal of a run, and those that are there already.
    Journal(Arc<Journal>),
}

impl BudgetMatrix<'_> {
    /// The number of rows of each group of a table whose tokens have frequencies; none for any other matrix.
    fn groups(&self) -> Vec<usize> {
        let Place { rows, columns, moments, .. } = &self.place;
        let counted =
            matches!(moments.input, Some(Moment::Diagonal(counts)) if counts.iter().any(|&count| count > 0.0));
        groups_of(*rows, *columns, self.usage != Usage::Map && counted)
    }
}

/// The number of rows of each group of a matrix that may be `counted`: a table whose tokens have frequencies.
fn groups_of(rows: usize, columns: usize, counted: bool) -> Vec<usize> {
    counted.then(|| GroupedShape::cut(rows, columns)).flatten().unwrap_or_default()
}

/// The fewest parameters to which a budget can compress a matrix: those of rank 1, of each group of rows where it is a
/// `counted` table.
///
/// # Errors
/// [`Error::Shape`] for a matrix that no rank makes smaller.
pub fn least_parameters(rows: usize, columns: usize, counted: bool) -> Result<usize> {
    match groups_of(rows, columns, counted) {
        groups if groups.is_empty() => TermSpec::LowRank { rank: 1 }.parameters(rows, columns),
        groups => {
            let groups = groups.into_iter().map(|rows| RowGroup { rows, rank: 1 }).collect();
            TermSpec::Grouped(groups).parameters(rows, columns)
        }
    }
}

impl SpentBudget {
    /// Distributes one budget over matrices that `load` reads by index, on the current rayon pool. Each rank follows
    /// from a spectrum that is computed once. Above the effort "fast", each matrix then gets the best approximation of
    /// any kind that has no more parameters.
    ///
    /// If some parts of a fused weight are compressed, a part that would stay dense gets its full rank less one, which
    /// has fewer parameters and loses almost nothing. MACs that the ranks leave below a cap are distributed in
    /// proportion to the MACs of each choice, and limit the best approximation of each matrix; without a cap, its MACs
    /// while dense do. Unless `keep` is [`Keep::Nothing`], [`fit_each`](Self::fit_each) can follow.
    ///
    /// `spectra` is a store that several budgets share, of the same matrices with the same moments: what it holds is not
    /// computed again.
    ///
    /// # Errors
    /// Those of `load`, of [`Spectrum::new`] and of [`fit_within`], in the matrix, and those of [`allocate`].
    ///
    /// # Cost
    /// Memory: one matrix per thread. With `keep`, also up to [`KEPT_SPECTRA`] bytes, or the bound of [`FitStore`].
    pub fn spend<V: Deref<Target = [f32]>>(
        matrices: &[BudgetMatrix<'_>],
        options: BudgetOptions,
        keep: &Keep,
        spectra: Option<&Arc<SpectrumStore>>,
        progress: &Progress,
        load: impl Fn(usize) -> Result<V> + Sync,
    ) -> Result<Self> {
        let journal = if let Keep::Journal(journal) = keep { Some(Arc::clone(journal)) } else { None };
        let refine = options.effort != Effort::Fast;
        let sizes: Vec<_> = matrices.iter().map(|matrix| matrix.place.size()).collect();
        let groups: Vec<_> = matrices.iter().map(BudgetMatrix::groups).collect();
        let all = sizes.iter().sum::<usize>() as u64;
        progress.expect(if refine { all * (1 + REFINEMENT) } else { all });
        let own = || {
            let room = if refine || !matches!(keep, Keep::Nothing) { KEPT_SPECTRA } else { 0 };
            Arc::new(SpectrumStore::with_room(matrices.len(), room))
        };
        let spectra = spectra.map_or_else(own, Arc::clone);
        if spectra.len() != matrices.len() {
            let (expected, got) = (spectra.len().to_string(), matrices.len().to_string());
            return Err(Error::Shape { operation: "matrices of the spectra", expected, got });
        }
        let results: Vec<Mutex<Vec<f64>>> = sizes.iter().map(|_| Mutex::default()).collect();
        largest_first(&sizes, progress, |i, _| {
            let place = &matrices[i].place;
            let length = place.rows.min(place.columns) * groups[i].len().max(1);
            let known = || journal.as_ref().map_or(Ok(None), |journal| journal.energies(i, length));
            let done = spectra.energies(i).map_or_else(known, |energies| Ok(Some(energies)))?;
            let energies = if let Some(energies) = done {
                energies
            } else {
                let energies = place
                    .with(&load(i)?, |view, norm| spectra.put(i, Spectra::new(view, norm, &groups[i], progress)?))?;
                if let Some(journal) = &journal {
                    journal.put_energies(i, &energies)?;
                }
                energies
            };
            *results[i].lock().expect("no thread panicked") = energies;
            progress.advance(sizes[i] as u64);
            Ok(())
        })?;
        let energies = results.into_iter().map(|result| result.into_inner().expect("no thread panicked"));
        let candidates: Vec<_> = matrices
            .iter()
            .zip(energies)
            .zip(groups)
            .map(|((BudgetMatrix { place, usage, .. }, energies), groups)| Candidate {
                rows: place.rows,
                columns: place.columns,
                usage: *usage,
                energies,
                groups,
            })
            .collect();
        let sensitive = matrices.iter().all(|matrix| matrix.place.moments.output.is_some());
        let weighting = if sensitive { Weighting::Absolute } else { Weighting::Relative };
        let dense: usize = candidates.iter().map(Candidate::dense_macs).sum();
        let share = options.max_macs.filter(|&share| share != f64::INFINITY);
        let most_macs = share.map(|share| (share * dense as f64) as usize);
        let mut choices = allocate(&candidates, weighting, options.target, most_macs)?;
        fuse(matrices, &candidates, &mut choices)?;
        let shares = match (most_macs, options.max_macs) {
            (Some(most), _) => Some(shared_out(most, &choices)),
            // A lookup takes none while dense, and some in any other form.
            (None, None) => {
                Some(candidates.iter().zip(&choices).map(|(each, choice)| each.dense_macs().max(choice.macs)).collect())
            }
            (None, Some(_)) => None,
        };
        let planned: Vec<_> = candidates
            .into_iter()
            .zip(&choices)
            .map(|(candidate, choice)| {
                let (spec, macs_before, mut energies) = (choice.spec(), candidate.dense_macs(), candidate.energies);
                if !candidate.groups.is_empty() {
                    energies.sort_by(|left, right| right.total_cmp(left));
                }
                let &Choice { parameters, macs, lost_energy, .. } = choice;
                Planned { spec, parameters, macs_before, macs, lost_energy, energies }
            })
            .collect();
        for (i, _) in choices.iter().enumerate().filter(|(_, choice)| choice.term.is_none()) {
            spectra.drop_spectra(i);
        }
        let work = choices.iter().map(|choice| Mutex::new(choice.term.clone())).collect();
        let mut spent = Self { planned, work, spectra, fits: FitStore::new(matrices.len()), journal };
        if refine {
            spent.refine(matrices, options.effort, &choices, shares.as_deref(), keep, progress, load)?;
        }
        progress.finish();
        Ok(spent)
    }

    /// Replaces each low rank by the best approximation of any kind within the same limits. Groups of rows stay.
    #[allow(clippy::too_many_arguments)]
    fn refine<V: Deref<Target = [f32]>>(
        &mut self,
        matrices: &[BudgetMatrix<'_>],
        effort: Effort,
        choices: &[Choice],
        shares: Option<&[usize]>,
        keep: &Keep,
        progress: &Progress,
        load: impl Fn(usize) -> Result<V> + Sync,
    ) -> Result<()> {
        let sizes: Vec<_> = matrices.iter().map(|matrix| matrix.place.size()).collect();
        let planned: Vec<_> = std::mem::take(&mut self.planned).into_iter().map(Mutex::new).collect();
        let done = largest_first(&sizes, progress, |i, _| {
            let BudgetMatrix { place, usage, .. } = &matrices[i];
            let mut work = self.work[i].lock().expect("no thread panicked");
            if let Some(TermSpec::LowRank { .. }) = &*work {
                *work = None;
                drop(work);
                let start = Instant::now();
                let limits =
                    Limits { parameters: choices[i].parameters, macs: shares.map(|shares| (shares[i], *usage)) };
                let made = || {
                    let fit = place.with(&load(i)?, |view, norm| {
                        let kept = self.spectra.spectra(i)?;
                        let made;
                        let spectrum = if let Some(Spectra::Whole(kept)) = kept.as_deref() {
                            kept
                        } else {
                            made = Spectrum::new(view, norm, progress)?;
                            &made
                        };
                        fit_within(view, limits, norm, spectrum, effort, progress)
                    })?;
                    Ok(Timed { fit, seconds: start.elapsed().as_secs_f64() })
                };
                let timed = match &self.journal {
                    Some(journal) => journal.fit_or(i, place, made)?,
                    None => made()?,
                };
                let mut planned = planned[i].lock().expect("no thread panicked");
                let fit = &timed.fit;
                planned.parameters = fit.spec.parameters(place.rows, place.columns)?;
                planned.macs = fit.spec.macs(place.rows, place.columns, *usage)?;
                planned.lost_energy = fit.lost_energy;
                planned.spec = Some(fit.spec.clone());
                if matches!(keep, Keep::Here) {
                    self.fits.put(i, timed)?;
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
        let load = |at: usize| Ok(matrices[at]);
        in_order(which.len(), |keep| self.fit_each(which, places, progress, load, keep))
    }

    /// The plan for every matrix, in the order of [`spend`](Self::spend).
    #[must_use]
    pub fn planned(&self) -> &[Planned] {
        &self.planned
    }

    /// Calls `finish` with the fit of each compressed matrix, once, on the current rayon pool: the fits that planning
    /// kept, and the low-rank fits that it only selected. `which` holds indices into the matrices of
    /// [`spend`](Self::spend); `places`, `load` and `finish` use positions in `which`.
    ///
    /// # Errors
    /// Those of `load` and of the fit, in the matrix, those of `finish`, and [`Error::Io`] of the fit store.
    ///
    /// # Panics
    /// If there are not as many places as indices, or a matrix stays dense or was already taken.
    pub fn fit_each<V: Deref<Target = [f32]>>(
        &self,
        which: &[usize],
        places: &[Place<'_>],
        progress: &Progress,
        load: impl Fn(usize) -> Result<V> + Sync,
        finish: impl Fn(usize, Timed) -> Result<()> + Sync,
    ) -> Result<()> {
        assert_eq!(which.len(), places.len());
        let sizes: Vec<_> = places.iter().map(Place::size).collect();
        progress.expect(sizes.iter().sum::<usize>() as u64);
        largest_first(&sizes, progress, |at, _| {
            let work = self.work[which[at]].lock().expect("no thread panicked").take();
            let made = || match work {
                None => self.fits.take(which[at]),
                Some(term) => {
                    let start = Instant::now();
                    let spectra = self.spectra.spectra(which[at])?;
                    let fit = low_rank(&places[at], &load(at)?, term, spectra.as_deref(), progress)?;
                    Ok(Timed { fit, seconds: start.elapsed().as_secs_f64() })
                }
            };
            let timed = match &self.journal {
                Some(journal) => journal.fit_or(which[at], &places[at], made)?,
                None => made()?,
            };
            progress.advance(sizes[at] as u64);
            finish(at, timed)
        })?;
        progress.finish();
        Ok(())
    }
}

/// The fit of a low-rank term, from eigendecompositions where they were kept.
fn low_rank(
    place: &Place<'_>,
    values: &[f32],
    term: TermSpec,
    spectra: Option<&Spectra>,
    progress: &Progress,
) -> Result<Fit> {
    let Some(spectra) = spectra else {
        let spec = term.into();
        // The effort and the seed are those of Kronecker terms.
        let made = |view: MatrixView<'_>, norm: &Norm| {
            fit(view, &spec, norm, Effort::Fast, 0, Parallelism::Sequential, progress)
        };
        return place.with(values, made);
    };
    // The norm is part of the spectra: preparing it again would cost as much as the rest of the fit.
    let fitted = MatrixView::new(values, place.rows, place.columns).and_then(|view| match (&term, spectra) {
        (TermSpec::LowRank { rank }, Spectra::Whole(spectrum)) => {
            spectrum.low_rank(view, *rank, progress).map(Term::LowRank)
        }
        (TermSpec::Grouped(groups), Spectra::Groups(spectrum)) => {
            let shape = GroupedShape::new(place.rows, place.columns, groups)?;
            spectrum.low_rank(view, &shape, progress).map(Term::Grouped)
        }
        _ => unreachable!("the spectra are those of the choice"),
    });
    Ok(Fit::of_term(term.into(), fitted.map_err(|error| error.in_tensor(&place.name))?))
}

/// Compresses the dense parts of fused weights that have compressed parts.
fn fuse(matrices: &[BudgetMatrix<'_>], candidates: &[Candidate], choices: &mut [Choice]) -> Result<()> {
    let fitted = matrices.iter().zip(&*choices).filter(|(_, choice)| choice.term.is_some());
    let compressed: HashSet<_> = fitted.map(|(matrix, _)| &matrix.module).collect();
    for ((matrix, candidate), choice) in matrices.iter().zip(candidates).zip(choices.iter_mut()) {
        if choice.term.is_none() && compressed.contains(&matrix.module) {
            *choice = candidate.choice_of_rank(candidate.rows.min(candidate.columns) - 1)?;
        }
    }
    Ok(())
}

/// The MACs that each matrix may use of `most`: those of its choice, and a share of the remainder in proportion to
/// them. Dense matrices get no share.
fn shared_out(most: usize, choices: &[Choice]) -> Vec<usize> {
    let left = most - choices.iter().map(|choice| choice.macs).sum::<usize>();
    let used = |choice: &Choice| if choice.term.is_some() { choice.macs } else { 0 };
    let all = choices.iter().map(used).sum::<usize>().max(1);
    // Rounded down. A product of two counts may exceed 64 bits.
    let part = |choice: &Choice| (left as u128 * used(choice) as u128 / all as u128) as usize;
    choices.iter().map(|choice| choice.macs + part(choice)).collect()
}

/// Approximate cost of finding the best approximation, in spectra, for the progress bar.
const REFINEMENT: u64 = 10;

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
                Choice { term: (!dense).then_some(TermSpec::LowRank { rank: 1 }), parameters: macs, macs, lost_energy: 0.0 }
            };
            let choices: Vec<_> = counts.iter().map(choice).collect();
            let used: usize = choices.iter().map(|choice| choice.macs).sum();
            let shares = shared_out(used + extra, &choices);
            prop_assert!(shares.iter().sum::<usize>() <= used + extra);
            for (share, choice) in shares.iter().zip(&choices) {
                prop_assert!(*share >= choice.macs && (choice.term.is_some() || *share == choice.macs));
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
            let load = |i: usize| Ok(values[i].as_slice());
            let options = BudgetOptions { target, max_macs: cap, effort: Effort::Best };
            SpentBudget::spend(&matrices, options, &Keep::Nothing, None, &Progress::default(), load)
                .map(|spent| spent.planned().to_vec())
        };
        let sum = |planned: &[Planned]| planned.iter().map(|each| each.macs).sum::<usize>();
        let free = choose(Some(f64::INFINITY)).unwrap();
        assert!(sum(&free) as f64 > 0.8 * dense as f64);
        let own = choose(None).unwrap();
        for (each, &(m, n, usage)) in own.iter().zip(&sizes) {
            // Low rank takes as many as parameters, and some for a lookup.
            assert!(each.macs <= each.macs_before || usage != Usage::Map, "{m} {n}");
        }
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

    #[test]
    fn budgets_that_share_spectra_choose_and_fit_as_alone_and_compute_none_again() {
        use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

        let sizes = [(24, 16), (16, 40)];
        let values: Vec<_> = sizes.iter().zip(1..).map(|(&(m, n), seed)| noise(m * n, seed)).collect();
        let places =
            sizes.map(|(rows, columns)| Place { name: format!("{rows}"), rows, columns, moments: Moments::default() });
        let matrices =
            places.clone().map(|place| BudgetMatrix { module: place.name.clone(), place, usage: Usage::Map });
        let (loads, progress) = (AtomicUsize::new(0), Progress::default());
        let load = |i: usize| {
            loads.fetch_add(1, Relaxed);
            Ok(values[i].as_slice())
        };
        for effort in [Effort::Fast, Effort::Balanced] {
            let shared = Arc::new(SpectrumStore::shared(2));
            for (number, parameters) in [700, 500, 850].into_iter().enumerate() {
                let options = BudgetOptions { target: Target::Parameters(parameters), max_macs: None, effort };
                let spend =
                    |store| SpentBudget::spend(&matrices, options, &Keep::Here, store, &progress, load).unwrap();
                let alone = spend(None);
                loads.store(0, Relaxed);
                let together = spend(Some(&shared));
                // One for each spectrum of the first budget, and one for each search of an effort above "fast".
                let searched = if effort == Effort::Fast { 0 } else { 2 };
                assert_eq!(loads.load(Relaxed), searched + if number == 0 { 2 } else { 0 });
                assert_eq!(together.planned(), alone.planned());
                // One of them may stay dense.
                let which: Vec<_> = (0..2).filter(|&i| alone.planned()[i].spec.is_some()).collect();
                let fits = |spent: &SpentBudget| {
                    let places: Vec<_> = which.iter().map(|&i| places[i].clone()).collect();
                    let data: Vec<_> = which.iter().map(|&i| values[i].as_slice()).collect();
                    let found = spent.fit_many(&which, &places, &data, &progress).unwrap();
                    found.into_iter().map(|timed| timed.fit).collect::<Vec<_>>()
                };
                assert_eq!(fits(&together), fits(&alone));
            }
            let other = SpentBudget::spend(
                &matrices[..1],
                BudgetOptions { target: Target::Parameters(300), max_macs: None, effort },
                &Keep::Nothing,
                Some(&shared),
                &progress,
                load,
            );
            assert!(matches!(other, Err(Error::Shape { .. })));
        }
    }
}
