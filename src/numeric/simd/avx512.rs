//! AVX-512: sixteen lanes in one register of 32.

use std::arch::x86_64::{
    __m512, __m512i, _mm256_loadu_si256, _mm512_add_epi32, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtepi8_epi16,
    _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_madd_epi16,
    _mm512_maskz_mov_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_slli_epi32,
};

use super::lanes::Lanes;
use crate::numeric::float::{Element, Float};

#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

impl Lanes for Avx512 {
    type Integers = __m512i;

    const SUMS: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's, here and below.
        Self(unsafe { _mm512_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn load<T: Element>(at: *const T) -> Self {
        // SAFETY: the caller's.
        Self(unsafe {
            match T::FLOAT {
                Float::F32 => _mm512_loadu_ps(at.cast()),
                Float::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
                // The upper half of an f32.
                Float::Bf16 => {
                    let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                }
            }
        })
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
    unsafe fn repeat(value: f32) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn no_integers() -> __m512i {
        // SAFETY: the caller's.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn add_pairs(sums: __m512i, codes: *const i8, x: *const i16) -> __m512i {
        // SAFETY: the caller's.
        unsafe {
            let codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256(codes.cast()));
            _mm512_add_epi32(sums, _mm512_madd_epi16(codes, _mm512_loadu_si512(x.cast())))
        }
    }

    #[inline(always)]
    unsafe fn from_integers(integers: __m512i) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { _mm512_cvtepi32_ps(integers) })
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        // SAFETY: the caller's.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
}
