//! Plans: a configuration resolved against the tensors of a model, and budgets distributed over matrices.

mod budget;
mod compressed;
mod config;
mod resolve;

pub use budget::{Candidate, Choice, Target, Weighting, allocate};
pub use compressed::specs_of;
pub use config::{FORMAT_VERSION, TQConfig};
pub use resolve::{Input, Job, Model, Plan, Untouched};
