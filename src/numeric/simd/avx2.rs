//! AVX2, FMA and F16C: sixteen lanes in two registers of 16.

use std::arch::x86_64::{
    __m256, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadl_epi64, _mm_loadu_si128, _mm_movehl_ps, _mm_shuffle_ps,
    _mm256_add_ps, _mm256_and_ps, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtepi8_epi32,
    _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_extractf128_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_mul_ps, _mm256_setzero_ps, _mm256_slli_epi32,
};

use super::lanes::{KEPT, Lanes};
use super::weight::{LANES, Weight};
use crate::numeric::float::Float;

#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256; 2]);

impl Lanes for Avx2 {
    const SUMS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's, here and below.
        Self(unsafe { [_mm256_setzero_ps(); 2] })
    }

    #[inline(always)]
    unsafe fn load<T: Weight>(at: *const T) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self([at, at.add(LANES / 2)].map(|at| match T::FLOAT {
                None => _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))),
                Some(Float::F32) => _mm256_loadu_ps(at.cast()),
                Some(Float::F16) => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
                // The upper half of an f32.
                Some(Float::Bf16) => {
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
    unsafe fn add_fused(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's.
        Self(std::array::from_fn(|part| unsafe { _mm256_fmadd_ps(a.0[part], b.0[part], self.0[part]) }))
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
