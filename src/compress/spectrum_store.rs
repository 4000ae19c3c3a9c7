//! Storage for spectra between planning and fitting, and between the budgets of one model.

use std::sync::{Arc, Mutex};

use faer::Mat;

use crate::error::Result;
use crate::fit::{GroupedSpectrum, Norm, Spectrum};
use crate::kron::MatrixView;
use crate::numeric::spill::Spill;
use crate::progress::Progress;

/// Bytes of eigendecompositions kept in memory between planning and fitting. The rest is computed again, or, where
/// several budgets share them, kept in a temporary file.
pub const KEPT_SPECTRA: usize = 512 << 20;

/// The eigendecompositions of a matrix: one, or one for each group of its rows.
#[derive(Clone)]
pub(super) enum Spectra {
    Whole(Box<Spectrum>),
    Groups(GroupedSpectrum),
}

impl Spectra {
    /// The spectra of a matrix, or of its groups of rows of these sizes.
    ///
    /// # Errors
    /// Those of [`Spectrum::new`].
    pub fn new(view: MatrixView<'_>, norm: &Norm, groups: &[usize], progress: &Progress) -> Result<Self> {
        Ok(match groups {
            [] => Self::Whole(Box::new(Spectrum::new(view, norm, progress)?)),
            sizes => Self::Groups(GroupedSpectrum::new(view, norm, sizes, progress)?),
        })
    }

    fn energies(&self) -> Vec<f64> {
        match self {
            Self::Whole(spectrum) => spectrum.energies(),
            Self::Groups(spectrum) => spectrum.energies(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Whole(spectrum) => spectrum.bytes(),
            Self::Groups(spectrum) => spectrum.bytes(),
        }
    }

    fn matrices(&mut self) -> Vec<&mut Mat<f64>> {
        match self {
            Self::Whole(spectrum) => spectrum.matrices(),
            Self::Groups(spectrum) => spectrum.matrices(),
        }
    }
}

/// The energies and the spectra of the matrices of one model in one norm: computed once, for one budget or for several.
pub struct SpectrumStore {
    slots: Vec<Mutex<Slot>>,
    room: Mutex<usize>,
    /// The file for what has no room in memory; `None` in a store for one budget, which drops that, and gives every
    /// spectrum away.
    spill: Option<Mutex<Spill>>,
}

#[derive(Default)]
struct Slot {
    energies: Option<Vec<f64>>,
    spectra: Option<Stored>,
}

/// Spectra. If their matrices are in the file, those here are empty, and their places and sizes are kept.
struct Stored {
    spectra: Arc<Spectra>,
    spilled: Option<Vec<(u64, usize, usize)>>,
}

impl SpectrumStore {
    /// A store that the budgets of one model share, for so many matrices.
    #[must_use]
    pub fn shared(matrices: usize) -> Self {
        Self { spill: Some(Mutex::default()), ..Self::with_room(matrices, KEPT_SPECTRA) }
    }

    /// A store for one budget, with room for so many bytes.
    pub(super) fn with_room(matrices: usize, room: usize) -> Self {
        let slots = (0..matrices).map(|_| Mutex::default()).collect();
        Self { slots, room: Mutex::new(room), spill: None }
    }

    /// The number of matrices.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The energies of matrix `i`, if it was put.
    pub(super) fn energies(&self, i: usize) -> Option<Vec<f64>> {
        self.slots[i].lock().expect("no thread panicked").energies.clone()
    }

    /// Keeps the spectra of matrix `i`, and returns its energies.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if the temporary file cannot be written.
    pub(super) fn put(&self, i: usize, mut spectra: Spectra) -> Result<Vec<f64>> {
        let (energies, bytes) = (spectra.energies(), spectra.bytes());
        let mut room = self.room.lock().expect("no thread panicked");
        let fits = room.checked_sub(bytes);
        *room = fits.unwrap_or(*room);
        drop(room);
        let spilled = match (&self.spill, fits) {
            (_, Some(_)) => None,
            (None, None) => return Ok(energies),
            (Some(spill), None) => {
                let mut spill = spill.lock().expect("no thread panicked");
                let taken = spectra.matrices().into_iter().map(|matrix| {
                    let matrix = std::mem::replace(matrix, Mat::new());
                    let mut place = None;
                    for column in 0..matrix.ncols() {
                        let at = spill.append(matrix.col_as_slice(column))?;
                        place.get_or_insert(at);
                    }
                    Ok((place.unwrap_or(0), matrix.nrows(), matrix.ncols()))
                });
                Some(taken.collect::<Result<_>>()?)
            }
        };
        let stored = Stored { spectra: Arc::new(spectra), spilled };
        *self.slots[i].lock().expect("no thread panicked") =
            Slot { energies: Some(energies.clone()), spectra: Some(stored) };
        Ok(energies)
    }

