//! Reading a checkpoint, dense or compressed, into a model.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bytemuck::Pod;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use indexmap::IndexMap;
use rayon::prelude::*;

use super::config::DecoderConfig;
use super::kronecker::Kronecker;
use super::linear::{Linear, Part, StoredTerm};
use super::low_rank::LowRank;
use super::model::{Block, Decoder, Norm, Size};
use super::order::Order;
use super::rows::{Rows, Weights, move_together};
use crate::checkpoint::files::read_object_if_any;
use crate::checkpoint::read::{CODES, Checkpoint, Tensor as Stored};
use crate::error::{Error, Result};
use crate::family::{self, DecoderRoles, Kind, fused_parts};
use crate::fit::GroupedLowRank;
use crate::numeric::Float;
use crate::numeric::int8::{Quantized, Scales, quantize};
use crate::numeric::memory::zeros;
use crate::permute::Permutation;
use crate::plan::specs_of;
use crate::progress::Progress;
use crate::spec::{GroupedShape, KroneckerShape, KroneckerSpec, LowRankShape, MatrixSpec, RowGroup, TermSpec};

impl Decoder {
    /// Reads the checkpoint in `directory` on the current rayon pool: `config.json` and safetensors files with a
    /// language model's or a bare model's weights, dense or with the factors that its `quantization_config` names.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the file and what is wrong with it, such as a tensor that is missing, superfluous or
    /// of another shape than `config.json` says; [`Error::NonFinite`] or [`Error::Dtype`] in a tensor; [`Error::Io`].
    ///
    /// # Cost
    /// The memory of the weights in their own dtype, and of one more matrix a thread while they are read.
    pub fn load(directory: &Path, progress: &Progress) -> Result<Self> {
        Self::load_as(directory, false, progress)
    }

    /// As [`load`](Self::load); with `int8`, the weights that are not eight-bit integers yet become so, as
    /// [`compress_checkpoint`](crate::compress::compress_checkpoint) would write them.
    ///
    /// # Errors
    /// Those of [`load`](Self::load).
    ///
    /// # Cost
    /// The memory of the eight-bit weights, and of three copies of a matrix a thread while they are read.
    pub fn load_as(directory: &Path, int8: bool, progress: &Progress) -> Result<Self> {
        let checkpoint = Checkpoint::open_any(directory)?;
        let problem = |problem: String| Error::Checkpoint { path: directory.to_owned(), problem };
        let (model_type, family) = (checkpoint.model_type(), checkpoint.family());
        let generation = read_object_if_any(&directory.join("generation_config.json"))?;
        let config = DecoderConfig::new(model_type, checkpoint.config(), generation.as_ref(), checkpoint.has_head());
        let config = config.map_err(problem)?;
        let roles = family.decoder.as_ref().expect("what the runtime computes is described");
        let specs = specs_of(checkpoint.config()).map_err(problem)?;
        let loader = Loader::new(&checkpoint, &config, roles, &specs, int8, progress);
        loader.check()?;
        progress.expect(config.layers as u64 + 2);
        let (d, vocabulary) = (config.width, config.vocabulary);
        // Load the largest tensors first and alone: until copied, they are in memory twice.
        let tokens = loader.embedding(family.token_embedding.as_deref().unwrap_or_default(), vocabulary, d)?;
        let positions = roles.position_embedding.as_deref();
        let positions = positions.map(|module| loader.embedding(module, config.positions, d)).transpose()?;
        let head = family.output_head.as_deref().filter(|_| !checkpoint.tied());
        let head = head.map(|module| loader.linear(module, d, vocabulary, false)).transpose()?;
        let blocks = (0..config.layers).into_par_iter().map(|layer| loader.block(layer));
        // Collect first, so that the first error in model order is reported.
        let blocks = blocks.collect::<Vec<_>>().into_iter().collect::<Result<_>>()?;
        let last_norm = loader.norm(&roles.last_norm)?;
        progress.finish();
        let size = loader.read.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (model_type, warning) = (model_type.to_owned(), checkpoint.warning().map(str::to_owned));
        let cache_float = Float::F32;
        Ok(Self {
            config,
            family,
            roles,
            model_type,
            tokens,
            positions,
            blocks,
            last_norm,
            head,
            size,
            warning,
            cache_float,
        })
    }
}

