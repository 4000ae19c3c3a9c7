//! The loops over a few hundred logits, compiled for every instruction set. Each loop is simple enough for automatic
//! vectorisation, and long enough that selecting the instruction set costs nothing.

use crate::numeric::exponential::{SMALL, power_of_two, small_power_less_one};
use crate::numeric::simd::{LANES, dispatched, prefetch};

/// The largest tile: values that are read from memory once and stay in the first-level cache.
pub(super) const TILE: usize = 1024;
/// Values that are summed in one block.
const BLOCK: usize = 8 * LANES;

/// Reduces the terms of a block to one value per lane. Terms at distances of [`LANES`] are added pairwise, which keeps
/// chains of dependent operations short. Unrolled by hand because compilers vectorise loops with carried lanes only in
/// part.
macro_rules! fold {
    ($combine:ident, $index:ident => $term:expr) => {{
        let mut lanes = [Default::default(); LANES];
        for lane in 0..LANES {
            let [a, b, c, d, e, f, g, h] = fold!(lane, $index => $term; 0, 1, 2, 3, 4, 5, 6, 7);
            lanes[lane] = $combine($combine($combine(a, b), $combine(c, d)), $combine($combine(e, f), $combine(g, h)));
        }
        lanes
    }};
    ($lane:ident, $index:ident => $term:expr; $($place:literal),*) => {
        [$({
            let $index = $lane + $place * LANES;
            $term
        }),*]
    };
}

/// Coefficients of a tile's gradient. `e`, `t` and `p` are the exponentials of the student, of the teacher and at
/// temperature 1 (see [`plain_exponential`]), and `d` is `((z − t) − normaliser[0]) − normaliser[1]`.
#[derive(Clone, Copy, Default)]
pub(super) struct TileCoefficients {
    pub student: f32,
    pub teacher: f32,
    pub difference: f32,
    pub plain: f32,
    pub normaliser: [f32; 2],
    pub scale: f32,
}

dispatched! {
    /// The largest and the least value, NaN ignored.
    pub(super) fn extent(values: &[f32]) -> [f32; 2] {
        let (mut largest, mut least) = ([f32::NEG_INFINITY; LANES], [f32::INFINITY; LANES]);
        let (blocks, rest) = values.as_chunks::<BLOCK>();
        for block in blocks {
            extend(&mut largest, &mut least, block);
        }
        if let Some(&first) = rest.first() {
            let mut block = [first; BLOCK];
            block[..rest.len()].copy_from_slice(rest);
            extend(&mut largest, &mut least, &block);
        }
        let [mut max, mut min] = [largest[0], least[0]];
        for lane in 1..LANES {
            max = larger(max, largest[lane]);
            min = smaller(min, least[lane]);
        }
        [max, min]
    }
}

dispatched! {
    /// Writes `2^(scale·(value − reference))`. Returns the sum of these values and, if requested, of their squares.
    /// Prefetches `next` into the cache.
    pub(super) fn exponentiate<const SQUARES: bool>(
        values: &[f32],
        reference: f32,
        scale: f32,
        out: &mut [f32],
        next: &[f32],
    ) -> [f64; 2] {
        for (block, (values, out)) in values.chunks(BLOCK).zip(out.chunks_mut(BLOCK)).enumerate() {
            let mut ahead = block * BLOCK;
            while ahead < next.len().min((block + 1) * BLOCK) {
                prefetch(&next[ahead]);
                ahead += LANES;
            }
            for (out, &value) in out.iter_mut().zip(values) {
                *out = power_of_two((value - reference) * scale);
            }
        }
        [sum_of(out), if SQUARES { sum_of_squares(out) } else { 0.0 }]
    }
}

dispatched! {
    /// `Σ w·((x − y) − shift)`. The difference of two close logits is exact; the difference to a distant maximum is
    /// not.
    pub(super) fn weighted_difference(w: &[f32], x: &[f32], y: &[f32], shift: f32) -> f64 {
        let mut partial = [0.0; BLOCK];
        let ((w, w_rest), (x, x_rest), (y, y_rest)) = (w.as_chunks(), x.as_chunks(), y.as_chunks());
        for (block, ((w, x), y)) in w.iter().zip(x).zip(y).enumerate() {
            put(&mut partial, block, weighted_differences(w, x, y, shift));
        }
        if !w_rest.is_empty() {
            let rest = weighted_differences(&padded(w_rest), &padded(x_rest), &padded(y_rest), shift);
            put(&mut partial, w.len(), rest);
        }
        total(&partial)
    }
}

dispatched! {
    /// `Σ value`.
    pub(super) fn sum(values: &[f32]) -> f64 {
        sum_of(values)
    }
}

#[inline(always)]
fn sum_of(values: &[f32]) -> f64 {
    let mut partial = [0.0; BLOCK];
    let (blocks, rest) = values.as_chunks::<BLOCK>();
    for (index, block) in blocks.iter().enumerate() {
        put(&mut partial, index, fold!(plus, i => block[i]));
    }
    if !rest.is_empty() {
        let block = padded(rest);
        put(&mut partial, blocks.len(), fold!(plus, i => block[i]));
    }
    total(&partial)
}

#[inline(always)]
fn sum_of_squares(values: &[f32]) -> f64 {
    let mut partial = [0.0; BLOCK];
    let (blocks, rest) = values.as_chunks::<BLOCK>();
    for (index, block) in blocks.iter().enumerate() {
        put(&mut partial, index, fold!(plus, i => block[i] * block[i]));
    }
    if !rest.is_empty() {
        let block = padded(rest);
        put(&mut partial, blocks.len(), fold!(plus, i => block[i] * block[i]));
    }
    total(&partial)
}

