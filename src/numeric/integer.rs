//! What rounding to integers with a scale needs, of which vector instructions are made.

use super::simd::{LANES, dispatched};

/// Added to a value between ±2²², it rounds to an integer, ties to even, and leaves that in the lowest bits.
pub(super) const ROUNDER: f32 = 12_582_912.0;

/// The nearest integer, ties to even, of a value between ±2²².
#[inline(always)]
pub(super) fn to_nearest(value: f32) -> i32 {
    (value + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()).cast_signed()
}

dispatched! {
    /// The largest magnitude; NaN if there is one.
    pub(super) fn largest_magnitude(values: &[f32]) -> f32 {
        // The bits of magnitudes are in their order, and those of NaN are above all.
        let bits = |value: f32| value.abs().to_bits().cast_signed();
        let mut lanes = [0; LANES];
        let (blocks, rest) = values.as_chunks::<LANES>();
        for block in blocks {
            for lane in 0..LANES {
                lanes[lane] = bits(block[lane]).max(lanes[lane]);
            }
        }
        let most = rest.iter().map(|&value| bits(value)).chain(lanes).max().unwrap_or(0);
        f32::from_bits(most.cast_unsigned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::simd::level::testing::on_each;
    use crate::testing::noise;

    #[test]
    fn ties_are_rounded_to_even() {
        for value in [0.0, -0.0, 0.5, 1.5, -0.5, -1.5, 2.5, 0.499_999_97, -32767.5, 32766.5, 4_194_303.0, -4_194_303.0]
        {
            assert_eq!(to_nearest(value), value.round_ties_even() as i32, "{value}");
        }
        for value in noise(1000, 1) {
            assert_eq!(to_nearest(500.0 * value), (500.0 * value).round_ties_even() as i32, "{value}");
        }
    }

    #[test]
    fn the_largest_magnitude_is_found_anywhere() {
        for length in [0, 1, 15, 16, 17, 40] {
            for at in 0..length {
                for (value, most) in [(-3.0, 3.0), (f32::NEG_INFINITY, f32::INFINITY), (-f32::NAN, f32::NAN)] {
                    let mut values = noise(length, 2);
                    values[at] = value;
                    for (set, found) in on_each(|| largest_magnitude(&values)) {
                        assert!(found == most || found.is_nan() && most.is_nan(), "{set:?} {length} {at} {found}");
                    }
                }
            }
            assert_eq!(largest_magnitude(&vec![-0.0; length]), 0.0);
        }
    }
}
