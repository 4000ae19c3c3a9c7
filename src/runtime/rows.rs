//! Products of vectors with the rows of a stored matrix, on which every linear map is built.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{CpuStorage, DType, Device, Layout, Storage, Tensor, WithDType};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use half::{bf16, f16};

use super::buffers::{Buffer, Buffers};
use super::kernels::{TOGETHER, add_scaled, dot_rows, dot_values, multiply};
use super::order::Order;
use super::thread_pool::ThreadPool;
use crate::error::{Error, Result};
use crate::numeric::Values;
use crate::numeric::int8::scaled;
use crate::numeric::int16::Int16Vectors;
use crate::numeric::memory::zeros;
use crate::numeric::simd::{LANES, ROWS};

/// Up to this many vectors share one pass over the rows. More vectors are a packed matrix product.
pub(super) const FEW: usize = 2 * TOGETHER;
/// Values of rows in one task: few microseconds, as long as one thread waits at the end for the others.
const TASK: usize = 1 << 14;
/// The most tasks of a thread in one product: a long list takes time, too.
const TASKS: usize = 32;
/// Rows of one product of many vectors: a multiple of the rows that a kernel multiplies at a time.
const PANEL: usize = 96;
/// The fewest vectors of one such product, if there are enough.
const VECTORS: usize = 128;
/// How many such products there are at least, with enough vectors: as long as one thread waits at the end for the others.
const TASKS_OF_MANY: usize = 16;
/// Products that are added up one by one; sums of these are added up. One long sum would lose twice as many digits, at
/// the same speed.
const SUMMED: usize = 128;

/// A stored matrix, or several: floating values, or eight-bit integers with scales that broadcast against them.
#[derive(Clone, Debug)]
pub(super) struct Weights {
    values: Tensor,
    scales: Option<Tensor>,
}

impl From<Tensor> for Weights {
    fn from(values: Tensor) -> Self {
        Self { values, scales: None }
    }
}

impl Weights {
    /// Takes the bytes of eight-bit integers, and f32 scales of a shape that broadcasts against theirs.
    pub fn int8(codes: Tensor, scales: Tensor) -> Self {
        Self { values: codes, scales: Some(scales) }
    }

    /// Whether they are eight-bit integers.
    pub fn is_int8(&self) -> bool {
        self.scales.is_some()
    }

    /// The last two dimensions exchanged.
    pub fn transposed(&self) -> Self {
        self.map(|tensor| tensor.transpose(tensor.dims().len() - 2, tensor.dims().len() - 1))
    }

    /// The dimensions in another order.
    pub fn permuted(&self, order: (usize, usize, usize)) -> Self {
        self.map(|tensor| tensor.permute(order))
    }

    /// The floating values as f32, in order.
    pub fn floats(&self) -> Result<Vec<f32>> {
        debug_assert!(!self.is_int8());
        self.values.to_dtype(DType::F32).and_then(|values| values.flatten_all()?.to_vec1()).map_err(unexpected)
    }

    fn map(&self, change: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Self {
        let changed = |tensor| change(tensor).expect("a matrix or several");
        Self { values: changed(&self.values), scales: self.scales.as_ref().map(changed) }
    }
}

/// Borrowed rows.
#[derive(Clone, Copy)]
pub(super) enum Stored<'a> {
    Float(Values<'a>),
    /// With the scale of each row.
    Int8(&'a [i8], &'a [f32]),
}

impl Stored<'_> {
    /// Row `index` as f32: the row itself, or a copy in `scratch`.
    pub fn row<'b>(&'b self, index: usize, width: usize, scratch: &'b mut Vec<f32>) -> &'b [f32] {
        let row = index..index + 1;
        if let Some(values) = self.in_f32(row.clone(), width) {
            return values;
        }
        scratch.resize(width, 0.0);
        self.widen(row, width, scratch);
        scratch
    }

    /// Consecutive rows, where they are stored as f32.
    fn in_f32(&self, rows: Range<usize>, width: usize) -> Option<&[f32]> {
        match self {
            Self::Float(Values::F32(values)) => Some(&values[rows.start * width..rows.end * width]),
            _ => None,
        }
    }

