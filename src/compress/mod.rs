//! The job: plan, read, decompose, write.

mod budget;
mod card;
mod checkpoint;
mod expand;
mod fit_store;
mod given;
mod journal;
mod parallel;
mod place;
mod queue;
mod report;

pub use budget::{BudgetMatrix, BudgetOptions, KEPT_SPECTRA, Keep, Planned, SpentBudget};
pub use checkpoint::{Fits, Options, compress_checkpoint, compress_journaled, planned_report, spend_budget};
pub use expand::expand_checkpoint;
pub use given::{Given, Origin, write_checkpoint};
pub use journal::Journal;
pub use parallel::{Task, Timed, decompose_each, decompose_many};
pub use place::{Calibration, Place};
pub use report::{CalibrationRecord, MatrixReport, Report, UNCALIBRATED_BUDGET};