/// A mapped checkpoint, tensors by their bare names.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a DecoderConfig,
    roles: &'a DecoderRoles,
    tensors: IndexMap<Cow<'a, str>, (&'a str, &'a Stored)>,
    specs: &'a IndexMap<String, MatrixSpec>,
    int8: bool,
    progress: &'a Progress,
    /// Of the tensors that were asked for.
    read: Mutex<Size>,
}

/// Whether the map is `W` or `Wᵀ`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Orientation {
    /// `y = x W`
    AsStored,
    /// `y = x Wᵀ`: an embedding as a head.
    Transposed,
}

impl Orientation {
    /// The values of a stored factor that share a scale: those of an output of the map.
    fn scales(self) -> Scales {
        if self == Self::AsStored { Scales::Columns } else { Scales::Rows }
    }
}

impl<'a> Loader<'a> {
    fn new(
        checkpoint: &'a Checkpoint,
        config: &'a DecoderConfig,
        roles: &'a DecoderRoles,
        specs: &'a IndexMap<String, MatrixSpec>,
        int8: bool,
        progress: &'a Progress,
    ) -> Self {
        let family = checkpoint.family();
        let bare = |(name, tensor): (&'a String, &'a Stored)| (family.bare(name), (name.as_str(), tensor));
        let tensors = checkpoint.tensors().iter().map(bare).collect();
        Self { checkpoint, config, roles, tensors, specs, int8, progress, read: Mutex::default() }
    }

    fn problem(&self, problem: String) -> Error {
        Error::Checkpoint { path: self.checkpoint.directory().to_owned(), problem }
    }

    /// Refuses two tensors of one name, and what belongs to no module of this model.
    fn check(&self) -> Result<()> {
        let (family, layers) = (self.checkpoint.family(), self.config.layers);
        if self.tensors.len() != self.checkpoint.tensors().len() {
            let mut seen = HashSet::new();
            let twice = self.checkpoint.tensors().keys().find(|name| !seen.insert(family.bare(name)));
            return Err(self.problem(format!("tensor '{}' is there under two names", twice.expect("there are fewer"))));
        }
        for (bare, (stored, _)) in &self.tensors {
            let module = bare.rsplit_once('.').map_or(&**bare, |(module, _)| module);
            if family.layer_of(module).is_some_and(|(layer, _)| layer >= layers as u64) {
                return Err(self.problem(format!("tensor '{stored}' does not belong to a model of {layers} layers")));
            }
        }
        for name in self.specs.keys() {
            let top = [&family.token_embedding, &self.roles.position_embedding, &family.output_head];
            let known = top.iter().any(|top| top.as_ref() == Some(name))
                || family.layer_of(name).is_some_and(|(layer, _)| layer < layers as u64);
            if !known {
                return Err(self.problem(format!("quantization_config: '{name}' is no matrix of this model")));
            }
        }
        Ok(())
    }

    fn block(&self, layer: usize) -> Result<Block> {
        self.progress.check()?;
        let DecoderConfig { width: d, heads, key_value_heads, head_width, inner, biases, .. } = *self.config;
        let prefix = self.checkpoint.family().layer_prefix();
        let name = |module: &str| format!("{prefix}{layer}.{module}");
        let expansion = |module: &String| self.linear(&name(module), d, inner, biases.mlp);
        let mut expansion = self.roles.mlp.iter().map(expansion).collect::<Result<Vec<_>>>()?;
        let mut projection = self.linear(&name(&self.roles.mlp_output), inner, d, biases.mlp)?;
        let hidden_order = share_hidden_order(&mut expansion, &mut projection);
        let (queries, others) = (heads * head_width, key_value_heads * head_width);
        let widths = match self.roles.attention.len() {
            1 => vec![queries + 2 * others],
            _ => vec![queries, others, others],
        };
        let of_attention = self.roles.attention.iter().zip(widths);
        let of_attention = of_attention.map(|(module, width)| self.linear(&name(module), d, width, biases.attention));
        let mut block = Block {
            attention_norm: self.norm(&name(&self.roles.attention_norm))?,
            query_key_value: Linear::side_by_side(of_attention.collect::<Result<_>>()?)?,
            attention_projection: self.linear(
                &name(&self.roles.attention_output),
                queries,
                d,
                biases.attention_output,
            )?,
            mlp_norm: self.norm(&name(&self.roles.mlp_norm))?,
            expansion: Linear::side_by_side(expansion)?,
            hidden_order,
            projection,
        };
        let Block { query_key_value, attention_projection, expansion, projection, .. } = &mut block;
        let maps = [query_key_value, attention_projection, expansion, projection];
        move_together(&mut maps.into_iter().flat_map(Linear::matrices).collect::<Vec<_>>())?;
        self.progress.advance(1);
        Ok(block)
    }

