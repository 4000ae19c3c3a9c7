//! Rows of f32, f16 or bf16 in, computed in f32, and gradients of the same dtype out.

use std::ops::Range;

use half::slice::{HalfBitsSliceExt as _, HalfFloatSliceExt as _};
use half::{bf16, f16};

use crate::memory::zeros;

/// Borrowed row-major values of one of the three dtypes; the halves as raw bits.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// float32
    F32(&'a [f32]),
    /// float16 bits
    F16(&'a [u16]),
    /// bfloat16 bits
    Bf16(&'a [u16]),
}

/// Values that a loss returns; the halves as raw bits.
#[derive(Clone, Debug, PartialEq)]
pub enum OwnedValues {
    /// float32
    F32(Vec<f32>),
    /// float16 bits
    F16(Vec<u16>),
    /// bfloat16 bits
    Bf16(Vec<u16>),
}

/// One row of a gradient.
pub(super) enum RowMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [u16]),
    Bf16(&'a mut [u16]),
    /// Of so many values, which nobody wants.
    Unwanted(usize),
}

impl<'a> Values<'a> {
    /// How many values there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(bits) | Self::Bf16(bits) => bits.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Zeros of the same dtype and number.
    #[must_use]
    pub fn zeros(&self) -> OwnedValues {
        match self {
            Self::F32(values) => OwnedValues::F32(zeros(values.len())),
            Self::F16(bits) => OwnedValues::F16(zeros(bits.len())),
            Self::Bf16(bits) => OwnedValues::Bf16(zeros(bits.len())),
        }
    }

    /// Row `index` as f32: the row itself, or widened (exactly) into `scratch`, which grows to a row's width.
    pub(crate) fn row<'b>(&self, index: usize, width: usize, scratch: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        self.rows(index..index + 1, width, scratch)
    }

    /// Some rows, as [`row`](Self::row).
    pub(crate) fn rows<'b>(&self, rows: Range<usize>, width: usize, scratch: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        let range = rows.start * width..rows.end * width;
        match *self {
            Self::F32(values) => &values[range],
            Self::F16(bits) => {
                scratch.resize(range.len(), 0.0);
                bits[range].reinterpret_cast::<f16>().convert_to_f32_slice(scratch);
                scratch
            }
            Self::Bf16(bits) => {
                scratch.resize(range.len(), 0.0);
                for (value, &half) in scratch.iter_mut().zip(&bits[range]) {
                    *value = f32::from_bits(u32::from(half) << 16);
                }
                scratch
            }
        }
    }
}

impl OwnedValues {
    /// The rows, each to be written by one thread.
    pub(super) fn rows_mut(&mut self, width: usize) -> Vec<RowMut<'_>> {
        match self {
            Self::F32(values) => values.chunks_mut(width).map(RowMut::F32).collect(),
            Self::F16(bits) => bits.chunks_mut(width).map(RowMut::F16).collect(),
            Self::Bf16(bits) => bits.chunks_mut(width).map(RowMut::Bf16).collect(),
        }
    }
}

impl RowMut<'_> {
    /// Lets `write` write the row in f32, in place or in `scratch`, then rounds it to nearest, ties to even. A row that is
    /// not wanted stays in `scratch`.
    pub(super) fn fill<T>(self, scratch: &mut Vec<f32>, write: impl FnOnce(&mut [f32]) -> T) -> T {
        match self {
            Self::F32(row) => write(row),
            Self::F16(bits) => {
                scratch.resize(bits.len(), 0.0);
                let result = write(scratch);
                bits.reinterpret_cast_mut::<f16>().convert_from_f32_slice(scratch);
                result
            }
            Self::Bf16(bits) => {
                scratch.resize(bits.len(), 0.0);
                let result = write(scratch);
                bits.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(scratch);
                result
            }
            Self::Unwanted(width) => {
                scratch.resize(width, 0.0);
                write(scratch)
            }
        }
    }
}
