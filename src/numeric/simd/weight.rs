//! What dot products read.

use super::level::dispatched;
use crate::numeric::float::{Element, Float};

/// Accumulators per loop: one AVX-512 register of `f32`, two AVX2, four SSE2 or NEON.
pub const LANES: usize = 16;

/// A weight that dot products read as f32.
pub trait Weight: Copy + Default + Send + Sync + 'static {
    /// Its dtype; `None` for an eight-bit integer.
    const FLOAT: Option<Float>;

    /// The values as f32: the slice itself, or a copy in `scratch`.
    fn widened<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32];
}

impl<T: Element> Weight for T {
    const FLOAT: Option<Float> = Some(T::FLOAT);

    fn widened<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        T::as_f32(values, scratch)
    }
}

impl Weight for i8 {
    const FLOAT: Option<Float> = None;

    fn widened<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(values.len(), 0.0);
        widen(values, scratch);
        scratch
    }
}

dispatched! {
    fn widen(values: &[i8], out: &mut [f32]) {
        out.iter_mut().zip(values).for_each(|(out, &value)| *out = f32::from(value));
    }
}
