//! Powers of two, in operations that every instruction set vectorises and rounds alike.

use super::integer::ROUNDER;

/// [`power_of_two`] is 0 below this. Subnormal results would be slow and add nothing to a sum.
pub(crate) const SMALLEST_EXPONENT: f32 = -125.0;

/// `2^x` for `x ≤ 0`, or 0 below [`SMALLEST_EXPONENT`]; NaN stays NaN. Relative error below 2e-7.
///
/// `x = n + f` with `|f| ≤ 1/2`. A polynomial gives `2^f`, minimax in the relative error: 2e-8, so that errors average
/// out in sums of many values. `2^n` is added to the exponent bits. Fused multiply-adds are avoided, because they are
/// library calls on processors without them.
#[inline(always)]
pub(crate) fn power_of_two(x: f32) -> f32 {
    let rounded = x + ROUNDER;
    let f = x - (rounded - ROUNDER);
    let mut fraction = 1.535_336_2e-4;
    fraction = fraction * f + 1.339_887_5e-3;
    fraction = fraction * f + 9.618_437e-3;
    fraction = fraction * f + 5.550_332_5e-2;
    fraction = fraction * f + 2.402_264_8e-1;
    fraction = fraction * f + std::f32::consts::LN_2;
    fraction = fraction * f + 1.0;
    let power = f32::from_bits(fraction.to_bits().wrapping_add(rounded.to_bits() << 23));
    if x < SMALLEST_EXPONENT { 0.0 } else { power }
}

/// The largest magnitude that [`small_power_less_one`] accepts.
pub(crate) const SMALL: f32 = 0.25;

/// `2^x − 1` for `|x|` up to [`SMALL`], with a relative error below 2e-6 however small it is.
#[inline(always)]
pub(crate) fn small_power_less_one(x: f32) -> f32 {
    let mut quotient = 9.618_128e-3;
    quotient = quotient * x + 5.558_743_4e-2;
    quotient = quotient * x + 2.402_268_8e-1;
    quotient = quotient * x + 6.931_465e-1;
    quotient * x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_within_its_bound_of_the_exact_value() {
        let mut worst = 0.0_f64;
        for step in 0..=4_000_000 {
            let x = SMALLEST_EXPONENT * (step as f32 / 4_000_000.0);
            let exact = f64::from(x).exp2();
            worst = worst.max(((f64::from(power_of_two(x)) - exact) / exact).abs());
        }
        assert!(worst < 2e-7, "{worst:e}");
        assert_eq!(power_of_two(0.0), 1.0);
    }

    #[test]
    fn less_one_it_keeps_its_digits_near_zero() {
        for step in -100_000..=100_000 {
            for x in [SMALL * step as f32 / 1e5, 1e-4 * step as f32 / 1e5] {
                let exact = (f64::from(x) * std::f64::consts::LN_2).exp_m1();
                let error = (f64::from(small_power_less_one(x)) - exact).abs();
                assert!(error <= 2e-6 * exact.abs(), "{x}: {error:e}");
            }
        }
    }

    #[test]
    fn far_below_it_is_zero_and_nan_stays() {
        for x in [-125.001, -1e4, -3e38, f32::NEG_INFINITY] {
            assert_eq!(power_of_two(x), 0.0);
        }
        assert!(power_of_two(f32::NAN).is_nan());
    }
}
