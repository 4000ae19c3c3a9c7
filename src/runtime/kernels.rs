//! The kernels of a forward pass over f32 slices, compiled for several instruction sets.

use std::f32::consts::LOG2_E;

use crate::numeric::exponential::power_of_two;
use crate::numeric::simd::{Int16, LANES, dispatched, dot, dot_int8};
use crate::numeric::{Element, Values};

/// The most vectors of one call of [`dot`]: with more, the sums would not fit in registers.
pub(super) const TOGETHER: usize = 4;

/// What rows of `T` are dotted with.
pub(super) trait Vectors<T>: Copy {
    /// Without the first vectors.
    fn skip(self, vectors: usize, length: usize) -> Self;

    /// As [`dot`].
    fn dot<const R: usize>(self, rows: &[T], length: usize, out: &mut [f32]);
}

impl<T: Element> Vectors<T> for &[f32] {
    fn skip(self, vectors: usize, length: usize) -> Self {
        &self[vectors * length..]
    }

    fn dot<const R: usize>(self, rows: &[T], length: usize, out: &mut [f32]) {
        dot::<T, R>(rows, self, length, out);
    }
}

impl Vectors<i8> for Int16<'_> {
    fn skip(self, vectors: usize, length: usize) -> Self {
        Int16::skip(self, vectors, length)
    }

    fn dot<const R: usize>(self, rows: &[i8], length: usize, out: &mut [f32]) {
        dot_int8::<R>(rows, self, length, out);
    }
}

/// `out[n, r] = Σ_i rows[n, i] · x[r, i]` for as many rows as there is room for, and `count` vectors, of `length` values.
/// Each product is added up in the same order whatever their numbers. More rows and values may follow, as in [`dot`].
pub(super) fn dot_rows<T>(rows: &[T], length: usize, x: impl Vectors<T>, count: usize, out: &mut [f32]) {
    if length == 0 {
        return out.fill(0.0);
    }
    match count {
        1 => x.dot::<1>(rows, length, out),
        2 => x.dot::<2>(rows, length, out),
        3 => x.dot::<3>(rows, length, out),
        4 => x.dot::<4>(rows, length, out),
        _ => {
            for (n, out) in out.chunks_exact_mut(count).enumerate() {
                for (part, out) in out.chunks_mut(TOGETHER).enumerate() {
                    dot_rows(&rows[n * length..], length, x.skip(part * TOGETHER, length), out.len(), out);
                }
            }
        }
    }
}

/// As [`dot_rows`], from row `first` on, of floating values whose dtype is known at run time.
pub(super) fn dot_values(rows: Values<'_>, first: usize, length: usize, x: &[f32], count: usize, out: &mut [f32]) {
    match rows {
        Values::F32(rows) => dot_rows(&rows[first * length..], length, x, count, out),
        Values::F16(rows) => dot_rows(&rows[first * length..], length, x, count, out),
        Values::Bf16(rows) => dot_rows(&rows[first * length..], length, x, count, out),
    }
}

dispatched! {
    /// `out += factor · x`.
    pub(super) fn add_scaled(out: &mut [f32], factor: f32, x: &[f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out += factor * x;
        }
    }
}

dispatched! {
    /// `out = Σ_t weights[t] · rows[t]` for rows one behind the other.
    pub(super) fn weighted_sum(out: &mut [f32], weights: &[f32], rows: &[f32]) {
        const WIDE: usize = 4 * LANES;
        let width = out.len();
        if width == 0 {
            return;
        }
        let wide = width / WIDE * WIDE;
        let (blocks, rest) = out.as_chunks_mut::<WIDE>();
        for (b, block) in blocks.iter_mut().enumerate() {
            let mut sums = [0.0_f32; WIDE];
            for (&weight, row) in weights.iter().zip(rows.chunks_exact(width)) {
                let row = row[b * WIDE..].first_chunk::<WIDE>().expect("as long as the sum");
                for lane in 0..WIDE {
                    sums[lane] += weight * row[lane];
                }
            }
            *block = sums;
        }
        rest.fill(0.0);
        for (&weight, row) in weights.iter().zip(rows.chunks_exact(width)) {
            for (out, &value) in rest.iter_mut().zip(&row[wide..]) {
                *out += weight * value;
            }
        }
    }
}

