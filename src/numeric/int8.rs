//! Eight-bit integers with a scale: `value ≈ code · scale`, one scale for each row or column of a matrix.
//!
//! The scale is the smallest bfloat16 with which no code of its row exceeds 127. Its rounding costs nothing, since codes
//! are rounded against the scale that is stored, and it has the range of f32. So every finite value has a code, and the
//! error of each is at most half a scale.

use half::bf16;

use super::integer::{largest_magnitude, to_nearest};
use super::memory::zeros;
use super::simd::dispatched;

/// The largest code. −128 is not used, so that codes are symmetric.
const MOST: f32 = 127.0;

/// The values that share a scale, in a row-major matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// Those of a row.
    Rows,
    /// Those of a column.
    Columns,
}

impl Scales {
    /// The number of scales of a matrix.
    #[must_use]
    pub fn count(self, rows: usize, columns: usize) -> usize {
        if self == Self::Rows { rows } else { columns }
    }

    /// The shape of the scales of matrices of `shape`, which broadcasts against it: its last dimension, or the one before
    /// it, is 1.
    ///
    /// # Panics
    /// For fewer than two dimensions.
    #[must_use]
    pub fn shape(self, shape: &[usize]) -> Vec<usize> {
        let mut scales = shape.to_vec();
        scales[shape.len() - if self == Self::Rows { 1 } else { 2 }] = 1;
        scales
    }
}

/// Codes and their scales.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Quantized {
    /// As many as there are values, in their order.
    pub codes: Vec<i8>,
    /// In the order of the rows, or of the columns, of each matrix.
    pub scales: Vec<bf16>,
}

impl Quantized {
    /// Adds the codes and scales of another.
    pub fn extend(&mut self, other: Self) {
        self.codes.extend(other.codes);
        self.scales.extend(other.scales);
    }
}

/// The codes and scales of `(rows, columns)` matrices, row-major, one behind the other. Rounds to nearest, ties to even.
///
/// `s = max |v| / 127`, rounded up to bfloat16, and `code = round(v / s)`, over the values `v` that share the scale. A
/// scale is 0 where all of them are.
///
/// # Errors
/// The index of the first NaN or infinity, and its value.
///
/// # Panics
/// Unless `values` has whole matrices.
pub fn quantize(values: &[f32], rows: usize, columns: usize, per: Scales) -> Result<Quantized, (usize, f32)> {
    let size = rows * columns;
    if size == 0 {
        return Ok(Quantized::default());
    }
    assert!(values.len().is_multiple_of(size), "whole matrices");
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Err((at, values[at]));
    }
    let mut codes = zeros::<i8>(values.len());
    let mut scales = Vec::with_capacity(values.len() / size * per.count(rows, columns));
    for (values, codes) in values.chunks_exact(size).zip(codes.chunks_exact_mut(size)) {
        match per {
            Scales::Rows => {
                for (values, codes) in values.chunks_exact(columns).zip(codes.chunks_exact_mut(columns)) {
                    let scale = scale_for(largest_magnitude(values));
                    scales.push(scale);
                    round_row(values, scale.to_f32(), codes);
                }
            }
            Scales::Columns => {
                let mut most = vec![0.0_f32; columns];
                for row in values.chunks_exact(columns) {
                    most.iter_mut().zip(row).for_each(|(most, value)| *most = most.max(value.abs()));
                }
                let own: Vec<_> = most.into_iter().map(scale_for).collect();
                let wide: Vec<_> = own.iter().map(|scale| scale.to_f32()).collect();
                for (row, codes) in values.chunks_exact(columns).zip(codes.chunks_exact_mut(columns)) {
                    round_columns(row, &wide, codes);
                }
                scales.extend(own);
            }
        }
    }
    Ok(Quantized { codes, scales })
}

/// The values of `(rows, columns)` matrices: the inverse of [`quantize`], up to its rounding.
///
/// # Panics
/// Unless the codes are of whole matrices with all their scales.
#[must_use]
pub fn dequantize(codes: &[i8], scales: &[f32], rows: usize, columns: usize, per: Scales) -> Vec<f32> {
    let mut values = zeros(codes.len());
    if codes.is_empty() {
        return values;
    }
    let matrices = codes.chunks_exact(rows * columns).zip(scales.chunks_exact(per.count(rows, columns)));
    for (values, (codes, scales)) in values.chunks_exact_mut(rows * columns).zip(matrices) {
        let each = values.chunks_exact_mut(columns).zip(codes.chunks_exact(columns)).enumerate();
        for (row, (values, codes)) in each {
            match per {
                Scales::Rows => scaled(codes, scales[row], values),
                Scales::Columns => {
                    let pairs = codes.iter().zip(scales);
                    values.iter_mut().zip(pairs).for_each(|(value, (&code, scale))| *value = f32::from(code) * scale);
                }
            }
        }
    }
    values
}

