//! The finished work of a run, beside its destination, so that a killed run can go on where it was.
//!
//! Beside `out`, `.out.tqcompressor-resume` holds `run.json`, what the bytes of the result depend on, and a file for the
//! spectrum and the fit of each finished matrix. A file is written aside and renamed; one that a power failure damaged
//! counts as missing. The directory goes when the run ends, unless the run may be resumed and did not succeed.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use serde_json::{Map, Value, json};

use super::parallel::Timed;
use super::place::Place;
use crate::checkpoint::files::read_object_if_any;
use crate::checkpoint::staging::{Claim, Destination, remove};
use crate::error::{Error, Result};
use crate::fit::{Fit, GroupedLowRank, LowRank, Term};
use crate::kron::KroneckerSum;
use crate::permute::{Decomposition, Permutation};
use crate::spec::{GroupedShape, LowRankShape, TermSpec, matrix_spec, matrix_spec_json};

/// The file with the facts that a resumed run must share.
const RUN_FILE: &str = "run.json";

/// The journal of a live run, which holds the claim on the destination.
#[derive(Debug)]
pub struct Journal {
    claim: Mutex<Option<Arc<Claim>>>,
    directory: PathBuf,
    keep: AtomicBool,
    found: usize,
    replaced: usize,
}

impl Journal {
    /// Claims the destination and opens its journal. `key` are the facts that the bytes of the result depend on, by the
    /// names of arguments. With `resume`, the work of an earlier run with the same key is taken over, and what this run
    /// finishes is kept if it fails. Without, an earlier run's is removed, and this run's too unless it is killed.
    ///
    /// # Errors
    /// [`Error::Destination`] if another run is writing it; [`Error::Config`] if `resume` finds a run with another key;
    /// [`Error::Io`].
    pub fn open(destination: Destination, key: &Map<String, Value>, resume: bool) -> Result<Self> {
        let claim = Arc::new(Claim::take(destination)?);
        let directory = claim.sibling("resume");
        // A file that is not whole is that of a run that was killed before anything else.
        let earlier = read_object_if_any(&directory.join(RUN_FILE)).ok().flatten();
        let done = count(&directory)?;
        if let (true, Some(earlier)) = (resume, &earlier) {
            same_run(claim.path(), earlier, key)?;
        } else {
            remove(&directory).map_err(Error::io(&directory))?;
            fs::create_dir(&directory).map_err(Error::io(&directory))?;
        }
        let found = if resume && earlier.is_some() { done } else { 0 };
        let journal = Self {
            claim: Mutex::new(Some(claim)),
            directory,
            keep: AtomicBool::new(resume),
            found,
            replaced: done - found,
        };
        if earlier.is_none() || !resume {
            let text = format!("{:#}\n", Value::Object(key.clone()));
            journal.put(RUN_FILE, |file| file.write_all(text.as_bytes()))?;
        }
        Ok(journal)
    }

    /// Its directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The number of files of finished work that were there when it was opened.
    #[must_use]
    pub fn found(&self) -> usize {
        self.found
    }

    /// The number of files of finished work that were removed when it was opened.
    #[must_use]
    pub fn replaced(&self) -> usize {
        self.replaced
    }

    /// The claim on the destination.
    ///
    /// # Panics
    /// If the journal is closed.
    pub(super) fn claim(&self) -> Arc<Claim> {
        let claim = self.claim.lock().expect("no thread panicked");
        Arc::clone(claim.as_ref().expect("a closed journal is not used"))
    }

    /// Removes the work, which the written result has made useless.
    pub(super) fn succeed(&self) {
        self.keep.store(false, Relaxed);
        self.close();
    }

    /// Ends the run: its claim is released, and its work removed unless it may be resumed. A second call does nothing.
    pub fn close(&self) {
        let Some(claim) = self.claim.lock().expect("no thread panicked").take() else { return };
        // An error cannot be reported here; the next run removes or resumes the directory.
        let done = count(&self.directory).unwrap_or(1);
        if !self.keep.load(Relaxed) || done == 0 {
            let _ = remove(&self.directory);
        }
        drop(claim);
    }

