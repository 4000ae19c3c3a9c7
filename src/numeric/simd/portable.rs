//! Registers of processors that have none of the instruction sets.

use half::{bf16, f16};

use super::lanes::Lanes;
use super::weight::{LANES, Weight};
use crate::numeric::float::Float;

/// Sixteen numbers, which the compiler puts where it can.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Lanes for Portable {
    const SUMS: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; LANES])
    }

    #[inline(always)]
    unsafe fn load<T: Weight>(at: *const T) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self(match T::FLOAT {
                None => at.cast::<[i8; LANES]>().read_unaligned().map(f32::from),
                Some(Float::F32) => at.cast::<[f32; LANES]>().read_unaligned(),
                Some(Float::F16) => at.cast::<[f16; LANES]>().read_unaligned().map(f16::to_f32_const),
                Some(Float::Bf16) => at.cast::<[bf16; LANES]>().read_unaligned().map(bf16::to_f32_const),
            })
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] * other.0[lane]))
    }

    #[cfg(target_arch = "aarch64")]
    #[inline(always)]
    unsafe fn add_fused(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|lane| a.0[lane].mul_add(b.0[lane], self.0[lane])))
    }

    #[inline(always)]
    unsafe fn keep(self, count: usize) -> Self {
        Self(std::array::from_fn(|lane| if lane < count { self.0[lane] } else { 0.0 }))
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        let mut lanes = self.0;
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
            width /= 2;
        }
        lanes[0]
    }
}
