//! Kernels compiled for several instruction sets, of which the best is chosen at run time.
//!
//! No other module knows processor features. A kernel is a plain loop over [`LANES`] accumulators, which the compiler
//! turns into vector instructions of any width. The order of additions, and so the result, is the same on every
//! instruction set.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{self, __m512};

use super::float::{Element, Float};

/// Accumulators per loop: one AVX-512 register of `f32`, two AVX2, four SSE2.
pub const LANES: usize = 16;

/// A weight that dot products read as f32.
pub trait Weight: Copy + Send + Sync + 'static {
    /// Its dtype; `None` for an eight-bit integer.
    const FLOAT: Option<Float>;

    /// The values as f32: the slice itself, or a copy in `scratch`.
    fn widened<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32];
}

impl<T: Element> Weight for T {
    const FLOAT: Option<Float> = Some(T::FLOAT);

    fn widened<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        T::as_f32(values, scratch)
    }
}

impl Weight for i8 {
    const FLOAT: Option<Float> = None;

    fn widened<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(values.len(), 0.0);
        widen(values, scratch);
        scratch
    }
}

/// Compiles a function once for each instruction set that is worth it, and chooses one of them at run time.
///
/// Functions that it calls are compiled along with it only if they are `#[inline(always)]`.
macro_rules! dispatched {
    ($($function:tt)*) => {
        #[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
        $($function)*
    };
}
pub(crate) use dispatched;

/// Whether the processor has what [`dot_avx512`] needs.
#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl")
}

/// The values at `at` as f32, and zeros where `mask` has none.
///
/// # Safety
/// Needs AVX-512 F, BW and VL; the values that `mask` names must be readable.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load<T: Weight>(at: *const T, mask: u16) -> __m512 {
    use x86_64::{
        _mm_maskz_loadu_epi8, _mm256_maskz_loadu_epi16, _mm512_castsi512_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps,
        _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_maskz_loadu_ps, _mm512_slli_epi32,
    };
    // SAFETY: the caller's.
    unsafe {
        match T::FLOAT {
            None => _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, at.cast()))),
            Some(Float::F32) => _mm512_maskz_loadu_ps(mask, at.cast()),
            Some(Float::F16) => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at.cast())),
            // The upper half of an f32.
            Some(Float::Bf16) => {
                let bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
    }
}

/// Independent sums of a dot product, each of [`LANES`] lanes: an addition need not wait for the one before it.
const CHAINS: usize = 2;

/// `out[n·R + r] = Σ_i rows[n·length + i] · x[r·length + i]`: `N` rows times `R` vectors, at the speed of memory.
///
/// The order of additions is the same for every `N`, `R` and instruction set.
#[inline]
pub fn dot<T: Weight, const N: usize, const R: usize>(rows: &[T], x: &[f32], length: usize, out: &mut [f32]) {
    assert_eq!((rows.len(), x.len(), out.len()), (N * length, R * length, N * R));
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512, and the lengths were compared.
        return unsafe { dot_avx512::<T, N, R>(rows, x, length, out) };
    }
    let widened = &mut Vec::new();
    match T::FLOAT {
        Some(_) => dot_portable::<N, R, false>(T::widened(rows, widened), x, length, out),
        None => dot_portable::<N, R, true>(T::widened(rows, widened), x, length, out),
    }
}

/// Written with intrinsics, because the compiler spills so many sums to memory. The loops over indices are unrolled.
///
/// # Safety
/// Needs AVX-512 F, BW and VL; `rows` holds `N` rows and `x` `R` vectors of `length` values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[allow(clippy::needless_range_loop)]
unsafe fn dot_avx512<T: Weight, const N: usize, const R: usize>(rows: &[T], x: &[f32], length: usize, out: &mut [f32]) {
    use x86_64::{
        _MM_HINT_T1, _mm_prefetch, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_maskz_loadu_ps,
        _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_setzero_ps,
    };
    // Software prefetch distance, in values. The hardware prefetcher stops at page boundaries: this gained 17 % on an
    // AMD EPYC with two rows at a time.
    const AHEAD: usize = 4096;
    // Eight-bit integers are converted in one of the two units that add, so that a fused product takes less time; a cache
    // line holds several blocks of them.
    let fused = T::FLOAT.is_none();
    let add_product = |sum: __m512, a: __m512, b: __m512| match fused {
        true => _mm512_fmadd_ps(a, b, sum),
        false => _mm512_add_ps(sum, _mm512_mul_ps(a, b)),
    };
    let mut sums = [[[_mm512_setzero_ps(); CHAINS]; R]; N];
    let (rows, x) = (rows.as_ptr(), x.as_ptr());
    let mut i = 0;
    // SAFETY: every load stays below `length` in its row or vector; a prefetch may point anywhere.
    unsafe {
        while i + CHAINS * LANES <= length {
            for chain in 0..CHAINS {
                let at = i + chain * LANES;
                for n in 0..N {
                    if !fused || chain == 0 {
                        _mm_prefetch::<_MM_HINT_T1>(rows.wrapping_add(n * length + at + AHEAD).cast());
                    }
                    let values = load(rows.add(n * length + at), u16::MAX);
                    for r in 0..R {
                        let vector = _mm512_loadu_ps(x.add(r * length + at));
                        sums[n][r][chain] = add_product(sums[n][r][chain], values, vector);
                    }
                }
            }
            i += CHAINS * LANES;
        }
        for chain in 0..CHAINS {
            let at = i + chain * LANES;
            if at < length {
                let mask = ((1_u32 << (length - at).min(LANES)) - 1) as u16;
                for n in 0..N {
                    let values = load(rows.add(n * length + at), mask);
                    for r in 0..R {
                        let vector = _mm512_maskz_loadu_ps(mask, x.add(r * length + at));
                        sums[n][r][chain] = add_product(sums[n][r][chain], values, vector);
                    }
                }
            }
        }
    }
    for n in 0..N {
        for r in 0..R {
            let [a, b] = sums[n][r];
            // The same order of additions as in `dot_portable`.
            out[n * R + r] = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
        }
    }
}

