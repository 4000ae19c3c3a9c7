//! Vectors as 16-bit integers, which are multiplied by eight-bit weights without widening these.
//!
//! Every [`BLOCK`] of values has a scale, `max |x| / 32767`, and the error of each is at most half of it. That of a weight
//! of eight bits is 256 times as large beside the largest weight of its row.

use super::integer::{largest_magnitude, to_nearest};
use super::simd::{BLOCK, Int16, dispatched};

/// The largest integer.
const MOST: f32 = 32767.0;

/// Vectors of one length.
#[derive(Debug)]
pub struct Int16Vectors {
    integers: Vec<i16>,
    scales: Vec<f32>,
}

impl Int16Vectors {
    /// Rounds to nearest the vectors of `length` values that lie one behind the other, but not what follows the last whole
    /// one.
    ///
    /// Blocks below 1e-34 become 0. Of a block with an infinity or a NaN the scale, and so every product, is NaN.
    #[must_use]
    pub fn new(x: &[f32], length: usize) -> Self {
        let count = x.len().checked_div(length).unwrap_or(0);
        let (width, blocks) = Int16::lengths(length);
        let mut vectors = Self { integers: vec![0; count * width], scales: vec![0.0; count * blocks] };
        if count > 0 {
            let places = vectors.integers.chunks_exact_mut(width).zip(vectors.scales.chunks_exact_mut(blocks));
            places.zip(x.chunks_exact(length)).for_each(|((integers, scales), x)| round(x, integers, scales));
        }
        vectors
    }

    /// All of them.
    #[must_use]
    pub fn as_slice(&self) -> Int16<'_> {
        Int16 { integers: &self.integers, scales: &self.scales }
    }
}

dispatched! {
    /// The integers and scales of a vector.
    fn round(x: &[f32], integers: &mut [i16], scales: &mut [f32]) {
        let blocks = x.chunks(BLOCK).zip(integers.chunks_mut(BLOCK));
        for ((x, integers), scale) in blocks.zip(scales) {
            let largest = largest_magnitude(x);
            let factor = MOST / largest;
            if factor.is_finite() && largest.is_finite() {
                for (integer, &value) in integers.iter_mut().zip(x) {
                    *integer = to_nearest(value * factor) as i16;
                }
                *scale = largest / MOST;
            } else {
                *scale = if largest.is_finite() { 0.0 } else { f32::NAN };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::numeric::simd::dot_int8;
    use crate::numeric::simd::level::testing::on_each;
    use crate::testing::noise;

    /// The values that the integers stand for.
    fn values(x: &[f32], length: usize) -> Vec<f32> {
        let vectors = Int16Vectors::new(x, length);
        let (width, blocks) = Int16::lengths(length);
        let value = |at: usize| {
            let (vector, i) = (at / length, at % length);
            f32::from(vectors.integers[vector * width + i]) * vectors.scales[vector * blocks + i / BLOCK]
        };
        assert!(vectors.integers.chunks(width.max(1)).all(|all| all[length..].iter().all(|&integer| integer == 0)));
        (0..x.len()).map(value).collect()
    }

    #[test]
    fn the_error_is_at_most_half_a_scale_on_every_instruction_set() {
        for length in [1, 15, 16, 31, 32, 33, 127, 128, 129, 300, 768] {
            for largest in [1e-30, 1e-3, 1.0, 65504.0, 1e30, f32::MAX] {
                let x: Vec<f32> = noise(3 * length, 1).into_iter().map(|value| value * (0.2 * largest)).collect();
                let results = on_each(|| values(&x, length));
                assert!(results.iter().all(|(_, found)| *found == results[0].1));
                for (found, x) in results[0].1.chunks(length).zip(x.chunks(length)) {
                    for (found, x) in found.chunks(BLOCK).zip(x.chunks(BLOCK)) {
                        let most = x.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
                        let error = found.iter().zip(x).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
                        assert!(error <= 0.51 / MOST * most, "{length} {largest}: {error}");
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_the_least_values_and_what_is_not_finite() {
        assert_eq!(values(&[0.0, -0.0, 1e-36, -f32::from_bits(1)], 4), [0.0; 4]);
        assert_eq!(values(&[-5.0, 5.0], 1), [-5.0, 5.0]);
        assert!(Int16Vectors::new(&[], 0).as_slice().integers.is_empty());
        assert!(Int16Vectors::new(&[], 7).as_slice().scales.is_empty());
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = noise(3 * BLOCK, 2);
            x[BLOCK + 5] = bad;
            let found = values(&x, 3 * BLOCK);
            assert!(found.iter().enumerate().all(|(i, value)| value.is_nan() == (i / BLOCK == 1)));
        }
    }

    proptest! {
        #[test]
        fn products_with_codes_are_those_of_the_values(
            length in 1..700_usize, cut in any::<bool>(), spare in 0..40_usize, seed in any::<u64>(),
        ) {
            let codes: Vec<i8> = noise(2 * length + spare, seed).into_iter().map(|value| (40.0 * value) as i8).collect();
            let x = noise(4 * length, seed ^ 1);
            let rounded = values(&x, length);
            for (_, (together, alone)) in on_each(|| {
                let vectors = Int16Vectors::new(&x, length);
                let (mut together, mut alone) = ([f32::NAN; 8], [f32::NAN; 8]);
                dot_int8::<4>(&codes, vectors.as_slice(), length, &mut together);
                for (at, alone) in alone.chunks_exact_mut(1).enumerate() {
                    // One vector of its own, and rows with or without others behind them.
                    let own = Int16Vectors::new(&x[at % 4 * length..][..length], length);
                    let rows = &codes[at / 4 * length..];
                    let rows = if cut { &rows[..length] } else { rows };
                    dot_int8::<1>(rows, own.as_slice(), length, alone);
                }
                (together, alone)
            }) {
                prop_assert_eq!(together, alone);
                for (at, found) in together.into_iter().enumerate() {
                    let row = &codes[at / 4 * length..][..length];
                    let x = &rounded[at % 4 * length..][..length];
                    let exact: f64 = row.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                    let size: f64 = row.iter().zip(x).map(|(&a, &b)| (f64::from(a) * f64::from(b)).abs()).sum();
                    prop_assert!((f64::from(found) - exact).abs() <= 1e-6 * size, "{} {}", found, exact);
                }
            }
        }
    }

    #[test]
    fn the_largest_integers_do_not_overflow_and_the_bits_are_the_same_everywhere() {
        let (rows, x) = ([i8::MIN; 1000], [-3.0; 1000]);
        let vectors = Int16Vectors::new(&x, 1000);
        for (set, found) in on_each(|| {
            let mut out = [0.0; 1];
            dot_int8::<1>(&rows, vectors.as_slice(), 1000, &mut out);
            out[0]
        }) {
            assert!((found - 384_000.0).abs() < 0.5, "{set:?} {found}");
        }
        let (codes, x) = (noise(2 * 999, 3), noise(2 * 999, 4));
        let codes: Vec<i8> = codes.into_iter().map(|value| (40.0 * value) as i8).collect();
        let results = on_each(|| {
            let mut out = [0.0; 4];
            dot_int8::<2>(&codes, Int16Vectors::new(&x, 999).as_slice(), 999, &mut out);
            out.map(f32::to_bits)
        });
        assert!(results.iter().all(|(_, found)| *found == results[0].1));
    }
}