dispatched! {
    /// Turns a row of scores into probabilities, `softmax(scale · scores)`, in place.
    pub(super) fn softmax(scores: &mut [f32], scale: f32) {
        let largest = largest(scores);
        let factor = scale * LOG2_E;
        for score in scores.iter_mut() {
            *score = power_of_two((*score - largest) * factor);
        }
        let mut sums = [0.0_f32; LANES];
        let (blocks, rest) = scores.as_chunks::<LANES>();
        for block in blocks {
            for lane in 0..LANES {
                sums[lane] += block[lane];
            }
        }
        let inverse = (sums.iter().chain(rest).sum::<f32>()).recip();
        for score in scores.iter_mut() {
            *score *= inverse;
        }
    }
}

dispatched! {
    /// `Σ e^(value − largest)`; no value may be larger.
    pub(super) fn sum_of_exponentials(values: &[f32], largest: f32) -> f64 {
        // Few enough for sums in f32, and many enough that the f64 additions cost little.
        const TILE: usize = 1024;
        let tile = |tile: &[f32]| f64::from(total(tile, |value| power_of_two((value - largest) * LOG2_E)));
        values.chunks(TILE).map(tile).sum()
    }
}

dispatched! {
    /// The largest value, and −∞ of none.
    pub(super) fn largest(values: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (blocks, rest) = values.as_chunks::<LANES>();
        for block in blocks {
            for lane in 0..LANES {
                lanes[lane] = if block[lane] > lanes[lane] { block[lane] } else { lanes[lane] };
            }
        }
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &value| most.max(value))
    }
}

dispatched! {
    /// `out = (x − mean) / √(variance + epsilon) · weight + bias`, the variance being the mean square.
    pub(super) fn layer_norm(x: &[f32], epsilon: f32, weight: &[f32], bias: &[f32], out: &mut [f32]) {
        let length = x.len() as f32;
        let mean = total(x, |value| value) / length;
        let variance = total(x, |value| (value - mean) * (value - mean)) / length;
        let inverse = (variance + epsilon).sqrt().recip();
        for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = (x - mean) * inverse * weight + bias;
        }
    }
}

dispatched! {
    /// `out = x / √(mean of squares + epsilon) · weight`.
    pub(super) fn rms_norm(x: &[f32], epsilon: f32, weight: &[f32], out: &mut [f32]) {
        let squares = total(x, |value| value * value) / x.len() as f32;
        let inverse = (squares + epsilon).sqrt().recip();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * weight;
        }
    }
}

dispatched! {
    /// Turns pairs of values, one from each half of `head`, by angles with these cosines and sines.
    pub(super) fn turn(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
        let (first, second) = head.split_at_mut(cosines.len());
        for (((x, y), &cosine), &sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
            (*x, *y) = (*x * cosine - *y * sine, *y * cosine + *x * sine);
        }
    }
}

dispatched! {
    /// `out *= factors`, value by value.
    pub(super) fn multiply(out: &mut [f32], factors: &[f32]) {
        for (out, &factor) in out.iter_mut().zip(factors) {
            *out *= factor;
        }
    }
}

#[inline(always)]
fn total(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            sums[lane] += term(block[lane]);
        }
    }
    sums.iter().sum::<f32>() + rest.iter().map(|&value| term(value)).sum::<f32>()
}

