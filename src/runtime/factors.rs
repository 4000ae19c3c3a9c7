//! Products of a few vectors with factors as torch modules store them: in × out, or as the rows of an embedding.
//!
//! A layer is one call: gather, both products, gather and bias. Every factor is read once. Sums are in f32 whatever the
//! dtype of the factors, and the same for any number of threads.

use super::kernels::{add_scaled, dot_values};
use super::rows::padded;
use super::thread_pool::ThreadPool;
use crate::error::{Error, Result};
use crate::numeric::Values;
use crate::numeric::simd::{COMBINED, add_combination, add_combinations};

/// Values of a matrix in one task, at least: a hundred microseconds of memory traffic would leave other threads idle.
const TASK: usize = 1 << 15;
/// The most tasks of one matrix. Each has sums of its own, which are added up at the end.
const TASKS: usize = 16;
/// Columns whose halves are widened at a time: with all rows of a group they fit in the first-level cache.
const TILE: usize = 512;
/// Rows of outputs in one task of a transposed matrix are a multiple of this.
const DOTTED: usize = 4;

/// Borrowed matrices of one shape, one after the other: `(terms, rows, columns)`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Factor<'a> {
    values: Values<'a>,
    rows: usize,
    columns: usize,
}

impl<'a> Factor<'a> {
    /// Matrices of that shape.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `values` are `terms · rows · columns`.
    pub fn new(values: Values<'a>, terms: usize, rows: usize, columns: usize) -> Result<Self> {
        if terms.checked_mul(rows).and_then(|size| size.checked_mul(columns)) != Some(values.len()) {
            return Err(unlike(format!("a factor of shape ({terms}, {rows}, {columns})"), values.len()));
        }
        Ok(Self { values, rows, columns })
    }

    fn terms(&self) -> usize {
        self.values.len().checked_div(self.rows * self.columns).unwrap_or(0)
    }

    /// Inputs and outputs of a matrix, which is transposed on request.
    fn sides(&self, transposed: bool) -> (usize, usize) {
        if transposed { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }

    /// One of the matrices.
    fn term(&self, index: usize) -> Self {
        let size = self.rows * self.columns;
        Self { values: self.values.slice(index * size..(index + 1) * size), ..*self }
    }
}

/// What surrounds the products of a layer. `input` and `output` are gather indices.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sides<'a> {
    /// Where each of the products' inputs is in `x`.
    pub input: Option<&'a [i64]>,
    /// Where each output is among those of the products.
    pub output: Option<&'a [i64]>,
    /// Added to the outputs.
    pub bias: Option<Values<'a>>,
    /// Whether the factors are those of the transposed matrix, as in the output layer of an embedding.
    pub transposed: bool,
}