    /// Keeps the energies of matrix `i`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn put_energies(&self, i: usize, energies: &[f64]) -> Result<()> {
        self.put(&format!("energies-{i}"), |file| {
            let mut file = Summed::new(file);
            file.write(&[energies.len() as u64])?;
            file.write(energies)?;
            file.finish()
        })
    }

    /// The energies of matrix `i`, if as many as `expected` were kept.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn energies(&self, i: usize, expected: usize) -> Result<Option<Vec<f64>>> {
        self.get(&format!("energies-{i}"), |file| {
            let mut file = Summed::new(file);
            let length = file.read_one::<u64>()? as usize;
            if length != expected {
                return Err(ErrorKind::InvalidData.into());
            }
            let energies = file.read_many::<f64>(length)?;
            file.check()?;
            Ok(energies)
        })
    }

    /// Keeps the fit of matrix `i`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn put_fit(&self, i: usize, timed: &Timed) -> Result<()> {
        let Timed { fit, seconds } = timed;
        let head = json!({
            "spec": matrix_spec_json(&fit.spec),
            "seconds": seconds,
            // JSON would round some numbers.
            "lost_energy": fit.lost_energy.to_bits(),
            "of_terms": fit.terms.iter().map(|term| term.lost_energy().to_bits()).collect::<Vec<_>>(),
        });
        let head = head.to_string().into_bytes();
        self.put(&format!("fit-{i}"), |file| {
            let mut file = Summed::new(file);
            file.write(&[head.len() as u64])?;
            file.write(&head)?;
            for term in &fit.terms {
                match term {
                    Term::Kronecker(Decomposition { sum, row_permutation, column_permutation }) => {
                        file.write(&sum.a)?;
                        file.write(&sum.b)?;
                        for permutation in [row_permutation, column_permutation].into_iter().flatten() {
                            file.write(permutation.as_slice())?;
                        }
                    }
                    Term::LowRank(low_rank) => write_low_rank(&mut file, low_rank)?,
                    Term::Grouped(GroupedLowRank { order, groups, .. }) => {
                        file.write(order.as_slice())?;
                        for group in groups {
                            write_low_rank(&mut file, group)?;
                            file.write(&[group.lost_energy])?;
                        }
                    }
                }
            }
            file.finish()
        })
    }

    /// The fit of matrix `i`, if it was kept.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn fit(&self, i: usize, place: &Place<'_>) -> Result<Option<Timed>> {
        self.get(&format!("fit-{i}"), |file| {
            let mut file = Summed::new(file);
            let length = file.read_one::<u64>()? as usize;
            // A head is some hundred bytes. A damaged length must not ask for all of the memory.
            if length > 1 << 20 {
                return Err(ErrorKind::InvalidData.into());
            }
            let head: Head = serde_json::from_slice(&file.read_many::<u8>(length)?)?;
            let spec = matrix_spec(head.spec).map_err(std::io::Error::other)?;
            let terms = spec.terms().iter().zip(head.of_terms);
            let terms = terms.map(|(term, energy)| read_term(&mut file, term, place, f64::from_bits(energy)));
            let terms = terms.collect::<std::io::Result<Vec<_>>>()?;
            file.check()?;
            let fit = Fit { spec, terms, lost_energy: f64::from_bits(head.lost_energy) };
            Ok(Timed { fit, seconds: head.seconds })
        })
    }

    /// The fit of matrix `i`: the one that was kept, or else the one that `make` makes, which is kept.
    ///
    /// # Errors
    /// Those of `make`, and [`Error::Io`].
    pub(super) fn fit_or(&self, i: usize, place: &Place<'_>, make: impl FnOnce() -> Result<Timed>) -> Result<Timed> {
        if let Some(timed) = self.fit(i, place)? {
            return Ok(timed);
        }
        let timed = make()?;
        self.put_fit(i, &timed)?;
        Ok(timed)
    }

    /// Writes a file aside and gives it its name.
    fn put(&self, name: &str, write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Result<()> {
        let (aside, path) = (self.directory.join(format!("{name}.partial")), self.directory.join(name));
        let written = File::create(&aside).and_then(|file| {
            let mut file = BufWriter::new(file);
            write(&mut file)?;
            file.into_inner()?;
            fs::rename(&aside, &path)
        });
        written.map_err(Error::io(path))
    }

    /// Reads a file; `None` if it is missing or damaged.
    fn get<T>(&self, name: &str, read: impl FnOnce(&mut BufReader<File>) -> std::io::Result<T>) -> Result<Option<T>> {
        let path = self.directory.join(name);
        match File::open(&path).and_then(|file| read(&mut BufReader::new(file))) {
            Ok(value) => Ok(Some(value)),
            Err(error) => match error.kind() {
                ErrorKind::NotFound | ErrorKind::InvalidData | ErrorKind::UnexpectedEof | ErrorKind::Other => Ok(None),
                _ => Err(Error::io(path)(error)),
            },
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.close();
    }
}

/// The part of a fit that is not an array.
#[derive(serde::Deserialize)]
struct Head {
    spec: Value,
    seconds: f64,
    lost_energy: u64,
    of_terms: Vec<u64>,
}

fn write_low_rank<T: Write>(file: &mut Summed<T>, low_rank: &LowRank) -> std::io::Result<()> {
    file.write(&low_rank.left)?;
    file.write(&low_rank.right)?;
    file.write(low_rank.order.as_slice())
}

fn read_low_rank<T: Read>(file: &mut Summed<T>, shape: LowRankShape, lost_energy: f64) -> std::io::Result<LowRank> {
    let left = file.read_many(shape.left().0 * shape.left().1)?;
    let right = file.read_many(shape.right().0 * shape.right().1)?;
    let permuted = if shape.pivots_on_rows() { shape.rows } else { shape.columns };
    let order = Permutation::new(file.read_many(permuted)?).map_err(damaged)?;
    Ok(LowRank { shape, left, right, order, lost_energy })
}

/// The error of a file whose values do not fit their shape.
fn damaged(_: Error) -> std::io::Error {
    ErrorKind::InvalidData.into()
}

fn read_term(
    file: &mut Summed<&mut BufReader<File>>,
    term: &TermSpec,
    place: &Place<'_>,
    lost_energy: f64,
) -> std::io::Result<Term> {
    Ok(match term {
        TermSpec::Kronecker(spec) => {
            let shape = spec.shape(place.rows, place.columns).map_err(damaged)?;
            let a = file.read_many(shape.rank * shape.blocks())?;
            let b = file.read_many(shape.rank * shape.block_entries())?;
            let mut permutation = |wanted: bool, length| -> std::io::Result<Option<Permutation>> {
                if wanted { Permutation::new(file.read_many(length)?).map(Some).map_err(damaged) } else { Ok(None) }
            };
            let row_permutation = permutation(spec.permute.rows(), place.rows)?;
            let column_permutation = permutation(spec.permute.columns(), place.columns)?;
            let sum = KroneckerSum { shape, a, b, lost_energy };
            Term::Kronecker(Decomposition { sum, row_permutation, column_permutation })
        }
        TermSpec::LowRank { rank } => {
            let shape = LowRankShape::new(place.rows, place.columns, *rank).map_err(damaged)?;
            Term::LowRank(read_low_rank(file, shape, lost_energy)?)
        }
        TermSpec::Grouped(groups) => {
            let shape = GroupedShape::new(place.rows, place.columns, groups).map_err(damaged)?;
            let order = Permutation::new(file.read_many(place.rows)?).map_err(damaged)?;
            let read = |shape: &LowRankShape| {
                let mut group = read_low_rank(file, *shape, 0.0)?;
                group.lost_energy = file.read_one()?;
                Ok(group)
            };
            let groups = shape.groups().iter().map(read).collect::<std::io::Result<_>>()?;
            Term::Grouped(GroupedLowRank { shape, order, groups, lost_energy })
        }
    })
}

/// The number of files of finished work in a directory, which need not exist.
fn count(directory: &Path) -> Result<usize> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        other => other.map_err(Error::io(directory))?,
    };
    let mut done = 0;
    for entry in entries {
        let name = entry.map_err(Error::io(directory))?.file_name();
        let name = name.to_string_lossy();
        done += usize::from(name != RUN_FILE && !name.starts_with('.') && !name.ends_with(".partial"));
    }
    Ok(done)
}

