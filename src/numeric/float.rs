//! The dtypes of weights and logits: f32, f16 and bf16. Everything is computed in f32 or f64.

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};

use super::simd::halves::{narrow_f16, widen_bf16, widen_f16};
use crate::error::{Error, Result};

/// Values converted at a time, so that buffers stay in the first-level cache.
const CHUNK: usize = 1024;

/// A floating dtype, known at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// "float32"
    F32,
    /// "float16"
    F16,
    /// "bfloat16"
    Bf16,
}

/// A floating dtype, known at compile time.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// The same dtype at run time.
    const FLOAT: Float;

    /// Writes the values as f32, exactly. Both slices have one length.
    fn upcast(values: &[Self], out: &mut [f32]);

    /// Rounds to the nearest value of this dtype, ties to even. Both slices have one length.
    fn downcast(values: &[f32], out: &mut [Self]);

    /// The values as f32: the slice itself, or a copy in `scratch`.
    fn as_f32<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(values.len(), 0.0);
        Self::upcast(values, scratch);
        scratch
    }
}

impl Element for f32 {
    const FLOAT: Float = Float::F32;

    fn upcast(values: &[Self], out: &mut [f32]) {
        out.copy_from_slice(values);
    }

    fn downcast(values: &[f32], out: &mut [Self]) {
        out.copy_from_slice(values);
    }

    fn as_f32<'a>(values: &'a [Self], _: &'a mut Vec<f32>) -> &'a [f32] {
        values
    }
}

impl Element for f16 {
    const FLOAT: Float = Float::F16;

    fn upcast(values: &[Self], out: &mut [f32]) {
        widen_f16(values, out);
    }

    fn downcast(values: &[f32], out: &mut [Self]) {
        narrow_f16(values, out);
    }
}

impl Element for bf16 {
    const FLOAT: Float = Float::Bf16;

    fn upcast(values: &[Self], out: &mut [f32]) {
        widen_bf16(values, out);
    }

    fn downcast(values: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(values);
    }
}

impl Float {
    const NAMES: [(&'static str, Self); 3] = [("float32", Self::F32), ("float16", Self::F16), ("bfloat16", Self::Bf16)];

    /// Reads the name that torch and `config.json` use.
    ///
    /// # Errors
    /// [`Error::Dtype`] if it is none of "float32", "float16", "bfloat16".
    pub fn from_name(name: &str) -> Result<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name).map(|&(_, float)| float);
        found.ok_or_else(|| Error::Dtype { expected: "float32, float16 or bfloat16".into(), got: name.into() })
    }

    /// The name that torch and `config.json` use.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].0
    }

    /// Bytes of one value.
    #[must_use]
    pub fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Reads little-endian bytes of `out.len()` values as f32, exactly.
    pub fn upcast(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len() * self.size());
        match self {
            Self::F32 => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
            Self::F16 => upcast_halves(bytes, out, f16::from_le_bytes),
            Self::Bf16 => upcast_halves(bytes, out, bf16::from_le_bytes),
        }
    }

    /// Appends `values` to `out` as little-endian bytes, rounded to the nearest value of this dtype, ties to even.
    ///
    /// # Errors
    /// The index of the first finite value that this dtype can only hold as an infinity.
    pub fn downcast(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), usize> {
        out.reserve(values.len() * self.size());
        match self {
            Self::F32 => values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes())),
            Self::F16 => downcast_halves(values, out, f16::is_infinite, f16::to_le_bytes)?,
            Self::Bf16 => downcast_halves(values, out, bf16::is_infinite, bf16::to_le_bytes)?,
        }
        Ok(())
    }

    /// The index and value of the first NaN or infinity.
    #[must_use]
    pub fn first_non_finite(self, bytes: &[u8]) -> Option<(usize, f32)> {
        let mut buffer = [0.0; CHUNK];
        for (i, bytes) in bytes.chunks(CHUNK * self.size()).enumerate() {
            let values = &mut buffer[..bytes.len() / self.size()];
            self.upcast(bytes, values);
            // `0 · x` is 0 for every finite value, however large, and NaN for the others: one sum tests them all.
            if values.iter().map(|value| value * 0.0).sum::<f32>() != 0.0
                && let Some(j) = values.iter().position(|value| !value.is_finite())
            {
                return Some((i * CHUNK + j, values[j]));
            }
        }
        None
    }
}

