//! The files of a checkpoint directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::foreign::foreign_json;
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

/// The name of the report of a compression, in the directory of its result.
pub const REPORT_FILE: &str = "compression_report.json";

/// The name of the model card of a checkpoint.
pub const CARD_FILE: &str = "README.md";

/// The name of the figure in the card of a compressed checkpoint.
pub const FIGURE_FILE: &str = "lost_energy.svg";

/// The name of the scores of a compressed checkpoint.
pub const EVALUATION_FILE: &str = "evaluation.json";

/// Other files of a checkpoint, as transformers and this package write them.
const KNOWN_FILES: [&str; 27] = [
    CARD_FILE,
    FIGURE_FILE,
    EVALUATION_FILE,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    REPORT_FILE,
    "config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "stage.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "training_args.bin",
    "training_report.json",
    "training_state.json",
    "vocab.json",
    "vocab.txt",
];

/// Files that the trainer of transformers, and ours, write beside those of a checkpoint.
const TRAINER_FILES: [&str; 6] =
    ["complete", "optimizer.pt", "rng_state.pth", "scaler.pt", "scheduler.pt", "trainer_state.json"];

/// A directory that this package writes, by what belongs in it.
#[derive(Clone, Copy)]
enum Place {
    /// A checkpoint, with the stages of a distillation.
    Checkpoint,
    /// The stages: `1-NAME`, `2-NAME`.
    Stages,
    /// One stage: the student before and after its training.
    Stage,
    /// The states of the trainer: `checkpoint-STEP`.
    States,
    /// One state of the trainer.
    State,
}

impl Place {
    /// What the directory `name` in this place is; none for a directory of someone else.
    fn directory(self, name: &str) -> Option<Self> {
        let numbered = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        match (self, name) {
            (Self::Checkpoint, "stages") => Some(Self::Stages),
            (Self::Stages, "final") | (Self::Stage, "compressed" | "trained") => Some(Self::Checkpoint),
            (Self::Stages, _) if name.split_once('-').is_some_and(|(number, _)| numbered(number)) => Some(Self::Stage),
            (Self::Stage, "checkpoints") => Some(Self::States),
            (Self::States, _) if name.strip_prefix("checkpoint-").is_some_and(numbered) => Some(Self::State),
            _ => None,
        }
    }

    /// Whether the file `name` belongs in this place.
    fn file(self, name: &str) -> bool {
        let checkpoint = matches!(self, Self::Checkpoint | Self::State);
        let state = matches!(self, Self::State) && (TRAINER_FILES.contains(&name) || name.starts_with("rng_state_"));
        state || checkpoint && (KNOWN_FILES.contains(&name) || is_model_file(name))
    }
}

/// Whether a file with this name belongs to a checkpoint: its tokenizer, its configuration, its weights.
#[must_use]
pub fn is_checkpoint_file(name: &str) -> bool {
    Place::Checkpoint.file(name)
}

/// Whether `name` is `model.safetensors`, `pytorch_model.bin`, one of their shards, or the index of these.
fn is_model_file(name: &str) -> bool {
    [("model", ".safetensors"), ("pytorch_model", ".bin")].iter().any(|(stem, extension)| {
        let rest = name.strip_prefix(stem).unwrap_or_default();
        let shard = rest.strip_suffix(extension).unwrap_or("?");
        let numbers = shard.strip_prefix('-').and_then(|numbers| numbers.split_once("-of-"));
        let digits = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        shard.is_empty()
            || numbers.is_some_and(|(number, count)| digits(number) && digits(count))
            || rest.strip_suffix(".index.json") == Some(extension)
    })
}

/// The first file or directory, in order of names and relative to `directory`, that belongs to no checkpoint and to no
/// distillation. Files that a compression copied from its source belong to it: its report names them.
///
/// # Errors
/// [`Error::Io`].
pub fn first_foreign(directory: &Path) -> Result<Option<PathBuf>> {
    Ok(foreign_in(directory, Place::Checkpoint)?.map(|path| path.strip_prefix(directory).unwrap_or(&path).to_owned()))
}

