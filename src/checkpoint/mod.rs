//! Checkpoints on disk: reading without loading, writing all or nothing.
//!
//! * [`float`]: the floating dtypes, and conversion to and from `f32`.
//! * [`header`]: the header of a safetensors file, validated.
//! * [`files`]: the files of a directory that hold it.
//! * [`read`]: a mapped checkpoint.
//! * [`write`]: safetensors files written tensor by tensor, in any order.
//! * [`stage`]: the hidden directory that becomes the destination in one step.

pub mod files;
pub mod float;
pub mod header;
pub mod read;
pub mod stage;
pub mod write;

#[cfg(test)]
pub(crate) mod testing;
