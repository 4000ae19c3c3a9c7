//! The job: plan, read, decompose, write.

mod budget;
mod checkpoint;
mod expand;
mod fit_store;
mod given;
mod journal;
mod parallel;
mod place;
mod queue;
mod report;
mod spectrum_store;
mod tensors;

pub use budget::{BudgetMatrix, BudgetOptions, Keep, Planned, SpentBudget, least_parameters};
pub use checkpoint::{Fits, Options, Written, compress_checkpoint, compress_journaled, planned_report, spend_budget};
pub use expand::expand_checkpoint;
pub use given::{Given, Origin, write_checkpoint};
pub use journal::Journal;
pub use parallel::{Task, Timed, decompose_each, decompose_many};
pub use place::{Calibration, Place};
pub use report::{CalibrationRecord, MatrixReport, Report, UNCALIBRATED_BUDGET, hub_id, source_name};
pub use spectrum_store::{KEPT_SPECTRA, SpectrumStore};
