//! Run-time dispatch of hand kernels: one body, compiled for several instruction sets, chosen once per process.
//!
//! Nothing else in the crate knows CPU features. A kernel is written as a plain loop over fixed-width lanes
//! ([`LANES`] accumulators), which the compiler turns into vector instructions of whatever width it may use; the
//! order of additions, and so the result, is the same on every instruction set.

use std::sync::OnceLock;

/// Accumulators per loop: one AVX-512 register of `f32`, two AVX2, four SSE2.
pub const LANES: usize = 16;

/// The instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    /// What the target triple guarantees (SSE2 on x86-64, NEON on AArch64).
    Baseline,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
}

/// The widest instruction set that this processor and this build share.
pub fn instruction_set() -> InstructionSet {
    static DETECTED: OnceLock<InstructionSet> = OnceLock::new();
    *DETECTED.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> InstructionSet {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) => InstructionSet::Avx512,
        (true, false) => InstructionSet::Avx2,
        _ => InstructionSet::Baseline,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> InstructionSet {
    InstructionSet::Baseline
}

/// Defines a function whose body is compiled once per [`InstructionSet`] and chosen at run time.
///
/// What the body calls is compiled along with it only if it is `#[inline(always)]`.
macro_rules! dispatched {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $([$(const $generic:ident: $kind:ty),+])? ($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$(const $generic: $kind),+>)? ($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$(const $generic: $kind),+>)? ($($arg: $type),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$(const $generic: $kind),+>)? ($($arg: $type),*) $(-> $ret)? {
                body $(::<$($generic),+>)? ($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$(const $generic: $kind),+>)? ($($arg: $type),*) $(-> $ret)? {
                body $(::<$($generic),+>)? ($($arg),*)
            }

            match $crate::simd::instruction_set() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `instruction_set` says Avx512 only where the processor has these features.
                $crate::simd::InstructionSet::Avx512 => unsafe { avx512 $(::<$($generic),+>)? ($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `instruction_set` says Avx2 only where the processor has these features.
                $crate::simd::InstructionSet::Avx2 => unsafe { avx2 $(::<$($generic),+>)? ($($arg),*) },
                _ => body $(::<$($generic),+>)? ($($arg),*),
            }
        }
    };
}
pub(crate) use dispatched;

/// Asks for the cache line of `value`, without waiting for it.
#[inline(always)]
pub fn prefetch<T>(value: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64, and a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}
