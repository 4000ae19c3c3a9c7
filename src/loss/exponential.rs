//! `e^x` of many values, in operations that every instruction set vectorises and rounds alike.

/// Below this, [`exponential`] is 0: `e^x` would soon be subnormal, which is slow and adds nothing to any sum.
pub(super) const SMALLEST_EXPONENT: f32 = -87.0;

/// `e^x` for `x ≤ 0`, or 0 below [`SMALLEST_EXPONENT`]; NaN stays NaN. Relative error below 2e-7.
///
/// `x = n·ln 2 + r` with `|r| ≤ ln 2 / 2`, then `2^n` by bits and `e^r` by a polynomial (the coefficients are those of
/// Cephes' `expf`, Moshier 1992). No fused multiply-add, which would be a library call where the processor has none.
#[inline(always)]
pub(super) fn exponential(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer, which then stands in the lowest bits.
    const ROUNDER: f32 = 12_582_912.0;
    // `LN_2_HIGH` has so few bits that its products with `n` are exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let rounded = x * std::f32::consts::LOG2_E + ROUNDER;
    let n = rounded - ROUNDER;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let fraction = small_exponential_less_one(r) + 1.0;
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x < SMALLEST_EXPONENT { 0.0 } else { fraction * power }
}

/// The largest magnitude that [`small_exponential_less_one`] is meant for: `ln 2 / 2`.
pub(super) const SMALL: f32 = 0.346_573_6;

/// `e^x − 1` for `|x|` up to [`SMALL`], with a relative error below 3e-7 however small it is.
#[inline(always)]
pub(super) fn small_exponential_less_one(x: f32) -> f32 {
    let mut polynomial = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        polynomial = polynomial * x + coefficient;
    }
    polynomial * (x * x) + x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_within_its_bound_of_the_exact_value() {
        let mut worst = 0.0_f64;
        for step in 0..=4_000_000 {
            let x = SMALLEST_EXPONENT * (step as f32 / 4_000_000.0);
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exponential(x)) - exact) / exact).abs());
        }
        assert!(worst < 2e-7, "{worst:e}");
        assert_eq!(exponential(0.0), 1.0);
    }

    #[test]
    fn less_one_it_keeps_its_digits_near_zero() {
        for step in -100_000..=100_000 {
            for x in [SMALL * step as f32 / 1e5, 1e-4 * step as f32 / 1e5] {
                let exact = f64::from(x).exp_m1();
                let error = (f64::from(small_exponential_less_one(x)) - exact).abs();
                assert!(error <= 3e-7 * exact.abs(), "{x}: {error:e}");
            }
        }
    }

    #[test]
    fn far_below_it_is_zero_and_nan_stays() {
        for x in [-87.001, -1e4, -3e38, f32::NEG_INFINITY] {
            assert_eq!(exponential(x), 0.0);
        }
        assert!(exponential(f32::NAN).is_nan());
    }
}
