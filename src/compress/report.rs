//! The report of a compression or of a plan: the JSON shared by Python, the command line and `compression_report.json`.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::plan::{Job, Plan, Untouched};
use crate::spec::MatrixSpec;

/// What the command line, the report and the card say of a budget that was spent in the Frobenius norm.
pub const UNCALIBRATED_BUDGET: &str = "This budget is spent without a calibration: the model will be far worse than a \
    calibrated one of the same size. To calibrate, run `tqcompressor calibrate MODEL --text FILE --out \
    calibration.safetensors`, and give that file to --calibration (in Python: calibration=).";

/// What the moments of a calibration were measured on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CalibrationRecord {
    /// How many tokens were read.
    pub tokens: u64,
    /// The seed that drew them from the texts.
    pub seed: u64,
    /// Whether gradients were measured, too.
    pub sensitivity: bool,
    /// The names of the texts, each with its tokens; empty where unknown.
    pub texts: BTreeMap<String, u64>,
}

/// One matrix of a [`Report`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MatrixReport {
    /// Its name: "h.0.attn.c_attn.q".
    pub name: String,
    /// The stored name of its tensor.
    pub tensor: String,
    /// Its shape, in × out.
    pub shape: (usize, usize),
    /// Its spec, with the keys of a configuration: "block", "rank" and "permute"; "rank"; or "terms".
    #[serde(flatten)]
    pub spec: MatrixSpec,
    /// Its parameters before.
    pub parameters_before: usize,
    /// Its parameters after.
    pub parameters_after: usize,
    /// `‖W − Ŵ‖² / ‖W‖²` of the `f32` factors, once it is computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_energy: Option<f64>,
    /// Wall-clock seconds, once they are measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// The report of a compression or, before it, of a plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The version of this package.
    pub tqcompressor: &'static str,
    /// The version of the format.
    pub format_version: u64,
    /// The name of the source directory, or its hub id; `None` for a model in memory.
    pub source: Option<String>,
    /// The effort of the permutation search.
    pub effort: &'static str,
    /// The seed of the search.
    pub seed: u64,
    /// The requested dtype; `None` keeps each tensor's own.
    pub dtype: Option<&'static str>,
    /// Whether lost energies are in the norm of a calibration instead of the Frobenius norm.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub calibrated: bool,
    /// That calibration, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationRecord>,
    /// What a reader must know of the result: [`UNCALIBRATED_BUDGET`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<&'static str>,
    /// The files copied from the source, beside the weights and the configuration.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub carried: Vec<String>,
    /// The compressed matrices, in model order.
    pub matrices: Vec<MatrixReport>,
    /// The tensors that are not compressed, in model order.
    pub untouched: Vec<Untouched>,
    /// Parameters before.
    pub parameters_before: usize,
    /// Parameters after.
    pub parameters_after: usize,
    /// Size of the weight files before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_before: Option<u64>,
    /// Size of the weight files after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_after: Option<u64>,
    /// Wall-clock seconds of the whole job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

impl Report {
    /// The report of `plan`.
    #[must_use]
    pub fn planned(plan: &Plan) -> Self {
        Self {
            tqcompressor: env!("CARGO_PKG_VERSION"),
            format_version: plan.config.format_version(),
            source: None,
            effort: plan.config.effort.name(),
            seed: plan.config.seed,
            dtype: None,
            calibrated: false,
            calibration: None,
            note: None,
            carried: Vec::new(),
            matrices: plan.jobs.iter().map(MatrixReport::planned).collect(),
            untouched: plan.untouched.clone(),
            parameters_before: plan.parameters_before,
            parameters_after: plan.parameters_after,
            bytes_before: None,
            bytes_after: None,
            seconds: None,
        }
    }

    /// Its JSON, on one line or indented.
    ///
    /// # Panics
    /// Never: every field is plain data.
    #[must_use]
    pub fn to_json(&self, indented: bool) -> String {
        let json = if indented { serde_json::to_string_pretty(self) } else { serde_json::to_string(self) };
        json.expect("a report is plain JSON")
    }
}

impl MatrixReport {
    fn planned(job: &Job) -> Self {
        let Job { matrix, spec, parameters } = job;
        Self {
            name: matrix.name.clone(),
            tensor: matrix.tensor.clone(),
            shape: (matrix.rows, matrix.columns),
            spec: spec.clone(),
            parameters_before: matrix.parameters(),
            parameters_after: *parameters,
            lost_energy: None,
            seconds: None,
        }
    }
}