    /// A linear module of `m` inputs and `n` outputs: compressed as a whole or in the parts of a fused weight, or dense.
    fn linear(&self, module: &str, m: usize, n: usize, bias: bool) -> Result<Linear> {
        let bias = if bias { self.vector(&format!("{module}.bias"), n)? } else { Vec::new() };
        let kind = self.checkpoint.family().kind_of(&format!("{module}.weight")).unwrap_or(Kind::Linear);
        let parts = fused_parts(module, kind, m, n).map_err(|error| error.in_tensor(module))?.unwrap_or_default();
        let spec = |name: &str| self.specs.get(name);
        let part_name = |part: &String| format!("{module}.{part}");
        let found = if parts.iter().any(|part| spec(&part_name(part)).is_some()) {
            let columns = n / parts.len();
            let part = |part: &String| {
                let name = part_name(part);
                let spec = spec(&name).ok_or_else(|| {
                    self.problem(format!("quantization_config: '{name}' is missing beside the parts of {module}"))
                })?;
                Ok(Part { columns, terms: self.terms(&name, spec, m, columns, Orientation::AsStored)? })
            };
            parts.iter().map(part).collect::<Result<_>>()?
        } else {
            let terms = match spec(module) {
                Some(spec) => self.terms(module, spec, m, n, Orientation::AsStored)?,
                None => {
                    let rows = if kind == Kind::Linear {
                        Rows::new(&self.dense(module, &[n, m], Scales::Rows)?)
                    } else {
                        Rows::new(&self.dense(module, &[m, n], Scales::Columns)?.transposed())
                    };
                    vec![StoredTerm::Dense(rows?)]
                }
            };
            vec![Part { columns: n, terms }]
        };
        Ok(Linear { rows: m, columns: n, parts: found, outputs: Order::default(), bias })
    }

    /// An embedding `(entries, d)` as the map from `d` features to its entries.
    fn embedding(&self, module: &str, entries: usize, d: usize) -> Result<Linear> {
        self.progress.check()?;
        let (rows, columns, bias) = (d, entries, Vec::new());
        let spec = self.specs.get(module);
        if let Some([TermSpec::Grouped(groups)]) = spec.map(MatrixSpec::terms) {
            let (parts, outputs) = self.groups(module, groups, entries, d)?;
            return Ok(Linear { rows, columns, parts, outputs, bias });
        }
        let terms = match spec {
            Some(spec) => self.terms(module, spec, entries, d, Orientation::Transposed)?,
            None => vec![StoredTerm::Dense(Rows::new(&self.dense(module, &[entries, d], Scales::Rows)?)?)],
        };
        Ok(Linear { rows, columns, parts: vec![Part { columns, terms }], outputs: Order::default(), bias })
    }

    /// The groups of an embedding `(entries, d)` as parts of the map to its entries, and where each entry is among them.
    fn groups(&self, name: &str, groups: &[RowGroup], entries: usize, d: usize) -> Result<(Vec<Part>, Order)> {
        let shape = GroupedShape::new(entries, d, groups).map_err(|error| error.in_tensor(name))?;
        let left = self.of_groups(&format!("{name}.left"), shape.groups().iter().map(LowRankShape::left))?;
        let right = self.of_groups(&format!("{name}.right"), shape.groups().iter().map(LowRankShape::right))?;
        let places = self.permutation(&format!("{name}.input_permutation"), entries)?;
        let orders = format!("{name}.output_permutation");
        let orders = GroupedLowRank::split_columns(&self.permutation(&orders, groups.len() * d)?, d)
            .map_err(|error| error.in_tensor(&orders))?;
        let mut parts = Vec::with_capacity(groups.len());
        for (((group, left), right), order) in shape.groups().iter().zip(&left).zip(&right).zip(&orders) {
            // Wᵀ[q] = [I; rightᵀ] leftᵀ; what is stored is inverse.
            let input = Order::new(order.inverse().as_slice().iter().copied());
            let (right, left) = (Rows::new(left)?, Rows::new(right)?);
            let terms = vec![StoredTerm::LowRank(LowRank::OnRows { left, right, input })];
            parts.push(Part { columns: group.rows, terms });
        }
        Ok((parts, Order::new(places.as_slice().iter().copied())))
    }