dispatched! {
    /// `out = codes · scale`.
    pub(crate) fn scaled(codes: &[i8], scale: f32, out: &mut [f32]) {
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = f32::from(code) * scale;
        }
    }
}

/// The smallest bfloat16 `s` with `largest / s ≤ 127`, but no subnormal one, which some processors take for 0.
fn scale_for(largest: f32) -> bf16 {
    if largest == 0.0 {
        return bf16::ZERO;
    }
    let bits = (largest / MOST).max(f32::MIN_POSITIVE).to_bits();
    let up = bf16::from_bits((bits.next_multiple_of(1 << 16) >> 16) as u16);
    // The quotient was rounded, too.
    if largest / up.to_f32() > MOST { bf16::from_bits(up.to_bits() + 1) } else { up }
}

dispatched! {
    /// The codes of values that share a scale.
    fn round_row(values: &[f32], scale: f32, codes: &mut [i8]) {
        codes.iter_mut().zip(values).for_each(|(code, &value)| *code = rounded(value, scale));
    }
}

dispatched! {
    /// The codes of a row whose columns have scales.
    fn round_columns(values: &[f32], scales: &[f32], codes: &mut [i8]) {
        let pairs = values.iter().zip(scales);
        codes.iter_mut().zip(pairs).for_each(|(code, (&value, &scale))| *code = rounded(value, scale));
    }
}

#[inline(always)]
fn rounded(value: f32, scale: f32) -> i8 {
    if scale == 0.0 { 0 } else { to_nearest(value / scale) as i8 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Checks codes and scales of one row against their definition.
    fn check(values: &[f32]) {
        let Quantized { codes, scales } = quantize(values, 1, values.len(), Scales::Rows).unwrap();
        let scale = scales[0].to_f32();
        let largest = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        assert_eq!(scale == 0.0, largest == 0.0);
        assert!(scale <= (largest / 127.0 * 1.01).max(f32::MIN_POSITIVE), "{scale} for {largest}");
        for (&code, &value) in codes.iter().zip(values) {
            assert!(code != i8::MIN);
            let error = (f64::from(code) * f64::from(scale) - f64::from(value)).abs();
            assert!(error <= 0.5 * f64::from(scale) * 1.000_001, "{value}: {code} · {scale}");
        }
    }

    #[test]
    fn the_error_is_at_most_half_a_scale_from_the_least_to_the_largest_float() {
        check(&[0.0; 5]);
        check(&[-0.0, 0.0]);
        for largest in [f32::MAX, 1e30, 65504.0, 1.0, 1e-8, 1e-30, f32::MIN_POSITIVE, 1e-40, f32::from_bits(1)] {
            check(&[largest; 4]);
            check(&[-largest, largest * 0.3, 0.0, largest / 254.0, largest / 255.0]);
        }
    }

    #[test]
    fn rows_and_columns_have_scales_of_their_own_in_every_matrix() {
        let values: Vec<f32> = (0..24).map(|i| (i as f32 - 11.0) * 10.0_f32.powi(i % 5)).collect();
        for per in [Scales::Rows, Scales::Columns] {
            let Quantized { codes, scales } = quantize(&values, 3, 4, per).unwrap();
            assert_eq!(scales.len(), 2 * per.count(3, 4));
            let wide: Vec<_> = scales.iter().map(|scale| scale.to_f32()).collect();
            let back = dequantize(&codes, &wide, 3, 4, per);
            for (i, (value, back)) in values.iter().zip(back).enumerate() {
                let (matrix, row, column) = (i / 12, i % 12 / 4, i % 4);
                let scale = if per == Scales::Rows { wide[matrix * 3 + row] } else { wide[matrix * 4 + column] };
                assert!((value - back).abs() <= 0.5 * scale, "{per:?} {i}");
            }
        }
        assert_eq!(Scales::Rows.shape(&[5, 3, 4]), [5, 3, 1]);
        assert_eq!(Scales::Columns.shape(&[5, 3, 4]), [5, 1, 4]);
    }

    #[test]
    fn what_is_not_finite_is_refused_by_its_index() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (at, value) = quantize(&[1.0, 2.0, bad, bad], 2, 2, Scales::Columns).unwrap_err();
            assert!(at == 2 && !value.is_finite());
        }
        assert_eq!(quantize(&[], 0, 3, Scales::Rows), Ok(Quantized::default()));
    }

    proptest! {
        #[test]
        fn any_finite_row_has_codes(values in proptest::collection::vec(proptest::num::f32::NORMAL | proptest::num::f32::SUBNORMAL | proptest::num::f32::ZERO, 1..40)) {
            check(&values);
        }
    }
}
