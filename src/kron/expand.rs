//! The dense matrix of a Kronecker sum, with rows and columns in any order.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::numeric::memory::zeros;
use crate::numeric::simd::add_combination;
use crate::progress::{Parallelism, Progress};
use crate::spec::KroneckerShape;

/// `K[rows][:, columns]` for `K = Σ_k A_k ⊗ B_k`, row-major `(m, n)`.
///
/// `a : (rank, m1, n1)` and `b : (rank, m2, n2)` are row-major; `rows` and `columns` are gather indices, or `None`
/// for the sum's own order. Sums over the rank are in f32. The result is the same for any number of threads.
///
/// # Errors
/// [`Error::Shape`] for factors or indices of another length than `shape` says; [`Error::Cancelled`].
///
/// # Cost
/// `rank·m·n` MACs and one random read an entry: some three milliseconds for 768 × 3072, rank 4, on one core.
///
/// # Panics
/// If an index is out of range.
///
/// ```
/// use tqcompressor::kron::expand;
/// use tqcompressor::progress::{Parallelism, Progress};
/// use tqcompressor::spec::KroneckerShape;
///
/// let shape = KroneckerShape::new(2, 2, (1, 2), 1).unwrap();
/// let (a, b) = ([1.0, 10.0], [3.0, 4.0]);
/// let swapped = expand(shape, &a, &b, Some(&[1, 0]), None, Parallelism::Sequential, &Progress::default());
/// assert_eq!(swapped.unwrap(), [30.0, 40.0, 3.0, 4.0]);
/// ```
pub fn expand(
    shape: KroneckerShape,
    a: &[f32],
    b: &[f32],
    rows: Option<&[usize]>,
    columns: Option<&[usize]>,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<Vec<f32>> {
    let KroneckerShape { n1, m2, n2, rank, .. } = shape;
    let (m, n) = (shape.rows(), shape.columns());
    let lengths = [a.len(), b.len(), rows.map_or(m, <[_]>::len), columns.map_or(n, <[_]>::len)];
    let expected = [rank * shape.blocks(), rank * shape.block_entries(), m, n];
    if lengths != expected {
        return Err(Error::Shape {
            operation: "expand",
            expected: format!("A, B, rows and columns of {expected:?} values"),
            got: format!("{lengths:?}"),
        });
    }
    // Add long vectors: rows of the longer factor.
    let length = n1.max(n2);
    let places = |column: usize| if n1 < n2 { column } else { column % n2 * n1 + column / n2 };
    let places: Vec<usize> = (0..n).map(|column| places(columns.map_or(column, |columns| columns[column]))).collect();
    let mut matrix = zeros(m * n);
    let scratch = || (vec![0.0; n], vec![0.0; rank]);
    let make = |(made, factors): &mut (Vec<f32>, Vec<f32>), (row, out): (usize, &mut [f32])| {
        progress.check()?;
        let row = rows.map_or(row, |rows| rows[row]);
        let rows_of_a: Vec<_> = a.chunks_exact(shape.blocks()).map(|a| &a[row / m2 * n1..][..n1]).collect();
        let rows_of_b: Vec<_> = b.chunks_exact(shape.block_entries()).map(|b| &b[row % m2 * n2..][..n2]).collect();
        let (long, short) = if n1 < n2 { (rows_of_b, rows_of_a) } else { (rows_of_a, rows_of_b) };
        made.fill(0.0);
        for (at, made) in made.chunks_exact_mut(length).enumerate() {
            factors.iter_mut().zip(&short).for_each(|(factor, short)| *factor = short[at]);
            add_combination(made, factors, &long);
        }
        out.iter_mut().zip(&places).for_each(|(out, &place)| *out = made[place]);
        Ok(())
    };
    match parallelism {
        Parallelism::Sequential => {
            let mut scratch = scratch();
            matrix.chunks_mut(n).enumerate().try_for_each(|item| make(&mut scratch, item))?;
        }
        Parallelism::Rayon => matrix.par_chunks_mut(n).enumerate().try_for_each_init(scratch, make)?,
    }
    Ok(matrix)
}
