//! Products of many rows, in the registers of the instruction set that is used.

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
use super::lanes::Lanes;
use super::level::{InstructionSet, instruction_set};
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use super::portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::sse2::Sse2;

/// The rows of one group: two at a time read memory faster than one or four.
pub const ROWS: usize = 2;

/// Products of rows with `R` vectors.
pub(super) trait Products<const R: usize> {
    /// Writes those of `N` rows from `first` on. Must be `#[inline(always)]`: it is compiled for the instruction set along
    /// with its caller.
    ///
    /// # Safety
    /// Needs the instruction set of the registers, and as many rows.
    unsafe fn of_rows<V: Lanes, const N: usize>(&self, first: usize, out: &mut [f32]);
}

/// Writes the products of all rows for which there is room, `(rows, R)`.
///
/// # Safety
/// Needs as many rows.
#[inline]
pub(super) unsafe fn with_lanes<const R: usize>(products: &impl Products<R>, out: &mut [f32]) {
    // SAFETY: the processor has what the instruction set names, and there are as many rows.
    unsafe {
        match instruction_set() {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => avx512(products, out),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => avx2(products, out),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Baseline => all_rows::<Sse2, R>(products, out),
            #[cfg(target_arch = "aarch64")]
            InstructionSet::Neon => all_rows::<Neon, R>(products, out),
            _ => all_rows::<Portable, R>(products, out),
        }
    }
}

/// # Safety
/// Needs AVX-512 F, BW, DQ and VL, and as many rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn avx512<const R: usize>(products: &impl Products<R>, out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { all_rows::<Avx512, R>(products, out) }
}

/// # Safety
/// Needs AVX2, FMA and F16C, and as many rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<const R: usize>(products: &impl Products<R>, out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { all_rows::<Avx2, R>(products, out) }
}

/// # Safety
/// Needs the instruction set, and as many rows.
#[inline(always)]
unsafe fn all_rows<V: Lanes, const R: usize>(products: &impl Products<R>, out: &mut [f32]) {
    let mut first = 0;
    let mut groups = out.chunks_exact_mut(ROWS * R);
    for out in &mut groups {
        // SAFETY: the caller's.
        unsafe { products.of_rows::<V, ROWS>(first, out) };
        first += ROWS;
    }
    for out in groups.into_remainder().chunks_exact_mut(R) {
        // SAFETY: the caller's.
        unsafe { products.of_rows::<V, 1>(first, out) };
        first += 1;
    }
}
