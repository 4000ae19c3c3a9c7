//! Safetensors files written tensor by tensor, in any order and from any thread.
//!
//! Names, dtypes and shapes are known in advance, so headers and offsets are too. Files are laid out and their space is
//! reserved first, so that a full disk is noticed before any work. Then every tensor is written as soon as it is ready.
//! The bytes do not depend on the order of writes, and each thread holds at most one tensor in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use indexmap::IndexMap;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use super::files::{INDEX_FILE, SINGLE_FILE};
use crate::error::{Error, Result};
use crate::numeric::Float;
use crate::portable::{reserve, write_all_at};

/// Values converted between two writes.
const CHUNK: usize = 1 << 18;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its stored name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Slot {
    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shape.iter().fold(self.dtype.bitsize() as u64, |bits, &extent| bits * extent as u64) / 8
    }
}

/// Where a tensor goes.
#[derive(Debug)]
struct Location {
    file: usize,
    offset: u64,
    length: u64,
    dtype: Dtype,
}

/// The weight files of a checkpoint being written.
#[derive(Debug)]
pub struct Writer {
    files: Vec<(PathBuf, File)>,
    locations: IndexMap<String, Location>,
    written: AtomicU64,
    bytes: u64,
}

impl Writer {
    /// Lays out `slots` in `directory`: in `model.safetensors`, or, if that would be longer than `max_shard_bytes`, in
    /// shards `model-00001-of-0000N.safetensors` and an index. A tensor longer than that has a shard of its own.
    ///
    /// Shards are filled in the order of `slots`; within a file wider dtypes come first, so that every tensor is
    /// aligned.
    ///
    /// # Errors
    /// [`Error::Io`], also if the disk is too small.
    pub fn create(directory: &Path, slots: &[Slot], max_shard_bytes: u64) -> Result<Self> {
        let shards = split(slots, max_shard_bytes);
        let mut writer = Self {
            files: Vec::new(),
            locations: IndexMap::with_capacity(slots.len()),
            written: AtomicU64::new(0),
            bytes: 0,
        };
        let mut weight_map = BTreeMap::new();
        for (number, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => SINGLE_FILE.to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            weight_map.extend(shard.iter().map(|slot| (slot.name.as_str(), name.clone())));
            writer.add_file(directory.join(name), shard)?;
        }
        if shards.len() > 1 {
            let total: u64 = slots.iter().map(Slot::bytes).sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            let path = directory.join(INDEX_FILE);
            let file = File::create(&path).map_err(Error::io(&path))?;
            write_all_at(&file, format!("{index:#}\n").as_bytes(), 0).map_err(Error::io(&path))?;
            writer.files.push((path, file));
        }
        Ok(writer)
    }

    fn add_file(&mut self, path: PathBuf, shard: &[&Slot]) -> Result<()> {
        let mut shard = shard.to_vec();
        // The order of safetensors' own writer, widest dtype first and then by name: loading and saving again with it
        // gives the same bytes.
        shard.sort_by(|a, b| (b.dtype, &a.name).cmp(&(a.dtype, &b.name)));
        let mut end = 0;
        let mut infos = Vec::with_capacity(shard.len());
        for slot in shard {
            let begin = end;
            end += slot.bytes() as usize;
            let info = TensorInfo { dtype: slot.dtype, shape: slot.shape.clone(), data_offsets: (begin, end) };
            infos.push((slot.name.clone(), info));
        }
        let format = [("format".to_owned(), "pt".to_owned())].into();
        let header = Metadata::new(Some(format), infos.clone()).map(|metadata| serde_json::to_vec(&metadata));
        // Neither can fail: the offsets are consecutive, and the metadata are strings and numbers.
        let mut header = header.expect("offsets follow each other").expect("a header is plain JSON");
        header.resize(header.len().next_multiple_of(8), b' ');
        let start = 8 + header.len() as u64;
        let length = start + end as u64;

        let file = File::create(&path).map_err(Error::io(&path))?;
        reserve(&file, length).map_err(Error::io(&path))?;
        let head = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
        write_all_at(&file, &head, 0).map_err(Error::io(&path))?;
        for (name, info) in infos {
            let (begin, end) = info.data_offsets;
            let location = Location {
                file: self.files.len(),
                offset: start + begin as u64,
                length: (end - begin) as u64,
                dtype: info.dtype,
            };
            self.locations.insert(name, location);
        }
        self.files.push((path, file));
        self.bytes += length;
        self.written.fetch_add(start, Relaxed);
        Ok(())
    }

    /// Size of the weight files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes `bytes` of a tensor, `offset` bytes after its beginning.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If the tensor was not laid out, or the bytes reach beyond it.
    pub fn write(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let location = &self.locations[name];
        let length = bytes.len() as u64;
        assert!(offset + length <= location.length, "tensor '{name}' is {} bytes long", location.length);
        let (path, file) = &self.files[location.file];
        write_all_at(file, bytes, location.offset + offset).map_err(Error::io(path))?;
        self.written.fetch_add(length, Relaxed);
        Ok(())
    }

