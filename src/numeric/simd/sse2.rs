//! SSE2, which every x86-64 processor has: sixteen lanes in four registers of 16.

use std::arch::x86_64::{
    __m128, __m128i, _mm_add_epi32, _mm_add_ps, _mm_add_ss, _mm_and_ps, _mm_and_si128, _mm_castsi128_ps,
    _mm_cvtepi32_ps, _mm_cvtss_f32, _mm_loadu_ps, _mm_loadu_si128, _mm_madd_epi16, _mm_max_epi16, _mm_movehl_ps,
    _mm_mul_ps, _mm_set1_epi16, _mm_set1_ps, _mm_setzero_ps, _mm_setzero_si128, _mm_shuffle_ps, _mm_slli_epi16,
    _mm_srai_epi16, _mm_unpackhi_epi8, _mm_unpackhi_epi16, _mm_unpacklo_epi8, _mm_unpacklo_epi16,
};

use super::lanes::{KEPT, LANES, Lanes};
use crate::numeric::float::{Element, Float};

#[derive(Clone, Copy)]
pub(super) struct Sse2([__m128; 4]);

/// Sixteen finite halves as f32.
#[inline(always)]
fn from_f16(halves: [__m128i; 2]) -> [__m128; 4] {
    // SAFETY: SSE2 is part of x86-64.
    unsafe {
        // The sign stays, and exponent and fraction go to their places: the value, less 112 in its exponent.
        let parts = halves.map(|halves| {
            let upper = _mm_and_si128(_mm_srai_epi16::<3>(halves), _mm_set1_epi16(0x8fff_u16 as i16));
            (_mm_slli_epi16::<13>(halves), upper)
        });
        // The product is exact, for subnormal halves, too.
        let [(a, b), (c, d)] = parts;
        [_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(c, d), _mm_unpackhi_epi16(c, d)]
            .map(|bits| _mm_mul_ps(_mm_castsi128_ps(bits), _mm_set1_ps(f32::from_bits((127 + 112) << 23))))
    }
}

impl Lanes for Sse2 {
    type Integers = [__m128i; 4];

    const SUMS: usize = 1;

    /// All but rows with an infinity or a NaN of float16. Both would need operations at every value.
    #[inline(always)]
    unsafe fn takes<T: Element>(row: *const T, length: usize) -> bool {
        if T::FLOAT != Float::F16 {
            return true;
        }
        // SAFETY: the caller's.
        let halves: &[i16] = unsafe { std::slice::from_raw_parts(row.cast(), length) };
        let (blocks, rest) = halves.as_chunks::<8>();
        // With intrinsics, because the compiler gathers the values of a lane.
        // SAFETY: SSE2 is part of x86-64, and both types have eight values.
        let most: [i16; 8] = unsafe {
            let largest = |most, block: &[i16; 8]| {
                _mm_max_epi16(most, _mm_and_si128(_mm_loadu_si128(block.as_ptr().cast()), _mm_set1_epi16(i16::MAX)))
            };
            std::mem::transmute(blocks.iter().fold(_mm_setzero_si128(), largest))
        };
        most.into_iter().chain(rest.iter().map(|half| half & i16::MAX)).all(|magnitude| magnitude < 0x7c00)
    }

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: SSE2 is part of x86-64, here and below.
        Self(unsafe { [_mm_setzero_ps(); 4] })
    }

    #[inline(always)]
    unsafe fn load<T: Element>(at: *const T) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self(match T::FLOAT {
                Float::F32 => [0, 1, 2, 3].map(|part| _mm_loadu_ps(at.cast::<f32>().add(4 * part))),
                Float::F16 => from_f16([0, 1].map(|part| _mm_loadu_si128(at.cast::<__m128i>().add(part)))),
                // The upper half of an f32.
                Float::Bf16 => {
                    let [low, high] = [0, 1].map(|part| _mm_loadu_si128(at.cast::<__m128i>().add(part)));
                    let zero = _mm_setzero_si128();
                    [
                        _mm_unpacklo_epi16(zero, low),
                        _mm_unpackhi_epi16(zero, low),
                        _mm_unpacklo_epi16(zero, high),
                        _mm_unpackhi_epi16(zero, high),
                    ]
                    .map(|bits| _mm_castsi128_ps(bits))
                }
            })
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(std::array::from_fn(|part| unsafe { _mm_add_ps(self.0[part], other.0[part]) }))
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(std::array::from_fn(|part| unsafe { _mm_mul_ps(self.0[part], other.0[part]) }))
    }

    #[inline(always)]
    unsafe fn keep(self, count: usize) -> Self {
        let kept = &KEPT[LANES - count..][..LANES];
        // SAFETY: the caller's; there are as many bits.
        Self(std::array::from_fn(|part| unsafe {
            let bits = _mm_loadu_ps(kept.as_ptr().cast::<f32>().add(4 * part));
            _mm_and_ps(self.0[part], bits)
        }))
    }

    #[inline(always)]
    unsafe fn repeat(value: f32) -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(unsafe { [_mm_set1_ps(value); 4] })
    }

    #[inline(always)]
    unsafe fn no_integers() -> [__m128i; 4] {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { [_mm_setzero_si128(); 4] }
    }

    #[inline(always)]
    unsafe fn add_pairs(sums: [__m128i; 4], codes: *const i8, x: *const i16) -> [__m128i; 4] {
        // SAFETY: the caller's.
        unsafe {
            let [low, high] = [0, 1].map(|part| _mm_loadu_si128(codes.cast::<__m128i>().add(part)));
            let doubled = [
                _mm_unpacklo_epi8(low, low),
                _mm_unpackhi_epi8(low, low),
                _mm_unpacklo_epi8(high, high),
                _mm_unpackhi_epi8(high, high),
            ];
            std::array::from_fn(|part| {
                let x = _mm_loadu_si128(x.cast::<__m128i>().add(part));
                _mm_add_epi32(sums[part], _mm_madd_epi16(_mm_srai_epi16::<8>(doubled[part]), x))
            })
        }
    }

    #[inline(always)]
    unsafe fn from_integers(integers: [__m128i; 4]) -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(integers.map(|integers| unsafe { _mm_cvtepi32_ps(integers) }))
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        let [a, b, c, d] = self.0;
        // SAFETY: SSE2 is part of x86-64.
        unsafe {
            let four = _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
}