/// Refuses to resume a run with other facts, and names those that differ.
fn same_run(path: &Path, earlier: &Map<String, Value>, key: &Map<String, Value>) -> Result<()> {
    let facts = key.keys().chain(earlier.keys().filter(|name| !key.contains_key(*name)));
    let shown = |fact: Option<&Value>| fact.map_or("nothing".into(), Value::to_string);
    let differing: Vec<_> = facts
        .filter(|name| key.get(*name) != earlier.get(*name))
        .map(|name| format!("{name} was {}, now {}", shown(earlier.get(name)), shown(key.get(name))))
        .collect();
    if differing.is_empty() {
        return Ok(());
    }
    Err(Error::Config(format!(
        "resume: the run that was stopped while writing {} is another one: {}. Resume it with what it had, or begin anew \
         without resume, which removes its work",
        path.display(),
        differing.join("; ")
    )))
}

/// A file whose last word is a checksum of all values before it.
struct Summed<T> {
    file: T,
    sum: u64,
}

impl<T> Summed<T> {
    fn new(file: T) -> Self {
        Self { file, sum: 0 }
    }

    fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words.iter().map(|word| u64::from_le_bytes(*word)).chain(rest.iter().map(|&byte| byte.into())) {
            self.sum = (self.sum.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }
}

impl<T: Write> Summed<T> {
    fn write<V: Pod>(&mut self, values: &[V]) -> std::io::Result<()> {
        self.add(cast_slice(values));
        self.file.write_all(cast_slice(values))
    }

