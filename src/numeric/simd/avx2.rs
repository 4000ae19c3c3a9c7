//! AVX2, FMA and F16C: sixteen lanes in two registers of 16.

use std::arch::x86_64::{
    __m256, __m256i, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehl_ps, _mm_shuffle_ps,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_ps, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtepi8_epi16,
    _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_extractf128_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_madd_epi16, _mm256_mul_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256,
    _mm256_slli_epi32,
};

use super::lanes::{KEPT, LANES, Lanes};
use crate::numeric::float::{Element, Float};

#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256; 2]);

impl Lanes for Avx2 {
    type Integers = [__m256i; 2];

    const SUMS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's, here and below.
        Self(unsafe { [_mm256_setzero_ps(); 2] })
    }

    #[inline(always)]
    unsafe fn load<T: Element>(at: *const T) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self([at, at.add(LANES / 2)].map(|at| match T::FLOAT {
                Float::F32 => _mm256_loadu_ps(at.cast()),
                Float::F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
                // The upper half of an f32.
                Float::Bf16 => {
                    let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
                }
            }))
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller's.
        unsafe { Self([_mm256_add_ps(self.0[0], other.0[0]), _mm256_add_ps(self.0[1], other.0[1])]) }
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        // SAFETY: the caller's.
        unsafe { Self([_mm256_mul_ps(self.0[0], other.0[0]), _mm256_mul_ps(self.0[1], other.0[1])]) }
    }

    #[inline(always)]
    unsafe fn keep(self, count: usize) -> Self {
        let kept = &KEPT[LANES - count..][..LANES];
        // SAFETY: the caller's; there are as many bits.
        Self(std::array::from_fn(|part| unsafe {
            let bits = _mm256_loadu_ps(kept.as_ptr().cast::<f32>().add(8 * part));
            _mm256_and_ps(self.0[part], bits)
        }))
    }

    #[inline(always)]
    unsafe fn repeat(value: f32) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { [_mm256_set1_ps(value); 2] })
    }

    #[inline(always)]
    unsafe fn no_integers() -> [__m256i; 2] {
        // SAFETY: the caller's.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    unsafe fn add_pairs(sums: [__m256i; 2], codes: *const i8, x: *const i16) -> [__m256i; 2] {
        // SAFETY: the caller's.
        std::array::from_fn(|part| unsafe {
            let codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(codes.add(16 * part).cast()));
            let x = _mm256_loadu_si256(x.add(16 * part).cast());
            _mm256_add_epi32(sums[part], _mm256_madd_epi16(codes, x))
        })
    }

    #[inline(always)]
    unsafe fn from_integers(integers: [__m256i; 2]) -> Self {
        // SAFETY: the caller's.
        Self(integers.map(|integers| unsafe { _mm256_cvtepi32_ps(integers) }))
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            let eight = _mm256_add_ps(self.0[0], self.0[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
}
