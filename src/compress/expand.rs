//! Expansion of a compressed checkpoint into a stock one: factors are multiplied out, everything else is copied.

use std::path::Path;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use indexmap::IndexMap;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::checkpoint::{Options, carried, config_of, copy};
use super::tensors::{factor_name, scales_of, stored_scales, with_dtype};
use crate::checkpoint::read::{CODES, Checkpoint, SCALE, Tensor};
use crate::checkpoint::staging::{Destination, StagingDirectory};
use crate::checkpoint::write::{Slot, Writer};
use crate::error::{Error, Result};
use crate::family::{Kind, fused_parts, split_part};
use crate::fit::GroupedLowRank;
use crate::kron::expand;
use crate::numeric::Float;
use crate::numeric::int8::{Scales, dequantize};
use crate::numeric::memory::zeros;
use crate::permute::Permutation;
use crate::plan::specs_of;
use crate::progress::{Parallelism, Progress};
use crate::spec::{GroupedShape, KroneckerShape, LowRankShape, MatrixSpec, TermSpec};

/// Writes the dense checkpoint of the compressed `checkpoint` into the directory `destination`, on the current rayon
/// pool: what tools read that know nothing of factors. The bytes do not depend on the number of threads.
///
/// Weights have the dtype of their factors, or `options.dtype`; those of eight-bit factors have the dtype in `config.json`. Products and sums of terms are in f32. The tokenizer and
/// other files are copied; the model card and the report of the compression are not.
///
/// # Errors
/// [`Error::Checkpoint`] for a checkpoint that is dense, or lacks a factor; [`Error::Shape`] in a tensor;
/// [`Error::Destination`], [`Error::NonFinite`], [`Error::Io`], [`Error::Cancelled`]. Then nothing is written.
///
/// # Cost
/// For a Kronecker sum `rank·m·n` MACs, for a low rank `k·(s − k)·l` for the sides `s ≤ l`. Memory: one dense matrix and
/// its factors per thread.
pub fn expand_checkpoint(
    checkpoint: &Checkpoint,
    destination: &Path,
    options: &Options,
    progress: &Progress,
) -> Result<()> {
    let source = checkpoint.directory();
    let problem = |problem: String| Error::Checkpoint { path: source.to_owned(), problem };
    let specs = specs_of(checkpoint.config()).map_err(problem)?;
    if specs.is_empty() && !checkpoint.tensors().keys().any(|name| coded_module(name).is_some()) {
        return Err(problem("is dense already: there is nothing to expand".into()));
    }
    let modules = modules(checkpoint, &specs)?;
    let outputs = outputs(checkpoint, &modules, options.dtype)?;
    let destination = Destination::check(destination, checkpoint, options.overwrite)?;

    let stage = StagingDirectory::begin(destination)?;
    let slots: Vec<_> = outputs.iter().map(|(slot, _)| slot.clone()).collect();
    let writer = Writer::create(stage.directory(), &slots, options.max_shard_bytes)?;
    progress.expect(modules.len() as u64);
    let written = outputs.par_iter().map(|(slot, content)| match content {
        Content::Copy(tensor) => copy(checkpoint, tensor, slot, &writer, progress),
        Content::Codes { name, tensor, per } => {
            progress.check()?;
            writer.write_floats(&slot.name, 0, &checkpoint.weights(name, &tensor.shape, *per)?)
        }
        Content::Dense(module) => {
            progress.check()?;
            writer.write_floats(&slot.name, 0, &module.dense(checkpoint, progress)?)?;
            progress.advance(1);
            Ok(())
        }
    });
    // Collect first, so that the first error in model order is reported.
    written.collect::<Vec<_>>().into_iter().collect::<Result<()>>()?;
    writer.finish()?;
    for name in carried(source)? {
        progress.check()?;
        stage.copy(source, &name)?;
    }
    stage.write("config.json", config_json(checkpoint.config(), options.dtype).as_bytes())?;
    progress.finish();
    stage.commit()
}

/// A module that was compressed.
struct Module<'a> {
    /// Its stored name.
    stored: String,
    kind: Kind,
    rows: usize,
    columns: usize,
    dtype: Dtype,
    /// Its matrices, side by side: one, or the parts of a fused weight.
    parts: Vec<Part<'a>>,
}

