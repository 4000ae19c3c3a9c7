//! What all numeric code shares: dtypes, large buffers, instruction sets, exponentials, a temporary file.
//!
//! * [`float`]: f32, f16 and bf16, and conversion between them.
//! * [`values`]: rows of values whose dtype is known at run time.
//! * [`memory`]: large buffers.
//! * `range`: scaling by powers of two.
//! * [`simd`]: kernels compiled for several instruction sets.
//! * [`int8`]: eight-bit integers with scales.
//! * [`int16`]: vectors of 16-bit integers with scales.
//! * `integer`: rounding to integers.
//! * `exponential`: powers of two.
//! * `spill`: numbers in a temporary file.

pub(crate) mod exponential;
pub mod float;
pub mod int16;
pub mod int8;
mod integer;
pub mod memory;
pub(crate) mod range;
pub mod simd;
pub(crate) mod spill;
pub mod values;

pub use float::{Element, Float};
pub use values::{OwnedValues, Values, ValuesMut};
