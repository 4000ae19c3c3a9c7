//! The floating dtypes of a checkpoint, and conversion between their little-endian bytes and `f32`.

use std::borrow::Cow;

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use safetensors::Dtype;

use crate::error::{Error, Result};

/// Values converted at a time, so that buffers stay in the first-level cache.
const CHUNK: usize = 1024;

/// A dtype that weights can be read from and written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// "float32"
    F32,
    /// "float16"
    F16,
    /// "bfloat16"
    Bf16,
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

    /// The safetensors dtype.
    #[must_use]
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    /// The float that a safetensors dtype is.
    ///
    /// # Errors
    /// [`Error::Dtype`] if it is none of the three.
    pub fn from_dtype(dtype: Dtype) -> Result<Self> {
        match dtype {
            Dtype::F32 => Ok(Self::F32),
            Dtype::F16 => Ok(Self::F16),
            Dtype::BF16 => Ok(Self::Bf16),
            other => Err(Error::Dtype { expected: "F32, F16 or BF16".into(), got: format!("{other:?}") }),
        }
    }

    /// Bytes of one value.
    #[must_use]
    pub fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Widens bytes to `f32`, exactly. `bytes` must hold `out.len()` values.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len() * self.size());
        match self {
            Self::F32 => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
            Self::F16 => {
                let mut halves = [f16::ZERO; CHUNK];
                for (out, bytes) in out.chunks_mut(CHUNK).zip(bytes.chunks(2 * CHUNK)) {
                    for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
                        *half = f16::from_le_bytes(*bytes);
                    }
                    halves[..out.len()].convert_to_f32_slice(out);
                }
            }
            Self::Bf16 => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
        }
    }

    /// Appends `values` to `out`, rounded to the nearest value of this dtype (ties to even).
    ///
    /// # Errors
    /// The index of the first finite value that this dtype can only hold as an infinity.
    pub fn narrow(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), usize> {
        out.reserve(values.len() * self.size());
        match self {
            Self::F32 => values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes())),
            Self::F16 => {
                let mut halves = [f16::ZERO; CHUNK];
                for (i, values) in values.chunks(CHUNK).enumerate() {
                    let halves = &mut halves[..values.len()];
                    halves.convert_from_f32_slice(values);
                    if let Some(j) = halves.iter().zip(values).position(|(h, v)| h.is_infinite() && v.is_finite()) {
                        return Err(i * CHUNK + j);
                    }
                    halves.iter().for_each(|half| out.extend_from_slice(&half.to_le_bytes()));
                }
            }
            Self::Bf16 => {
                for (i, &value) in values.iter().enumerate() {
                    let half = bf16::from_f32(value);
                    if half.is_infinite() && value.is_finite() {
                        return Err(i);
                    }
                    out.extend_from_slice(&half.to_le_bytes());
                }
            }
        }
        Ok(())
    }

    /// The index and value of the first NaN or infinity.
    #[must_use]
    pub fn first_non_finite(self, bytes: &[u8]) -> Option<(usize, f32)> {
        let mut buffer = [0.0; CHUNK];
        for (i, bytes) in bytes.chunks(CHUNK * self.size()).enumerate() {
            let values = &mut buffer[..bytes.len() / self.size()];
            self.widen(bytes, values);
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

/// Bytes as `f32` without a copy, where the machine is little-endian and the bytes happen to be aligned.
#[must_use]
pub fn borrow_f32(bytes: &[u8]) -> Option<&[f32]> {
    if cfg!(target_endian = "little") { bytemuck::try_cast_slice(bytes).ok() } else { None }
}

/// How a matrix lies in its tensor's bytes.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Columns of the stored tensor.
    pub stored_columns: usize,
    /// Whether the matrix is the transpose of the stored tensor.
    pub transposed: bool,
    /// Where the matrix's columns begin in the in × out tensor.
    pub first_column: usize,
}

/// Reads a `rows × columns` matrix, row-major, in in × out orientation. Borrows where the bytes are already just that.
///
/// `bytes` is the whole tensor. Cost: one pass, and one copy of the matrix unless borrowed.
#[must_use]
pub fn read_matrix(bytes: &[u8], float: Float, layout: Layout, rows: usize, columns: usize) -> Cow<'_, [f32]> {
    let Layout { stored_columns, transposed, first_column } = layout;
    if !transposed
        && columns == stored_columns
        && float == Float::F32
        && let Some(values) = borrow_f32(bytes)
    {
        return Cow::Borrowed(values);
    }
    let mut matrix = vec![0.0; rows * columns];
    let row_bytes = stored_columns * float.size();
    if !transposed {
        let (from, to) = (first_column * float.size(), (first_column + columns) * float.size());
        for (row, bytes) in matrix.chunks_exact_mut(columns.max(1)).zip(bytes.chunks_exact(row_bytes.max(1))) {
            float.widen(&bytes[from..to], row);
        }
        return Cow::Owned(matrix);
    }
    // The stored tensor is columns × rows: widen a band of its rows, then write it out as a band of columns, so that
    // every cache line of the result is filled while it is at hand.
    const BAND: usize = 16;
    let mut band = vec![0.0; BAND * rows];
    for first in (0..columns).step_by(BAND) {
        let width = BAND.min(columns - first);
        let stored = (first_column + first) * row_bytes;
        float.widen(&bytes[stored..stored + width * row_bytes], &mut band[..width * rows]);
        for (i, row) in matrix.chunks_exact_mut(columns).enumerate() {
            for (j, value) in row[first..first + width].iter_mut().enumerate() {
                *value = band[j * rows + i];
            }
        }
    }
    Cow::Owned(matrix)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLOATS: [Float; 3] = [Float::F32, Float::F16, Float::Bf16];

    fn bytes(float: Float, values: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        float.narrow(values, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn names_and_dtypes_round_trip() {
        for float in FLOATS {
            assert_eq!(Float::from_name(float.name()).unwrap(), float);
            assert_eq!(Float::from_dtype(float.dtype()).unwrap(), float);
        }
        assert!(Float::from_name("float64").is_err() && Float::from_dtype(Dtype::F64).is_err());
    }

    #[test]
    fn a_value_that_only_fits_as_infinity_is_reported_by_index() {
        let mut values = vec![1.0; 3000];
        values[2500] = 70000.0;
        assert_eq!(Float::F16.narrow(&values, &mut Vec::new()), Err(2500));
        values[2500] = f32::MAX;
        assert_eq!(Float::Bf16.narrow(&values, &mut Vec::new()), Err(2500));
        values[2500] = f32::INFINITY;
        assert_eq!(Float::F16.narrow(&values, &mut Vec::new()), Ok(()));
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
        fn narrowing_is_half_crates_and_widening_undoes_it(values in proptest::collection::vec(-6e4f32..6e4, 1..3000)) {
            for float in FLOATS {
                let stored = bytes(float, &values);
                let mut widened = vec![0.0; values.len()];
                float.widen(&stored, &mut widened);
                for (wide, value) in widened.iter().zip(&values) {
                    let expected = match float {
                        Float::F32 => *value,
                        Float::F16 => f16::from_f32(*value).to_f32(),
                        Float::Bf16 => bf16::from_f32(*value).to_f32(),
                    };
                    prop_assert_eq!(*wide, expected);
                }
            }
        }

        #[test]
        fn matrices_are_read_in_in_out_orientation(rows in 1usize..40, columns in 1usize..40, extra in 0usize..3, shift in 0usize..4) {
            for float in FLOATS {
                for transposed in [false, true] {
                    // Fused weights are never stored out × in.
                    let (stored_rows, stored_columns) = if transposed { (columns, rows) } else { (rows, columns * (1 + extra)) };
                    let first_column = if transposed { 0 } else { columns * extra };
                    let values: Vec<f32> = (0..stored_rows * stored_columns).map(|i| (i % 251) as f32).collect();
                    // Bytes at any alignment, as in a file whose header was not padded.
                    let mut buffer = vec![0; shift];
                    float.narrow(&values, &mut buffer).unwrap();
                    let layout = Layout { stored_columns, transposed, first_column };
                    let matrix = read_matrix(&buffer[shift..], float, layout, rows, columns);
                    for i in 0..rows {
                        for j in 0..columns {
                            let at = if transposed { j * rows + i } else { i * stored_columns + first_column + j };
                            prop_assert_eq!(matrix[i * columns + j], values[at]);
                        }
                    }
                }
            }
        }
    }
}
