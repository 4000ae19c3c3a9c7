//! The one product that everything is made of: vectors times the rows of a stored matrix.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use half::slice::HalfFloatSliceExt as _;

use super::kernels::{TOGETHER, dot_rows};
use super::workers::Workers;
use crate::error::{Error, Result};
use crate::loss::Values;

/// Up to so many vectors the rows are read once for all of them, without being packed for a matrix product first.
const FEW: usize = 2 * TOGETHER;
/// Values of rows that a thread takes at a time.
const TASK: usize = 1 << 15;
/// Rows of one matrix product.
const PANEL: usize = 256;

/// A matrix whose rows are dotted with vectors: `(rows, length)`, contiguous, in the dtype that it was stored in.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    tensor: Tensor,
    /// How many.
    pub rows: usize,
    /// Values of each.
    pub length: usize,
}

impl Rows {
    /// Takes a tensor of two dimensions, copied if it is not contiguous.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        let unexpected = |error: candle_core::Error| Error::Config(format!("weights: {error}"));
        let (rows, length) = tensor.dims2().map_err(unexpected)?;
        let tensor = tensor.contiguous().map_err(unexpected)?;
        if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) || !matches!(tensor.device(), Device::Cpu) {
            return Err(Error::Dtype { expected: "F32, F16 or BF16".into(), got: format!("{:?}", tensor.dtype()) });
        }
        Ok(Self { tensor, rows, length })
    }

    /// Calls `work` with the values.
    fn with<T>(&self, work: impl FnOnce(Values<'_>) -> T) -> T {
        let (storage, layout) = self.tensor.storage_and_layout();
        let range = layout.start_offset()..layout.start_offset() + self.rows * self.length;
        match &*storage {
            Storage::Cpu(CpuStorage::F32(values)) => work(Values::F32(&values[range])),
            Storage::Cpu(CpuStorage::F16(values)) => work(Values::F16(values[range].reinterpret_cast())),
            Storage::Cpu(CpuStorage::BF16(values)) => work(Values::Bf16(values[range].reinterpret_cast())),
            _ => unreachable!("checked when it was made"),
        }
    }

    /// Calls `work` with a row, in f32.
    pub fn with_row<T>(&self, row: usize, work: impl FnOnce(&[f32]) -> T) -> T {
        self.with(|values| work(values.row(row, self.length, &mut Vec::new())))
    }

    /// `out[t, i] = Σ_j x[t, j] · rows[i, j]` for `x : (count, length)` and `out : (count, rows)`.
    ///
    /// The result is the same for any number of threads, and for few vectors that of each does not depend on the others.
    ///
    /// # Cost
    /// Few vectors read the rows once, as fast as memory gives them; many are a matrix product.
    pub fn times(&self, x: &[f32], count: usize, out: &mut [f32], workers: &Workers) {
        debug_assert_eq!((x.len(), out.len()), (count * self.length, count * self.rows));
        if count == 0 || self.rows == 0 {
            return;
        }
        self.with(|values| match count {
            1 => self.few(values, x, 1, out, workers),
            2..=FEW => {
                let mut columns = vec![0.0; out.len()];
                self.few(values, x, count, &mut columns, workers);
                for (i, column) in columns.chunks_exact(count).enumerate() {
                    for (t, &value) in column.iter().enumerate() {
                        out[t * self.rows + i] = value;
                    }
                }
            }
            _ => self.many(values, x, count, out, workers),
        });
    }

    /// As `times`, but `out` is `(rows, count)`.
    fn few(&self, values: Values<'_>, x: &[f32], count: usize, out: &mut [f32], workers: &Workers) {
        let at_a_time = (TASK / self.length.max(1)).next_multiple_of(TOGETHER);
        workers.for_each(out.chunks_mut(at_a_time * count).enumerate(), |(task, out)| {
            let (first, mut scratch) = (task * at_a_time, Vec::new());
            for (group, out) in out.chunks_mut(TOGETHER * count).enumerate() {
                let first = first + group * TOGETHER;
                let rows = values.rows(first..first + out.len() / count, self.length, &mut scratch);
                dot_rows(rows, self.length, x, count, out);
            }
        });
    }

    fn many(&self, values: Values<'_>, x: &[f32], count: usize, out: &mut [f32], workers: &Workers) {
        let panel = (self.rows / 8).next_multiple_of(16).clamp(16, PANEL);
        let x = MatRef::from_row_major_slice(x, count, self.length);
        let out = MatMut::from_row_major_slice_mut(out, count, self.rows);
        let (mut panels, mut rest) = (Vec::with_capacity(self.rows.div_ceil(panel)), out);
        while rest.ncols() > panel {
            let (first, others) = rest.split_at_col_mut(panel);
            panels.push(first);
            rest = others;
        }
        panels.push(rest);
        workers.for_each(panels.into_iter().enumerate(), |(index, out)| {
            let (first, height, mut scratch) = (index * panel, out.ncols(), Vec::new());
            let rows = values.rows(first..first + height, self.length, &mut scratch);
            let rows = MatRef::from_row_major_slice(rows, height, self.length);
            matmul(out, Accum::Replace, x, rows.transpose(), 1.0, Par::Seq);
        });
    }
}