    fn finish(mut self) -> std::io::Result<()> {
        // A file of nothing but zeros must not pass.
        self.file.write_all(&(!self.sum).to_le_bytes())
    }
}

impl<T: Read> Summed<T> {
    fn read_many<V: Pod>(&mut self, length: usize) -> std::io::Result<Vec<V>> {
        let mut values = vec![V::zeroed(); length];
        self.file.read_exact(cast_slice_mut(&mut values))?;
        self.add(cast_slice(&values));
        Ok(values)
    }

    fn read_one<V: Pod>(&mut self) -> std::io::Result<V> {
        Ok(self.read_many(1)?[0])
    }

    /// Refuses a file whose checksum differs, or that is longer.
    fn check(mut self) -> std::io::Result<()> {
        let mut last = Vec::new();
        self.file.read_to_end(&mut last)?;
        if last == (!self.sum).to_le_bytes() { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::read::Checkpoint;
    use crate::checkpoint::testing::Source;
    use crate::fit::{Moments, Norm, fit};
    use crate::kron::MatrixView;
    use crate::numeric::Float;
    use crate::permute::Effort;
    use crate::progress::{Parallelism, Progress};
    use crate::spec::{KroneckerSpec, MatrixSpec, Permute, RowGroup};
    use crate::testing::noise;

    fn key(seed: u64) -> Map<String, Value> {
        Map::from_iter([("seed".to_owned(), seed.into()), ("budget".to_owned(), "0.65".into())])
    }

    fn open(root: &Path, seed: u64, resume: bool) -> Result<Journal> {
        let source = root.join("source");
        if !source.exists() {
            Source::tiny("transformer.", Float::F32).write(&source);
        }
        let checkpoint = Checkpoint::open(&source).unwrap();
        Journal::open(Destination::check(&root.join("out"), &checkpoint, false).unwrap(), &key(seed), resume)
    }

    fn fitted(spec: &MatrixSpec, rows: usize, columns: usize) -> (Place<'static>, Timed) {
        let values = noise(rows * columns, 3);
        let view = MatrixView::new(&values, rows, columns).unwrap();
        let (norm, way) = (Norm::frobenius(), Parallelism::Sequential);
        let fit = fit(view, spec, &norm, Effort::Fast, 0, way, &Progress::default()).unwrap();
        let place = Place { name: "w".into(), rows, columns, moments: Moments::default() };
        (place, Timed { fit, seconds: 0.1 })
    }

    fn kinds() -> Vec<(Place<'static>, Timed)> {
        let kronecker = |permute| TermSpec::Kronecker(KroneckerSpec { block: (2, 4), rank: 2, permute });
        let mixed = MatrixSpec::new(vec![TermSpec::LowRank { rank: 2 }, kronecker(Permute::Both)]).unwrap();
        let group = |rows, rank| RowGroup { rows, rank };
        let specs = [
            MatrixSpec::low_rank(3),
            kronecker(Permute::None).into(),
            kronecker(Permute::Rows).into(),
            kronecker(Permute::Columns).into(),
            mixed,
        ];
        let grouped = TermSpec::Grouped(vec![group(5, 3), group(9, 1)]).into();
        specs
            .iter()
            .flat_map(|spec| [fitted(spec, 12, 16), fitted(spec, 16, 12)])
            .chain([fitted(&grouped, 14, 4)])
            .collect()
    }

    #[test]
    fn every_kind_of_fit_and_energies_come_back_bit_for_bit() {
        let root = tempfile::tempdir().unwrap();
        let energies = [3.0, 0.1_f64.sqrt(), 1e-300];
        {
            let journal = open(root.path(), 0, true).unwrap();
            for (i, (place, timed)) in kinds().iter().enumerate() {
                assert_eq!(journal.fit(i, place).unwrap(), None);
                journal.put_fit(i, timed).unwrap();
            }
            journal.put_energies(4, &energies).unwrap();
        }
        let journal = open(root.path(), 0, true).unwrap();
        assert_eq!((journal.found(), journal.replaced()), (kinds().len() + 1, 0));
        for (i, (place, timed)) in kinds().iter().enumerate() {
            assert_eq!(journal.fit(i, place).unwrap().as_ref(), Some(timed));
        }
        assert_eq!(journal.energies(4, 3).unwrap().as_deref(), Some(&energies[..]));
        journal.succeed();
        assert!(!journal.directory().exists() && open(root.path(), 1, true).is_ok());
    }

    #[test]
    fn a_damaged_file_counts_as_missing() {
        let root = tempfile::tempdir().unwrap();
        let journal = open(root.path(), 0, true).unwrap();
        let (place, timed) = &kinds()[8];
        journal.put_fit(0, timed).unwrap();
        journal.put_energies(0, &[1.0, 2.0]).unwrap();
        for name in ["fit-0", "energies-0"] {
            let path = journal.directory().join(name);
            let whole = fs::read(&path).unwrap();
            let there = || match name {
                "fit-0" => journal.fit(0, place).unwrap().is_some(),
                _ => journal.energies(0, 2).unwrap().is_some(),
            };
            for length in (0..whole.len()).step_by(7) {
                fs::write(&path, &whole[..length]).unwrap();
                assert!(!there(), "{name}, {length} bytes");
                let mut zeroed = whole.clone();
                zeroed[length..].fill(0);
                fs::write(&path, &zeroed).unwrap();
                assert!(!there() || zeroed == whole, "{name}, zeros from byte {length}");
                let mut flipped = whole.clone();
                flipped[length] ^= 4;
                fs::write(&path, &flipped).unwrap();
                assert!(!there(), "{name}, byte {length} differs");
            }
            fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
            assert!(!there(), "{name}, longer");
            fs::write(&path, &whole).unwrap();
            assert!(there(), "{name}");
        }
    }

    #[test]
    fn a_run_with_other_facts_is_refused_by_name_and_stays() {
        let root = tempfile::tempdir().unwrap();
        let (_, timed) = &kinds()[0];
        open(root.path(), 0, true).unwrap().put_fit(0, timed).unwrap();
        let error = open(root.path(), 1, true).unwrap_err().to_string();
        assert!(error.contains("seed was 0, now 1") && !error.contains("budget"), "{error}");
        assert_eq!(open(root.path(), 0, true).unwrap().found(), 1);
    }

    #[test]
    fn work_is_kept_for_a_run_that_may_be_resumed_only() {
        let root = tempfile::tempdir().unwrap();
        let (_, timed) = &kinds()[0];
        let left = || root.path().join(".out.tqcompressor-resume").exists();
        drop(open(root.path(), 0, true).unwrap());
        assert!(!left());
        open(root.path(), 0, true).unwrap().put_fit(0, timed).unwrap();
        assert!(left());
        let second = open(root.path(), 0, false).unwrap();
        assert_eq!((second.found(), second.replaced()), (0, 1));
        second.put_fit(0, timed).unwrap();
        let busy = open(root.path(), 0, true).unwrap_err().to_string();
        assert!(busy.contains("another run"), "{busy}");
        second.close();
        assert!(!left());
    }
}
