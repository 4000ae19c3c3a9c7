//! Rows of values whose dtype is known at run time: read as f32, and written from f32.

use std::ops::Range;

use half::vec::HalfBitsVecExt as _;
use half::{bf16, f16};

use super::float::{Element, Float};
use super::memory::{prefer_huge_pages, zeros};

/// Borrowed row-major values.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// float32
    F32(&'a [f32]),
    /// float16
    F16(&'a [f16]),
    /// bfloat16
    Bf16(&'a [bf16]),
}

/// Row-major values.
#[derive(Clone, Debug, PartialEq)]
pub enum OwnedValues {
    /// float32
    F32(Vec<f32>),
    /// float16
    F16(Vec<f16>),
    /// bfloat16
    Bf16(Vec<bf16>),
}

/// Values to be written.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// float32
    F32(&'a mut [f32]),
    /// float16
    F16(&'a mut [f16]),
    /// bfloat16
    Bf16(&'a mut [bf16]),
}

impl<'a> Values<'a> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are no values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The dtype.
    #[must_use]
    pub fn float(&self) -> Float {
        match self {
            Self::F32(_) => Float::F32,
            Self::F16(_) => Float::F16,
            Self::Bf16(_) => Float::Bf16,
        }
    }

    /// The values as f32: themselves, or a copy in `scratch`, which grows to their number.
    pub(crate) fn as_f32<'b>(self, scratch: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        match self {
            Self::F32(values) => values,
            Self::F16(values) => Element::as_f32(values, scratch),
            Self::Bf16(values) => Element::as_f32(values, scratch),
        }
    }

    /// Writes the values as f32, exactly. Both have one length.
    pub(crate) fn upcast(self, out: &mut [f32]) {
        match self {
            Self::F32(values) => Element::upcast(values, out),
            Self::F16(values) => Element::upcast(values, out),
            Self::Bf16(values) => Element::upcast(values, out),
        }
    }

    /// The rows of `width` values.
    pub(crate) fn split(self, width: usize) -> Vec<Self> {
        match self {
            Self::F32(values) => values.chunks(width).map(Self::F32).collect(),
            Self::F16(values) => values.chunks(width).map(Self::F16).collect(),
            Self::Bf16(values) => values.chunks(width).map(Self::Bf16).collect(),
        }
    }

    /// Row `index` as f32: the row itself, or a copy in `scratch`, which grows to the width of a row.
    pub(crate) fn row<'b>(&self, index: usize, width: usize, scratch: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        self.slice(index * width..(index + 1) * width).as_f32(scratch)
    }

    /// Consecutive values.
    pub(crate) fn slice(&self, range: Range<usize>) -> Self {
        match *self {
            Self::F32(values) => Self::F32(&values[range]),
            Self::F16(values) => Self::F16(&values[range]),
            Self::Bf16(values) => Self::Bf16(&values[range]),
        }
    }
}

impl OwnedValues {
    /// Zeros of a dtype.
    #[must_use]
    pub fn zeros(float: Float, length: usize) -> Self {
        // Zeros of integers, which come as untouched pages from the allocator; zeros of halves would be written.
        match float {
            Float::F32 => Self::F32(zeros(length)),
            Float::F16 => Self::F16(zeros::<u16>(length).reinterpret_into()),
            Float::Bf16 => Self::Bf16(zeros::<u16>(length).reinterpret_into()),
        }
    }

    /// The values in a dtype. Halves are rounded to nearest, ties to even; what is too large for them becomes an infinity.
    #[must_use]
    pub fn rounded(float: Float, values: Vec<f32>) -> Self {
        fn halves<E: Element>(values: &[f32]) -> Vec<E> {
            let mut halves = vec![E::default(); values.len()];
            E::downcast(values, &mut halves);
            halves
        }
        match float {
            Float::F32 => Self::F32(values),
            Float::F16 => Self::F16(halves(&values)),
            Float::Bf16 => Self::Bf16(halves(&values)),
        }
    }

    /// Writes `values` from place `at` on. Halves are rounded to nearest, ties to even.
    ///
    /// # Errors
    /// The first finite value that this dtype can only hold as an infinity.
    pub(crate) fn write(&mut self, at: usize, values: &[f32]) -> Result<(), f32> {
        fn downcast<E: Element>(place: &mut [E], values: &[f32], is_infinite: impl Fn(E) -> bool) -> Result<(), f32> {
            E::downcast(values, place);
            let overflows = |(half, value): &(&E, &f32)| is_infinite(**half) && value.is_finite();
            place.iter().zip(values).find(overflows).map_or(Ok(()), |(_, value)| Err(*value))
        }
        let range = at..at + values.len();
        match self {
            Self::F32(place) => place[range].copy_from_slice(values),
            Self::F16(place) => downcast(&mut place[range], values, f16::is_infinite)?,
            Self::Bf16(place) => downcast(&mut place[range], values, bf16::is_infinite)?,
        }
        Ok(())
    }
}

impl<'a> ValuesMut<'a> {
    /// The values, to be read.
    #[must_use]
    pub fn values(&self) -> Values<'_> {
        match self {
            Self::F32(values) => Values::F32(values),
            Self::F16(values) => Values::F16(values),
            Self::Bf16(values) => Values::Bf16(values),
        }
    }

    /// The rows of `width` values, to be written by different threads.
    pub(crate) fn split(self, width: usize) -> Vec<Self> {
        match self {
            Self::F32(values) => values.chunks_mut(width).map(Self::F32).collect(),
            Self::F16(values) => values.chunks_mut(width).map(Self::F16).collect(),
            Self::Bf16(values) => values.chunks_mut(width).map(Self::Bf16).collect(),
        }
    }

    /// Writes zeros.
    pub(crate) fn clear(self) {
        match self {
            Self::F32(values) => values.fill(0.0),
            Self::F16(values) => values.fill(f16::ZERO),
            Self::Bf16(values) => values.fill(bf16::ZERO),
        }
    }

    /// Asks for huge pages where that helps, as `memory::zeros` does.
    pub(crate) fn prefer_huge_pages(&mut self) {
        match self {
            Self::F32(values) => prefer_huge_pages(values),
            Self::F16(values) => prefer_huge_pages(values),
            Self::Bf16(values) => prefer_huge_pages(values),
        }
    }

    /// Writes values. Halves are rounded to nearest, ties to even.
    pub(crate) fn assign(&mut self, values: &[f32]) {
        match self {
            Self::F32(place) => place.copy_from_slice(values),
            Self::F16(place) => Element::downcast(values, place),
            Self::Bf16(place) => Element::downcast(values, place),
        }
    }

    /// Calls `write` with a buffer of f32, in place or in `scratch`; see [`assign`](Self::assign) for halves.
    pub(crate) fn fill<T>(mut self, scratch: &mut Vec<f32>, write: impl FnOnce(&mut [f32]) -> T) -> T {
        if let Self::F32(values) = self {
            return write(values);
        }
        scratch.resize(self.values().len(), 0.0);
        let result = write(scratch);
        self.assign(scratch);
        result
    }
}
