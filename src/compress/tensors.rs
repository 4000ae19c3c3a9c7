//! The tensors of a compressed checkpoint: which there are, where they lie, and how matrices become factors and codes.

use safetensors::Dtype;

use crate::checkpoint::read::{CODES, Checkpoint, Tensor, scale_name};
use crate::checkpoint::write::{Slot, Writer};
use crate::error::{Error, Result};
use crate::family::{Kind, Matrix};
use crate::fit::{Fit, LowRank, Term};
use crate::numeric::Float;
use crate::numeric::int8::{Quantized, Scales, quantize};
use crate::permute::{Decomposition, Permutation};
use crate::plan::{Job, Plan};
use crate::spec::{GroupedShape, KroneckerShape, LowRankShape, TermSpec};

/// One tensor of the compressed checkpoint and the source of its values.
pub(super) struct Output<'a> {
    pub slot: Slot,
    pub content: Content<'a>,
}

pub(super) enum Content<'a> {
    /// A copy of a tensor of the source.
    Copy(&'a Tensor),
    /// The codes of a dense matrix of the source, which is stored under this name.
    Codes { name: &'a str, tensor: &'a Tensor, per: Scales },
    /// A factor or a permutation of a decomposition, or scales.
    Factor,
    /// One zero byte under the name of a dense weight. Without it, a plain load would leave that weight random and only
    /// warn; with it, the load fails because the shapes differ.
    Guard,
}

impl Output<'_> {
    /// The bare name of the module of a matrix that stays dense as eight-bit integers.
    pub fn module(&self, checkpoint: &Checkpoint) -> Option<String> {
        let Content::Codes { name, .. } = self.content else { return None };
        let bare = checkpoint.family().bare(name);
        Some(bare.strip_suffix(".weight").unwrap_or(&bare).to_owned())
    }
}

/// A head that is stored although it is tied, with the values of the token embedding. It must be left out once that is
/// factored or eight-bit.
fn dropped_head<'a>(checkpoint: &'a Checkpoint, plan: &Plan, int8: bool) -> Option<&'a Tensor> {
    let family = checkpoint.family();
    let factored = plan.jobs.iter().any(|job| family.is_token_embedding(&job.matrix.tensor));
    let head = checkpoint.output_head().filter(|_| (factored || int8) && checkpoint.tied());
    head.map(|(_, tensor)| tensor)
}

/// The tensors of the compressed checkpoint, in model order.
pub(super) fn outputs<'a>(
    checkpoint: &'a Checkpoint,
    plan: &Plan,
    dtype: Option<Float>,
    int8: bool,
) -> Result<Vec<Output<'a>>> {
    let dropped = dropped_head(checkpoint, plan, int8);
    let mut outputs = Vec::new();
    let mut jobs = plan.jobs.iter().peekable();
    let mut guarded = false;
    for (name, tensor) in checkpoint.tensors() {
        if dropped.is_some_and(|head| std::ptr::eq(head, tensor)) {
            continue;
        }
        let kept = jobs.peek().is_none_or(|job| job.matrix.tensor != *name);
        let quantized = checkpoint.family().kind_of(name).filter(|_| kept && int8 && tensor.shape.len() == 2);
        if kept && quantized.is_none() {
            outputs.push(Output { slot: with_dtype(name, tensor, dtype)?, content: Content::Copy(tensor) });
            continue;
        }
        if !guarded {
            outputs.push(Output {
                slot: Slot { name: name.clone(), dtype: Dtype::U8, shape: vec![1] },
                content: Content::Guard,
            });
            guarded = true;
        }
        if let Some(kind) = quantized {
            Float::from_dtype(tensor.dtype).map_err(|error| error.in_tensor(name))?;
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let per = stored_scales(kind);
            let [codes, scales] = coded(format!("{module}.{CODES}"), &tensor.shape, per.shape(&tensor.shape));
            outputs.push(Output { slot: codes, content: Content::Codes { name, tensor, per } });
            outputs.push(Output { slot: scales, content: Content::Factor });
            continue;
        }
        while let Some(job) = jobs.next_if(|job| job.matrix.tensor == *name) {
            let (_, own) = checkpoint.stored(&job.matrix)?;
            let factors = factor_slots(job, dtype.unwrap_or(own).dtype(), int8)?;
            outputs.extend(factors.into_iter().map(|slot| Output { slot, content: Content::Factor }));
        }
    }
    debug_assert!(jobs.next().is_none(), "plan and checkpoint are in the same order");
    Ok(outputs)
}