/// `y = x W + bias` for `W[p] = [I; left] right` with `sides.input`, else for `W[:, q] = left [I right]`.
///
/// `x` has `count` vectors, `y` as many. With `sides.transposed`, `left` and `right` are transposed first.
///
/// # Errors
/// [`Error::Shape`] for factors, indices or a bias of other lengths, and for an index that is out of range.
///
/// ```
/// use tqcompressor::numeric::Values;
/// use tqcompressor::runtime::{Factor, Sides, ThreadPool, times_low_rank};
/// let pool = ThreadPool::new(1).expect("no thread is started");
/// let left = Factor::new(Values::F32(&[2.0, 3.0]), 1, 2, 1)?;
/// let right = Factor::new(Values::F32(&[10.0]), 1, 1, 1)?;
/// // W = [2 20; 3 30]
/// assert_eq!(times_low_rank(&[1.0, 1.0], 1, left, right, Sides::default(), &pool)?, [5.0, 50.0]);
/// # Ok::<(), tqcompressor::Error>(())
/// ```
pub fn times_low_rank(
    x: &[f32],
    count: usize,
    left: Factor<'_>,
    right: Factor<'_>,
    sides: Sides<'_>,
    pool: &ThreadPool,
) -> Result<Vec<f32>> {
    let ((inputs, rank), (inner, outputs)) = (left.sides(sides.transposed), right.sides(sides.transposed));
    if rank != inner || left.values.len() != inputs * rank || right.values.len() != inner * outputs {
        return Err(unlike(format!("a right factor of {rank} inputs, and one matrix each"), inner));
    }
    let product = |factor, x: &[f32]| {
        let mut y = times(&[(factor, x)], count, sides.transposed, pool);
        y.pop().expect("one product")
    };
    if sides.input.is_some() {
        let x = gathered(x, count, inputs + rank, sides.input)?;
        // The inputs beside the identity, one vector after the other.
        let others: Vec<f32> = x.chunks_exact((inputs + rank).max(1)).flat_map(|x| &x[rank..]).copied().collect();
        let mut h = product(left, &others);
        for (h, x) in h.chunks_exact_mut(rank.max(1)).zip(x.chunks_exact((inputs + rank).max(1))) {
            add_scaled(h, 1.0, &x[..rank]);
        }
        return finished(product(right, &h), count, outputs, sides);
    }
    let x = gathered(x, count, inputs, None)?;
    let h = product(left, &x);
    let beyond = product(right, &h);
    let mut y = Vec::with_capacity(count * (rank + outputs));
    for t in 0..count {
        y.extend_from_slice(&h[t * rank..][..rank]);
        y.extend_from_slice(&beyond[t * outputs..][..outputs]);
    }
    finished(y, count, rank + outputs, sides)
}

/// `y = x W + bias` for `W[p][:, q] = Σ_k A_k ⊗ B_k`: `a` holds all `A_k`, `b` all `B_k`.
///
/// With `sides.transposed` both are transposed first. The larger of the two is read once, and multiplies as many vectors at
/// a time as the smaller one has rows or columns.
///
/// # Errors
/// As [`times_low_rank`].
pub fn times_kronecker(
    x: &[f32],
    count: usize,
    a: Factor<'_>,
    b: Factor<'_>,
    sides: Sides<'_>,
    pool: &ThreadPool,
) -> Result<Vec<f32>> {
    let terms = a.terms();
    if terms != b.terms() {
        return Err(unlike(format!("B with the {terms} terms of A"), b.terms()));
    }
    let ((m1, n1), (m2, n2)) = (a.sides(sides.transposed), b.sides(sides.transposed));
    // A ⊗ B is B ⊗ A in another order of rows and columns.
    let exchanged = m1 * n1 < m2 * n2;
    let (large, small) = if exchanged { (b, a) } else { (a, b) };
    let ((height, width), (s, u)) = (large.sides(sides.transposed), small.sides(sides.transposed));
    let x = gathered(x, count, m1 * m2, sides.input)?;
    // Vectors that the large factor multiplies, (count·s, height).
    let x = if exchanged { x } else { transposed(&x, m1, m2) };
    let weights = effective(small, sides.transposed);
    let weight = |k: usize, i: usize, j: usize| weights[(k * s + i) * u + j];

    let mut y = vec![0.0; count * u * width];
    if s * width * (height + u) <= u * height * (s + width) {
        let products: Vec<_> = (0..terms).map(|k| (large.term(k), &x[..])).collect();
        let inner = times(&products, count * s, sides.transposed, pool);
        let mut factors = vec![0.0; terms * s];
        for (row, y) in y.chunks_exact_mut(width.max(1)).enumerate() {
            let (t, j) = (row / u, row % u);
            factors.iter_mut().enumerate().for_each(|(at, factor)| *factor = weight(at / s, at % s, j));
            let rows: Vec<_> = (0..terms * s).map(|at| &inner[at / s][(t * s + at % s) * width..][..width]).collect();
            add_combination(y, &factors, &rows);
        }
    } else {
        let mut vectors = vec![vec![0.0; count * u * height]; terms];
        let mut factors = vec![0.0; s];
        for (k, vectors) in vectors.iter_mut().enumerate() {
            for (row, vector) in vectors.chunks_exact_mut(height.max(1)).enumerate() {
                let (t, j) = (row / u, row % u);
                factors.iter_mut().enumerate().for_each(|(i, factor)| *factor = weight(k, i, j));
                let rows: Vec<_> = (0..s).map(|i| &x[(t * s + i) * height..][..height]).collect();
                add_combination(vector, &factors, &rows);
            }
        }
        let products: Vec<_> = vectors.iter().enumerate().map(|(k, x)| (large.term(k), &x[..])).collect();
        for product in times(&products, count * u, sides.transposed, pool) {
            add_scaled(&mut y, 1.0, &product);
        }
    }
    let y = if exchanged { y } else { transposed(&y, n2, n1) };
    finished(y, count, n1 * n2, sides)
}