fn upcast_halves<T: Element>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; 2]) -> T) {
    let mut halves = [T::default(); CHUNK];
    for (out, bytes) in out.chunks_mut(CHUNK).zip(bytes.chunks(2 * CHUNK)) {
        for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *half = read(*bytes);
        }
        T::upcast(&halves[..out.len()], out);
    }
}

fn downcast_halves<T: Element>(
    values: &[f32],
    out: &mut Vec<u8>,
    is_infinite: impl Fn(T) -> bool,
    write: impl Fn(T) -> [u8; 2],
) -> Result<(), usize> {
    let mut halves = [T::default(); CHUNK];
    for (chunk, values) in values.chunks(CHUNK).enumerate() {
        let halves = &mut halves[..values.len()];
        T::downcast(values, halves);
        let overflows = |(half, value): (&T, &f32)| is_infinite(*half) && value.is_finite();
        if let Some(at) = halves.iter().zip(values).position(overflows) {
            return Err(chunk * CHUNK + at);
        }
        halves.iter().for_each(|half| out.extend_from_slice(&write(*half)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLOATS: [Float; 3] = [Float::F32, Float::F16, Float::Bf16];

    fn bytes(float: Float, values: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        float.downcast(values, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn names_round_trip() {
        for float in FLOATS {
            assert_eq!(Float::from_name(float.name()).unwrap(), float);
        }
        assert!(Float::from_name("float64").is_err());
    }

    #[test]
    fn a_value_that_only_fits_as_infinity_is_reported_by_index() {
        let mut values = vec![1.0; 3000];
        values[2500] = 70000.0;
        assert_eq!(Float::F16.downcast(&values, &mut Vec::new()), Err(2500));
        values[2500] = f32::MAX;
        assert_eq!(Float::Bf16.downcast(&values, &mut Vec::new()), Err(2500));
        values[2500] = f32::INFINITY;
        assert_eq!(Float::F16.downcast(&values, &mut Vec::new()), Ok(()));
    }

    #[test]
    fn the_first_non_finite_value_is_found_wherever_it_is() {
        for float in FLOATS {
            for (index, value) in [(0, f32::NAN), (1023, f32::INFINITY), (1024, f32::NEG_INFINITY), (2999, f32::NAN)] {
                // Large finite values around it: the test must not mistake an overflow for an infinity.
                let mut values = vec![60000.0; 3000];
                assert_eq!(float.first_non_finite(&bytes(float, &values)), None);
                values[index] = value;
                let (found, seen) = float.first_non_finite(&bytes(float, &values)).unwrap();
                assert_eq!((found, seen.is_nan(), seen.is_infinite()), (index, value.is_nan(), value.is_infinite()));
            }
        }
    }

    proptest! {
        #[test]
        fn downcasting_is_half_crates_and_upcasting_undoes_it(values in proptest::collection::vec(-6e4f32..6e4, 1..3000)) {
            for float in FLOATS {
                let stored = bytes(float, &values);
                let mut upcast = vec![0.0; values.len()];
                float.upcast(&stored, &mut upcast);
                for (found, value) in upcast.iter().zip(&values) {
                    let expected = match float {
                        Float::F32 => *value,
                        Float::F16 => f16::from_f32(*value).to_f32(),
                        Float::Bf16 => bf16::from_f32(*value).to_f32(),
                    };
                    prop_assert_eq!(*found, expected);
                }
            }
        }
    }
}