struct Part<'a> {
    /// The stored name of its factors, without the term's number.
    stored: String,
    columns: usize,
    terms: &'a [TermSpec],
}

/// A part with what decides on its place and its module.
struct Piece<'a> {
    /// The name of a part of a fused weight: "q".
    name: Option<String>,
    rows: usize,
    dtype: Dtype,
    part: Part<'a>,
}

enum Content<'a> {
    Copy(&'a Tensor),
    /// A dense matrix of eight-bit integers.
    Codes {
        name: &'a str,
        tensor: &'a Tensor,
        per: Scales,
    },
    Dense(&'a Module<'a>),
}

const FACTORS: [&str; 4] = ["A", "B", "left", "right"];
const PERMUTATIONS: [&str; 2] = ["input_permutation", "output_permutation"];

/// The stored name of the matrix that a factor or a permutation is of; `None` for another tensor.
fn matrix_of(name: &str) -> Option<&str> {
    let (module, last) = name.rsplit_once('.')?;
    let last = last.strip_suffix(SCALE).filter(|factor| FACTORS.contains(factor)).unwrap_or(last);
    if !FACTORS.contains(&last) && !PERMUTATIONS.contains(&last) {
        return None;
    }
    match module.rsplit_once('.') {
        Some((outer, number)) if number.parse::<usize>().is_ok() => {
            Some(outer.strip_suffix(".terms").unwrap_or(module))
        }
        _ => Some(module),
    }
}

/// The stored module of the codes of a dense matrix, by the name of a tensor; `None` for another tensor.
fn coded_module(name: &str) -> Option<&str> {
    name.rsplit_once('.').filter(|(_, last)| *last == CODES).map(|(module, _)| module)
}

/// The dtype of what eight-bit integers become: the model's, as `config.json` gives it.
fn float_of(checkpoint: &Checkpoint) -> Dtype {
    let config = checkpoint.config();
    let name = config.get("dtype").or_else(|| config.get("torch_dtype")).and_then(Value::as_str);
    name.and_then(|name| Float::from_name(name).ok()).unwrap_or(Float::F32).dtype()
}

fn missing(checkpoint: &Checkpoint, name: &str) -> Error {
    let stored = checkpoint.tensors().keys().map(String::as_str);
    let problem = checkpoint.family().absent(name, "quantization_config in config.json has it", stored);
    Error::Checkpoint { path: checkpoint.directory().to_owned(), problem }
}

/// The modules of the specs, by stored name, in the order of their first factors.
fn modules<'a>(
    checkpoint: &Checkpoint,
    specs: &'a IndexMap<String, MatrixSpec>,
) -> Result<IndexMap<String, Module<'a>>> {
    let family = checkpoint.family();
    // Matrices by bare name, with their stored names.
    let stored: IndexMap<_, _> = checkpoint
        .tensors()
        .keys()
        .filter_map(|name| matrix_of(name))
        .map(|matrix| (family.bare(matrix).into_owned(), matrix))
        .collect();
    let mut found: IndexMap<String, Vec<Piece<'_>>> = IndexMap::new();
    for (name, spec) in specs {
        let matrix = *stored.get(name).ok_or_else(|| missing(checkpoint, &format!("{name}.{}", first_factor(spec))))?;
        let (rows, columns, dtype) = size(checkpoint, matrix, spec)?;
        let dtype = if dtype == Dtype::I8 { float_of(checkpoint) } else { dtype };
        let (module, part) = split_part(matrix);
        let piece = Piece {
            name: part.map(str::to_owned),
            rows,
            dtype,
            part: Part { stored: matrix.to_owned(), columns, terms: spec.terms() },
        };
        found.entry(module.to_owned()).or_default().push(piece);
    }
    let mut modules = IndexMap::new();
    for (stored, mut pieces) in found {
        let weight = format!("{stored}.weight");
        let kind = family.kind_of(&weight).ok_or_else(|| Error::Checkpoint {
            path: checkpoint.directory().to_owned(),
            problem: format!(
                "'{stored}' is no module of this family of models: load the model and call its dequantize()"
            ),
        })?;
        let (rows, dtype) = (pieces[0].rows, pieces[0].dtype);
        let columns = pieces.iter().map(|piece| piece.part.columns).sum();
        let order = fused_parts(&stored, kind, rows, columns).map_err(|error| error.in_tensor(&weight))?;
        if let Some(order) = order {
            pieces.sort_by_key(|piece| order.iter().position(|name| Some(name) == piece.name.as_ref()));
        }
        let parts = pieces.into_iter().map(|piece| piece.part).collect();
        modules.insert(stored.clone(), Module { stored, kind, rows, columns, dtype, parts });
    }
    Ok(modules)
}

