//! The job: plan, read, decompose, write.

mod budget;
mod card;
mod checkpoint;
mod parallel;
mod place;
mod queue;
mod report;

pub use budget::{Planned, choose_specs, choose_specs_of_checkpoint};
pub use checkpoint::{Options, compress_checkpoint, plan_checkpoint};
pub use parallel::{Task, Timed, decompose_each, decompose_many};
pub use place::{Calibration, Place};
pub use report::{MatrixPosition, MatrixReport, Report};
