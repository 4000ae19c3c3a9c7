//! Checkpoints on disk: reading without loading, writing all or nothing.
//!
//! * [`header`]: the header of a safetensors file, validated.
//! * [`files`]: the files of a directory that hold it.
//! * `foreign`: files that are not what their names say.
//! * [`read`]: a mapped checkpoint.
//! * [`write`]: safetensors files written tensor by tensor, in any order.
//! * [`staging`]: the hidden directory that becomes the destination in one step.

mod dtype;
pub mod files;
pub(crate) mod foreign;
pub mod header;
mod layout;
pub mod read;
pub mod staging;
pub mod write;

#[cfg(test)]
pub(crate) mod testing;
