//! NEON, which every AArch64 processor has: sixteen lanes in four registers of 32.

use std::arch::aarch64::{
    float32x4_t, int32x4_t, uint16x4_t, vadd_f32, vaddq_f32, vaddq_s32, vandq_u32, vcvtq_f32_s32, vdupq_n_f32,
    vdupq_n_s32, vget_high_f32, vget_low_f32, vget_low_s16, vld1_s8, vld1_u16, vld1q_f32, vld1q_s16, vld1q_u32,
    vmovl_s8, vmull_high_s16, vmull_s16, vmulq_f32, vpaddq_s32, vpadds_f32, vreinterpretq_f32_u32,
    vreinterpretq_u32_f32, vshll_n_u16,
};
use std::arch::asm;

use super::lanes::{KEPT, LANES, Lanes};
use crate::numeric::float::{Element, Float};

#[derive(Clone, Copy)]
pub(super) struct Neon([float32x4_t; 4]);

/// Four halves as f32.
#[inline(always)]
fn from_f16(halves: uint16x4_t) -> float32x4_t {
    let wide;
    // Rust has no stable type for vectors of halves.
    // SAFETY: the instruction is part of NEON and touches these registers alone.
    unsafe { asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) halves, options(pure, nomem, nostack)) };
    wide
}

impl Lanes for Neon {
    type Integers = [int32x4_t; 4];

    const SUMS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: NEON is part of AArch64, here and below.
        Self(unsafe { [vdupq_n_f32(0.0); 4] })
    }

    #[inline(always)]
    unsafe fn load<T: Element>(at: *const T) -> Self {
        // SAFETY: the caller's.
        Self([0, 4, 8, 12].map(|first| unsafe {
            match T::FLOAT {
                Float::F32 => vld1q_f32(at.cast::<f32>().add(first)),
                Float::F16 => from_f16(vld1_u16(at.cast::<u16>().add(first))),
                // The upper half of an f32.
                Float::Bf16 => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(at.cast::<u16>().add(first)))),
            }
        }))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: NEON is part of AArch64.
        Self(std::array::from_fn(|part| unsafe { vaddq_f32(self.0[part], other.0[part]) }))
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        // SAFETY: NEON is part of AArch64.
        Self(std::array::from_fn(|part| unsafe { vmulq_f32(self.0[part], other.0[part]) }))
    }

    #[inline(always)]
    unsafe fn keep(self, count: usize) -> Self {
        let kept = &KEPT[LANES - count..][..LANES];
        // SAFETY: the caller's; there are as many bits.
        Self(std::array::from_fn(|part| unsafe {
            let bits = vld1q_u32(kept.as_ptr().add(4 * part));
            vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(self.0[part]), bits))
        }))
    }

    #[inline(always)]
    unsafe fn repeat(value: f32) -> Self {
        // SAFETY: NEON is part of AArch64.
        Self(unsafe { [vdupq_n_f32(value); 4] })
    }

    #[inline(always)]
    unsafe fn no_integers() -> [int32x4_t; 4] {
        // SAFETY: NEON is part of AArch64.
        unsafe { [vdupq_n_s32(0); 4] }
    }

    #[inline(always)]
    unsafe fn add_pairs(sums: [int32x4_t; 4], codes: *const i8, x: *const i16) -> [int32x4_t; 4] {
        // SAFETY: the caller's.
        std::array::from_fn(|part| unsafe {
            let (codes, x) = (vmovl_s8(vld1_s8(codes.add(8 * part))), vld1q_s16(x.add(8 * part)));
            let low = vmull_s16(vget_low_s16(codes), vget_low_s16(x));
            vaddq_s32(sums[part], vpaddq_s32(low, vmull_high_s16(codes, x)))
        })
    }

    #[inline(always)]
    unsafe fn from_integers(integers: [int32x4_t; 4]) -> Self {
        // SAFETY: NEON is part of AArch64.
        Self(integers.map(|integers| unsafe { vcvtq_f32_s32(integers) }))
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        let [a, b, c, d] = self.0;
        // SAFETY: NEON is part of AArch64.
        unsafe {
            let four = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
            vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        }
    }
}
