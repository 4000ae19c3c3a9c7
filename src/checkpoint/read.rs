//! A GPT-2 checkpoint, mapped: opened and validated without reading a single weight.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::expected::Geometry;
use super::float::{Float, Layout, read_matrix};
use super::header;
use super::names::{self, Kind, Matrix};
use crate::error::{Error, Result};

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

/// Whether a file's name says that it holds weights or pickles.
#[must_use]
pub fn is_weight_file(name: &str) -> bool {
    let extension = Path::new(name).extension();
    extension.is_some_and(|found| WEIGHT_EXTENSIONS.iter().any(|known| found.eq_ignore_ascii_case(known)))
}

/// One stored tensor.
#[derive(Clone, Debug)]
pub struct Tensor {
    file: usize,
    range: std::ops::Range<usize>,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape as stored.
    pub shape: Vec<usize>,
}

impl Tensor {
    /// Its number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its number of parameters: its elements if they are floating, else none.
    #[must_use]
    pub fn parameters(&self) -> usize {
        use Dtype::{BF16, F8_E4M3, F8_E5M2, F16, F32, F64};
        if matches!(self.dtype, F64 | F32 | F16 | BF16 | F8_E4M3 | F8_E5M2) { self.elements() } else { 0 }
    }
}

/// An open checkpoint. Weights are mapped: pages come in when they are read, and [`release`](Self::release) lets them go.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    config: Map<String, Value>,
    geometry: Geometry,
    files: Vec<(PathBuf, Mmap)>,
    tensors: IndexMap<String, Tensor>,
}

impl Checkpoint {
    /// Opens the directory `directory`, a dense checkpoint: `config.json` and either `model.safetensors` or shards with
    /// their index.
    ///
    /// Every header is validated, and every tensor that `config.json` promises is there in the promised shape. Causal
    /// masks that old versions of transformers stored are left out. Weights are not looked at.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the file and what is wrong with it; [`Error::Io`] if it cannot be opened.
    pub fn open(directory: &Path) -> Result<Self> {
        let (paths, config) = begin(directory)?;
        let config_path = directory.join("config.json");
        check_dense(&config).map_err(|words| problem(&config_path, words))?;
        let checkpoint = Self::map(directory, paths, config)?;
        let tensors = checkpoint.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.shape.as_slice()));
        checkpoint.geometry.check(tensors).map_err(|words| problem(directory, words))?;
        Ok(checkpoint)
    }

    /// Opens a checkpoint that may be compressed. Headers are validated, but it is the caller's to compare the tensors
    /// with what `config.json` promises; that there are no fewer tensors than layers is known.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_any(directory: &Path) -> Result<Self> {
        let (paths, config) = begin(directory)?;
        let checkpoint = Self::map(directory, paths, config)?;
        let (layers, tensors) = (checkpoint.geometry.layers, checkpoint.tensors.len());
        if layers > tensors {
            let words = format!("config.json asks for {layers} layers, there are {tensors} tensors");
            return Err(problem(directory, words));
        }
        Ok(checkpoint)
    }

    fn map(directory: &Path, paths: WeightFiles, config: Map<String, Value>) -> Result<Self> {
        let config_path = directory.join("config.json");
        check_model_type(&config).map_err(|words| problem(&config_path, words))?;
        let geometry = Geometry::from_config(&config).map_err(|words| problem(&config_path, words))?;

        let mut files = Vec::with_capacity(paths.len());
        let mut tensors = IndexMap::new();
        for (path, indexed) in paths {
            let file = File::open(&path).map_err(Error::io(&path))?;
            // SAFETY: the map is only read. Should another process truncate the file meanwhile, reading it raises
            // SIGBUS: the usual contract of mapped weights, the same as that of safetensors' own `load_file`.
            let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
            let entries = header::parse(&map).map_err(|words| problem(&path, words))?;
            if let Some(indexed) = indexed {
                check_shard(&indexed, &entries).map_err(|words| problem(&path, words))?;
            }
            for header::Entry { name, dtype, shape, range } in entries {
                let tensor = Tensor { file: files.len(), range, dtype, shape };
                if !names::is_mask(&name) && tensors.insert(name.clone(), tensor).is_some() {
                    return Err(problem(&path, format!("tensor '{name}' is also in another shard")));
                }
            }
            files.push((path, map));
        }
        tensors.sort_by(|left, _, right, _| {
            names::model_order(left).cmp(&names::model_order(right)).then(left.cmp(right))
        });
        Ok(Self { directory: directory.to_owned(), config, geometry, files, tensors })
    }

    /// Where it lies.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its `config.json`.
    #[must_use]
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// Its tensors in model order, by stored name. Causal masks are left out.
    #[must_use]
    pub fn tensors(&self) -> &IndexMap<String, Tensor> {
        &self.tensors
    }

    /// What its shapes follow from.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Whether the output head is the token embedding.
    #[must_use]
    pub fn tied(&self) -> bool {
        self.geometry.tied
    }

    /// Whether the model has an output head, and that is the token embedding.
    #[must_use]
    pub fn has_tied_head(&self) -> bool {
        self.geometry.head && self.geometry.tied
    }

    /// The files of its weights.
    pub fn weight_files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// Size of its weight files.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.files.iter().map(|(_, map)| map.len() as u64).sum()
    }

    /// The bytes of a tensor.
    #[must_use]
    pub fn bytes(&self, tensor: &Tensor) -> &[u8] {
        &self.files[tensor.file].1[tensor.range.clone()]
    }

    /// Lets go of the memory that a tensor's mapped pages take. Reading it again maps them again.
    pub fn release(&self, tensor: &Tensor) {
        // SAFETY: the map is shared and read-only, so dropped pages are read back from the file unchanged.
        // A refusal only means that memory is freed later.
        let _ = unsafe {
            self.files[tensor.file].1.unchecked_advise_range(
                UncheckedAdvice::DontNeed,
                tensor.range.start,
                tensor.range.len(),
            )
        };
    }

    /// The stored tensor that a matrix is (a part of), and its dtype.
    ///
    /// # Errors
    /// [`Error::Dtype`] in the tensor if it is none of the three floating dtypes.
    ///
    /// # Panics
    /// If the matrix is not of this checkpoint.
    pub fn stored(&self, matrix: &Matrix) -> Result<(&Tensor, Float)> {
        let tensor = &self.tensors[&matrix.tensor];
        let float = Float::from_dtype(tensor.dtype).map_err(|error| error.in_tensor(&matrix.tensor))?;
        Ok((tensor, float))
    }

    /// A matrix's values, row-major, in × out.
    ///
    /// # Errors
    /// As [`stored`](Self::stored).
    pub fn matrix(&self, matrix: &Matrix) -> Result<Cow<'_, [f32]>> {
        let (tensor, float) = self.stored(matrix)?;
        let layout = Layout {
            stored_columns: tensor.shape[1],
            transposed: matrix.kind == Kind::Linear,
            first_column: matrix.first_column,
        };
        Ok(read_matrix(self.bytes(tensor), float, layout, matrix.rows, matrix.columns))
    }

    /// Refuses a tensor that holds NaN or an infinity, naming its row and column as stored.
    ///
    /// # Errors
    /// [`Error::NonFinite`] or [`Error::Dtype`], in the tensor.
    pub fn check_finite(&self, name: &str) -> Result<()> {
        let tensor = &self.tensors[name];
        let float = Float::from_dtype(tensor.dtype).map_err(|error| error.in_tensor(name))?;
        let columns = tensor.shape.last().copied().unwrap_or(1).max(1);
        match float.first_non_finite(self.bytes(tensor)) {
            None => Ok(()),
            Some((index, value)) => {
                Err(Error::NonFinite { value, row: index / columns, column: index % columns }.in_tensor(name))
            }
        }
    }
}

