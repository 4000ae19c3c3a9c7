//! Losses of distillation with their gradients: cross-entropy, Kullback–Leibler divergence, and distances of hidden
//! states.
//!
//! A row is one token. Rows run in parallel, each on one thread, and their losses are added in f64 in row order.
//! Results therefore do not depend on the number of threads, nor on the instruction set. Each row takes two passes:
//! `kernels::measure` reads it from memory and leaves its exponentials in the cache, and `kernels::write_gradient`
//! reads them there.

mod distillation;
mod head;
mod hidden;
mod kernels;
mod labels;
mod logits;
mod objective;
mod parallel;
mod student;
#[cfg(test)]
mod tests;
mod tiles;
mod topk;

pub use distillation::{Batch, Part, distillation_loss, distillation_loss_of_part};
pub use head::{Head, HeadBatch, HeadGradients, head_loss};
pub use hidden::{HiddenBatch, HiddenDistance, hidden_state_loss};
pub use objective::{Direction, Objective};
pub use student::Student;
pub use topk::{TopKBatch, topk_distillation_loss};
