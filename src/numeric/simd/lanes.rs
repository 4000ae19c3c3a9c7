//! What an instruction set gives to dot products.

use crate::numeric::float::Element;

/// Accumulators per loop: one AVX-512 register of `f32`, two AVX2, four SSE2 or NEON.
pub const LANES: usize = 16;

/// Products of one call of [`Lanes::add_pairs`].
pub(super) const PAIRS: usize = 2 * LANES;

/// [`LANES`] values of f32 in the registers of an instruction set.
///
/// # Safety
/// The methods need the instruction set. They are inlined into a function that is compiled for it.
pub(super) trait Lanes: Copy {
    /// [`LANES`] values of i32.
    type Integers: Copy;

    /// How many sums, each of two chains of [`LANES`], fit in the registers beside what is added to them.
    const SUMS: usize;

    /// Whether [`load`](Self::load) is right for all values of a row. `Portable` takes any.
    #[inline(always)]
    unsafe fn takes<T: Element>(_row: *const T, _length: usize) -> bool {
        true
    }

    /// Zeros.
    unsafe fn zero() -> Self;

    /// The [`LANES`] values at `at`, as f32.
    unsafe fn load<T: Element>(at: *const T) -> Self;

    /// The sum with another.
    unsafe fn add(self, other: Self) -> Self;

    /// The product with another.
    unsafe fn multiply(self, other: Self) -> Self;

    /// The same value in each lane.
    unsafe fn repeat(value: f32) -> Self;

    /// Zeros.
    unsafe fn no_integers() -> Self::Integers;

    /// Adds the products of [`PAIRS`] codes with as many integers: to each lane those of two neighbours.
    unsafe fn add_pairs(sums: Self::Integers, codes: *const i8, x: *const i16) -> Self::Integers;

    /// Integers as f32, rounded to nearest.
    unsafe fn from_integers(integers: Self::Integers) -> Self;

    /// The sum of all lanes: the upper half is added to the lower one until one is left.
    unsafe fn total(self) -> f32;

    /// The first `count` lanes, and zeros in place of whatever the others hold.
    unsafe fn keep(self, count: usize) -> Self;

    /// The first `count` values at `at`, as f32, and zeros: for the end of a slice.
    #[inline(always)]
    unsafe fn load_some<T: Element>(at: *const T, count: usize) -> Self {
        let mut values = [T::default(); LANES];
        // SAFETY: the caller's; the copy has room for all lanes.
        unsafe {
            std::ptr::copy_nonoverlapping(at, values.as_mut_ptr(), count);
            Self::load(values.as_ptr())
        }
    }
}

/// Bits of lanes that are kept, then of lanes that are not: [`LANES`] of them from `LANES - count` on keep `count`.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) static KEPT: [u32; 2 * LANES] = {
    let mut kept = [0; 2 * LANES];
    let mut lane = 0;
    while lane < LANES {
        kept[lane] = u32::MAX;
        lane += 1;
    }
    kept
};
