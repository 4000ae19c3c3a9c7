//! Registers of processors that have none of the instruction sets.

use half::{bf16, f16};

use super::lanes::{LANES, Lanes, PAIRS};
use crate::numeric::float::{Element, Float};

/// Sixteen numbers, which the compiler puts where it can.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Lanes for Portable {
    type Integers = [i32; LANES];

    const SUMS: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; LANES])
    }

    #[inline(always)]
    unsafe fn load<T: Element>(at: *const T) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self(match T::FLOAT {
                Float::F32 => at.cast::<[f32; LANES]>().read_unaligned(),
                Float::F16 => at.cast::<[f16; LANES]>().read_unaligned().map(f16::to_f32_const),
                Float::Bf16 => at.cast::<[bf16; LANES]>().read_unaligned().map(bf16::to_f32_const),
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

    #[inline(always)]
    unsafe fn keep(self, count: usize) -> Self {
        Self(std::array::from_fn(|lane| if lane < count { self.0[lane] } else { 0.0 }))
    }

    #[inline(always)]
    unsafe fn repeat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn no_integers() -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn add_pairs(sums: [i32; LANES], codes: *const i8, x: *const i16) -> [i32; LANES] {
        // SAFETY: the caller's.
        let (codes, x) =
            unsafe { (codes.cast::<[i8; PAIRS]>().read_unaligned(), x.cast::<[i16; PAIRS]>().read_unaligned()) };
        let product = |at: usize| i32::from(codes[at]) * i32::from(x[at]);
        std::array::from_fn(|lane| sums[lane] + product(2 * lane) + product(2 * lane + 1))
    }

    #[inline(always)]
    unsafe fn from_integers(integers: [i32; LANES]) -> Self {
        Self(integers.map(|integer| integer as f32))
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
