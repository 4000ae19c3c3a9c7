//! GPT-2 checkpoints on disk: which tensor is what, reading without loading, writing all or nothing.
//!
//! * [`names`]: kinds, orientation, the fused `c_attn`, model order.
//! * [`header`]: the header of a safetensors file, validated.
//! * [`expected`]: the tensors that `config.json` promises.
//! * [`files`]: the files of a directory that hold it.
//! * [`read`]: a mapped checkpoint.
//! * [`write`]: safetensors files written tensor by tensor, in any order.
//! * [`staging`]: the hidden directory that becomes the destination in one step.

mod dtype;
pub mod expected;
pub mod files;
pub mod header;
mod layout;
pub mod names;
pub mod read;
pub mod staging;
pub mod write;

#[cfg(test)]
pub(crate) mod testing;
