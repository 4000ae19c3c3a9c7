//! The student's values, and the place of the gradient by them.

use crate::error::{Error, Result};
use crate::numeric::{Values, ValuesMut};

/// The student's values, and where the gradient by them is written.
#[derive(Debug)]
pub enum Student<'a> {
    /// Nowhere: only the loss is wanted.
    Read(Values<'a>),
    /// To other memory of the same dtype and length, whatever it holds before.
    Apart(Values<'a>, ValuesMut<'a>),
    /// Over the values. They are undefined after an error.
    Overwritten(ValuesMut<'a>),
}

impl<'a> Student<'a> {
    /// The values.
    #[must_use]
    pub fn values(&self) -> Values<'_> {
        match self {
            Self::Read(values) | Self::Apart(values, _) => *values,
            Self::Overwritten(values) => values.values(),
        }
    }

    /// Whether a gradient is wanted.
    #[must_use]
    pub fn wants_gradient(&self) -> bool {
        !matches!(self, Self::Read(_))
    }

    /// Checks that the gradient's place is like the values.
    pub(super) fn check(&self) -> Result<()> {
        let Self::Apart(values, out) = self else { return Ok(()) };
        let out = out.values();
        if values.float() != out.float() {
            return Err(Error::Dtype { expected: values.float().name().into(), got: out.float().name().into() });
        }
        if values.len() != out.len() {
            let expected = format!("the student's {} values", values.len());
            return Err(Error::Shape { operation: "out", expected, got: out.len().to_string() });
        }
        Ok(())
    }

    /// The rows of `width` values, for different threads.
    pub(super) fn split(self, width: usize) -> Vec<Self> {
        match self {
            Self::Read(values) => values.split(width).into_iter().map(Self::Read).collect(),
            Self::Apart(values, mut out) => {
                // A page fault for every small page of fresh memory would take longer than the loss.
                out.prefer_huge_pages();
                values.split(width).into_iter().zip(out.split(width)).map(|(row, out)| Self::Apart(row, out)).collect()
            }
            Self::Overwritten(values) => values.split(width).into_iter().map(Self::Overwritten).collect(),
        }
    }

    /// Writes a gradient of zeros.
    pub(super) fn clear_gradient(self) {
        match self {
            Self::Read(_) => {}
            Self::Apart(_, out) | Self::Overwritten(out) => out.clear(),
        }
    }

    /// Calls `work` with the values, and with a buffer of f32 as long as they are, which becomes the gradient.
    ///
    /// The buffer is the gradient's place itself where `work` may write there while it reads. Without a gradient it is
    /// scratch.
    pub(super) fn work<T>(
        self,
        [student, gradient]: &mut [Vec<f32>; 2],
        work: impl FnOnce(&[f32], &mut [f32]) -> Result<T>,
    ) -> Result<T> {
        match self {
            Self::Read(values) => {
                gradient.resize(values.len(), 0.0);
                work(values.as_f32(student), gradient)
            }
            Self::Apart(values, out) => out.fill(gradient, |out| work(values.as_f32(student), out)),
            Self::Overwritten(mut place) => {
                gradient.resize(place.values().len(), 0.0);
                let result = work(place.values().as_f32(student), gradient)?;
                place.assign(gradient);
                Ok(result)
            }
        }
    }
}
