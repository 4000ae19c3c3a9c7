//! The report of a compression or of a plan: the JSON shared by Python, the command line and `compression_report.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::plan::{Job, Plan, Untouched};
use crate::spec::{MatrixSpec, Usage};

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
    /// Its MACs for one token before, where its usage is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub macs_before: Option<usize>,
    /// Its MACs for one token after, where its usage is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub macs_after: Option<usize>,
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
    /// What the caller states of the run, such as its budget.
    #[serde(flatten)]
    pub facts: Map<String, Value>,
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
            facts: Map::new(),
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
    /// Adds its MACs for one token, in this operation.
    pub(super) fn count_macs(&mut self, usage: Usage) {
        let (m, n) = self.shape;
        self.macs_before = Some(usage.dense_macs(m, n));
        self.macs_after = self.spec.macs(m, n, usage).ok();
    }

    fn planned(job: &Job) -> Self {
        let Job { matrix, spec, parameters } = job;
        Self {
            name: matrix.name.clone(),
            tensor: matrix.tensor.clone(),
            shape: (matrix.rows, matrix.columns),
            spec: spec.clone(),
            parameters_before: matrix.parameters(),
            parameters_after: *parameters,
            macs_before: None,
            macs_after: None,
            lost_energy: None,
            seconds: None,
        }
    }
}

/// The source's name in a report and a card: its hub id if it is in the hub's cache, otherwise that of its folder. A
/// path would tell the readers of a published model of its maker's machine.
#[must_use]
pub fn source_name(source: &Path) -> String {
    let absolute = std::path::absolute(source).unwrap_or_else(|_| source.to_owned());
    hub_id(&absolute).unwrap_or_else(|| {
        absolute.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
    })
}

/// The hub id of a model in huggingface_hub's cache: `models--ORG--NAME/snapshots/REVISION`.
#[must_use]
pub fn hub_id(source: &Path) -> Option<String> {
    let snapshots = source.parent()?;
    let id = snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?;
    (snapshots.file_name()? == "snapshots").then(|| id.replace("--", "/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_cache_path_gives_the_hubs_name() {
        let path = Path::new("/cache/hub/models--openai-community--gpt2/snapshots/607a30d");
        assert_eq!(hub_id(path).unwrap(), "openai-community/gpt2");
        assert_eq!(source_name(path), "openai-community/gpt2");
        assert_eq!(hub_id(Path::new("/models--a--b/other/c")), None);
        assert_eq!(hub_id(Path::new("gpt2")), None);
        assert_eq!(source_name(Path::new("/home/me/gpt2")), "gpt2");
    }
}