fn first_factor(spec: &MatrixSpec) -> &'static str {
    match spec.terms() {
        [TermSpec::Kronecker(_)] => "A",
        [TermSpec::LowRank { .. } | TermSpec::Grouped(_)] => "left",
        [TermSpec::Kronecker(_), ..] => "terms.0.A",
        _ => "terms.0.left",
    }
}

/// Rows, columns and dtype of a matrix, from the shapes of the factors of its first term.
fn size(checkpoint: &Checkpoint, matrix: &str, spec: &MatrixSpec) -> Result<(usize, usize, Dtype)> {
    let terms = spec.terms();
    let tensor = |which: &str, dimensions: usize| {
        let name = factor_name(matrix, terms.len(), 0, which);
        let tensor = checkpoint.tensors().get(&name).ok_or_else(|| missing(checkpoint, &name))?;
        if tensor.shape.len() == dimensions {
            return Ok(tensor);
        }
        let expected = format!("{dimensions} dimensions");
        let error = Error::Shape { operation: "factor", expected, got: format!("{:?}", tensor.shape) };
        Err(error.in_tensor(&name))
    };
    Ok(match &terms[0] {
        TermSpec::Kronecker(_) => {
            let (a, b) = (tensor("A", 3)?, tensor("B", 3)?);
            (a.shape[1].saturating_mul(b.shape[1]), a.shape[2].saturating_mul(b.shape[2]), a.dtype)
        }
        TermSpec::LowRank { rank } => {
            let (left, right) = (tensor("left", 2)?, tensor("right", 2)?);
            let (height, width) = (left.shape[0], right.shape[1]);
            // The identity is on the columns only if there are more rows than columns.
            let on_rows = height.saturating_add(*rank) <= width;
            let (rows, columns) = if on_rows { (height + rank, width) } else { (height, width.saturating_add(*rank)) };
            (rows, columns, left.dtype)
        }
        TermSpec::Grouped(groups) => {
            let (left, orders) = (tensor("left", 1)?, tensor("output_permutation", 1)?);
            if orders.shape[0] % groups.len() != 0 {
                let expected = format!("as many columns in each of {} groups", groups.len());
                let error = Error::Shape { operation: "factor", expected, got: format!("{:?}", orders.shape) };
                return Err(error.in_tensor(&factor_name(matrix, 1, 0, "output_permutation")));
            }
            let rows = groups.iter().fold(0_usize, |sum, group| sum.saturating_add(group.rows));
            (rows, orders.shape[0] / groups.len(), left.dtype)
        }
    })
}

/// The tensors of the dense checkpoint, in model order.
fn outputs<'a>(
    checkpoint: &'a Checkpoint,
    modules: &'a IndexMap<String, Module<'a>>,
    dtype: Option<Float>,
) -> Result<Vec<(Slot, Content<'a>)>> {
    let mut outputs = Vec::new();
    let mut made = std::collections::HashSet::new();
    for (name, tensor) in checkpoint.tensors() {
        let module = matrix_of(name).and_then(|matrix| modules.get(split_part(matrix).0));
        if let Some(module) = module {
            if made.insert(module.stored.as_str()) {
                let (rows, columns) = (module.rows, module.columns);
                let shape = if module.kind == Kind::Linear { vec![columns, rows] } else { vec![rows, columns] };
                let dtype = dtype.map_or(module.dtype, Float::dtype);
                let slot = Slot { name: format!("{}.weight", module.stored), dtype, shape };
                outputs.push((slot, Content::Dense(module)));
            }
            continue;
        }
        // The guard has the name of a dense weight.
        let coded = |module: &str| checkpoint.tensors().contains_key(&format!("{module}.{CODES}"));
        if name.strip_suffix(".weight").is_some_and(|module| modules.contains_key(module) || coded(module)) {
            continue;
        }
        if let Some(module) = coded_module(name) {
            let weight = format!("{module}.weight");
            let kind = checkpoint.family().kind_of(&weight).filter(|_| tensor.shape.len() == 2);
            let kind = kind.ok_or_else(|| Error::Checkpoint {
                path: checkpoint.directory().to_owned(),
                problem: format!("tensor '{name}': '{module}' is no matrix of this family of models"),
            })?;
            let per = stored_scales(kind);
            let slot = Slot {
                name: weight,
                dtype: dtype.map_or_else(|| float_of(checkpoint), Float::dtype),
                shape: tensor.shape.clone(),
            };
            outputs.push((slot, Content::Codes { name, tensor, per }));
            continue;
        }
        let codes = name.strip_suffix(SCALE);
        if codes.and_then(coded_module).is_some_and(coded) {
            continue;
        }
        outputs.push((with_dtype(name, tensor, dtype)?, Content::Copy(tensor)));
    }
    Ok(outputs)
}