    /// The matrices of all groups of a factor, which are stored one behind the other, with a scale for each row.
    fn of_groups(&self, name: &str, shapes: impl Iterator<Item = (usize, usize)> + Clone) -> Result<Vec<Weights>> {
        let shapes: Vec<_> = shapes.collect();
        let sums = shapes.iter().fold((0, 0), |(all, sum), (height, width)| (all + height * width, sum + height));
        let expect = "as many values as in the shapes";
        if let Some((mut codes, mut scales)) = self.codes(name, &[sums.0], &[sums.1])? {
            let piece = |&(height, width): &(usize, usize)| {
                let (own, others) = codes.split_at(height * width);
                let rest = scales.split_off(height);
                let own_scales = std::mem::replace(&mut scales, rest);
                codes = others;
                let scales = Tensor::from_vec(own_scales, (height, 1), &Device::Cpu).expect(expect);
                Weights::int8(Tensor::from_vec(bytes_of(own), (height, width), &Device::Cpu).expect(expect), scales)
            };
            return Ok(shapes.iter().map(piece).collect());
        }
        let (tensor, mut first) = (self.tensor(name, &[sums.0])?, 0);
        let piece = |shape: (usize, usize)| {
            let length = shape.0 * shape.1;
            let values = tensor.narrow(0, first, length).and_then(|values| values.reshape(shape)).expect(expect);
            first += length;
            if self.int8 { self.quantized(name, &values, Scales::Rows) } else { Ok(values.into()) }
        };
        shapes.into_iter().map(piece).collect()
    }

    fn terms(
        &self,
        name: &str,
        spec: &MatrixSpec,
        m: usize,
        n: usize,
        orientation: Orientation,
    ) -> Result<Vec<StoredTerm>> {
        let terms = spec.terms();
        let number = |t: usize| if terms.len() == 1 { String::new() } else { format!(".terms.{t}") };
        let term = |(t, term): (usize, &TermSpec)| {
            let name = format!("{name}{}", number(t));
            match term {
                TermSpec::Kronecker(spec) => self.kronecker(&name, spec, m, n, orientation),
                TermSpec::LowRank { rank } => self.low_rank(&name, *rank, m, n, orientation),
                TermSpec::Grouped(_) => Err(self.problem(format!(
                    "quantization_config: '{name}' is no embedding, and only those have groups of rows"
                ))),
            }
            .map_err(|error| match error {
                Error::Shape { .. } => error.in_tensor(&name),
                other => other,
            })
        };
        terms.iter().enumerate().map(term).collect()
    }

    fn kronecker(
        &self,
        name: &str,
        spec: &KroneckerSpec,
        m: usize,
        n: usize,
        orientation: Orientation,
    ) -> Result<StoredTerm> {
        let stored = spec.shape(m, n)?;
        let KroneckerShape { m1, n1, m2, n2, rank } = stored;
        let (a, b) = ((format!("{name}.A"), [rank, m1, n1]), (format!("{name}.B"), [rank, m2, n2]));
        let (a, b) = if stored.large_blocks() {
            (self.tensor(&a.0, &a.1)?.into(), self.weights(&b.0, &b.1, orientation.scales())?)
        } else {
            (self.weights(&a.0, &a.1, orientation.scales())?, self.tensor(&b.0, &b.1)?.into())
        };
        let side = |which: &str, allowed: bool, length: usize| match allowed {
            true => self.permutation(&format!("{name}.{which}"), length),
            false => Ok(Permutation::identity(length)),
        };
        let input = side("input_permutation", spec.permute.rows(), m)?;
        let output = side("output_permutation", spec.permute.columns(), n)?;
        Ok(StoredTerm::Kronecker(match orientation {
            Orientation::AsStored => Kronecker::new(stored, &a, &b, &input, &output)?,
            // The stored indices of an embedding are both inverse: see `compress`.
            Orientation::Transposed => {
                Kronecker::new(stored.transposed(), &a.transposed(), &b.transposed(), &output.inverse(), &input)?
            }
        }))
    }