    /// Writes values of a floating tensor in its dtype, `first` values after its beginning.
    ///
    /// # Errors
    /// [`Error::Dtype`] in the tensor if a finite value is beyond the dtype's range; [`Error::Io`].
    ///
    /// # Panics
    /// As [`write`](Self::write), and if the tensor is not floating.
    pub fn write_floats(&self, name: &str, first: usize, values: &[f32]) -> Result<()> {
        let float = Float::from_dtype(self.locations[name].dtype).expect("a floating tensor");
        let mut bytes = Vec::new();
        for (i, values) in values.chunks(CHUNK).enumerate() {
            bytes.clear();
            float.downcast(values, &mut bytes).map_err(|at| {
                let got = format!("{}, which is beyond its range", values[at]);
                Error::Dtype { expected: format!("values that {} can hold", float.name()), got }.in_tensor(name)
            })?;
            self.write(name, ((first + i * CHUNK) * float.size()) as u64, &bytes)?;
        }
        Ok(())
    }

    /// Writes a whole I64 tensor of indices.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// As [`write`](Self::write).
    pub fn write_indices(&self, name: &str, indices: &[usize]) -> Result<()> {
        let bytes: Vec<u8> = indices.iter().flat_map(|&index| (index as i64).to_le_bytes()).collect();
        self.write(name, 0, &bytes)
    }

    /// Makes every file durable.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If a tensor was not written, or written twice: a hole in a file would read as zeros.
    pub fn finish(self) -> Result<()> {
        assert_eq!(self.written.into_inner(), self.bytes, "every tensor is written once");
        for (path, file) in &self.files {
            file.sync_all().map_err(Error::io(path))?;
        }
        Ok(())
    }
}

/// Consecutive runs of slots, each no longer than `most` bytes unless it is a single slot.
fn split(slots: &[Slot], most: u64) -> Vec<Vec<&Slot>> {
    let mut shards = vec![Vec::new()];
    let mut length = 0;
    for slot in slots {
        let bytes = slot.bytes();
        if length > 0 && length + bytes > most {
            shards.push(Vec::new());
            length = 0;
        }
        length += bytes;
        shards.last_mut().expect("there is always a shard").push(slot);
    }
    shards
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn slot(name: &str, dtype: Dtype, shape: &[usize]) -> Slot {
        Slot { name: name.into(), dtype, shape: shape.into() }
    }

    fn slots() -> Vec<Slot> {
        vec![
            slot("b", Dtype::U8, &[1]),
            slot("a", Dtype::F16, &[3]),
            slot("d", Dtype::I64, &[2]),
            slot("c", Dtype::F32, &[2, 2]),
        ]
    }

    fn fill(writer: &Writer) {
        writer.write_floats("c", 0, &[1.0, 2.0]).unwrap();
        writer.write_indices("d", &[5, 6]).unwrap();
        writer.write("b", 0, &[0]).unwrap();
        writer.write_floats("c", 2, &[3.0, 4.0]).unwrap();
        writer.write_floats("a", 0, &[0.5, 1.5, -2.0]).unwrap();
    }

    #[test]
    fn one_file_is_read_back_by_the_reference_and_aligned() {
        let directory = tempfile::tempdir().unwrap();
        let writer = Writer::create(directory.path(), &slots(), u64::MAX).unwrap();
        fill(&writer);
        let bytes = writer.bytes();
        writer.finish().unwrap();
        let file = std::fs::read(directory.path().join("model.safetensors")).unwrap();
        assert_eq!(file.len() as u64, bytes);
        let read = SafeTensors::deserialize(&file).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap().len(), 1);
        assert_eq!(metadata.offset_keys(), ["d", "c", "a", "b"]);
        assert_eq!(read.tensor("d").unwrap().data(), [5i64.to_le_bytes(), 6i64.to_le_bytes()].concat());
        let c: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(read.tensor("c").unwrap().data(), c);
        for entry in super::super::header::parse(&file).unwrap() {
            assert!(entry.range.start.is_multiple_of(entry.dtype.bitsize() / 8), "{}", entry.name);
        }
    }

    #[test]
    fn shards_are_named_and_indexed_as_transformers_does() {
        let directory = tempfile::tempdir().unwrap();
        let writer = Writer::create(directory.path(), &slots(), 20).unwrap();
        fill(&writer);
        writer.finish().unwrap();
        let index = std::fs::read(directory.path().join(INDEX_FILE)).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 39);
        // b (1) and a (6) share a shard; d (16) would make it 23 bytes, and c (16) does not fit with d.
        for (tensor, number) in [("b", 1), ("a", 1), ("d", 2), ("c", 3)] {
            let name = format!("model-0000{number}-of-00003.safetensors");
            assert_eq!(index["weight_map"][tensor], *name);
            let file = std::fs::read(directory.path().join(name)).unwrap();
            assert!(SafeTensors::deserialize(&file).unwrap().tensor(tensor).is_ok());
        }
    }

    #[test]
    fn values_beyond_the_dtype_are_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let writer = Writer::create(directory.path(), &slots(), u64::MAX).unwrap();
        let message = writer.write_floats("a", 0, &[1.0, 1e6, 0.0]).unwrap_err().to_string();
        assert!(message.contains("'a'") && message.contains("float16") && message.contains("1000000"), "{message}");
    }

    #[test]
    #[should_panic(expected = "every tensor is written once")]
    fn a_hole_is_never_taken_for_zeros() {
        let directory = tempfile::tempdir().unwrap();
        Writer::create(directory.path(), &slots(), u64::MAX).unwrap().finish().unwrap();
    }
}
