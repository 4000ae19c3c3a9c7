//! What was done, or would be done, to a checkpoint: the JSON that Python, the shell and `compression_report.json`
//! share.

use serde::Serialize;

use crate::plan::{Job, Plan, Untouched};
use crate::spec::MatrixSpec;

/// One matrix of a [`Report`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MatrixReport {
    /// Its name: "h.0.attn.c_attn.q".
    pub name: String,
    /// The stored name of its tensor.
    pub tensor: String,
    /// Its shape, in × out.
    pub shape: (usize, usize),
    /// What it becomes, with the keys that configurations use: "block", "rank" and "permute"; "rank"; or "terms".
    #[serde(flatten)]
    pub spec: MatrixSpec,
    /// Its parameters before.
    pub parameters_before: usize,
    /// Its parameters after.
    pub parameters_after: usize,
    /// `‖W − Ŵ‖² / ‖W‖²`, once it is known, of the `f32` factors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_energy: Option<f64>,
    /// Wall-clock seconds, once they are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// What was done to a checkpoint, or, from a plan, what would be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The version of this package.
    pub tqcompressor: &'static str,
    /// The version of the format.
    pub format_version: u64,
    /// The directory that was read, or its name on the hub; `None` for a model in memory.
    pub source: Option<String>,
    /// How long permutations are searched.
    pub effort: &'static str,
    /// The seed of the search.
    pub seed: u64,
    /// The dtype asked for; `None` keeps each tensor's own.
    pub dtype: Option<&'static str>,
    /// Whether lost energies are in the norm of a calibration, and not in the Frobenius norm.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub calibrated: bool,
    /// The compressed matrices, in model order.
    pub matrices: Vec<MatrixReport>,
    /// The tensors that stay as they are, in model order.
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
    /// What `plan` would do.
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
