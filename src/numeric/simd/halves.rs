//! Conversion between halves and f32, with the same bits on every instruction set.

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};

use super::level::{InstructionSet, dispatched, instruction_set};

/// Writes the values as f32, exactly. Both slices have one length.
pub fn widen_f16(values: &[f16], out: &mut [f32]) {
    assert_eq!(values.len(), out.len());
    match instruction_set() {
        InstructionSet::Baseline => widen_f16_by_bits(values, out),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has what the instruction set names.
        InstructionSet::Avx2 | InstructionSet::Avx512 => unsafe { widen_f16_by_f16c(values, out) },
        _ => values.convert_to_f32_slice(out),
    }
}

/// Rounds to the nearest float16, ties to even. Both slices have one length.
pub fn narrow_f16(values: &[f32], out: &mut [f16]) {
    assert_eq!(values.len(), out.len());
    match instruction_set() {
        InstructionSet::Baseline => {
            out.iter_mut().zip(values).for_each(|(out, &value)| *out = f16::from_f32_const(value))
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has what the instruction set names.
        InstructionSet::Avx2 | InstructionSet::Avx512 => unsafe { narrow_f16_by_f16c(values, out) },
        _ => out.convert_from_f32_slice(values),
    }
}

dispatched! {
    /// Writes the values as f32, exactly. Both slices have one length.
    pub fn widen_bf16(values: &[bf16], out: &mut [f32]) {
        out.iter_mut().zip(values).for_each(|(out, value)| *out = f32::from_bits(u32::from(value.to_bits()) << 16));
    }
}

/// A loop that compilers vectorise.
fn widen_f16_by_bits(values: &[f16], out: &mut [f32]) {
    // The exponents of both dtypes differ by 112, and float16 has 10 bits behind the point.
    const BIAS: u32 = 112 << 23;
    const LEAST: f32 = f32::from_bits(BIAS + (1 << 23));
    for (out, value) in out.iter_mut().zip(values) {
        let bits = u32::from(value.to_bits());
        let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7fff) << 13);
        let normal = magnitude + BIAS;
        let subnormal = (f32::from_bits(normal + (1 << 23)) - LEAST).to_bits();
        // Infinity and NaN, which becomes a quiet one.
        let quiet = if magnitude > 0x7c00 << 13 { 1 << 22 } else { 0 };
        let beyond = (magnitude | 0xff << 23) | quiet;
        let finite = if magnitude < 0x0400 << 13 { subnormal } else { normal };
        *out = f32::from_bits(sign | if magnitude >= 0x7c00 << 13 { beyond } else { finite });
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn widen_f16_by_f16c(values: &[f16], out: &mut [f32]) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    let ((blocks, rest), (outs, out_rest)) = (values.as_chunks::<8>(), out.as_chunks_mut::<8>());
    for (block, out) in blocks.iter().zip(outs) {
        // SAFETY: both have eight values.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(block.as_ptr().cast()))) };
    }
    widen_f16_by_bits(rest, out_rest);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn narrow_f16_by_f16c(values: &[f32], out: &mut [f16]) {
    use std::arch::x86_64::{_MM_FROUND_TO_NEAREST_INT, _mm_storeu_si128, _mm256_cvtps_ph, _mm256_loadu_ps};
    let ((blocks, rest), (outs, out_rest)) = (values.as_chunks::<8>(), out.as_chunks_mut::<8>());
    for (block, out) in blocks.iter().zip(outs) {
        // SAFETY: both have eight values.
        unsafe {
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(block.as_ptr()));
            _mm_storeu_si128(out.as_mut_ptr().cast(), halves);
        }
    }
    out_rest.iter_mut().zip(rest).for_each(|(out, &value)| *out = f16::from_f32_const(value));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::simd::level::testing::on_each;

    #[test]
    fn every_half_has_the_same_bits_on_every_instruction_set() {
        let halves: Vec<_> = (0..=u16::MAX).map(f16::from_bits).collect();
        for (set, wide) in on_each(|| {
            let mut wide = vec![0.0; halves.len()];
            // Not a multiple of a vector's width, so that the rest is met, too.
            widen_f16(&halves[..65533], &mut wide[..65533]);
            widen_f16(&halves[65533..], &mut wide[65533..]);
            wide
        }) {
            for (half, wide) in halves.iter().zip(wide) {
                assert_eq!(wide.to_bits(), half.to_f32_const().to_bits(), "{set:?} {:x}", half.to_bits());
            }
        }
    }

    #[test]
    fn rounding_is_the_same_on_every_instruction_set() {
        // Values between any two halves, in the middle and beside it, and beyond them.
        let between = |bits: u16| {
            let wide = f16::from_bits(bits).to_f32_const().to_bits();
            [0, 0x0fff, 0x1000, 0x1001, 0x1fff].map(|more| f32::from_bits(wide + more))
        };
        let mut values: Vec<_> = (0..=u16::MAX).flat_map(between).collect();
        values.extend([f32::MAX, f32::MIN_POSITIVE, 1e-8, 2.98e-8, -65520.0, 65519.9, f32::NAN, f32::NEG_INFINITY]);
        for (set, narrow) in on_each(|| {
            let mut narrow = vec![f16::ZERO; values.len()];
            narrow_f16(&values, &mut narrow);
            narrow
        }) {
            for (value, narrow) in values.iter().zip(narrow) {
                assert_eq!(narrow.to_bits(), f16::from_f32_const(*value).to_bits(), "{set:?} {value:e}");
            }
        }
    }
}
