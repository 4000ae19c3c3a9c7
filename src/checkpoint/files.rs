//! The files of a checkpoint directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::foreign::foreign_text;
use super::header;
use crate::error::{Error, Result};
use crate::family::Family;

/// The name of the weights' file when there is only one.
pub const SINGLE_FILE: &str = "model.safetensors";

/// The name of the file that says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Extensions of files that hold weights or pickles, in whatever framework.
pub const WEIGHT_EXTENSIONS: [&str; 14] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "pkl",
    "pickle",
    "h5",
    "msgpack",
    "ot",
    "gguf",
    "onnx",
    "tflite",
    "npz",
];

/// Whether a file holds weights or pickles, by its extension.
#[must_use]
pub fn is_weight_file(name: &str) -> bool {
    let extension = Path::new(name).extension();
    extension.is_some_and(|found| WEIGHT_EXTENSIONS.iter().any(|known| found.eq_ignore_ascii_case(known)))
}

pub(super) fn problem(path: &Path, problem: impl Into<String>) -> Error {
    Error::Checkpoint { path: path.to_owned(), problem: problem.into() }
}

/// Reads a file that must hold one JSON object.
pub(super) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(problem(path, "no such file")),
        other => other.map_err(Error::io(path))?,
    };
    if let Some(words) = foreign_text(&text) {
        return Err(problem(path, words));
    }
    serde_json::from_slice(&text).map_err(|error| problem(path, format!("expected a JSON object: {error}")))
}

/// The object in a file that must hold one, if there is such a file.
///
/// # Errors
/// [`Error::Checkpoint`] if it holds anything else; [`Error::Io`].
pub fn read_object_if_any(path: &Path) -> Result<Option<Map<String, Value>>> {
    if path.exists() { read_object(path).map(Some) } else { Ok(None) }
}

/// The files of a checkpoint and its `config.json`.
pub(super) fn begin(directory: &Path) -> Result<(WeightFiles, Map<String, Value>)> {
    match fs::metadata(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(problem(directory, "no such directory"));
        }
        Err(error) => return Err(Error::io(directory)(error)),
        Ok(metadata) if !metadata.is_dir() => {
            return Err(problem(directory, "expected a directory with config.json and model.safetensors, got a file"));
        }
        Ok(_) => {}
    }
    Ok((weight_files(directory)?, read_object(&directory.join("config.json"))?))
}

/// The weight files and, for shards, the tensors that the index puts in them.
pub(super) type WeightFiles = Vec<(PathBuf, Option<Vec<String>>)>;

fn weight_files(directory: &Path) -> Result<WeightFiles> {
    let single = directory.join(SINGLE_FILE);
    if single.exists() {
        return Ok(vec![(single, None)]);
    }
    let index = directory.join(INDEX_FILE);
    if !index.exists() {
        return Err(problem(directory, no_weights(directory)?));
    }
    let object = read_object(&index)?;
    let weight_map = object.get("weight_map").and_then(Value::as_object).filter(|map| !map.is_empty());
    let weight_map = weight_map.ok_or_else(|| problem(&index, "expected a \"weight_map\" from tensors to shards"))?;
    let mut shards: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        // A shard is a file beside the index; anything else could reach outside the checkpoint.
        let shard = shard.as_str().filter(|shard| Path::new(shard).file_name().is_some_and(|name| name == *shard));
        let shard = shard.ok_or_else(|| problem(&index, format!("tensor '{tensor}': its shard is not a file name")))?;
        shards.entry(shard).or_default().push(tensor.clone());
    }
    shards
        .into_iter()
        .map(|(shard, tensors)| {
            let path = directory.join(shard);
            if path.exists() {
                return Ok((path, Some(tensors)));
            }
            let first = tensors.first().map_or("", String::as_str);
            Err(problem(&path, format!("this shard is missing; the index puts tensor '{first}' in it")))
        })
        .collect()
}

/// Compares a shard's tensors with those that the index puts in it. Tensors that are ignored may be on either side alone.
pub(super) fn check_shard(family: &Family, indexed: &[String], entries: &[header::Entry]) -> Result<(), String> {
    let used = |name: &&str| !family.is_ignored(name);
    let indexed: std::collections::BTreeSet<_> = indexed.iter().map(String::as_str).filter(used).collect();
    let found: std::collections::BTreeSet<_> = entries.iter().map(|entry| entry.name.as_str()).filter(used).collect();
    if let Some(name) = indexed.difference(&found).next() {
        return Err(format!("tensor '{name}' is missing; the index puts it here"));
    }
    match found.difference(&indexed).next() {
        Some(name) => Err(format!("tensor '{name}' is here, but the index does not say so")),
        None => Ok(()),
    }
}

/// The error message for a directory without readable weights.
fn no_weights(directory: &Path) -> Result<String> {
    let expected = format!("expected {SINGLE_FILE} or {INDEX_FILE}");
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
        names.push(entry.map_err(Error::io(directory))?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    match names.iter().find(|name| is_weight_file(name)) {
        None => Ok(format!("{expected}, found no weights")),
        Some(name) if name.ends_with(".safetensors") => Ok(format!("{expected}, found only {name}")),
        Some(name) => Ok(format!(
            "only safetensors is read, found {name}. Convert it with \
             transformers.AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(NEW)"
        )),
    }
}
