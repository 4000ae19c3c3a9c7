//! Kernels compiled for several instruction sets, of which one is chosen when the process starts.
//!
//! No other module knows processor features. Most kernels are plain loops over [`LANES`] accumulators, which the compiler
//! turns into vector instructions of any width; dot products are written for each instruction set. The order of additions,
//! and so the result, is the same on every instruction set. Products and sums are rounded apart, since fused ones are
//! library calls on processors without them.
//!
//! `faer` chooses the instructions of its matrix products by itself, whatever is chosen here.
//!
//! * `level`: which instruction set is used.
//! * `halves`: conversion of halves.
//! * `prefetch`: software prefetches.
//! * `dot`, `dot_int8`: dot products, run `with_lanes`: the `lanes` of `avx512`, `avx2`, `sse2`, `neon` or `portable`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dot;
mod dot_int8;
pub(super) mod halves;
mod lanes;
pub(crate) mod level;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod prefetch;
#[cfg(target_arch = "x86_64")]
mod sse2;
mod with_lanes;

pub use dot::dot;
pub use dot_int8::{BLOCK, Int16, dot_int8};
pub use lanes::LANES;
pub(crate) use level::dispatched;
pub use level::{InstructionSet, check, instruction_set};
pub use prefetch::prefetch;
use prefetch::prefetch_far;
pub use with_lanes::ROWS;

dispatched! {
    /// `out += Σ_k factors[k] · rows[k]`, in one pass over `out`.
    pub fn add_combination(out: &mut [f32], factors: &[f32], rows: &[&[f32]]) {
        let (blocks, rest) = out.as_chunks_mut::<LANES>();
        let done = blocks.len() * LANES;
        for (b, block) in blocks.iter_mut().enumerate() {
            let mut sum = *block;
            for (&factor, row) in factors.iter().zip(rows) {
                let row = row[b * LANES..].first_chunk::<LANES>().expect("as long as the sum");
                for lane in 0..LANES {
                    sum[lane] += factor * row[lane];
                }
            }
            *block = sum;
        }
        for (&factor, row) in factors.iter().zip(rows) {
            for (out, &value) in rest.iter_mut().zip(&row[done..]) {
                *out += factor * value;
            }
        }
    }
}

/// Rows of one call of [`add_combinations`]: each output is read and written once for all of them.
pub const COMBINED: usize = 8;