/// The place of a copied tensor. Integers keep their dtype; floats that cannot be converted are errors.
pub(super) fn with_dtype(name: &str, tensor: &Tensor, dtype: Option<Float>) -> Result<Slot> {
    let dtype = match dtype {
        Some(float) if tensor.parameters() > 0 => {
            Float::from_dtype(tensor.dtype).map_err(|error| error.in_tensor(name))?;
            float.dtype()
        }
        _ => tensor.dtype,
    };
    Ok(Slot { name: name.to_owned(), dtype, shape: tensor.shape.clone() })
}

/// The stored name of a tensor of term `t` of a compressed matrix, which is stored as `matrix`. A single term has no
/// number.
pub(super) fn factor_name(matrix: &str, terms: usize, t: usize, which: &str) -> String {
    let number = if terms == 1 { String::new() } else { format!(".terms.{t}") };
    format!("{matrix}{number}.{which}")
}

/// The stored name of a compressed matrix: that of its module, or of its part of a fused one.
fn stored_matrix(matrix: &Matrix) -> String {
    format!("{}{}", matrix.stored_module(), matrix.part())
}

/// The places of codes and of their scales.
fn coded(name: String, shape: &[usize], scales: Vec<usize>) -> [Slot; 2] {
    let scales = Slot { name: scale_name(&name), dtype: Dtype::BF16, shape: scales };
    [Slot { name, dtype: Dtype::I8, shape: shape.to_vec() }, scales]
}

/// The values of a factor, in × out, that share a scale.
pub(super) fn scales_of(kind: Kind) -> Scales {
    if kind == Kind::Embedding { Scales::Rows } else { Scales::Columns }
}

/// As [`scales_of`] of a dense matrix as it is stored, which is transposed in a linear layer.
pub(super) fn stored_scales(kind: Kind) -> Scales {
    if kind == Kind::Linear { Scales::Rows } else { scales_of(kind) }
}

/// Writes the codes of matrices and their scales under the name `to`; errors name the tensor `from`.
pub(super) fn write_codes(
    writer: &Writer,
    to: &str,
    from: &str,
    values: &[f32],
    shape: (usize, usize),
    per: Scales,
) -> Result<()> {
    write_quantized(writer, to, &coded_values(values, from, shape, per)?)
}

/// As [`write_codes`], of matrices of several shapes one behind the other, each row with a scale.
fn write_groups(writer: &Writer, to: &str, from: &str, values: &[f32], shapes: &[(usize, usize)]) -> Result<()> {
    let (mut all, mut rest) = (Quantized::default(), values);
    for &(rows, columns) in shapes {
        let (own, others) = rest.split_at(rows * columns);
        all.extend(coded_values(own, from, (rows, columns), Scales::Rows)?);
        rest = others;
    }
    write_quantized(writer, to, &all)
}

fn coded_values(values: &[f32], name: &str, (rows, columns): (usize, usize), per: Scales) -> Result<Quantized> {
    quantize(values, rows, columns, per)
        .map_err(|(at, value)| Error::NonFinite { value, row: at / columns, column: at % columns }.in_tensor(name))
}

fn write_quantized(writer: &Writer, to: &str, Quantized { codes, scales }: &Quantized) -> Result<()> {
    writer.write(to, 0, bytemuck::cast_slice(codes))?;
    let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    writer.write(&scale_name(to), 0, &scales)
}