impl Module<'_> {
    /// The weight, row-major, as it is stored.
    fn dense(&self, checkpoint: &Checkpoint, progress: &Progress) -> Result<Vec<f32>> {
        let mut weight = zeros(self.rows * self.columns);
        let mut first = 0;
        for part in &self.parts {
            let matrix = part.dense(checkpoint, self.rows, self.kind, progress)?;
            for (row, values) in matrix.chunks_exact(part.columns).enumerate() {
                match self.kind {
                    Kind::Linear => {
                        for (column, &value) in values.iter().enumerate() {
                            weight[(first + column) * self.rows + row] = value;
                        }
                    }
                    _ => weight[row * self.columns + first..][..part.columns].copy_from_slice(values),
                }
            }
            first += part.columns;
        }
        Ok(weight)
    }
}

impl Part<'_> {
    /// The matrix, row-major, in × out.
    fn dense(&self, checkpoint: &Checkpoint, rows: usize, kind: Kind, progress: &Progress) -> Result<Vec<f32>> {
        let mut sum: Option<Vec<f32>> = None;
        let per = scales_of(kind);
        for (t, term) in self.terms.iter().enumerate() {
            let name = |which| factor_name(&self.stored, self.terms.len(), t, which);
            let made = match term {
                TermSpec::Kronecker(spec) => {
                    let shape = spec.shape(rows, self.columns).map_err(|error| error.in_tensor(&self.stored))?;
                    let KroneckerShape { m1, n1, m2, n2, rank } = shape;
                    let a = checkpoint.weights(&name("A"), &[rank, m1, n1], per)?;
                    let b = checkpoint.weights(&name("B"), &[rank, m2, n2], per)?;
                    let side = |which, permuted: bool, length| match permuted {
                        true => checkpoint.permutation(&name(which), length).map(Some),
                        false => Ok(None),
                    };
                    let input = side("input_permutation", spec.permute.rows(), rows)?;
                    let output = side("output_permutation", spec.permute.columns(), self.columns)?;
                    let input = input.map(|input| gather_of_rows(input, kind));
                    let sides = [input.as_ref(), output.as_ref()].map(|side| side.map(Permutation::as_slice));
                    expand(shape, &a, &b, sides[0], sides[1], Parallelism::Rayon, progress)?
                }
                TermSpec::LowRank { rank } => {
                    let shape = LowRankShape::new(rows, self.columns, *rank);
                    let shape = shape.map_err(|error| error.in_tensor(&self.stored))?;
                    let left = checkpoint.weights(&name("left"), &[shape.left().0, shape.left().1], per)?;
                    let right = checkpoint.weights(&name("right"), &[shape.right().0, shape.right().1], per)?;
                    let on_rows = shape.pivots_on_rows();
                    let order = match on_rows {
                        true => gather_of_rows(checkpoint.permutation(&name("input_permutation"), rows)?, kind),
                        false => checkpoint.permutation(&name("output_permutation"), self.columns)?,
                    };
                    low_rank(&shape, &left, &right, order.as_slice())
                }
                TermSpec::Grouped(groups) => {
                    let shape = GroupedShape::new(rows, self.columns, groups);
                    let shape = shape.map_err(|error| error.in_tensor(&self.stored))?;
                    let groups = shape.groups();
                    let left = of_groups(checkpoint, &name("left"), groups.iter().map(LowRankShape::left))?;
                    let right = of_groups(checkpoint, &name("right"), groups.iter().map(LowRankShape::right))?;
                    let places = checkpoint.permutation(&name("input_permutation"), rows)?;
                    let orders = checkpoint.permutation(&name("output_permutation"), groups.len() * self.columns)?;
                    let orders = GroupedLowRank::split_columns(&orders, self.columns)
                        .map_err(|error| error.in_tensor(&name("output_permutation")))?;
                    grouped(&shape, &left, &right, &places, &orders)
                }
            };
            match &mut sum {
                None => sum = Some(made),
                Some(sum) => sum.iter_mut().zip(&made).for_each(|(sum, made)| *sum += made),
            }
        }
        Ok(sum.unwrap_or_default())
    }
}

