//! Runs a kernel with the registers of the instruction set that is used.

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

/// A kernel with its arguments.
pub(super) trait Kernel {
    /// Does the work. Must be `#[inline(always)]`: it is compiled for the instruction set along with its caller.
    ///
    /// # Safety
    /// Needs the instruction set of the registers.
    unsafe fn run<V: Lanes>(self);
}

/// Runs a kernel.
#[inline]
pub(super) fn with_lanes(kernel: impl Kernel) {
    match instruction_set() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has what the instruction set names.
        InstructionSet::Avx512 => unsafe { avx512(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the same.
        InstructionSet::Avx2 => unsafe { avx2(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE2 is part of x86-64.
        InstructionSet::Baseline => unsafe { kernel.run::<Sse2>() },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: NEON is part of AArch64.
        InstructionSet::Neon => unsafe { kernel.run::<Neon>() },
        // SAFETY: it needs no instructions.
        _ => unsafe { kernel.run::<Portable>() },
    }
}

/// # Safety
/// Needs AVX-512 F, BW, DQ and VL.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn avx512(kernel: impl Kernel) {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512>() }
}

/// # Safety
/// Needs AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2(kernel: impl Kernel) {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx2>() }
}