fn foreign_in(directory: &Path, place: Place) -> Result<Option<PathBuf>> {
    let entries = fs::read_dir(directory).map_err(Error::io(directory))?;
    let mut paths = entries.map(|entry| Ok(entry.map_err(Error::io(directory))?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort_unstable();
    // A file that is no report lists nothing.
    let report = read_object_if_any(&directory.join(REPORT_FILE)).ok().flatten().unwrap_or_default();
    let modules = if matches!(place, Place::Checkpoint) { module_folders(directory)? } else { Vec::new() };
    let carried = report.get("carried").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    for path in paths {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return Ok(Some(path)) };
        // A killed run leaves `.NAME.partial` and `.NAME.lock`.
        let left = |end| name.strip_prefix('.').and_then(|rest| rest.strip_suffix(end));
        let name = left(".partial").or_else(|| left(".lock")).unwrap_or(name);
        let foreign = if path.is_dir() {
            match place.directory(name) {
                Some(inside) => foreign_in(&path, inside)?,
                None if modules.iter().any(|module| module == name) => first_folder(&path)?,
                None => Some(path),
            }
        } else {
            let known = place.file(name) || place.directory(name).is_some() || carried.iter().any(|file| file == name);
            (!known).then_some(path)
        };
        if foreign.is_some() {
            return Ok(foreign);
        }
    }
    Ok(None)
}

/// A folder within another.
fn first_folder(directory: &Path) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
        let path = entry.map_err(Error::io(directory))?.path();
        if path.is_dir() {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// The folders beside the weights that belong to the checkpoint: those that the `modules.json` of sentence-transformers
/// names, such as `1_Pooling`. A file that is no such list names none.
///
/// # Errors
/// [`Error::Io`].
pub fn module_folders(directory: &Path) -> Result<Vec<String>> {
    let path = directory.join("modules.json");
    let text = match fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::io(path))?,
    };
    let modules: Vec<Map<String, Value>> = serde_json::from_slice(&text).unwrap_or_default();
    let mut names: Vec<String> = modules
        .iter()
        .filter_map(|module| module.get("path").and_then(Value::as_str))
        // A name of one component, which cannot lead out of the directory.
        .filter(|name| Path::new(name).file_name().is_some_and(|last| last == *name) && directory.join(name).is_dir())
        .map(str::to_owned)
        .collect();
    names.sort_unstable();
    names.dedup();
    Ok(names)
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
    if let Some(words) = foreign_json(&text) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weights_of_a_checkpoint_are_told_from_other_files() {
        for name in [
            "model.safetensors",
            "model-00001-of-00012.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model-1-of-2.bin",
            "pytorch_model.bin.index.json",
        ] {
            assert!(is_model_file(name), "{name}");
        }
        for name in
            ["", "model", "my_model.safetensors", "model-a-of-b.safetensors", "model.bin", "model.py", "data.bin"]
        {
            assert!(!is_model_file(name), "{name}");
        }
    }

    #[test]
    fn the_first_foreign_entry_is_found_wherever_it_is() {
        let root = tempfile::tempdir().unwrap();
        let ours = [
            "config.json",
            "model-00001-of-00002.safetensors",
            "stages/1-one-shot/compressed/stage.json",
            "stages/1-one-shot/.trained.partial/model.safetensors",
            "stages/1-one-shot/.trained.lock",
            "stages/1-one-shot/checkpoints/checkpoint-20/optimizer.pt",
            "stages/final/tokenizer.json",
            ".training_state.json.partial",
            "licence.txt",
            "1_Pooling/config.json",
            "2_Dense/model.safetensors",
        ];
        let write = |name: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        ours.iter().for_each(|name| write(name));
        fs::write(root.path().join(REPORT_FILE), r#"{"carried": ["licence.txt"]}"#).unwrap();
        // Paths that lead elsewhere name no folder of the checkpoint.
        let modules =
            r#"[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "a/b"}, {"path": ".."}, {}]"#;
        fs::write(root.path().join("modules.json"), modules).unwrap();
        assert_eq!(module_folders(root.path()).unwrap(), ["1_Pooling", "2_Dense"]);
        assert_eq!(first_foreign(root.path()).unwrap(), None);
        for name in [
            "1_Pooling/notes/thesis.tex",
            "3_Other/config.json",
            ".git/HEAD",
            ".env",
            "a folder/config.json",
            "data.safetensors",
            "stages/1-one-shot/notes.txt",
            "stages/1-one-shot/checkpoints/runs/events",
            "stages/1-one-shot/trained/figure.png",
            "stages/thesis.tex",
            "thesis.tex",
        ] {
            write(name);
            let found = first_foreign(root.path()).unwrap().unwrap();
            assert!(Path::new(name).starts_with(&found), "{name}: {}", found.display());
            fs::remove_file(root.path().join(name)).unwrap();
            // The folder by itself is foreign, too, unless it is one of ours.
            let folder = Path::new(name).parent().unwrap();
            if fs::remove_dir(root.path().join(folder)).is_err() {
                assert_eq!(first_foreign(root.path()).unwrap(), None, "{name}");
            }
        }
    }
}