fn problem(path: &Path, problem: impl Into<String>) -> Error {
    Error::Checkpoint { path: path.to_owned(), problem: problem.into() }
}

/// Reads a file that must hold one JSON object.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(problem(path, "no such file")),
        other => other.map_err(Error::io(path))?,
    };
    serde_json::from_slice(&text).map_err(|error| problem(path, format!("expected a JSON object: {error}")))
}

/// The files of a checkpoint and its `config.json`.
fn begin(directory: &Path) -> Result<(WeightFiles, Map<String, Value>)> {
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

fn check_model_type(config: &Map<String, Value>) -> Result<(), String> {
    match config.get("model_type") {
        Some(Value::String(name)) if name == "gpt2" => Ok(()),
        Some(other) => Err(format!("model_type: expected \"gpt2\", got {other}")),
        None => Err("model_type: expected \"gpt2\", got none".into()),
    }
}

fn check_dense(config: &Map<String, Value>) -> Result<(), String> {
    match config.get("quantization_config") {
        None | Some(Value::Null) => Ok(()),
        Some(value) => match value.get("quant_method").and_then(Value::as_str) {
            Some("tqcompressor") => {
                Err("already compressed by tqcompressor: give the original, or dequantize() it first".into())
            }
            Some(method) => Err(format!("already quantized by {method}: give the original")),
            None => Err("already quantized: give the original".into()),
        },
    }
}

/// The weight files and, for shards, the tensors that the index puts in them.
type WeightFiles = Vec<(PathBuf, Option<Vec<String>>)>;

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

fn check_shard(indexed: &[String], entries: &[header::Entry]) -> Result<(), String> {
    let indexed: std::collections::BTreeSet<_> = indexed.iter().map(String::as_str).collect();
    let found: std::collections::BTreeSet<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
    if let Some(name) = indexed.difference(&found).next() {
        return Err(format!("tensor '{name}' is missing; the index puts it here"));
    }
    match found.difference(&indexed).next() {
        Some(name) => Err(format!("tensor '{name}' is here, but the index does not say so")),
        None => Ok(()),
    }
}

/// What to tell about a directory without the files that are read.
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
mod tests;
