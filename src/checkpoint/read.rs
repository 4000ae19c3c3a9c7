//! A memory-mapped checkpoint, opened and validated without reading its weights.

use std::borrow::Cow;
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use indexmap::IndexMap;
use memmap2::Mmap;
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::files::{WeightFiles, begin, check_shard, problem};
use super::header;
use super::layout::{Layout, read_matrix};
use crate::error::{Error, Result};
use crate::family::{Family, Geometry, Kind, Matrix};
use crate::numeric::Float;
use crate::numeric::int8::{Scales, dequantize};
use crate::permute::Permutation;
use crate::portable;

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

    /// Its number of parameters: its elements if they are floating or eight-bit integers, else none.
    #[must_use]
    pub fn parameters(&self) -> usize {
        use Dtype::{BF16, F8_E4M3, F8_E5M2, F16, F32, F64, I8};
        if matches!(self.dtype, F64 | F32 | F16 | BF16 | F8_E4M3 | F8_E5M2 | I8) { self.elements() } else { 0 }
    }
}

/// Values of a matrix. Dropping them frees the memory of the mapped pages that they were read from.
pub struct Values<'a> {
    checkpoint: &'a Checkpoint,
    tensor: &'a Tensor,
    values: Cow<'a, [f32]>,
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

impl Drop for Values<'_> {
    fn drop(&mut self) {
        self.checkpoint.release(self.tensor);
    }
}

/// An open checkpoint. Weights are memory-mapped: pages load on first read, and [`release`](Self::release) frees them.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    config: Map<String, Value>,
    family: &'static Family,
    geometry: Geometry,
    files: Vec<(PathBuf, Mmap)>,
    tensors: IndexMap<String, Tensor>,
    /// Whether only the ends of a tied head and its embedding are compared.
    names_only: bool,
    /// That a tied head differs from the embedding, once that was looked at.
    warning: OnceLock<Option<String>>,
}

impl Checkpoint {
    /// Opens the directory `directory`, a dense checkpoint: `config.json` and either `model.safetensors` or shards with
    /// their index.
    ///
    /// Validates every header, and checks that every tensor that `config.json` asks for is there in its shape. Causal
    /// masks of old versions of transformers are left out. Weights are not read. A head that is stored although it is
    /// tied is compared with the token embedding at the first question for it: if it differs, it is a matrix of its own,
    /// as in transformers, and there is a [`warning`](Self::warning).
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the file and what is wrong with it; [`Error::Io`] if it cannot be opened.
    pub fn open(directory: &Path) -> Result<Self> {
        Self::dense(directory, false)
    }