dispatched! {
    /// GELU in its tanh form: `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))`, which is `x · sigmoid` of twice the
    /// argument.
    pub(super) fn gelu_tanh(values: &mut [f32]) {
        // 2·√(2/π)·log2(e)
        const SCALE: f32 = 2.302_208_2;
        for x in values.iter_mut() {
            let exponent = SCALE * (*x + 0.044_715 * *x * *x * *x);
            let power = power_of_two(-exponent.abs());
            *x *= if exponent >= 0.0 { 1.0 } else { power } / (1.0 + power);
        }
    }
}

dispatched! {
    /// `x · sigmoid(x)`.
    pub(super) fn silu(values: &mut [f32]) {
        for x in values.iter_mut() {
            let power = power_of_two(-(*x * LOG2_E).abs());
            *x *= if *x >= 0.0 { 1.0 } else { power } / (1.0 + power);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::numeric::simd::level::testing::on_each;
    use crate::testing::noise;

    proptest! {
        #[test]
        fn norms_are_those_of_their_formulas(length in 1..200_usize, epsilon in 0.0..0.1_f32, scale in 1e-3..1e3_f32, seed in any::<u64>()) {
            let x: Vec<f32> = noise(length, seed).into_iter().map(|value| scale * value).collect();
            let (weight, bias) = (noise(length, seed ^ 1), noise(length, seed ^ 2));
            let (mut rms, mut layer) = (vec![0.0; length], vec![0.0; length]);
            rms_norm(&x, epsilon, &weight, &mut rms);
            layer_norm(&x, epsilon, &weight, &bias, &mut layer);
            let mean = |term: &dyn Fn(f64) -> f64| x.iter().map(|&x| term(f64::from(x))).sum::<f64>() / length as f64;
            let (squares, middle) = (mean(&|x| x * x), mean(&|x| x));
            let variance = mean(&|x| (x - middle) * (x - middle));
            for i in 0..length {
                let (x, weight) = (f64::from(x[i]), f64::from(weight[i]));
                let exact = x / (squares + f64::from(epsilon)).sqrt() * weight;
                prop_assert!((f64::from(rms[i]) - exact).abs() < 1e-5 * exact.abs().max(1.0), "{} {exact}", rms[i]);
                // Few values may be so near their mean that the difference is rounding alone.
                if length > 8 {
                    let exact = (x - middle) / (variance + f64::from(epsilon)).sqrt() * weight + f64::from(bias[i]);
                    prop_assert!((f64::from(layer[i]) - exact).abs() < 1e-3 * exact.abs().max(1.0), "{} {exact}", layer[i]);
                }
            }
        }
    }

    type Change<'a> = &'a dyn Fn(&mut [f32]);

    #[test]
    fn the_bits_are_the_same_on_every_instruction_set() {
        for length in [1, 15, 16, 63, 64, 200, 3072] {
            let (x, weight, bias) = (noise(length, 1), noise(length, 2), noise(length, 3));
            let rows = noise(5 * length, 4);
            let results = on_each(|| {
                let mut out = vec![vec![0.0; length]; 3];
                layer_norm(&x, 1e-5, &weight, &bias, &mut out[0]);
                rms_norm(&x, 1e-5, &weight, &mut out[1]);
                weighted_sum(&mut out[2], &bias[..length.min(5)], &rows);
                let changed: [Change<'_>; 6] = [
                    &|values| gelu_tanh(values),
                    &|values| silu(values),
                    &|values| softmax(values, 3.0),
                    &|values| add_scaled(values, 0.7, &weight),
                    &|values| multiply(values, &weight),
                    &|values| turn(&mut values[..length / 2 * 2], &weight[..length / 2], &bias[..length / 2]),
                ];
                out.extend(changed.map(|change| {
                    let mut values = x.clone();
                    change(&mut values);
                    values
                }));
                let mut products = vec![0.0; 5 * 7];
                dot_rows(&rows, length, &noise(7 * length, 5)[..], 7, &mut products);
                out.push(products);
                let sum = sum_of_exponentials(&x, largest(&x));
                (sum.to_bits(), out.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>())
            });
            assert!(results.iter().all(|(_, result)| *result == results[0].1), "{length}");
        }
    }
}
