//! The specs that a compressed checkpoint was written with.

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::config::TQConfig;
use crate::spec::MatrixSpec;

/// The specs of the compressed matrices in the `quantization_config` of a `config.json`, by name; none if it has none.
///
/// # Errors
/// A message about a config of another method, or one that is no config of a compressed checkpoint.
pub fn specs_of(config: &Map<String, Value>) -> Result<IndexMap<String, MatrixSpec>, String> {
    match config.get("quantization_config") {
        None | Some(Value::Null) => Ok(IndexMap::new()),
        Some(value) => match value.get("quant_method").and_then(Value::as_str) {
            Some("tqcompressor") => {
                let config = TQConfig::from_json(&value.to_string()).map_err(|error| error.to_string())?;
                match config.specs.keys().find(|name| name.contains(['*', '?', '[', ']'])) {
                    Some(name) => Err(format!(
                        "quantization_config: a compressed checkpoint's names matrices, not patterns: {name:?}"
                    )),
                    None => Ok(config.specs),
                }
            }
            other => Err(format!("quantization_config: expected quant_method \"tqcompressor\", got {other:?}")),
        },
    }
}
