//! Numbers that need not fit the memory: an unnamed temporary file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use bytemuck::{Pod, cast_slice, cast_slice_mut};

use crate::error::{Error, Result};

/// A file in the system's folder for temporary files, which is made by the first write. The system removes it when this
/// is dropped or the process ends.
///
/// It is read and not mapped, because pages that are mapped count as memory of the process.
#[derive(Default)]
pub struct Spill {
    file: Option<File>,
    end: u64,
}

impl Spill {
    /// Writes values at the end, and returns the place that they have.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn append<T: Pod>(&mut self, values: &[T]) -> Result<u64> {
        let place = self.end;
        self.write(place, values)?;
        self.end += size_of_val(values) as u64;
        Ok(place)
    }

    /// Writes values over those at `place`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write<T: Pod>(&mut self, place: u64, values: &[T]) -> Result<()> {
        self.at(place).and_then(|mut file| file.write_all(cast_slice(values))).map_err(Error::io(std::env::temp_dir()))
    }

    /// Reads the values at `place`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read.
    pub fn read<T: Pod>(&mut self, place: u64, values: &mut [T]) -> Result<()> {
        let read = self.at(place).and_then(|mut file| file.read_exact(cast_slice_mut(values)));
        read.map_err(Error::io(std::env::temp_dir()))
    }

    /// Whether anything was written.
    #[cfg(test)]
    pub fn is_used(&self) -> bool {
        self.file.is_some()
    }

    fn at(&mut self, place: u64) -> std::io::Result<&File> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile()?),
        };
        file.seek(SeekFrom::Start(place))?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_comes_back() {
        let mut spill = Spill::default();
        assert!(!spill.is_used());
        let places = [spill.append(&[1.0_f64, 2.0]).unwrap(), spill.append(&[3.0_f32]).unwrap()];
        assert_eq!(places, [0, 16]);
        spill.write(places[0] + 8, &[5.0_f64]).unwrap();
        let (mut doubles, mut singles) = ([0.0_f64; 2], [0.0_f32]);
        spill.read(places[0], &mut doubles).unwrap();
        spill.read(places[1], &mut singles).unwrap();
        assert_eq!((doubles, singles), ([1.0, 5.0], [3.0]));
        assert!(matches!(spill.read(places[1], &mut doubles), Err(Error::Io { .. })));
    }
}