#[inline(always)]
fn weighted_differences(w: &[f32; BLOCK], x: &[f32; BLOCK], y: &[f32; BLOCK], shift: f32) -> [f32; LANES] {
    fold!(plus, i => w[i] * ((x[i] - y[i]) - shift))
}

dispatched! {
    /// Without a teacher: `student·e + plain·p`.
    pub(super) fn alone<const SQUARE: bool, const OWN: bool>(out: &mut [f32], own: &[f32], coefficients: &TileCoefficients) {
        let TileCoefficients { student, plain, .. } = *coefficients;
        for (e, &own) in out.iter_mut().zip(own) {
            *e = student * *e + plain * plain_exponential::<SQUARE, OWN>(*e, own);
        }
    }
}

dispatched! {
    /// The forward divergence: `student·e − teacher·t + plain·p`.
    ///
    /// Where the first two terms are close, as in a well-trained student, their difference would have few correct
    /// digits. There it is `teacher·t·(2^(scale·d) − 1)`.
    pub(super) fn forward<const SQUARE: bool, const OWN: bool>(
        out: &mut [f32],
        teacher: &[f32],
        own: &[f32],
        z: &[f32],
        y: &[f32],
        coefficients: &TileCoefficients,
    ) {
        let TileCoefficients { student, teacher: of_teacher, plain, normaliser, scale, .. } = *coefficients;
        let logits = z.iter().zip(y);
        for (((e, &t), &own), (&z, &y)) in out.iter_mut().zip(teacher).zip(own).zip(logits) {
            let exponent = ((z - y) - normaliser[0] - normaliser[1]) * scale;
            let (q, p) = (student * *e, of_teacher * t);
            let near = p * small_power_less_one(exponent);
            let difference = if exponent.abs() < SMALL { near } else { q - p };
            *e = difference + plain * plain_exponential::<SQUARE, OWN>(*e, own);
        }
    }
}

dispatched! {
    /// The reverse divergence: `(difference·d + student)·e + plain·p`.
    pub(super) fn reverse<const SQUARE: bool, const OWN: bool>(
        out: &mut [f32],
        own: &[f32],
        z: &[f32],
        y: &[f32],
        coefficients: &TileCoefficients,
    ) {
        let TileCoefficients { student, difference, plain, normaliser, .. } = *coefficients;
        let logits = z.iter().zip(y);
        for ((e, &own), (&z, &y)) in out.iter_mut().zip(own).zip(logits) {
            let d = (z - y) - normaliser[0] - normaliser[1];
            *e = (difference * d + student) * *e + plain * plain_exponential::<SQUARE, OWN>(*e, own);
        }
    }
}

/// The exponential at temperature 1: a separate value, `e` itself at temperature 1, or the square of `e` at temperature
/// 2.
#[inline(always)]
fn plain_exponential<const SQUARE: bool, const OWN: bool>(e: f32, own: f32) -> f32 {
    match (OWN, SQUARE) {
        (true, _) => own,
        (_, true) => e * e,
        _ => e,
    }
}

/// The last values of a tile, padded with zeros.
#[inline(always)]
fn padded(rest: &[f32]) -> [f32; BLOCK] {
    let mut block = [0.0; BLOCK];
    block[..rest.len()].copy_from_slice(rest);
    block
}

#[inline(always)]
fn plus<T: std::ops::Add<Output = T>>(a: T, b: T) -> T {
    a + b
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

#[inline(always)]
fn smaller(a: f32, b: f32) -> f32 {
    if b < a { b } else { a }
}

#[inline(always)]
fn extend(largest: &mut [f32; LANES], least: &mut [f32; LANES], block: &[f32; BLOCK]) {
    let (block_largest, block_least) = (fold!(larger, i => block[i]), fold!(smaller, i => block[i]));
    for lane in 0..LANES {
        largest[lane] = larger(largest[lane], block_largest[lane]);
        least[lane] = smaller(least[lane], block_least[lane]);
    }
}

/// Sums of eight values each over the blocks of a tile.
type Partial = [f32; BLOCK];

#[inline(always)]
fn put(partial: &mut Partial, block: usize, lanes: [f32; LANES]) {
    partial[block * LANES..][..LANES].copy_from_slice(&lanes);
}

#[inline(always)]
fn total(partial: &Partial) -> f64 {
    let lanes: [f64; LANES] = fold!(plus, i => f64::from(partial[i]));
    let mut total = 0.0;
    for lane in lanes {
        total += lane;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_any_length_are_taken_whole() {
        let values: Vec<f32> = (0..TILE).map(|index| ((index * 37) % 101) as f32 - 50.5).collect();
        for length in [1, 2, LANES, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3, TILE - 1, TILE] {
            let values = &values[..length];
            let [largest, least] = extent(values);
            assert_eq!(largest, values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            assert_eq!(least, values.iter().copied().fold(f32::INFINITY, f32::min));
            assert_eq!(sum(values), values.iter().map(|&value| f64::from(value)).sum::<f64>());
            let differences = weighted_difference(values, values, values, 1.5);
            assert_eq!(differences, values.iter().map(|&value| f64::from(value * -1.5)).sum::<f64>());
            let mut out = vec![0.0; length];
            let [sum, squares] = exponentiate::<true>(values, largest, 0.25, &mut out, values);
            let exact = |exponent: f64| -> f64 {
                values.iter().map(|&value| (exponent * f64::from(value - largest)).exp2()).sum()
            };
            assert!((sum / exact(0.25) - 1.0).abs() < 2e-7 && (squares / exact(0.5) - 1.0).abs() < 4e-7);
        }
    }
}
