//! NEON, which every AArch64 processor has: sixteen lanes in four registers of 32.

use std::arch::aarch64::{
    float32x4_t, uint16x4_t, vadd_f32, vaddq_f32, vandq_u32, vcvtq_f32_s32, vdupq_n_f32, vfmaq_f32, vget_high_f32,
    vget_high_s16, vget_low_f32, vget_low_s16, vld1_s8, vld1_u16, vld1q_f32, vld1q_u32, vmovl_s8, vmovl_s16, vmulq_f32,
    vpadds_f32, vreinterpretq_f32_u32, vreinterpretq_u32_f32, vshll_n_u16,
};
use std::arch::asm;

use super::lanes::{KEPT, Lanes};
use super::weight::{LANES, Weight};
use crate::numeric::float::Float;

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
    const SUMS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: NEON is part of AArch64, here and below.
        Self(unsafe { [vdupq_n_f32(0.0); 4] })
    }

    #[inline(always)]
    unsafe fn load<T: Weight>(at: *const T) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self(match T::FLOAT {
                None => {
                    let [low, high] = [0, 8].map(|first| vmovl_s8(vld1_s8(at.cast::<i8>().add(first))));
                    [vget_low_s16(low), vget_high_s16(low), vget_low_s16(high), vget_high_s16(high)]
                        .map(|codes| vcvtq_f32_s32(vmovl_s16(codes)))
                }
                Some(float) => [0, 4, 8, 12].map(|first| match float {
                    Float::F32 => vld1q_f32(at.cast::<f32>().add(first)),
                    Float::F16 => from_f16(vld1_u16(at.cast::<u16>().add(first))),
                    // The upper half of an f32.
                    Float::Bf16 => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(at.cast::<u16>().add(first)))),
                }),
            })
        }
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
    unsafe fn add_fused(self, a: Self, b: Self) -> Self {
        // SAFETY: NEON is part of AArch64.
        Self(std::array::from_fn(|part| unsafe { vfmaq_f32(self.0[part], a.0[part], b.0[part]) }))
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
    unsafe fn total(self) -> f32 {
        let [a, b, c, d] = self.0;
        // SAFETY: NEON is part of AArch64.
        unsafe {
            let four = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
            vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        }
    }
}
