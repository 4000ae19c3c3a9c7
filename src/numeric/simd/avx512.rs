//! AVX-512: sixteen lanes in one register of 32.

use std::arch::x86_64::{
    __m512, _mm_loadu_si128, _mm256_loadu_si256, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtepi8_epi32,
    _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_maskz_mov_ps,
    _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_setzero_ps, _mm512_slli_epi32,
};

use super::lanes::Lanes;
use super::weight::Weight;
use crate::numeric::float::Float;

#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

impl Lanes for Avx512 {
    const SUMS: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's, here and below.
        Self(unsafe { _mm512_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn load<T: Weight>(at: *const T) -> Self {
        // SAFETY: the caller's.
        Self(unsafe {
            match T::FLOAT {
                None => _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))),
                Some(Float::F32) => _mm512_loadu_ps(at.cast()),
                Some(Float::F16) => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
                // The upper half of an f32.
                Some(Float::Bf16) => {
                    let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                }
            }
        })
    }

    #[inline(always)]
    unsafe fn add_fused(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }

    #[inline(always)]
    unsafe fn keep(self, count: usize) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { _mm512_maskz_mov_ps(((1_u32 << count) - 1) as u16, self.0) })
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        // SAFETY: the caller's.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
}