    /// As [`open`](Self::open), to list what is there: of a head that is stored although it is tied only the first and
    /// the last rows are compared.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_for_names(directory: &Path) -> Result<Self> {
        Self::dense(directory, true)
    }

    fn dense(directory: &Path, names_only: bool) -> Result<Self> {
        let (paths, config) = begin(directory)?;
        let config_path = directory.join("config.json");
        check_dense(&config).map_err(|words| problem(&config_path, words))?;
        let checkpoint = Self { names_only, ..Self::map(directory, paths, config)? };
        let tensors = checkpoint.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.shape.as_slice()));
        let (model_type, family) = (model_type(&checkpoint.config), checkpoint.family);
        family.check(model_type, &checkpoint.config, tensors).map_err(|words| problem(directory, words))?;
        Ok(checkpoint)
    }

    /// Opens a checkpoint that may be compressed. Validates headers, and checks that there are at least as many tensors
    /// as layers. Comparing the tensors with `config.json` is left to the caller.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_any(directory: &Path) -> Result<Self> {
        let (paths, config) = begin(directory)?;
        let checkpoint = Self::map(directory, paths, config)?;
        let layers = checkpoint.geometry.layers.iter().filter_map(|(_, number)| *number).max().unwrap_or(0);
        let tensors = checkpoint.tensors.len();
        if layers > tensors {
            let words = format!("config.json asks for {layers} layers, there are {tensors} tensors");
            return Err(problem(directory, words));
        }
        Ok(checkpoint)
    }

    fn map(directory: &Path, paths: WeightFiles, config: Map<String, Value>) -> Result<Self> {
        let config_path = directory.join("config.json");
        let family = family_of(&config).map_err(|words| problem(&config_path, words))?;
        let geometry = family.geometry(model_type(&config), &config).map_err(|words| problem(&config_path, words))?;

        let mut files = Vec::with_capacity(paths.len());
        let mut tensors = IndexMap::new();
        for (path, indexed) in paths {
            let file = File::open(&path).map_err(Error::io(&path))?;
            // SAFETY: the map is only read. Should another process truncate the file meanwhile, reading it raises
            // SIGBUS: the usual contract of mapped weights, the same as that of safetensors' own `load_file`.
            let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
            let entries = header::parse(&map).map_err(|words| problem(&path, words))?;
            if let Some(indexed) = indexed {
                check_shard(family, &indexed, &entries).map_err(|words| problem(&path, words))?;
            }
            for header::Entry { name, dtype, shape, range } in entries {
                let tensor = Tensor { file: files.len(), range, dtype, shape };
                if !family.is_ignored(&name) && tensors.insert(name.clone(), tensor).is_some() {
                    return Err(problem(&path, format!("tensor '{name}' is also in another shard")));
                }
            }
            files.push((path, map));
        }
        tensors.sort_by_cached_key(|name, _| (family.model_order(name), name.clone()));
        let (directory, warning) = (directory.to_owned(), OnceLock::new());
        Ok(Self { directory, config, family, geometry, files, tensors, names_only: false, warning })
    }

    /// Why a tied head is a matrix of its own: transformers ties a head that is stored beside the token embedding only
    /// if both have the same values.
    fn head_that_differs(&self) -> Option<String> {
        let embedding = self.tensors.iter().find(|(name, _)| self.family.is_token_embedding(name));
        let (Some((head_name, head)), Some((name, embedding)), true) =
            (self.output_head(), embedding, self.geometry.tied)
        else {
            return None;
        };
        // Other faults of the two are found where they are read.
        if head.shape != embedding.shape || self.equal_values(head, embedding) != Some(false) {
            return None;
        }
        Some(format!(
            "{}: tensor '{head_name}' differs from '{name}', though tie_word_embeddings says that they are one: the head \
             is taken as a matrix of its own, as transformers takes it. Set \"tie_word_embeddings\": false in config.json",
            self.directory.display()
        ))
    }

    /// Whether two tensors of one shape hold the same values, in whichever dtypes; `None` unless both are floating.
    fn equal_values(&self, left: &Tensor, right: &Tensor) -> Option<bool> {
        const VALUES: usize = 1 << 14;
        let floats = (Float::from_dtype(left.dtype).ok()?, Float::from_dtype(right.dtype).ok()?);
        let pieces = |tensor, float: Float| self.bytes(tensor).chunks(VALUES * float.size());
        let (mut a, mut b) = (vec![0.0; VALUES], vec![0.0; VALUES]);
        let last = left.elements().div_ceil(VALUES).saturating_sub(1);
        let read = |number: usize| !self.names_only || number == 0 || number == last;
        let mut pairs = pieces(left, floats.0).zip(pieces(right, floats.1)).enumerate();
        let equal = pairs.all(|(number, (left, right))| {
            if !read(number) {
                return true;
            }
            let count = left.len() / floats.0.size();
            floats.0.upcast(left, &mut a[..count]);
            floats.1.upcast(right, &mut b[..count]);
            a[..count] == b[..count]
        });
        self.release(left);
        self.release(right);
        Some(equal)
    }

    /// What its user should hear: its files contradict each other, and the model is still clear. The first question reads
    /// the weights of a head that is stored although it is tied.
    #[must_use]
    pub fn warning(&self) -> Option<&str> {
        self.warning.get_or_init(|| self.head_that_differs()).as_deref()
    }

    /// Its directory.
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

    /// The description of its family.
    #[must_use]
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// Its `model_type`.
    #[must_use]
    pub fn model_type(&self) -> &str {
        model_type(&self.config)
    }

    /// The stored output head, whether or not it is tied.
    #[must_use]
    pub fn output_head(&self) -> Option<(&str, &Tensor)> {
        let head = self.tensors.iter().find(|(name, _)| self.family.is_output_head(name));
        head.map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Whether the output head is the token embedding.
    #[must_use]
    pub fn tied(&self) -> bool {
        self.geometry.tied && self.warning().is_none()
    }

    /// Whether the model has an output head.
    #[must_use]
    pub fn has_head(&self) -> bool {
        self.geometry.head
    }

    /// Whether the model has an output head that is the token embedding.
    #[must_use]
    pub fn has_tied_head(&self) -> bool {
        self.has_head() && self.tied()
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

    /// Frees the memory of a tensor's mapped pages. Reading it again loads them again.
    pub fn release(&self, tensor: &Tensor) {
        portable::release(&self.files[tensor.file].1, tensor.range.start, tensor.range.len());
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
    pub fn matrix(&self, matrix: &Matrix) -> Result<Values<'_>> {
        let (tensor, float) = self.stored(matrix)?;
        let layout = Layout {
            stored_columns: tensor.shape[1],
            transposed: matrix.kind == Kind::Linear,
            first_column: matrix.first_column,
        };
        let values = read_matrix(self.bytes(tensor), float, layout, matrix.rows, matrix.columns);
        if matches!(values, Cow::Owned(_)) {
            self.release(tensor);
        }
        Ok(Values { checkpoint: self, tensor, values })
    }

    /// A tensor's values as f32, row-major.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is missing or has another shape; [`Error::Dtype`] or [`Error::NonFinite`] in the
    /// tensor.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.of_shape(name, shape)?;
        self.check_finite(name)?;
        let float = Float::from_dtype(tensor.dtype).map_err(|error| error.in_tensor(name))?;
        let mut values = vec![0.0; tensor.elements()];
        float.upcast(self.bytes(tensor), &mut values);
        self.release(tensor);
        Ok(values)
    }

    /// The codes of an eight-bit tensor and its scales, of shape `scales`; `None` for a floating tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the tensor is missing or has another shape, if an eight-bit one has no scales or a
    /// floating one has them; [`Error::Dtype`] or [`Error::NonFinite`] in the scales.
    pub fn codes(&self, name: &str, shape: &[usize], scales: &[usize]) -> Result<Option<(&[i8], Vec<f32>)>> {
        let (tensor, scale) = (self.of_shape(name, shape)?, scale_name(name));
        let found = self.tensors.get(&scale);
        if tensor.dtype != Dtype::I8 {
            return match found {
                None => Ok(None),
                Some(_) => {
                    let dtype = tensor.dtype;
                    Err(problem(
                        &self.directory,
                        format!("tensor '{name}': expected I8, since it has scales, got {dtype:?}"),
                    ))
                }
            };
        }
        let Some(found) = found else {
            return Err(problem(
                &self.directory,
                format!("tensor '{scale}' is missing: the scales of '{name}', which is I8"),
            ));
        };
        if found.dtype != Dtype::BF16 {
            let error = Error::Dtype { expected: "BF16".into(), got: format!("{:?}", found.dtype) };
            return Err(error.in_tensor(&scale));
        }
        Ok(Some((bytemuck::cast_slice(self.bytes(tensor)), self.floats(&scale, scales)?)))
    }

    /// The values of a tensor of one or more matrices, floating or eight-bit, as f32, row-major.
    ///
    /// # Errors
    /// As [`floats`](Self::floats) and [`codes`](Self::codes).
    pub fn weights(&self, name: &str, shape: &[usize], per: Scales) -> Result<Vec<f32>> {
        let Some((codes, scales)) = self.codes(name, shape, &per.shape(shape))? else {
            return self.floats(name, shape);
        };
        let [.., rows, columns] = *shape else { unreachable!("a matrix") };
        let values = dequantize(codes, &scales, rows, columns, per);
        self.release(&self.tensors[name]);
        Ok(values)
    }

    /// A tensor that holds a permutation.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is missing or has another length; [`Error::Dtype`] or [`Error::Permutation`] in the
    /// tensor.
    pub fn permutation(&self, name: &str, length: usize) -> Result<Permutation> {
        let tensor = self.of_shape(name, &[length])?;
        if tensor.dtype != Dtype::I64 {
            let error = Error::Dtype { expected: "I64".into(), got: format!("{:?}", tensor.dtype) };
            return Err(error.in_tensor(name));
        }
        let (indices, _) = self.bytes(tensor).as_chunks::<8>();
        // A negative index maps to one that is out of range.
        let index = |bytes: &[u8; 8]| usize::try_from(i64::from_le_bytes(*bytes)).unwrap_or(usize::MAX);
        Permutation::new(indices.iter().map(index).collect()).map_err(|error| error.in_tensor(name))
    }

    fn of_shape(&self, name: &str, shape: &[usize]) -> Result<&Tensor> {
        match self.tensors.get(name) {
            Some(tensor) if tensor.shape == shape => Ok(tensor),
            Some(tensor) => Err(problem(&self.directory, self.family.misshapen(name, shape, &tensor.shape))),
            None => {
                let stored = self.tensors.keys().map(String::as_str);
                Err(problem(&self.directory, self.family.missing(name, shape, stored)))
            }
        }
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

/// The last part of the stored name of a dense matrix of eight-bit integers. It is not that of the weight, so that the
/// guard has its name, and a program without this package fails to load it.
pub const CODES: &str = "codes";

/// The end of the stored name of scales.
pub const SCALE: &str = "_scale";

/// The stored name of the scales of an eight-bit tensor.
#[must_use]
pub fn scale_name(tensor: &str) -> String {
    format!("{tensor}{SCALE}")
}

fn family_of(config: &Map<String, Value>) -> Result<&'static Family, String> {
    match config.get("model_type") {
        None | Some(Value::Null) => Err(Family::without_model_type(config.get("architectures"))),
        Some(_) => Family::of(model_type(config)),
    }
}

/// The `model_type` of a config; "none" if it has none.
fn model_type(config: &Map<String, Value>) -> &str {
    config.get("model_type").and_then(Value::as_str).unwrap_or("none")
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

#[cfg(test)]
mod tests;
