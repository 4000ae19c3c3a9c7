//! Losses of distillation with their gradients: cross-entropy, Kullback–Leibler divergence, and distances of hidden states.
//!
//! A row is one token. Rows are worked on in parallel, each by one thread and always in the same way, and their losses are
//! added in f64 in row order: results do not depend on the number of threads, nor on the instruction set. A row is worked
//! on twice: `kernels::measure` reads it from memory and leaves its exponentials in the cache, where
//! `kernels::write_gradient` finds them.

mod distillation;
mod head;
mod hidden;
mod kernels;
mod labels;
mod logits;
mod objective;
mod parallel;
#[cfg(test)]
mod tests;
mod tiles;
mod topk;

pub use distillation::{Batch, Chunk, distillation_loss, distillation_loss_in_place};
pub use head::{Head, HeadBatch, HeadGradients, head_loss};
pub use hidden::{HiddenBatch, HiddenDistance, hidden_state_loss};
pub use objective::{Direction, Objective};
pub use topk::{TopKBatch, topk_distillation_loss};