/// The values of matrices stored one behind the other, floating, or eight-bit with a scale for each row.
fn of_groups(
    checkpoint: &Checkpoint,
    name: &str,
    shapes: impl Iterator<Item = (usize, usize)> + Clone,
) -> Result<Vec<f32>> {
    let (count, rows) =
        shapes.clone().fold((0, 0), |(count, sum), (rows, columns)| (count + rows * columns, sum + rows));
    let Some((mut codes, scales)) = checkpoint.codes(name, &[count], &[rows])? else {
        return checkpoint.floats(name, &[count]);
    };
    let mut values = Vec::with_capacity(count);
    let mut all = scales.as_slice();
    for (rows, columns) in shapes {
        let (own, others) = codes.split_at(rows * columns);
        let (own_scales, other_scales) = all.split_at(rows);
        values.extend(dequantize(own, own_scales, rows, columns, Scales::Rows));
        (codes, all) = (others, other_scales);
    }
    Ok(values)
}

/// The gather indices of a matrix's rows, from the stored ones of the forward pass: those of an embedding are that
/// already, those of a linear map are the inverse.
fn gather_of_rows(stored: Permutation, kind: Kind) -> Permutation {
    if kind == Kind::Embedding { stored } else { stored.inverse() }
}

/// `[I; left] right` with its rows gathered, or `left [I right]` with its columns gathered.
fn low_rank(shape: &LowRankShape, left: &[f32], right: &[f32], order: &[usize]) -> Vec<f32> {
    let LowRankShape { rows, columns, rank } = *shape;
    let (height, width) = (shape.left().0, shape.right().1);
    let mut product = zeros(height * width);
    matmul(
        MatMut::from_row_major_slice_mut(&mut product, height, width),
        Accum::Replace,
        MatRef::from_row_major_slice(left, height, rank),
        MatRef::from_row_major_slice(right, rank, width),
        1.0,
        Par::Seq,
    );
    let mut dense = zeros(rows * columns);
    if shape.pivots_on_rows() {
        for (row, &from) in dense.chunks_exact_mut(columns).zip(order) {
            let values = if from < rank { &right[from * columns..] } else { &product[(from - rank) * columns..] };
            row.copy_from_slice(&values[..columns]);
        }
    } else {
        let pairs = left.chunks_exact(rank).zip(product.chunks_exact(width));
        for (row, (left, product)) in dense.chunks_exact_mut(columns).zip(pairs) {
            for (value, &from) in row.iter_mut().zip(order) {
                *value = if from < rank { left[from] } else { product[from - rank] };
            }
        }
    }
    dense
}

/// The groups one above the other, with their rows gathered by `places`.
fn grouped(
    shape: &GroupedShape,
    left: &[f32],
    right: &[f32],
    places: &Permutation,
    orders: &[Permutation],
) -> Vec<f32> {
    let columns = shape.columns();
    let mut stacked = Vec::with_capacity(shape.rows() * columns);
    for ((group, of_left, of_right), order) in shape.pieces().zip(orders) {
        stacked.extend(low_rank(group, &left[of_left], &right[of_right], order.as_slice()));
    }
    let mut dense = zeros(stacked.len());
    for (row, &from) in dense.chunks_exact_mut(columns).zip(places.as_slice()) {
        row.copy_from_slice(&stacked[from * columns..][..columns]);
    }
    dense
}

fn config_json(source: &Map<String, Value>, dtype: Option<Float>) -> String {
    let mut object = config_of(source, dtype);
    object.remove("quantization_config");
    format!("{:#}\n", Value::Object(object))
}
