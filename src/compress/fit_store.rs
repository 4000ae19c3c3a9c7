//! Storage for fits between planning and compression: in memory up to a bound, the rest in an unnamed temporary file,
//! which the system removes when the process ends.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Mutex;

use bytemuck::{cast_slice, cast_slice_mut};

use super::parallel::Timed;
use crate::error::{Error, Result};
use crate::fit::{Fit, LowRank, Term};
use crate::permute::Decomposition;

/// Bytes of factors kept in memory.
const HELD: usize = 1 << 30;

/// A store with one slot per matrix.
pub(super) struct FitStore {
    slots: Vec<Mutex<Option<Stored>>>,
    shelf: Mutex<Shelf>,
}

/// A fit. If its factors are in the file, the vectors here are empty and their lengths are kept.
struct Stored {
    timed: Timed,
    spilled: Option<(u64, Vec<usize>)>,
}

struct Shelf {
    /// Bytes that may still be kept in memory.
    room: usize,
    file: Option<File>,
    end: u64,
}

impl FitStore {
    /// A store for the fits of the given number of matrices.
    pub fn new(matrices: usize) -> Self {
        Self::with_room(matrices, HELD)
    }

    fn with_room(matrices: usize, room: usize) -> Self {
        let slots = (0..matrices).map(|_| Mutex::new(None)).collect();
        Self { slots, shelf: Mutex::new(Shelf { room, file: None, end: 0 }) }
    }

    /// Stores the fit of matrix `i`.
    ///
    /// # Errors
    /// [`Error::Io`] if the temporary file cannot be written.
    pub fn put(&self, i: usize, mut timed: Timed) -> Result<()> {
        let lengths: Vec<usize> = factors(&mut timed.fit).map(|values| values.len()).collect();
        let bytes = lengths.iter().sum::<usize>() * size_of::<f32>();
        let mut shelf = self.shelf.lock().expect("no thread panicked");
        let spilled = if let Some(room) = shelf.room.checked_sub(bytes) {
            shelf.room = room;
            None
        } else {
            let start = shelf.end;
            shelf.append(factors(&mut timed.fit).map(std::mem::take)).map_err(Error::io(&std::env::temp_dir()))?;
            Some((start, lengths))
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
            None => shelf.room += factors(&mut timed.fit).map(|values| values.len() * size_of::<f32>()).sum::<usize>(),
            Some((start, lengths)) => {
                let read = shelf.read(start, factors(&mut timed.fit).zip(lengths));
                read.map_err(Error::io(&std::env::temp_dir()))?;
            }
        }
        Ok(timed)
    }
}

impl Shelf {
    fn append(&mut self, values: impl Iterator<Item = Vec<f32>>) -> std::io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile()?),
        };
        file.seek(SeekFrom::Start(self.end))?;
        for values in values {
            file.write_all(cast_slice(&values))?;
            self.end += (values.len() * size_of::<f32>()) as u64;
        }
        Ok(())
    }

    fn read<'a>(&mut self, start: u64, values: impl Iterator<Item = (&'a mut Vec<f32>, usize)>) -> std::io::Result<()> {
        let file = self.file.as_mut().expect("what was spilled is in the file");
        file.seek(SeekFrom::Start(start))?;
        for (values, length) in values {
            values.resize(length, 0.0);
            file.read_exact(cast_slice_mut(values))?;
        }
        Ok(())
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
            assert_eq!(store.shelf.lock().unwrap().file.is_some(), room < 2000);
        }
    }
}