    /// Writes consecutive rows as f32.
    fn widen(&self, rows: Range<usize>, width: usize, out: &mut [f32]) {
        match self {
            Self::Float(values) => values.slice(rows.start * width..rows.end * width).upcast(out),
            Self::Int8(codes, scales) => {
                for (row, out) in rows.zip(out.chunks_exact_mut(width.max(1))) {
                    scaled(&codes[row * width..][..width], scales[row], out);
                }
            }
        }
    }
}

/// A matrix whose rows are dotted with vectors: `(rows, length)`, contiguous, in the dtype that it was stored in.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    tensor: Tensor,
    /// The scale of each row of eight-bit integers, whose bytes the tensor holds; none of floating values.
    scales: Option<Vec<f32>>,
    /// How many.
    pub rows: usize,
    /// Values of each.
    pub length: usize,
}

impl Rows {
    /// Takes a matrix, copied if it is not contiguous.
    ///
    /// # Errors
    /// Of eight-bit integers, unless there is one scale for each row.
    pub fn new(weights: &Weights) -> Result<Self> {
        let tensor = &weights.values;
        let (rows, length) = tensor.dims2().map_err(unexpected)?;
        let contiguous = if tensor.is_contiguous() { tensor.clone() } else { packed(tensor).map_err(unexpected)? };
        Self::checked(contiguous, &weights.scales, rows, length)
    }