/// Each of several matrices times `count` vectors of its own, as `(count, outputs)`. All threads do one step.
fn times(products: &[(Factor<'_>, &[f32])], count: usize, transposed: bool, pool: &ThreadPool) -> Vec<Vec<f32>> {
    if transposed { times_transposed(products, count, pool) } else { times_in_order(products, count, pool) }
}

/// `x W` for matrices in × out: the rows of `W`, weighted by the values of the vectors, are added up.
fn times_in_order(products: &[(Factor<'_>, &[f32])], count: usize, pool: &ThreadPool) -> Vec<Vec<f32>> {
    // Parts of the rows, each of them contiguous: memory is read faster than by columns. They depend on the shapes alone.
    let rows_of_task = |factor: &Factor<'_>| {
        let tasks = factor.values.len().div_ceil(TASK).clamp(1, TASKS);
        factor.rows.div_ceil(tasks).max(1).next_multiple_of(COMBINED)
    };
    let sums_of = |factor: &Factor<'_>| factor.rows.div_ceil(rows_of_task(factor)).max(1) * count * factor.columns;
    let mut sums: Vec<_> = products.iter().map(|(factor, _)| vec![0.0; sums_of(factor)]).collect();
    let mut tasks = Vec::new();
    for ((factor, x), sums) in products.iter().zip(&mut sums) {
        let size = count * factor.columns;
        if size > 0 {
            let parts = sums.chunks_exact_mut(size).enumerate();
            tasks.extend(parts.map(|(part, sums)| (factor, *x, part * rows_of_task(factor), sums)));
        }
    }
    pool.for_each(tasks.into_iter(), |(factor, x, first, sums)| {
        let last = (first + rows_of_task(factor)).min(factor.rows);
        combine(factor, first..last, x, sums);
    });
    for ((factor, _), sums) in products.iter().zip(&mut sums) {
        let size = count * factor.columns;
        let (total, others) = sums.split_at_mut(size);
        others.chunks_exact(size.max(1)).for_each(|other| add_scaled(total, 1.0, other));
        sums.truncate(size);
    }
    sums
}

/// Adds the rows of a range, weighted by their values in each vector of `x`, to that vector's sums.
fn combine(factor: &Factor<'_>, rows: std::ops::Range<usize>, x: &[f32], sums: &mut [f32]) {
    let (height, width) = (factor.rows, factor.columns);
    let count = sums.len() / width;
    let mut scratch = Vec::new();
    let groups = rows.len() / COMBINED;
    for first in (0..groups).map(|group| rows.start + group * COMBINED) {
        if let Values::F32(values) = factor.values {
            let ahead = COMBINED * width;
            combine_group(&values[first * width..], width, (x, height, first), sums, (width, count), ahead);
            continue;
        }
        for start in (0..width).step_by(TILE) {
            let tile = TILE.min(width - start);
            scratch.resize(COMBINED * tile, 0.0);
            for (k, wide) in scratch.chunks_exact_mut(tile).enumerate() {
                let at = (first + k) * width + start;
                factor.values.slice(at..at + tile).upcast(wide);
            }
            combine_group(&scratch, tile, (x, height, first), &mut sums[start..], (width, count), 0);
        }
    }
    for row in rows.start + groups * COMBINED..rows.end {
        let row_values = factor.values.row(row, width, &mut scratch);
        for (t, sums) in sums.chunks_exact_mut(width).enumerate() {
            add_scaled(sums, x[t * height + row], row_values);
        }
    }
}

/// One group of rows for all vectors, of which a few share a pass. `x` comes with the length of its vectors and the place
/// of the first row, `sums` with their distance and number.
fn combine_group(
    rows: &[f32],
    width: usize,
    (x, length, first): (&[f32], usize, usize),
    sums: &mut [f32],
    (distance, count): (usize, usize),
    ahead: usize,
) {
    let mut t = 0;
    while t < count {
        // Only the first pass over the rows waits for memory.
        let ahead = if t == 0 { ahead } else { 0 };
        let (x, sums) = (&x[t * length + first..], &mut sums[t * distance..]);
        let together = match count - t {
            left @ ..3 => left,
            3 => 2,
            _ => 4,
        };
        match together {
            1 => add_combinations(sums, distance, &factors::<1>(x, length), rows, width, ahead),
            2 => add_combinations(sums, distance, &factors::<2>(x, length), rows, width, ahead),
            _ => add_combinations(sums, distance, &factors::<4>(x, length), rows, width, ahead),
        }
        t += together;
    }
}

/// The values of the next vectors by which a group of rows is weighted.
fn factors<const R: usize>(x: &[f32], length: usize) -> [[f32; COMBINED]; R] {
    std::array::from_fn(|r| std::array::from_fn(|k| x[r * length + k]))
}

/// `x Wᵀ`: the rows of `W` are dotted with the vectors.
fn times_transposed(products: &[(Factor<'_>, &[f32])], count: usize, pool: &ThreadPool) -> Vec<Vec<f32>> {
    let padded: Vec<_> = products.iter().map(|(factor, x)| padded(x, factor.columns)).collect();
    // Each `(outputs, count)`.
    let mut columns: Vec<_> = products.iter().map(|(factor, _)| vec![0.0; factor.rows * count]).collect();
    let mut tasks = Vec::new();
    for (((factor, _), x), out) in products.iter().zip(&padded).zip(&mut columns) {
        let rows = TASK.div_ceil(factor.columns.max(1)).next_multiple_of(DOTTED);
        let pieces = out.chunks_mut((rows * count).max(1)).enumerate();
        tasks.extend(pieces.map(|(piece, out)| (factor, &x[..], piece * rows, out)));
    }
    pool.for_each(tasks.into_iter(), |(factor, x, first, out)| {
        dot_values(factor.values, first, factor.columns, x, count, out);
    });
    if count < 2 {
        return columns;
    }
    columns.iter().map(|columns| transposed(columns, columns.len() / count, count)).collect()
}

/// Matrices `(rows, columns)`, one after the other, transposed.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    let size = (rows * columns).max(1);
    for (values, out) in values.chunks_exact(size).zip(out.chunks_exact_mut(size)) {
        for (j, out) in out.chunks_exact_mut(rows).enumerate() {
            out.iter_mut().zip(values.iter().skip(j).step_by(columns)).for_each(|(out, &value)| *out = value);
        }
    }
    out
}

/// All matrices of a factor in f32, each transposed on request.
fn effective(factor: Factor<'_>, is_transposed: bool) -> Vec<f32> {
    let values = factor.values.as_f32(&mut Vec::new()).to_vec();
    if is_transposed { transposed(&values, factor.rows, factor.columns) } else { values }
}

/// Vectors of `length` values in the order of the indices.
fn gathered(x: &[f32], count: usize, length: usize, indices: Option<&[i64]>) -> Result<Vec<f32>> {
    if count.checked_mul(length) != Some(x.len()) {
        return Err(unlike(format!("{count} vectors of {length}"), x.len()));
    }
    let Some(indices) = indices else { return Ok(x.to_vec()) };
    if indices.len() != length {
        return Err(unlike(format!("{length} indices of the inputs"), indices.len()));
    }
    let mut out = Vec::with_capacity(x.len());
    for x in x.chunks_exact(length.max(1)) {
        for &index in indices {
            out.push(*x.get(usize::try_from(index).unwrap_or(usize::MAX)).ok_or_else(|| out_of_range(index, length))?);
        }
    }
    Ok(out)
}

/// The outputs in their order, with the bias.
fn finished(y: Vec<f32>, count: usize, length: usize, sides: Sides<'_>) -> Result<Vec<f32>> {
    let mut y = match sides.output {
        None => y,
        Some(indices) if indices.len() != length => {
            return Err(unlike(format!("{length} indices of the outputs"), indices.len()));
        }
        Some(_) => gathered(&y, count, length, sides.output)?,
    };
    if let Some(bias) = sides.bias {
        if bias.len() != length {
            return Err(unlike(format!("a bias of {length}"), bias.len()));
        }
        let mut scratch = Vec::new();
        let bias = bias.as_f32(&mut scratch);
        y.chunks_exact_mut(length.max(1)).for_each(|y| add_scaled(y, 1.0, bias));
    }
    Ok(y)
}

fn out_of_range(index: i64, length: usize) -> Error {
    Error::Shape { operation: "factored layer", expected: format!("indices below {length}"), got: index.to_string() }
}

fn unlike(expected: String, got: usize) -> Error {
    Error::Shape { operation: "factored layer", expected, got: got.to_string() }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;
    use crate::numeric::simd::level::testing::on_each;
    use crate::testing::noise;

    /// Small integers, whose sums are exact in any order, and exact in halves.
    fn integers(count: usize, seed: u64) -> Vec<f32> {
        noise(count, seed).into_iter().map(|value| (3.0 * value).round()).collect()
    }

    fn indices(length: usize, seed: u64) -> Vec<i64> {
        let keys = noise(length, seed);
        let mut order: Vec<_> = (0..length).collect();
        order.sort_by(|&i, &j| keys[i].total_cmp(&keys[j]));
        order.into_iter().map(|i| i64::try_from(i).unwrap()).collect()
    }

    fn pools() -> [ThreadPool; 2] {
        [1, 3].map(|threads| ThreadPool::new(threads).unwrap())
    }

    /// The matrix whose rows are stored transposed.
    fn stored(values: &[f32], rows: usize, columns: usize, is_transposed: bool) -> Vec<f32> {
        if is_transposed { transposed(values, rows, columns) } else { values.to_vec() }
    }

    fn factor(values: &[f32], terms: usize, rows: usize, columns: usize, is_transposed: bool) -> Factor<'_> {
        let (rows, columns) = if is_transposed { (columns, rows) } else { (rows, columns) };
        Factor::new(Values::F32(values), terms, rows, columns).unwrap()
    }

    /// `y = x W + bias` for a `W` given by its entries.
    fn dense(x: &[f32], count: usize, m: usize, n: usize, w: impl Fn(usize, usize) -> f32, bias: &[f32]) -> Vec<f32> {
        let y = |t: usize, j: usize| bias[j] + (0..m).map(|i| x[t * m + i] * w(i, j)).sum::<f32>();
        (0..count * n).map(|at| y(at / n, at % n)).collect()
    }

    proptest! {
        #[test]
        fn low_rank_layers_are_their_dense_matrices(
            (k, others, wide) in (1..20_usize, 0..40_usize, 1..40_usize), count in 0..7_usize,
            on_rows in any::<bool>(), is_transposed in any::<bool>(), seed in any::<u64>(),
        ) {
            // With the identity on the rows, `others` rows are beside it, else `wide` columns.
            let (inputs, outputs) = if on_rows { (others, wide) } else { (others + k, wide) };
            let (left, right) = (integers(inputs * k, seed), integers(k * outputs, seed ^ 1));
            let (m, n) = if on_rows { (others + k, wide) } else { (inputs, k + wide) };
            let (order, x, bias) = (indices(if on_rows { m } else { n }, seed ^ 2), integers(count * m, seed ^ 3), integers(n, seed ^ 4));
            let entry = |i: usize, j: usize| {
                // Of the matrix before the permutation.
                let product = |i: usize, j: usize| (0..k).map(|r| left[i * k + r] * right[r * outputs + j]).sum::<f32>();
                match on_rows {
                    true if i < k => right[i * outputs + j],
                    true => product(i - k, j),
                    false if j < k => left[i * k + j],
                    false => product(i, j - k),
                }
            };
            let place = |at: usize| order.iter().position(|&index| index == i64::try_from(at).unwrap()).unwrap();
            let expected = dense(&x, count, m, n, |i, j| {
                if on_rows { entry(place(i), j) } else { entry(i, usize::try_from(order[j]).unwrap()) }
            }, &bias);
            let (left, right) = (stored(&left, inputs, k, is_transposed), stored(&right, k, outputs, is_transposed));
            let (left, right) = (factor(&left, 1, inputs, k, is_transposed), factor(&right, 1, k, outputs, is_transposed));
            let (input, output) = if on_rows { (Some(&order[..]), None) } else { (None, Some(&order[..])) };
            let sides = Sides { input, output, bias: Some(Values::F32(&bias)), transposed: is_transposed };
            for pool in pools() {
                prop_assert_eq!(&times_low_rank(&x, count, left, right, sides, &pool).unwrap(), &expected);
            }
        }

        #[test]
        fn kronecker_layers_are_their_dense_matrices(
            (m1, n1) in (1..12_usize, 1..12_usize), (m2, n2) in (1..12_usize, 1..12_usize), rank in 1..4_usize,
            count in 0..4_usize, (permuted, biased, is_transposed) in any::<(bool, bool, bool)>(), seed in any::<u64>(),
        ) {
            let (m, n) = (m1 * m2, n1 * n2);
            let (a, b) = (integers(rank * m1 * n1, seed), integers(rank * m2 * n2, seed ^ 1));
            let (input, output) = (indices(m, seed ^ 2), indices(n, seed ^ 3));
            let (x, bias) = (integers(count * m, seed ^ 4), integers(n, seed ^ 5));
            let entry = |i: usize, j: usize| {
                let of = |k: usize| a[(k * m1 + i / m2) * n1 + j / n2] * b[(k * m2 + i % m2) * n2 + j % n2];
                (0..rank).map(of).sum::<f32>()
            };
            let at = |order: &[i64], i: usize| if permuted { usize::try_from(order[i]).unwrap() } else { i };
            let place = |i: usize| (0..m).find(|&p| at(&input, p) == i).unwrap();
            let added = if biased { bias.clone() } else { vec![0.0; n] };
            let expected = dense(&x, count, m, n, |i, j| entry(place(i), at(&output, j)), &added);
            let (a, b) = (stored(&a, m1, n1, is_transposed), stored(&b, m2, n2, is_transposed));
            let (a, b) = (factor(&a, rank, m1, n1, is_transposed), factor(&b, rank, m2, n2, is_transposed));
            let sides = Sides {
                input: permuted.then_some(&input),
                output: permuted.then_some(&output),
                bias: biased.then_some(Values::F32(&bias)),
                transposed: is_transposed,
            };
            for pool in pools() {
                prop_assert_eq!(&times_kronecker(&x, count, a, b, sides, &pool).unwrap(), &expected);
            }
        }
    }

    #[test]
    fn the_bits_are_the_same_for_any_number_of_threads_of_vectors_and_on_every_instruction_set() {
        // Several tasks of each factor, and rows that make no whole group.
        let (others, rank, n) = (203, 301, 517);
        let (left, right, x) = (noise(others * rank, 1), noise(rank * n, 2), noise(5 * (others + rank), 3));
        let order = indices(others + rank, 4);
        let halves = |values: &[f32]| values.iter().map(|&value| f16::from_f32(value)).collect::<Vec<_>>();
        let bfloats = |values: &[f32]| values.iter().map(|&value| bf16::from_f32(value)).collect::<Vec<_>>();
        let (left_halves, right_halves) = (halves(&left), halves(&right));
        let (left_bfloats, right_bfloats) = (bfloats(&left), bfloats(&right));
        let kinds = [
            (Values::F32(&left), Values::F32(&right)),
            (Values::F16(&left_halves), Values::F16(&right_halves)),
            (Values::Bf16(&left_bfloats), Values::Bf16(&right_bfloats)),
        ];
        for (left, right) in kinds {
            let factors = (Factor::new(left, 1, others, rank).unwrap(), Factor::new(right, 1, rank, n).unwrap());
            let sides = Sides { input: Some(&order), ..Sides::default() };
            let run = |x: &[f32], count: usize, threads: usize| {
                let pool = ThreadPool::new(threads).unwrap();
                times_low_rank(x, count, factors.0, factors.1, sides, &pool).unwrap()
            };
            // Helpers of a pool have the process's instruction set.
            let first = run(&x, 5, 1);
            for (set, found) in on_each(|| run(&x, 5, 1)) {
                assert_eq!(found, first, "{set:?}");
            }
            assert_eq!(run(&x, 5, 2), first);
            assert_eq!(run(&x, 5, 4), first);
            let alone: Vec<_> = x.chunks_exact(others + rank).flat_map(|x| run(x, 1, 1)).collect();
            assert_eq!(alone, first);
        }
    }

    #[test]
    fn halves_are_multiplied_as_they_are_and_wrong_lengths_and_indices_are_errors() {
        let values = [1.5, -2.0, 0.25, 3.0, 1.0, 2.0].map(f16::from_f32);
        let pool = ThreadPool::new(1).unwrap();
        let left = Factor::new(Values::F16(&values[..4]), 1, 2, 2).unwrap();
        let right = Factor::new(Values::F16(&values[4..]), 1, 2, 1).unwrap();
        let run = |x: &[f32], sides| times_low_rank(x, 1, left, right, sides, &pool);
        // W = [1.5 −2 −2.5; 0.25 3 6.25]
        assert_eq!(run(&[2.0, 4.0], Sides::default()).unwrap(), [4.0, 8.0, 20.0]);
        assert!(matches!(run(&[2.0], Sides::default()), Err(Error::Shape { .. })));
        for wrong in [&[0, 1][..], &[0, 1, 3], &[0, 1, -1]] {
            assert!(matches!(
                run(&[2.0, 4.0], Sides { output: Some(wrong), ..Sides::default() }),
                Err(Error::Shape { .. })
            ));
            let input = Sides { input: Some(wrong), ..Sides::default() };
            assert!(matches!(run(&[2.0, 4.0, 1.0, 1.0], input), Err(Error::Shape { .. })));
        }
        let bias = Sides { bias: Some(Values::F32(&[1.0])), ..Sides::default() };
        assert!(matches!(run(&[2.0, 4.0], bias), Err(Error::Shape { .. })));
        assert!(Factor::new(Values::F32(&[1.0; 5]), 1, 2, 2).is_err());
        let two = Factor::new(Values::F16(&values[..4]), 2, 2, 1).unwrap();
        assert!(matches!(times_kronecker(&[1.0; 4], 1, two, left, Sides::default(), &pool), Err(Error::Shape { .. })));
    }
}
