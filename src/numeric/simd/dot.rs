//! Dot products at the speed of memory. One loop serves every instruction set, which gives its registers.

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
use super::lanes::Lanes;
use super::level::{InstructionSet, instruction_set};
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use super::portable::Portable;
use super::prefetch::prefetch_far;
#[cfg(target_arch = "x86_64")]
use super::sse2::Sse2;
use super::weight::{LANES, Weight};

/// Independent sums of a dot product, each of [`LANES`] lanes: an addition need not wait for the one before it.
const CHAINS: usize = 2;

/// Software prefetch distance, in bytes. The hardware prefetcher stops at page boundaries: this gained 17 % on an AMD EPYC
/// with two rows at a time. At 4 KiB eight-bit weights are read a fifth slower there; from 8 to 32 KiB all are equal.
const AHEAD: usize = 16384;

/// Bytes of a cache line.
const LINE: usize = 64;

/// `out[n·R + r] = Σ_i rows[n·length + i] · x[r·length + i]`: `N` rows times `R` vectors, at the speed of memory.
///
/// The order of additions, and so the result, is the same for every `N`, `R` and instruction set; but products of eight-bit
/// integers are fused with their sum where the processor can, and SSE2 cannot. Both slices may be longer:
/// the last few values of a row are read faster if there are others behind them, which do not count.
#[inline]
pub fn dot<T: Weight, const N: usize, const R: usize>(rows: &[T], x: &[f32], length: usize, out: &mut [f32]) {
    assert!(rows.len() >= N * length && x.len() >= R * length && out.len() == N * R);
    match instruction_set() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has what the instruction set names, and the lengths were compared.
        InstructionSet::Avx512 => unsafe { dot_avx512::<T, N, R>(rows, x, length, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the same.
        InstructionSet::Avx2 => unsafe { dot_avx2::<T, N, R>(rows, x, length, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the lengths were compared.
        InstructionSet::Baseline => unsafe { dot_by::<Sse2, T, N, R>(rows, x, length, out) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the lengths were compared.
        InstructionSet::Neon => unsafe { dot_by::<Neon, T, N, R>(rows, x, length, out) },
        // SAFETY: the lengths were compared.
        _ => unsafe { dot_by::<Portable, T, N, R>(rows, x, length, out) },
    }
}

/// As [`dot`].
///
/// # Safety
/// Needs AVX-512 F, BW, DQ and VL, and lengths as [`dot`] compares them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn dot_avx512<T: Weight, const N: usize, const R: usize>(rows: &[T], x: &[f32], length: usize, out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { dot_by::<Avx512, T, N, R>(rows, x, length, out) }
}

/// As [`dot`].
///
/// # Safety
/// Needs AVX2, FMA and F16C, and lengths as [`dot`] compares them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_avx2<T: Weight, const N: usize, const R: usize>(rows: &[T], x: &[f32], length: usize, out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { dot_by::<Avx2, T, N, R>(rows, x, length, out) }
}

/// As [`dot`], in blocks whose sums fit in registers.
///
/// # Safety
/// Needs the instruction set; the lengths must be as [`dot`] compares them.
#[inline(always)]
unsafe fn dot_by<V: Lanes, T: Weight, const N: usize, const R: usize>(
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
unsafe fn dot_of_any<T: Weight>(row: &[T], x: &[f32], length: usize, out: &mut [f32]) {
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
unsafe fn block<V: Lanes, T: Weight, const N: usize, const R: usize>(
    rows: &[T],
    x: &[f32],
    length: usize,
    out: &mut [f32],
) {
    let per_line = LINE / size_of::<T>();
    // Integers are converted in units that also add, so that fused products take a fifth less time.
    let fused = T::FLOAT.is_none();
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
                        *sum = if fused { sum.add_fused(values, vector) } else { sum.add(values.multiply(vector)) };
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
                        *sum = if fused {
                            sum.add_fused(values, vector.keep(count))
                        } else {
                            sum.add(values.multiply(vector).keep(count))
                        };
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