    /// Copies three dimensions into `(rows, length)`, in the order of their indices.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_three_dimensions(weights: &Weights, rows: usize, length: usize) -> Result<Self> {
        let packed = packed(&weights.values).and_then(|packed| packed.reshape((rows, length)));
        Self::checked(packed.map_err(unexpected)?, &weights.scales, rows, length)
    }

    fn checked(tensor: Tensor, scales: &Option<Tensor>, rows: usize, length: usize) -> Result<Self> {
        let known = match scales {
            None => matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16),
            Some(scales) => tensor.dtype() == DType::U8 && scales.elem_count() == rows,
        };
        if !known || !matches!(tensor.device(), Device::Cpu) {
            let expected = "F32, F16 or BF16, or I8 with a scale for each row".into();
            return Err(Error::Dtype { expected, got: format!("{:?}", tensor.dtype()) });
        }
        let scales = scales.as_ref().map(|scales| scales.flatten_all()?.to_vec1()).transpose().map_err(unexpected)?;
        Ok(Self { tensor, scales, rows, length })
    }

    /// Whether [`stack`](Self::stack) takes these rows.
    pub fn can_stack(&self, below: &Self) -> bool {
        let alike = self.length == below.length && self.tensor.dtype() == below.tensor.dtype();
        alike && self.scales.is_some() == below.scales.is_some()
    }

    /// Adds rows of the same length and dtype behind these.
    pub fn stack(&mut self, below: &Self) -> Result<()> {
        self.tensor = Tensor::cat(&[&self.tensor, &below.tensor], 0).map_err(unexpected)?;
        self.rows += below.rows;
        if let (Some(scales), Some(others)) = (&mut self.scales, &below.scales) {
            scales.extend_from_slice(others);
        }
        Ok(())
    }

    /// Calls `work` with the values.
    pub fn with<T>(&self, work: impl FnOnce(Stored<'_>) -> T) -> T {
        work(self.stored(&self.tensor.storage_and_layout().0))
    }

    /// The values in the tensor's storage.
    fn stored<'a>(&'a self, storage: &'a Storage) -> Stored<'a> {
        let first = self.tensor.layout().start_offset();
        let range = first..first + self.rows * self.length;
        match (storage, &self.scales) {
            (Storage::Cpu(CpuStorage::F32(values)), _) => Stored::Float(Values::F32(&values[range])),
            (Storage::Cpu(CpuStorage::F16(values)), _) => Stored::Float(Values::F16(&values[range])),
            (Storage::Cpu(CpuStorage::BF16(values)), _) => Stored::Float(Values::Bf16(&values[range])),
            (Storage::Cpu(CpuStorage::U8(values)), Some(scales)) => {
                Stored::Int8(bytemuck::cast_slice(&values[range]), scales)
            }
            _ => unreachable!("checked when it was made"),
        }
    }

    /// Calls `work` with a row, in f32.
    pub fn with_row<T>(&self, row: usize, work: impl FnOnce(&[f32]) -> T) -> T {
        self.with(|values| work(values.row(row, self.length, &mut Vec::new())))
    }

    /// `out += Σ_i weights[i] · rows[i]`.
    pub fn add_combination(&self, weights: &[f32], out: &mut [f32]) {
        self.with(|values| {
            let mut scratch = Vec::new();
            for (i, &weight) in weights.iter().enumerate() {
                add_scaled(out, weight, values.row(i, self.length, &mut scratch));
            }
        });
    }

    /// Puts element `i` of every row at place `order.at(i)`.
    pub fn reorder_values(&mut self, order: &Order) {
        self.select(&order.inverse(), 1);
    }

    /// Puts row `order.at(i)` at place `i`.
    pub fn reorder_rows(&mut self, order: &Order) {
        self.select(order, 0);
    }

    fn select(&mut self, order: &Order, dimension: usize) {
        if !order.is_identity() {
            let length = if dimension == 0 { self.rows } else { self.length };
            let indices: Vec<_> = (0..length).map(|i| u32::try_from(order.at(i)).expect("an index")).collect();
            let selected = Tensor::new(indices, &Device::Cpu).and_then(|at| self.tensor.index_select(&at, dimension));
            self.tensor = selected.expect("an index for every place");
            if let Some(scales) = self.scales.as_mut().filter(|_| dimension == 0) {
                *scales = (0..length).map(|i| scales[order.at(i)]).collect();
            }
        }
    }

    /// `y[t, i] = Σ_j x[t, j] · rows[i, j]` for `x : (count, length)`, as `(count, rows)`.
    ///
    /// The result is the same for any number of threads, and for few vectors that of each does not depend on the
    /// others.
    ///
    /// # Cost
    /// Few vectors read the rows once, as fast as memory gives them; many are a matrix product.
    pub fn times(&self, x: &[f32], count: usize, pool: &ThreadPool) -> Buffer {
        if count <= FEW {
            return times_together(&[(self, x)], count, pool).pop().expect("one product");
        }
        let mut y = pool.buffer(count * self.rows);
        self.times_many(
            MatRef::from_row_major_slice(x, count, self.length),
            y.matrix_mut(count, self.rows),
            false,
            pool,
        );
        y
    }

    /// Writes [`times`](Self::times) of many vectors to `y`, or adds it.
    pub fn times_many(&self, x: MatRef<'_, f32>, y: MatMut<'_, f32>, adds: bool, pool: &ThreadPool) {
        self.with(|values| {
            product_by_panels(x, y, adds, TASKS_OF_MANY, pool, |rows, buffers, multiply| {
                if let Some(rows) = values.in_f32(rows.clone(), self.length) {
                    return multiply(rows);
                }
                let mut wide = buffers.get(rows.len() * self.length);
                values.widen(rows, self.length, &mut wide);
                multiply(&wide);
            });
        });
    }
}

/// Each of several matrices times its few vectors, as [`Rows::times`]. All threads do one step, and wait for one another
/// once.
pub(super) fn times_together(products: &[(&Rows, &[f32])], count: usize, pool: &ThreadPool) -> Vec<Buffer> {
    debug_assert!(count <= FEW && products.iter().all(|(rows, x)| x.len() == count * rows.length));
    // Each `(rows, count)`.
    let mut columns: Vec<_> = products.iter().map(|(rows, _)| pool.buffer(rows.rows * count)).collect();
    let storages: Vec<_> = products.iter().map(|(rows, _)| rows.tensor.storage_and_layout().0).collect();
    let each =
        products.iter().zip(&storages).map(|((rows, x), storage)| Few::new(rows.stored(storage), x, rows.length));
    let each: Vec<_> = each.collect();
    let at_a_time: Vec<_> =
        products.iter().map(|(rows, _)| rows_of_task(rows.rows, rows.length, pool.threads())).collect();
    let mut pieces: Vec<_> =
        columns.iter_mut().zip(&at_a_time).map(|(out, at_a_time)| (&mut out[..], at_a_time * count)).collect();
    pool.for_each_piece(&mut pieces, |product, piece, out| {
        each[product].times(piece * at_a_time[product], products[product].0.length, count, out);
    });
    if count < 2 {
        return columns;
    }
    let transposed = columns.iter().map(|columns| {
        let mut y = pool.buffer(columns.len());
        for (t, y) in y.chunks_exact_mut((columns.len() / count).max(1)).enumerate() {
            y.iter_mut().zip(columns.chunks_exact(count)).for_each(|(y, column)| *y = column[t]);
        }
        y
    });
    transposed.collect()
}