    /// The spectra of matrix `i`, if they were kept. A store for one budget gives them once.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if the temporary file cannot be read.
    pub(super) fn spectra(&self, i: usize) -> Result<Option<Arc<Spectra>>> {
        let mut slot = self.slots[i].lock().expect("no thread panicked");
        let Some(spill) = &self.spill else {
            return Ok(slot.spectra.take().map(|stored| stored.spectra));
        };
        let Some(Stored { spectra, spilled }) = &slot.spectra else { return Ok(None) };
        let Some(places) = spilled else { return Ok(Some(Arc::clone(spectra))) };
        let mut whole = Spectra::clone(spectra);
        let mut spill = spill.lock().expect("no thread panicked");
        for (matrix, &(place, rows, columns)) in whole.matrices().into_iter().zip(places) {
            let mut values = vec![0.0_f64; rows * columns];
            spill.read(place, &mut values)?;
            *matrix = Mat::from_fn(rows, columns, |row, column| values[column * rows + row]);
        }
        Ok(Some(Arc::new(whole)))
    }

    /// Frees the memory of the spectra of matrix `i`, which this budget does not fit. A shared store keeps them.
    pub(super) fn drop_spectra(&self, i: usize) {
        if self.spill.is_none() {
            self.slots[i].lock().expect("no thread panicked").spectra = None;
        }
    }

    #[cfg(test)]
    fn shared_with_room(matrices: usize, room: usize) -> Self {
        Self { room: Mutex::new(room), ..Self::shared(matrices) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::{LowRank, Moment, Moments};
    use crate::spec::{GroupedShape, RowGroup};
    use crate::testing::noise;

    fn spectra(norm: &Norm, groups: &[usize]) -> Spectra {
        let values = noise(24 * 8, 1);
        Spectra::new(MatrixView::new(&values, 24, 8).unwrap(), norm, groups, &Progress::default()).unwrap()
    }

    fn fits(spectra: &Spectra) -> Vec<LowRank> {
        let values = noise(24 * 8, 1);
        let (view, progress) = (MatrixView::new(&values, 24, 8).unwrap(), Progress::default());
        match spectra {
            Spectra::Whole(spectrum) => vec![spectrum.low_rank(view, 3, &progress).unwrap()],
            Spectra::Groups(spectrum) => {
                let groups = [RowGroup { rows: 10, rank: 3 }, RowGroup { rows: 14, rank: 2 }];
                spectrum.low_rank(view, &GroupedShape::new(24, 8, &groups).unwrap(), &progress).unwrap().groups
            }
        }
    }

    #[test]
    fn spectra_come_back_as_they_were_whether_held_or_spilled_and_any_number_of_times() {
        let factors = noise(8 * 8, 2);
        let moment: Vec<f32> =
            (0..64).map(|at| (0..8).map(|k| factors[at / 8 * 8 + k] * factors[at % 8 * 8 + k]).sum::<f32>()).collect();
        let moments = Moments { input: None, output: Some(Moment::Full(&moment)) };
        let norms = [Norm::frobenius(), Norm::prepare(moments, 24, 8).unwrap()];
        for norm in &norms {
            for groups in [&[][..], &[10, 14]] {
                let made = spectra(norm, groups);
                for room in [0, usize::MAX] {
                    let store = SpectrumStore::shared_with_room(2, room);
                    assert!(store.energies(1).is_none() && store.spectra(1).unwrap().is_none());
                    // Something lies before it in the file.
                    store.put(0, spectra(&norms[0], &[])).unwrap();
                    assert_eq!(store.put(1, made.clone()).unwrap(), made.energies());
                    for _ in 0..2 {
                        let found = store.spectra(1).unwrap().unwrap();
                        assert_eq!((store.energies(1), fits(&found)), (Some(made.energies()), fits(&made)));
                    }
                    assert_eq!(store.spill.as_ref().unwrap().lock().unwrap().is_used(), room == 0);
                }
            }
        }
    }

    #[test]
    fn a_store_for_one_budget_gives_spectra_once_and_drops_what_has_no_room() {
        let norm = Norm::frobenius();
        let store = SpectrumStore::with_room(2, spectra(&norm, &[]).bytes());
        for i in 0..2 {
            assert_eq!(store.put(i, spectra(&norm, &[])).unwrap().len(), 8);
        }
        assert!(store.spectra(0).unwrap().is_some() && store.spectra(0).unwrap().is_none());
        assert!(store.spectra(1).unwrap().is_none());
    }
}
