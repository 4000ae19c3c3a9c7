//! Dot products of eight-bit weights with vectors of 16-bit integers: their products are added up as integers, two by one
//! instruction, where each weight would have to be widened to f32.

use super::lanes::{Lanes, PAIRS};
use super::prefetch::{AHEAD, LINE, prefetch_far};
use super::with_lanes::{Products, with_lanes};

/// Values of a vector that share a scale. The integer sums of as many products are far from overflow.
pub const BLOCK: usize = 128;

/// Vectors of 16-bit integers, one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct Int16<'a> {
    /// Those of each vector, and zeros up to a multiple of 32.
    pub integers: &'a [i16],
    /// Of each [`BLOCK`] of each vector.
    pub scales: &'a [f32],
}

impl Int16<'_> {
    /// The integers, with the zeros, and the scales of a vector.
    #[must_use]
    pub fn lengths(length: usize) -> (usize, usize) {
        (length.next_multiple_of(PAIRS), length.div_ceil(BLOCK))
    }

    /// Without the first vectors.
    #[must_use]
    pub fn skip(self, vectors: usize, length: usize) -> Self {
        let (integers, scales) = Self::lengths(length);
        Self { integers: &self.integers[vectors * integers..], scales: &self.scales[vectors * scales..] }
    }
}

/// `out[n·R + r] = Σ_i rows[n·length + i] · x[r][i]`: as many rows as there is room for, times `R` vectors, at the speed of
/// memory.
///
/// Sums of integers are exact. Those of blocks are scaled and added up in one order, so that the result is the same for
/// any number of rows and vectors and every instruction set. The rows may be longer, as those of [`dot`](super::dot).
#[inline]
pub fn dot_int8<const R: usize>(rows: &[i8], x: Int16<'_>, length: usize, out: &mut [f32]) {
    let (integers, scales) = Int16::lengths(length);
    assert!(out.len().is_multiple_of(R) && rows.len() >= out.len() / R * length);
    assert!(x.integers.len() >= R * integers && x.scales.len() >= R * scales);
    // SAFETY: there are as many rows.
    unsafe { with_lanes(&DotInt8::<R> { rows, x, length }, out) };
}

/// The arguments of [`dot_int8`], whose lengths were compared.
struct DotInt8<'a, const R: usize> {
    rows: &'a [i8],
    x: Int16<'a>,
    length: usize,
}

impl<const R: usize> Products<R> for DotInt8<'_, R> {
    #[inline(always)]
    unsafe fn of_rows<V: Lanes, const N: usize>(&self, first: usize, out: &mut [f32]) {
        let &Self { rows, x, length } = self;
        // SAFETY: the caller's.
        unsafe {
            let rows = rows.get_unchecked(first * length..);
            if N * R <= V::SUMS {
                return block::<V, N, R>(rows, x, length, out);
            }
            for (n, out) in out.chunks_exact_mut(R).enumerate() {
                for (r, out) in out.chunks_exact_mut(1).enumerate() {
                    block::<V, 1, 1>(&rows[n * length..], x.skip(r, length), length, out);
                }
            }
        }
    }
}

/// `N` rows times `R` vectors. The loops over constants are unrolled.
///
/// # Safety
/// Needs the instruction set; there are at least `N` rows and `R` vectors of `length` values, and room for the sums.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn block<V: Lanes, const N: usize, const R: usize>(rows: &[i8], x: Int16<'_>, length: usize, out: &mut [f32]) {
    let (integers, scales) = Int16::lengths(length);
    // The last load of all must not go beyond the rows. What it reads of the next row is multiplied by zeros.
    let whole = N * length + PAIRS <= rows.len();
    let (rows, x, factors) = (rows.as_ptr(), x.integers.as_ptr(), x.scales.as_ptr());
    // SAFETY: every load of a row stays in the slice, and of a vector in what fills it up.
    unsafe {
        let mut sums = [[V::zero(); R]; N];
        for (b, first) in (0..length).step_by(BLOCK).enumerate() {
            let mut partial = [[V::no_integers(); R]; N];
            let end = length.min(first + BLOCK);
            let mut at = first;
            while at + PAIRS <= end {
                for n in 0..N {
                    let row = rows.add(n * length + at);
                    if (at - first).is_multiple_of(LINE) {
                        prefetch_far(row.wrapping_byte_add(AHEAD));
                    }
                    for r in 0..R {
                        partial[n][r] = V::add_pairs(partial[n][r], row, x.add(r * integers + at));
                    }
                }
                at += PAIRS;
            }
            if at < end {
                for n in 0..N {
                    let row = rows.add(n * length + at);
                    prefetch_far(row.wrapping_byte_add(AHEAD));
                    let mut copy = [0_i8; PAIRS];
                    let row = if whole {
                        row
                    } else {
                        std::ptr::copy_nonoverlapping(row, copy.as_mut_ptr(), end - at);
                        copy.as_ptr()
                    };
                    for r in 0..R {
                        partial[n][r] = V::add_pairs(partial[n][r], row, x.add(r * integers + at));
                    }
                }
            }
            for n in 0..N {
                for r in 0..R {
                    let scale = V::repeat(*factors.add(r * scales + b));
                    sums[n][r] = sums[n][r].add(V::from_integers(partial[n][r]).multiply(scale));
                }
            }
        }
        for n in 0..N {
            for r in 0..R {
                out[n * R + r] = sums[n][r].total();
            }
        }
    }
}