/// Vectors with what may be read beyond the last one.
pub(super) fn padded(x: &[f32], length: usize) -> Cow<'_, [f32]> {
    match length % LANES {
        0 => x.into(),
        _ => x.iter().copied().chain([0.0; LANES]).collect::<Vec<_>>().into(),
    }
}

/// Stored rows, and few vectors in what these are dotted with.
enum Few<'a> {
    Floats(Values<'a>, Cow<'a, [f32]>),
    /// With the scale of each row.
    Int8(&'a [i8], &'a [f32], Int16Vectors),
}

impl<'a> Few<'a> {
    fn new(rows: Stored<'a>, x: &'a [f32], length: usize) -> Self {
        match rows {
            Stored::Float(rows) => Self::Floats(rows, padded(x, length)),
            Stored::Int8(codes, scales) => Self::Int8(codes, scales, Int16Vectors::new(x, length)),
        }
    }

    /// The products of some rows from `first` on, `(rows, count)`.
    fn times(&self, first: usize, length: usize, count: usize, out: &mut [f32]) {
        match self {
            Self::Floats(rows, x) => dot_values(*rows, first, length, x, count, out),
            Self::Int8(codes, scales, x) => {
                dot_rows(&codes[first * length..], length, x.as_slice(), count, out);
                let scales = &scales[first..];
                if count == 1 {
                    return multiply(out, scales);
                }
                for (out, &scale) in out.chunks_exact_mut(count).zip(scales) {
                    out.iter_mut().for_each(|out| *out *= scale);
                }
            }
        }
    }
}

/// How many of the rows make a task: as many in each, and as many tasks for each thread.
fn rows_of_task(rows: usize, length: usize, threads: usize) -> usize {
    let tasks = (rows * length).div_ceil(TASK);
    let tasks = if tasks > 1 { tasks.next_multiple_of(threads).min(TASKS * threads) } else { 1 };
    rows.div_ceil(tasks).next_multiple_of(ROWS)
}

/// Moves matrices into one buffer, in the order in which they are read. Most matrices alone are too small for huge
/// pages.
pub(super) fn move_together(matrices: &mut [&mut Rows]) -> Result<()> {
    fn of_dtype<T: WithDType + Default>(matrices: &mut [&mut Rows]) -> candle_core::Result<()> {
        let mut matrices: Vec<_> = matrices.iter_mut().filter(|matrix| matrix.tensor.dtype() == T::DTYPE).collect();
        let count = matrices.iter().map(|matrix| matrix.rows * matrix.length).sum();
        let mut values = zeros::<T>(count);
        let mut rest = values.as_mut_slice();
        for matrix in &matrices {
            let (storage, layout) = matrix.tensor.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { unreachable!("checked when it was made") };
            let (place, others) = rest.split_at_mut(matrix.rows * matrix.length);
            place.copy_from_slice(&T::cpu_storage_as_slice(storage)?[layout.start_offset()..][..place.len()]);
            rest = others;
        }
        let (values, mut first) = (Tensor::from_vec(values, count, &Device::Cpu)?, 0);
        for matrix in &mut matrices {
            let length = matrix.rows * matrix.length;
            matrix.tensor = values.narrow(0, first, length)?.reshape((matrix.rows, matrix.length))?;
            first += length;
        }
        Ok(())
    }
    let moved = of_dtype::<f32>(matrices).and_then(|()| of_dtype::<f16>(matrices));
    let moved = moved.and_then(|()| of_dtype::<bf16>(matrices));
    moved.and_then(|()| of_dtype::<u8>(matrices)).map_err(unexpected)
}