dispatched! {
    /// `FUSED` rounds each product and sum once, as [`dot_avx512`] does with eight-bit integers.
    fn dot_portable<const N: usize, const R: usize, const FUSED: bool>(
        rows: &[f32],
        x: &[f32],
        length: usize,
        out: &mut [f32],
    ) {
        let add = |sum: &mut f32, a: f32, b: f32| *sum = if FUSED { a.mul_add(b, *sum) } else { *sum + a * b };
        for (at, out) in out.iter_mut().enumerate() {
            let (row, vector) = (&rows[at / R * length..][..length], &x[at % R * length..][..length]);
            let mut sums = [[0.0_f32; LANES]; CHAINS];
            let ((blocks, rest), (vectors, vector_rest)) = (row.as_chunks::<LANES>(), vector.as_chunks::<LANES>());
            let ((groups, last), (vector_groups, vector_last)) =
                (blocks.as_chunks::<CHAINS>(), vectors.as_chunks::<CHAINS>());
            for (group, vectors) in groups.iter().zip(vector_groups) {
                for chain in 0..CHAINS {
                    for lane in 0..LANES {
                        add(&mut sums[chain][lane], group[chain][lane], vectors[chain][lane]);
                    }
                }
            }
            for (chain, (block, vector)) in last.iter().zip(vector_last).enumerate() {
                for lane in 0..LANES {
                    add(&mut sums[chain][lane], block[lane], vector[lane]);
                }
            }
            for (lane, (a, b)) in rest.iter().zip(vector_rest).enumerate() {
                add(&mut sums[last.len()][lane], *a, *b);
            }
            *out = added_up(sums);
        }
    }
}

dispatched! {
    fn widen(values: &[i8], out: &mut [f32]) {
        out.iter_mut().zip(values).for_each(|(out, &value)| *out = f32::from(value));
    }
}

/// The sum of all lanes, added pairwise.
#[inline(always)]
fn added_up(sums: [[f32; LANES]; CHAINS]) -> f32 {
    let [a, b] = sums;
    let mut lanes: [f32; LANES] = std::array::from_fn(|lane| a[lane] + b[lane]);
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

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

/// Prefetches the cache line of `value`.
#[inline(always)]
pub fn prefetch<T>(value: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64, and a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::testing::noise;

    #[test]
    fn dot_products_are_exact_enough_and_the_same_for_any_number_of_vectors_and_instruction_set() {
        fn check<T: Weight>(stored: impl Fn(f32) -> T) {
            for length in [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 768, 3071] {
                let rows: Vec<T> = noise(2 * length, 1).into_iter().map(&stored).collect();
                let (mut scratch, x) = (Vec::new(), noise(4 * length, 2));
                let upcast = T::widened(&rows, &mut scratch);
                let mut together = [0.0; 8];
                dot::<T, 2, 4>(&rows, &x, length, &mut together);
                for (at, &found) in together.iter().enumerate() {
                    let (row, vector) = (at / 4 * length..(at / 4 + 1) * length, &x[at % 4 * length..][..length]);
                    let [mut alone, mut portable] = [[f32::NAN]; 2];
                    dot::<T, 1, 1>(&rows[row.clone()], vector, length, &mut alone);
                    match T::FLOAT {
                        Some(_) => dot_portable::<1, 1, false>(&upcast[row.clone()], vector, length, &mut portable),
                        None => dot_portable::<1, 1, true>(&upcast[row.clone()], vector, length, &mut portable),
                    }
                    let exact: f64 = upcast[row].iter().zip(vector).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                    assert_eq!((found, found), (alone[0], portable[0]), "{length}");
                    let most = upcast.iter().fold(1.0_f32, |most, value| most.max(value.abs()));
                    assert!(
                        (f64::from(found) - exact).abs() < 1e-6 * f64::from(most) * (1.0 + length as f64),
                        "{length}"
                    );
                }
            }
        }
        check(|value| value);
        check(f16::from_f32);
        check(bf16::from_f32);
        check(|value| (40.0 * value) as i8);
    }
}
