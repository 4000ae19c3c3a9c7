//! What a `config.json` says of the size and the head of a model of any family.

use serde_json::{Map, Value};

/// The sizes of a model, as far as its `config.json` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The prefix and the number of layers of each stack.
    pub layers: Vec<(String, Option<usize>)>,
    /// Rows of the token embedding.
    pub vocabulary: Option<usize>,
    /// Columns of the token embedding.
    pub width: Option<usize>,
    /// Whether the output head is the token embedding: `tie_word_embeddings`.
    pub tied: bool,
    /// Whether `architectures` names a model with an output head.
    pub head: bool,
}

/// A key's value; null is as good as absent.
pub(crate) fn given<'a>(config: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    config.get(key).filter(|value| !value.is_null())
}

/// A positive integer of a config; null is as good as absent.
///
/// # Errors
/// A message that names the key with a value of the wrong type.
pub(crate) fn optional_number(config: &Map<String, Value>, key: &str) -> Result<Option<usize>, String> {
    match given(config, key) {
        None => Ok(None),
        Some(value) => value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .filter(|&number| number > 0)
            .map(Some)
            .ok_or_else(|| format!("{key}: expected a positive integer, got {value}")),
    }
}

/// A boolean of a config; null is as good as absent.
///
/// # Errors
/// A message that names the key with a value of the wrong type.
pub(crate) fn optional_flag(config: &Map<String, Value>, key: &str) -> Result<Option<bool>, String> {
    match given(config, key) {
        None => Ok(None),
        Some(value) => value.as_bool().map(Some).ok_or_else(|| format!("{key}: expected true or false, got {value}")),
    }
}