fn unexpected(error: candle_core::Error) -> Error {
    Error::Config(format!("weights: {error}"))
}

/// A tensor of two or three dimensions and any strides as a contiguous one, on huge pages, which are read a third
/// faster.
fn packed(tensor: &Tensor) -> candle_core::Result<Tensor> {
    fn copy<T: Copy + Default>(values: &[T], layout: &Layout) -> Vec<T> {
        // A block is read and written within the first-level cache.
        const BLOCK: usize = 32;
        let (dims, strides) = (layout.dims(), layout.stride());
        let ([.., rows, length], [.., down, along]) = (dims, strides) else { unreachable!("a matrix or several") };
        let (rows, length, down, along) = (*rows, *length, *down, *along);
        let between = if dims.len() == 3 { strides[0] } else { 0 };
        let mut packed = zeros(layout.shape().elem_count());
        for (matrix, packed) in packed.chunks_exact_mut((rows * length).max(1)).enumerate() {
            let values = &values[layout.start_offset() + matrix * between..];
            for first in (0..rows).step_by(BLOCK) {
                for start in (0..length).step_by(BLOCK) {
                    for i in first..rows.min(first + BLOCK) {
                        for j in start..length.min(start + BLOCK) {
                            packed[i * length + j] = values[i * down + j * along];
                        }
                    }
                }
            }
        }
        packed
    }
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Tensor::from_vec(copy(values, layout), layout.shape(), &Device::Cpu),
        Storage::Cpu(CpuStorage::F16(values)) => Tensor::from_vec(copy(values, layout), layout.shape(), &Device::Cpu),
        Storage::Cpu(CpuStorage::BF16(values)) => Tensor::from_vec(copy(values, layout), layout.shape(), &Device::Cpu),
        Storage::Cpu(CpuStorage::U8(values)) => Tensor::from_vec(copy(values, layout), layout.shape(), &Device::Cpu),
        _ => tensor.contiguous(),
    }
}

/// Writes to `y : (count, ·)`, or adds, the products of `x : (count, length)` with rows that `panel` gives, some at a
/// time, to the function that it gets.
///
/// Of few rows every panel is made for some of the vectors at a time, so that there are about `tasks` equal ones. With 1, no
/// panel is made twice.
pub(super) fn product_by_panels(
    x: MatRef<'_, f32>,
    mut y: MatMut<'_, f32>,
    adds: bool,
    tasks: usize,
    pool: &ThreadPool,
    panel: impl Fn(Range<usize>, &Buffers, &mut dyn FnMut(&[f32])) + Sync,
) {
    let (count, length) = (x.nrows(), x.ncols());
    if y.ncols() == 0 || length == 0 {
        if !adds {
            y.fill(0.0);
        }
        return;
    }
    let pieces = tasks.div_ceil(y.ncols().div_ceil(PANEL)).min(count / VECTORS).max(1);
    let at_a_time = count.div_ceil(pieces).max(1);
    let mut parts = Vec::new();
    let mut rest = y;
    for first in (0..rest.ncols()).step_by(PANEL) {
        let width = PANEL.min(rest.ncols());
        let mut columns;
        (columns, rest) = rest.split_at_col_mut(width);
        for start in (0..count).step_by(at_a_time) {
            let (height, rows) = (at_a_time.min(count - start), columns);
            let part;
            (part, columns) = rows.split_at_row_mut(height);
            parts.push((first, x.subrows(start, height), part));
        }
    }
    let buffers = pool.buffers();
    pool.for_each(parts.into_iter(), |(first, x, mut y)| {
        let height = y.ncols();
        panel(first..first + height, buffers, &mut |rows| {
            let rows = MatRef::from_row_major_slice(rows, height, length);
            for first in (0..length).step_by(SUMMED) {
                let width = SUMMED.min(length - first);
                let how = if first == 0 && !adds { Accum::Replace } else { Accum::Add };
                let (x, rows) = (x.subcols(first, width), rows.subcols(first, width));
                matmul(y.as_mut(), how, x, rows.transpose(), 1.0, Par::Seq);
            }
        });
    });
}