fn factor_slots(job: &Job, dtype: Dtype, int8: bool) -> Result<Vec<Slot>> {
    let Job { matrix, spec, .. } = job;
    let per = scales_of(matrix.kind);
    let (stored, terms) = (stored_matrix(matrix), spec.terms());
    let mut slots = Vec::new();
    for (t, term) in terms.iter().enumerate() {
        let name = |which: &str| factor_name(&stored, terms.len(), t, which);
        let factor = |which: &str, shape: Vec<usize>, int8: bool| match int8 {
            true => Vec::from(coded(name(which), &shape, per.shape(&shape))),
            false => vec![Slot { name: name(which), dtype, shape }],
        };
        let indices = |which: &str, length| Slot { name: name(which), dtype: Dtype::I64, shape: vec![length] };
        let (rows, columns) = match term {
            TermSpec::Kronecker(spec) => {
                let shape = spec.shape(matrix.rows, matrix.columns)?;
                let KroneckerShape { m1, n1, m2, n2, rank } = shape;
                slots.extend(factor("A", vec![rank, m1, n1], int8 && !shape.large_blocks()));
                slots.extend(factor("B", vec![rank, m2, n2], int8 && shape.large_blocks()));
                (spec.permute.rows(), spec.permute.columns())
            }
            TermSpec::LowRank { rank } => {
                let shape = LowRankShape::new(matrix.rows, matrix.columns, *rank)?;
                slots.extend(factor("left", vec![shape.left().0, shape.left().1], int8));
                slots.extend(factor("right", vec![shape.right().0, shape.right().1], int8));
                (shape.pivots_on_rows(), !shape.pivots_on_rows())
            }
            TermSpec::Grouped(groups) => {
                let shape = GroupedShape::new(matrix.rows, matrix.columns, groups)?;
                for (which, values, rows) in
                    [("left", shape.left(), shape.left_rows()), ("right", shape.right(), shape.right_rows())]
                {
                    match int8 {
                        true => slots.extend(coded(name(which), &[values], vec![rows])),
                        false => slots.push(Slot { name: name(which), dtype, shape: vec![values] }),
                    }
                }
                slots.push(indices("input_permutation", matrix.rows));
                slots.push(indices("output_permutation", groups.len() * matrix.columns));
                (false, false)
            }
        };
        if rows {
            slots.push(indices("input_permutation", matrix.rows));
        }
        if columns {
            slots.push(indices("output_permutation", matrix.columns));
        }
    }
    Ok(slots)
}

pub(super) fn write_factors(writer: &Writer, matrix: &Matrix, fit: &Fit, int8: bool) -> Result<()> {
    let stored = stored_matrix(matrix);
    let write = |name: &str, values: &[f32], shape: (usize, usize), int8: bool| match int8 {
        true => write_codes(writer, name, &matrix.name, values, shape, scales_of(matrix.kind)),
        false => writer.write_floats(name, 0, values),
    };
    for (t, term) in fit.terms.iter().enumerate() {
        let name = |which| factor_name(&stored, fit.terms.len(), t, which);
        let of_groups;
        let (rows, columns) = match term {
            Term::Kronecker(Decomposition { sum, row_permutation: rows, column_permutation: columns }) => {
                let KroneckerShape { m1, n1, m2, n2, .. } = sum.shape;
                write(&name("A"), &sum.a, (m1, n1), int8 && !sum.shape.large_blocks())?;
                write(&name("B"), &sum.b, (m2, n2), int8 && sum.shape.large_blocks())?;
                (rows.as_ref(), columns.as_ref())
            }
            Term::LowRank(LowRank { shape, left, right, order, .. }) => {
                write(&name("left"), left, shape.left(), int8)?;
                write(&name("right"), right, shape.right(), int8)?;
                if shape.pivots_on_rows() { (Some(order), None) } else { (None, Some(order)) }
            }
            Term::Grouped(grouped) => {
                let (left, right) = grouped.factors();
                if int8 {
                    let groups = grouped.shape.pieces();
                    let (of_left, of_right): (Vec<_>, Vec<_>) =
                        groups.map(|(group, ..)| (group.left(), group.right())).unzip();
                    write_groups(writer, &name("left"), &matrix.name, &left, &of_left)?;
                    write_groups(writer, &name("right"), &matrix.name, &right, &of_right)?;
                } else {
                    writer.write_floats(&name("left"), 0, &left)?;
                    writer.write_floats(&name("right"), 0, &right)?;
                }
                of_groups = grouped.column_order();
                (Some(&grouped.order), Some(&of_groups))
            }
        };
        if let Some(rows) = rows {
            // A linear map gathers its input by `p`. An embedding looks up the new position of row `id`, which is the
            // inverse.
            let inverse = (matrix.kind == Kind::Embedding).then(|| rows.inverse());
            writer.write_indices(&name("input_permutation"), inverse.as_ref().unwrap_or(rows).as_slice())?;
        }
        if let Some(inverse) = columns.map(Permutation::inverse) {
            writer.write_indices(&name("output_permutation"), inverse.as_slice())?;
        }
    }
    Ok(())
}
