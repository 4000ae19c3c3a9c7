//! Powers of two that bring values into the range where f32 products and their sums neither overflow nor vanish.
//!
//! Scaling by a power of two is exact, so results at one scale are those at another, digit for digit.

use std::borrow::Cow;

use super::simd::{LANES, dispatched};

/// Values whose largest magnitude lies between `2^-SAFE` and `2^SAFE` are left as they are: copies cost memory.
const SAFE: i32 = 16;

/// What was computed from scaled values and depends on their scale.
pub(crate) trait Rescale: Sized {
    /// The same result for the values times `2^exponent`, for an even exponent; `None` if f32 cannot hold it.
    fn rescaled(self, exponent: i32) -> Option<Self>;
}

dispatched! {
    /// The largest magnitude; NaN if there is one. Without an early exit, so that it runs at the speed of memory.
    pub(crate) fn largest_magnitude(values: &[f32]) -> f32 {
        // Magnitudes are in the order of their bits, without the sign. NaN comes after infinity.
        let mut largest = [0_u32; LANES];
        let (chunks, rest) = values.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                largest[lane] = largest[lane].max(chunk[lane].to_bits() << 1);
            }
        }
        let rest = rest.iter().map(|value| value.to_bits() << 1);
        f32::from_bits(largest.into_iter().chain(rest).fold(0, u32::max) >> 1)
    }
}

/// The even exponent to take out of values with this largest magnitude; 0 if they are in the safe range.
fn excess(largest: f32) -> i32 {
    if largest == 0.0 || !largest.is_finite() {
        return 0;
    }
    // In f64, subnormal numbers of f32 have an exponent like all others.
    let exponent = ((f64::from(largest).to_bits() >> 52) as i32) - 1023;
    if exponent.abs() <= SAFE { 0 } else { exponent & !1 }
}

/// `2^exponent`, of a normal f64.
fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// Finite values in the safe range, and the even exponent that was taken out of them.
pub(crate) fn in_safe_range(values: &[f32]) -> (Cow<'_, [f32]>, i32) {
    let exponent = excess(largest_magnitude(values));
    if exponent == 0 {
        return (Cow::Borrowed(values), 0);
    }
    let mut scaled = values.to_vec();
    scale(&mut scaled, -exponent);
    (Cow::Owned(scaled), exponent)
}

/// Multiplies by `2^exponent` and returns whether all products are finite.
pub(crate) fn scale(values: &mut [f32], exponent: i32) -> bool {
    let factor = power_of_two(exponent);
    values.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
    largest_magnitude(values).is_finite()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_largest_magnitude_is_that_of_a_plain_loop(values in prop::collection::vec(any::<f32>(), 0..70)) {
            let expected = values.iter().fold(0.0_f32, |largest, value| if value.is_nan() || value.abs() > largest { value.abs() } else { largest });
            let found = largest_magnitude(&values);
            prop_assert!(found == expected || found.is_nan() && values.iter().any(|value| value.is_nan()));
        }

        #[test]
        fn scaled_values_are_safe_and_come_back(bits in prop::collection::vec(any::<u32>(), 1..40)) {
            let values: Vec<f32> = bits.into_iter().map(f32::from_bits).filter(|value| value.is_finite()).collect();
            let (scaled, exponent) = in_safe_range(&values);
            let (before, after) = (largest_magnitude(&values), largest_magnitude(&scaled));
            prop_assert!(before == 0.0 || (2.0_f32.powi(-SAFE)..2.0_f32.powi(SAFE + 1)).contains(&after));
            prop_assert_eq!(exponent % 2, 0);
            let mut back = scaled.into_owned();
            scale(&mut back, exponent);
            for (back, value) in back.iter().zip(&values) {
                // What is far below the largest magnitude may lose digits.
                prop_assert!((back - value).abs() <= before * 1e-37);
            }
        }
    }
}