    fn low_rank(&self, name: &str, rank: usize, m: usize, n: usize, orientation: Orientation) -> Result<StoredTerm> {
        let shape = LowRankShape::new(m, n, rank)?;
        let per = orientation.scales();
        let left = self.weights(&format!("{name}.left"), &[shape.left().0, shape.left().1], per)?;
        let right = self.weights(&format!("{name}.right"), &[shape.right().0, shape.right().1], per)?;
        let on_rows = shape.pivots_on_rows();
        let (which, length) = if on_rows { ("input_permutation", m) } else { ("output_permutation", n) };
        let stored = self.permutation(&format!("{name}.{which}"), length)?;
        let order = |permutation: &Permutation| Order::new(permutation.as_slice().iter().copied());
        let transposed = |weights: &Weights| Rows::new(&weights.transposed());
        Ok(StoredTerm::LowRank(match (orientation, on_rows) {
            (Orientation::AsStored, true) => {
                LowRank::OnRows { left: transposed(&left)?, right: transposed(&right)?, input: order(&stored) }
            }
            (Orientation::AsStored, false) => {
                LowRank::OnColumns { left: transposed(&left)?, right: transposed(&right)?, output: order(&stored) }
            }
            // Wᵀ[q] = [I; rightᵀ] leftᵀ, and Wᵀ[:, p] = rightᵀ [I leftᵀ]; what is stored is inverse.
            (Orientation::Transposed, false) => {
                LowRank::OnRows { left: Rows::new(&right)?, right: Rows::new(&left)?, input: order(&stored.inverse()) }
            }
            (Orientation::Transposed, true) => {
                LowRank::OnColumns { left: Rows::new(&right)?, right: Rows::new(&left)?, output: order(&stored) }
            }
        }))
    }

    fn norm(&self, module: &str) -> Result<Norm> {
        let weight = self.vector(&format!("{module}.weight"), self.config.width)?;
        Ok(match self.roles.norm {
            family::Norm::Layer => {
                Norm::Layer { weight, bias: self.vector(&format!("{module}.bias"), self.config.width)? }
            }
            family::Norm::Rms => Norm::Rms { weight },
        })
    }

    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>> {
        let values = self.tensor(name, &[length])?.to_dtype(DType::F32).and_then(|tensor| tensor.to_vec1());
        Ok(values.expect("a tensor of floats"))
    }

    /// A tensor that is about to be read, with the name that it is stored under.
    fn found(&self, name: &str, shape: &[usize]) -> Result<(&'a str, &'a Stored)> {
        let Some(&(stored, tensor)) = self.tensors.get(name) else {
            let stored = self.checkpoint.tensors().keys().map(String::as_str);
            return Err(self.problem(self.checkpoint.family().missing(name, shape, stored)));
        };
        if tensor.shape != shape {
            return Err(self.problem(self.checkpoint.family().misshapen(stored, shape, &tensor.shape)));
        }
        self.count(tensor.parameters(), self.checkpoint.bytes(tensor).len());
        Ok((stored, tensor))
    }

    fn count(&self, parameters: usize, bytes: usize) {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.parameters += parameters;
        read.bytes += bytes;
    }

    /// A dense matrix, floating or eight-bit.
    fn dense(&self, module: &str, shape: &[usize], per: Scales) -> Result<Weights> {
        let codes = format!("{module}.{CODES}");
        let name = if self.tensors.contains_key(&*codes) { codes } else { format!("{module}.weight") };
        self.weights(&name, shape, per)
    }

    /// A tensor of one or more matrices, floating or eight-bit, which becomes eight-bit if that is asked for.
    fn weights(&self, name: &str, shape: &[usize], per: Scales) -> Result<Weights> {
        let Some((codes, scales)) = self.codes(name, shape, &per.shape(shape))? else {
            let values = self.tensor(name, shape)?;
            return if self.int8 { self.quantized(name, &values, per) } else { Ok(values.into()) };
        };
        let tensors = (
            Tensor::from_vec(bytes_of(codes), shape, &Device::Cpu),
            Tensor::from_vec(scales, per.shape(shape), &Device::Cpu),
        );
        Ok(Weights::int8(tensors.0.expect("as many as in the shape"), tensors.1.expect("as many as in the shape")))
    }