dispatched! {
    /// `out[r] += Σ_k factors[r][k] · rows[k]` for [`COMBINED`] rows and `R` vectors, in one pass over the rows.
    ///
    /// The rows have `width` values each, one row after the other; those of `out` are `stride` values apart. What is
    /// `ahead` values behind in memory is prefetched, if that is not 0: rows that are read soon. The order of additions is
    /// the same for every `R` and instruction set, and that of [`add_combination`].
    pub fn add_combinations<const R: usize>(
        out: &mut [f32],
        stride: usize,
        factors: &[[f32; COMBINED]; R],
        rows: &[f32],
        width: usize,
        ahead: usize,
    ) {
        let blocks = width / LANES;
        for b in 0..blocks {
            if ahead > 0 {
                for k in 0..COMBINED {
                    prefetch_far(rows[k * width + b * LANES..].as_ptr().wrapping_add(ahead));
                }
            }
            for r in 0..R {
                let place = out[r * stride + b * LANES..].first_chunk_mut::<LANES>().expect("a row's place");
                let mut sum = *place;
                for k in 0..COMBINED {
                    let row = rows[k * width + b * LANES..].first_chunk::<LANES>().expect("as long as the sum");
                    for lane in 0..LANES {
                        sum[lane] += factors[r][k] * row[lane];
                    }
                }
                *place = sum;
            }
        }
        for r in 0..R {
            for column in blocks * LANES..width {
                let mut sum = out[r * stride + column];
                for k in 0..COMBINED {
                    sum += factors[r][k] * rows[k * width + column];
                }
                out[r * stride + column] = sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::level::testing::on_each;
    use super::*;
    use crate::numeric::Element;
    use crate::testing::noise;

    /// The sum of `row · vector` in the order that is promised: two chains of [`LANES`], added pairwise.
    fn in_order(row: &[f32], vector: &[f32]) -> f32 {
        let mut lanes = [0.0_f32; 2 * LANES];
        row.iter().zip(vector).enumerate().for_each(|(i, (a, b))| {
            lanes[i % (2 * LANES)] += a * b;
        });
        let mut width = LANES;
        while width > 0 {
            (0..width).for_each(|lane| lanes[lane] += lanes[lane + width]);
            width /= 2;
        }
        lanes[0]
    }

    #[test]
    fn dot_products_are_exact_enough_and_the_same_for_any_number_of_vectors_and_instruction_set() {
        fn check<T: Element>(stored: impl Fn(f32) -> T) {
            for length in [0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 200, 768, 3071] {
                let rows: Vec<T> = noise(2 * length, 1).into_iter().map(&stored).collect();
                let (mut scratch, x) = (Vec::new(), noise(4 * length, 2));
                let upcast = T::as_f32(&rows, &mut scratch);
                let spoiled = [&x[..3 * length], &[f32::NAN; 2 * LANES]].concat();
                let rows = [&rows[..], &[T::default(); 2 * LANES]].concat();
                for (set, (together, three, alone)) in on_each(|| {
                    let (mut together, mut three, mut alone) = ([f32::NAN; 8], [f32::NAN; 6], [f32::NAN; 8]);
                    dot::<T, 4>(&rows[..2 * length], &x, length, &mut together);
                    // Three of the four vectors, so that others follow; `spoiled` has NaN behind what counts.
                    dot::<T, 3>(&rows, &spoiled, length, &mut three);
                    for (at, alone) in alone.chunks_exact_mut(1).enumerate() {
                        let (n, r) = (at / 4 * length, at % 4 * length);
                        dot::<T, 1>(&rows[n..n + length], &x[r..r + length], length, alone);
                    }
                    (together, three, alone)
                }) {
                    for (at, found) in together.into_iter().enumerate() {
                        let (row, vector) = (&upcast[at / 4 * length..][..length], &x[at % 4 * length..][..length]);
                        let expected = in_order(row, vector);
                        assert_eq!((found, alone[at]), (expected, expected), "{set:?} {length}");
                        if at % 4 < 3 {
                            assert_eq!(three[at / 4 * 3 + at % 4], expected, "{set:?} {length}");
                        }
                        let exact: f64 = row.iter().zip(vector).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                        let most = upcast.iter().fold(1.0_f32, |most, value| most.max(value.abs()));
                        let tolerance = 1e-6 * f64::from(most) * (1.0 + length as f64);
                        assert!((f64::from(found) - exact).abs() < tolerance, "{set:?} {length}");
                    }
                }
            }
        }
        check(|value| value);
        check(f16::from_f32);
        check(bf16::from_f32);
    }

    #[test]
    fn halves_of_every_kind_are_multiplied_as_they_are() {
        // Each half alone in some place, among them subnormal ones, infinities and NaN.
        let halves: Vec<_> =
            (0..=u16::MAX).step_by(7).chain([0x8000, 0x7c00, 0xfc00, 0x7e00]).map(f16::from_bits).collect();
        for (set, found) in on_each(|| {
            let sum = |(at, &half): (usize, &f16)| {
                let (mut row, mut sum) = ([f16::ZERO; 40], [0.0]);
                row[at % 40] = half;
                dot::<f16, 1>(&row, &[1.0; 40], 40, &mut sum);
                sum[0]
            };
            halves.iter().enumerate().map(sum).collect::<Vec<_>>()
        }) {
            for (half, found) in halves.iter().zip(found) {
                let wide = half.to_f32_const();
                assert!(found == wide || found.is_nan() && wide.is_nan(), "{set:?} {:x} {found}", half.to_bits());
            }
        }
    }

    #[test]
    fn combinations_are_the_same_on_every_instruction_set() {
        let (factors, rows) = (noise(3, 3), noise(3 * 1037, 4));
        let rows: Vec<_> = rows.chunks_exact(1037).collect();
        for (set, found) in on_each(|| {
            let mut out = noise(1037, 5);
            add_combination(&mut out, &factors, &rows);
            out
        }) {
            for (i, (found, start)) in found.into_iter().zip(noise(1037, 5)).enumerate() {
                let expected = factors.iter().zip(&rows).fold(start, |sum, (factor, row)| sum + factor * row[i]);
                assert_eq!(found, expected, "{set:?} {i}");
            }
        }
    }

    #[test]
    fn many_combinations_are_those_of_each_vector_alone_on_every_instruction_set() {
        fn check<const R: usize>(width: usize) {
            let stride = width + 5;
            let rows = noise(COMBINED * width, 6);
            let mut factors = [[0.0; COMBINED]; R];
            factors.iter_mut().flatten().zip(noise(R * COMBINED, 7)).for_each(|(factor, value)| *factor = value);
            for (set, found) in on_each(|| {
                let mut out = noise(R * stride, 8);
                add_combinations(&mut out, stride, &factors, &rows, width, width);
                out
            }) {
                let mut expected = noise(R * stride, 8);
                for (r, factors) in factors.iter().enumerate() {
                    let rows: Vec<_> = (0..COMBINED).map(|k| &rows[k * width..][..width]).collect();
                    add_combination(&mut expected[r * stride..][..width], factors, &rows);
                }
                assert_eq!(found, expected, "{set:?} {R} {width}");
            }
        }
        for width in [0, 1, 15, 16, 17, 64, 100] {
            check::<1>(width);
            check::<2>(width);
            check::<4>(width);
        }
    }
}
