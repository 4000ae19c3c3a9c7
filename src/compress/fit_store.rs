//! Storage for fits between planning and compression: in memory up to a bound, the rest in an unnamed temporary file,
//! which the system removes when the process ends.

use std::sync::Mutex;

use super::parallel::Timed;
use crate::error::Result;
use crate::fit::{Fit, LowRank, Term};
use crate::numeric::spill::Spill;
use crate::permute::Decomposition;

/// Bytes of factors kept in memory.
const HELD: usize = 1 << 30;

/// A store with one slot per matrix.
pub(super) struct FitStore {
    slots: Vec<Mutex<Option<Stored>>>,
    shelf: Mutex<Shelf>,
}

/// A fit. If its factors are in the file, the vectors here are empty, and their places and lengths are kept.
struct Stored {
    timed: Timed,
    spilled: Option<Vec<(u64, usize)>>,
}

struct Shelf {
    /// Bytes that may still be kept in memory.
    room: usize,
    spill: Spill,
}

impl FitStore {
    /// A store for the fits of the given number of matrices.
    pub fn new(matrices: usize) -> Self {
        Self::with_room(matrices, HELD)
    }

    fn with_room(matrices: usize, room: usize) -> Self {
        let slots = (0..matrices).map(|_| Mutex::new(None)).collect();
        Self { slots, shelf: Mutex::new(Shelf { room, spill: Spill::default() }) }
    }

    /// Stores the fit of matrix `i`.
    ///
    /// # Errors
    /// [`Error::Io`] if the temporary file cannot be written.
    pub fn put(&self, i: usize, mut timed: Timed) -> Result<()> {
        let bytes = factors(&mut timed.fit).map(|values| size_of_val(&values[..])).sum();
        let mut shelf = self.shelf.lock().expect("no thread panicked");
        let spilled = if let Some(room) = shelf.room.checked_sub(bytes) {
            shelf.room = room;
            None
        } else {
            let spill = |values: &mut Vec<f32>| {
                let values = std::mem::take(values);
                Ok((shelf.spill.append(&values)?, values.len()))
            };
            Some(factors(&mut timed.fit).map(spill).collect::<Result<_>>()?)
        };
        drop(shelf);
        *self.slots[i].lock().expect("no thread panicked") = Some(Stored { timed, spilled });
        Ok(())
    }

    /// Takes the fit of matrix `i` out of the store.
    ///
    /// # Errors
    /// [`Error::Io`] if the temporary file cannot be read.
    ///
    /// # Panics
    /// If the store has no fit of that matrix.
    pub fn take(&self, i: usize) -> Result<Timed> {
        let stored = self.slots[i].lock().expect("no thread panicked").take();
        let Stored { mut timed, spilled } = stored.expect("a fit is taken once, after it was put");
        let mut shelf = self.shelf.lock().expect("no thread panicked");
        match spilled {
            None => shelf.room += factors(&mut timed.fit).map(|values| size_of_val(&values[..])).sum::<usize>(),
            Some(places) => {
                for (values, (place, length)) in factors(&mut timed.fit).zip(places) {
                    values.resize(length, 0.0);
                    shelf.spill.read(place, values)?;
                }
            }
        }
        Ok(timed)
    }
}

/// The values of all factors of a fit, by term.
fn factors(fit: &mut Fit) -> impl Iterator<Item = &mut Vec<f32>> {
    fit.terms.iter_mut().flat_map(|term| match term {
        Term::Kronecker(Decomposition { sum, .. }) => vec![&mut sum.a, &mut sum.b],
        Term::LowRank(LowRank { left, right, .. }) => vec![left, right],
        Term::Grouped(term) => term.groups.iter_mut().flat_map(|group| [&mut group.left, &mut group.right]).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::{Norm, fit};
    use crate::kron::MatrixView;
    use crate::permute::Effort;
    use crate::progress::{Parallelism, Progress};
    use crate::spec::{KroneckerSpec, Permute};
    use crate::spec::{MatrixSpec, TermSpec};
    use crate::testing::noise;

    #[test]
    fn fits_come_back_as_they_were_whether_held_or_spilled() {
        let (m, n) = (12, 16);
        let kronecker = TermSpec::Kronecker(KroneckerSpec { block: (2, 4), rank: 2, permute: Permute::Both });
        let specs = [MatrixSpec::low_rank(3), MatrixSpec::new(vec![TermSpec::LowRank { rank: 2 }, kronecker]).unwrap()];
        let fits: Vec<Timed> = (0..6)
            .map(|i| {
                let w = noise(m * n, i as u64);
                let view = MatrixView::new(&w, m, n).unwrap();
                let progress = Progress::default();
                let (norm, way) = (Norm::frobenius(), Parallelism::Sequential);
                let fit = fit(view, &specs[i % 2], &norm, Effort::Fast, 0, way, &progress).unwrap();
                Timed { fit, seconds: i as f64 }
            })
            .collect();
        for room in [0, 700, usize::MAX] {
            let store = FitStore::with_room(fits.len(), room);
            for (i, timed) in fits.iter().enumerate() {
                store.put(i, timed.clone()).unwrap();
            }
            for i in [3, 0, 5, 1, 2, 4] {
                assert_eq!(store.take(i).unwrap(), fits[i]);
            }
            assert_eq!(store.shelf.lock().unwrap().room, room);
            assert_eq!(store.shelf.lock().unwrap().spill.is_used(), room < 2000);
        }
    }
}