    /// The codes and scales of a tensor; `None` for a floating one, which is not counted as read.
    fn codes(&self, name: &str, shape: &[usize], scales: &[usize]) -> Result<Option<(&'a [i8], Vec<f32>)>> {
        let Some(&(stored, _)) = self.tensors.get(name) else { return self.found(name, shape).map(|_| None) };
        let codes = self.checkpoint.codes(stored, shape, scales)?;
        if let Some((codes, scales)) = &codes {
            self.count(codes.len(), codes.len() + size_of::<bf16>() * scales.len());
        }
        Ok(codes)
    }

    /// Eight-bit integers of floating values that were read from the tensor `name`.
    fn quantized(&self, name: &str, values: &Tensor, per: Scales) -> Result<Weights> {
        let &[.., rows, columns] = values.dims() else { unreachable!("a matrix") };
        let floats: Vec<f32> =
            values.to_dtype(DType::F32).and_then(|all| all.flatten_all()?.to_vec1()).expect("floats");
        let Quantized { codes, scales } = quantize(&floats, rows, columns, per).map_err(|(at, value)| {
            Error::NonFinite { value, row: at / columns, column: at % columns }.in_tensor(name)
        })?;
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.bytes -= floats.len() * (values.dtype().size_in_bytes() - 1);
        read.bytes += size_of::<bf16>() * scales.len();
        drop(read);
        let scales: Vec<_> = scales.into_iter().map(bf16::to_f32).collect();
        let scales = Tensor::from_vec(scales, per.shape(values.dims()), &Device::Cpu).expect("a scale for each");
        Ok(Weights::int8(Tensor::from_vec(bytes_of(&codes), values.dims(), &Device::Cpu).expect("as many"), scales))
    }

    /// A tensor of floats, finite, in its own dtype.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let (stored, tensor) = self.found(name, shape)?;
        self.checkpoint.check_finite(stored)?;
        /// On huge pages: reading is a third faster.
        fn copied<T: WithDType + Pod + Default>(bytes: &[u8], shape: &[usize]) -> candle_core::Result<Tensor> {
            let mut values = zeros::<T>(bytes.len() / size_of::<T>());
            bytemuck::cast_slice_mut(&mut values).copy_from_slice(bytes);
            Tensor::from_vec(values, shape, &Device::Cpu)
        }
        let bytes = self.checkpoint.bytes(tensor);
        let read = match Float::from_dtype(tensor.dtype).map_err(|error| error.in_tensor(stored))? {
            Float::F32 => copied::<f32>(bytes, shape),
            Float::F16 => copied::<f16>(bytes, shape),
            Float::Bf16 => copied::<bf16>(bytes, shape),
        };
        self.checkpoint.release(tensor);
        read.map_err(|error| self.problem(format!("tensor '{stored}': {error}")))
    }

    fn permutation(&self, name: &str, length: usize) -> Result<Permutation> {
        let (stored, _) = self.found(name, &[length])?;
        self.checkpoint.permutation(stored, length)
    }
}

/// Puts the hidden units into an order that costs fewest gathers, and returns it: the activation, and the product with a
/// gate, are elementwise, so that units may be stored in any order that all maps share.
fn share_hidden_order(expansion: &mut [Linear], projection: &mut Linear) -> Order {
    // The projection's order is free for dense maps and Kronecker sums before it; otherwise keep that of a map before it.
    let wanted = projection.keep_input_order();
    expansion.iter_mut().for_each(|map| map.put_outputs_in(&wanted));
    let mut order = wanted.inverse();
    for kept in 0..expansion.len() {
        if !order.is_identity() {
            break;
        }
        order = expansion[kept].keep_output_order();
        let inverse = order.inverse();
        let others = expansion.iter_mut().enumerate().filter(|(map, _)| *map != kept);
        others.for_each(|(_, map)| map.put_outputs_in(&inverse));
        projection.take_inputs_from(&order);
    }
    order
}

/// On huge pages: reading is a third faster.
fn bytes_of(codes: &[i8]) -> Vec<u8> {
    let mut bytes = zeros::<u8>(codes.len());
    bytes.copy_from_slice(bytemuck::cast_slice(codes));
    bytes
}
