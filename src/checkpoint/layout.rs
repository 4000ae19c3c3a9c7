//! Where a matrix lies in its tensor's bytes, and reading it from there.

use std::borrow::Cow;

use crate::numeric::Float;

/// Bytes as `f32` without a copy, where the machine is little-endian and the bytes happen to be aligned.
#[must_use]
pub fn borrow_f32(bytes: &[u8]) -> Option<&[f32]> {
    if cfg!(target_endian = "little") { bytemuck::try_cast_slice(bytes).ok() } else { None }
}

/// How a matrix lies in its tensor's bytes.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Columns of the stored tensor.
    pub stored_columns: usize,
    /// Whether the matrix is the transpose of the stored tensor.
    pub transposed: bool,
    /// Where the matrix's columns begin in the in × out tensor.
    pub first_column: usize,
}

/// Reads a `rows × columns` matrix, row-major, in in × out orientation. Borrows where the bytes are already just that.
///
/// `bytes` is the whole tensor. Cost: one pass, and one copy of the matrix unless borrowed.
#[must_use]
pub fn read_matrix(bytes: &[u8], float: Float, layout: Layout, rows: usize, columns: usize) -> Cow<'_, [f32]> {
    let Layout { stored_columns, transposed, first_column } = layout;
    if !transposed
        && columns == stored_columns
        && float == Float::F32
        && let Some(values) = borrow_f32(bytes)
    {
        return Cow::Borrowed(values);
    }
    let mut matrix = vec![0.0; rows * columns];
    let row_bytes = stored_columns * float.size();
    if !transposed {
        let (from, to) = (first_column * float.size(), (first_column + columns) * float.size());
        for (row, bytes) in matrix.chunks_exact_mut(columns.max(1)).zip(bytes.chunks_exact(row_bytes.max(1))) {
            float.upcast(&bytes[from..to], row);
        }
        return Cow::Owned(matrix);
    }
    // The stored tensor is columns × rows. Transpose in bands of its rows, so that every cache line of the result is
    // filled while it is in the cache.
    const BAND: usize = 16;
    let mut band = vec![0.0; BAND * rows];
    for first in (0..columns).step_by(BAND) {
        let width = BAND.min(columns - first);
        let stored = (first_column + first) * row_bytes;
        float.upcast(&bytes[stored..stored + width * row_bytes], &mut band[..width * rows]);
        for (i, row) in matrix.chunks_exact_mut(columns).enumerate() {
            for (j, value) in row[first..first + width].iter_mut().enumerate() {
                *value = band[j * rows + i];
            }
        }
    }
    Cow::Owned(matrix)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn matrices_are_read_in_in_out_orientation(rows in 1usize..40, columns in 1usize..40, extra in 0usize..3, shift in 0usize..4) {
            for float in [Float::F32, Float::F16, Float::Bf16] {
                for transposed in [false, true] {
                    // Fused weights are never stored out × in.
                    let (stored_rows, stored_columns) = if transposed { (columns, rows) } else { (rows, columns * (1 + extra)) };
                    let first_column = if transposed { 0 } else { columns * extra };
                    let values: Vec<f32> = (0..stored_rows * stored_columns).map(|i| (i % 251) as f32).collect();
                    // Bytes at any alignment, as in a file whose header was not padded.
                    let mut buffer = vec![0; shift];
                    float.downcast(&values, &mut buffer).unwrap();
                    let layout = Layout { stored_columns, transposed, first_column };
                    let matrix = read_matrix(&buffer[shift..], float, layout, rows, columns);
                    for i in 0..rows {
                        for j in 0..columns {
                            let at = if transposed { j * rows + i } else { i * stored_columns + first_column + j };
                            prop_assert_eq!(matrix[i * columns + j], values[at]);
                        }
                    }
                }
            }
        }
    }
}
