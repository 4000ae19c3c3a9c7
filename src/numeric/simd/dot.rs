//! Dot products at the speed of memory. One loop serves every instruction set, which gives its registers.

use super::lanes::{LANES, Lanes};
use super::portable::Portable;
use super::prefetch::{AHEAD, LINE, prefetch_far};
use super::with_lanes::{Products, with_lanes};
use crate::numeric::float::Element;

/// Independent sums of a dot product, each of [`LANES`] lanes: an addition need not wait for the one before it.
const CHAINS: usize = 2;

/// `out[n·R + r] = Σ_i rows[n·length + i] · x[r·length + i]`: as many rows as there is room for, times `R` vectors, at the
/// speed of memory.
///
/// The order of additions, and so the result, is the same for any number of rows and vectors and every instruction set.
/// Both slices may be longer: the last few values of a row are read faster if there are others behind them, which do not
/// count.
#[inline]
pub fn dot<T: Element, const R: usize>(rows: &[T], x: &[f32], length: usize, out: &mut [f32]) {
    assert!(out.len().is_multiple_of(R) && rows.len() >= out.len() / R * length && x.len() >= R * length);
    // SAFETY: there are as many rows.
    unsafe { with_lanes(&Dot::<T, R> { rows, x, length }, out) };
}

/// The arguments of [`dot`], whose lengths were compared.
struct Dot<'a, T, const R: usize> {
    rows: &'a [T],
    x: &'a [f32],
    length: usize,
}

impl<T: Element, const R: usize> Products<R> for Dot<'_, T, R> {
    #[inline(always)]
    unsafe fn of_rows<V: Lanes, const N: usize>(&self, first: usize, out: &mut [f32]) {
        // SAFETY: the caller's.
        unsafe { dot_by::<V, T, N, R>(self.rows.get_unchecked(first * self.length..), self.x, self.length, out) }
    }
}

/// As [`dot`], in blocks whose sums fit in registers.
///
/// # Safety
/// Needs the instruction set; the lengths must be as [`dot`] compares them.
#[inline(always)]
unsafe fn dot_by<V: Lanes, T: Element, const N: usize, const R: usize>(
    rows: &[T],
    x: &[f32],
    length: usize,
    out: &mut [f32],
) {
    // SAFETY: the caller's.
    unsafe {
        if N * R <= V::SUMS && V::takes(rows.as_ptr(), N * length) {
            return block::<V, T, N, R>(rows, x, length, out);
        }
        for (n, out) in out.chunks_exact_mut(R).enumerate() {
            let row = &rows[n * length..];
            if !V::takes(row.as_ptr(), length) {
                dot_of_any(row, x, length, out);
                continue;
            }
            let mut r = 0;
            if V::SUMS >= 2 {
                while r + 2 <= R {
                    block::<V, T, 1, 2>(row, &x[r * length..], length, &mut out[r..r + 2]);
                    r += 2;
                }
            }
            while r < R {
                block::<V, T, 1, 1>(row, &x[r * length..], length, &mut out[r..=r]);
                r += 1;
            }
        }
    }
}

/// A row that [`Lanes::takes`] refuses, times as many vectors as there is room for results.
///
/// # Safety
/// As of [`block`].
#[cold]
#[inline(never)]
unsafe fn dot_of_any<T: Element>(row: &[T], x: &[f32], length: usize, out: &mut [f32]) {
    for (r, out) in out.chunks_exact_mut(1).enumerate() {
        // SAFETY: the caller's.
        unsafe { block::<Portable, T, 1, 1>(row, &x[r * length..], length, out) };
    }
}

/// `N` rows times `R` vectors. The loops over constants are unrolled.
///
/// # Safety
/// Needs the instruction set; there are at least `N` rows and `R` vectors of `length` values, and room for the sums.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn block<V: Lanes, T: Element, const N: usize, const R: usize>(
    rows: &[T],
    x: &[f32],
    length: usize,
    out: &mut [f32],
) {
    let per_line = LINE / size_of::<T>();
    // The last load of all must not go beyond the slices.
    let whole = N * length + LANES <= rows.len() && R * length + LANES <= x.len();
    let (rows, x) = (rows.as_ptr(), x.as_ptr());
    // SAFETY: every load stays in the slices: below `length` in its row or vector, but for the last one.
    unsafe {
        let mut sums = [[[V::zero(); CHAINS]; R]; N];
        let mut i = 0;
        while i + CHAINS * LANES <= length {
            for chain in 0..CHAINS {
                let at = i + chain * LANES;
                for n in 0..N {
                    // Once for a line of several loads.
                    if (chain * LANES).is_multiple_of(per_line) {
                        prefetch_far(rows.wrapping_add(n * length + at).wrapping_byte_add(AHEAD));
                    }
                    let values = V::load(rows.add(n * length + at));
                    for r in 0..R {
                        let vector = V::load(x.add(r * length + at));
                        let sum = &mut sums[n][r][chain];
                        *sum = sum.add(values.multiply(vector));
                    }
                }
            }
            i += CHAINS * LANES;
        }
        for chain in 0..CHAINS {
            let at = i + chain * LANES;
            if at < length {
                let count = (length - at).min(LANES);
                for n in 0..N {
                    let row = rows.add(n * length + at);
                    // One line that is left out of each row costs more than the row.
                    prefetch_far(row.wrapping_byte_add(AHEAD));
                    let values = if whole { V::load(row) } else { V::load_some(row, count) };
                    for r in 0..R {
                        let vector = x.add(r * length + at);
                        let vector = if whole { V::load(vector) } else { V::load_some(vector, count) };
                        let sum = &mut sums[n][r][chain];
                        *sum = sum.add(values.multiply(vector).keep(count));
                    }
                }
            }
        }
        for n in 0..N {
            for r in 0..R {
                let [a, b] = sums[n][r];
                out[n * R + r] = a.add(b).total();
            }
        }
    }
}
