//! The two passes over one row of logits, tile by tile.

use std::f32::consts::LOG2_E;

use super::tiles::{TILE, TileCoefficients, alone, exponentiate, extent, forward, reverse, weighted_difference};

/// How `Σ e^z` of the cross-entropy follows from `e^(z/T)`, so that no exponential is computed twice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Plain {
    /// There is no cross-entropy.
    Absent,
    /// `T = 1`.
    Same,
    /// `T = 2`.
    Square,
    /// Any other temperature: exponentials of their own.
    Own,
}

/// The logits of a row, and the parameters of their exponentials.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub student: &'a [f32],
    /// Empty if there is none.
    pub teacher: &'a [f32],
    /// `log2(e) / T`: the factor from differences of logits to exponents of two.
    pub scale: f32,
    pub plain: Plain,
    pub reversed: bool,
}

/// Buffers for the exponentials of a row, `2^(scale·(value − reference))`, until its gradient is written.
pub(super) struct Outputs<'a> {
    /// The student's, which become the gradient.
    pub student: &'a mut [f32],
    pub teacher: &'a mut [f32],
    /// The student's at temperature 1, for [`Plain::Own`].
    pub plain: &'a mut [f32],
    /// The reference of each tile's exponentials: the largest logits so far, student's and teacher's.
    pub references: &'a mut [[f32; 2]],
}

/// What the first pass over a row finds.
pub(super) struct Measured {
    /// The largest logits, student's and teacher's.
    pub maxima: [f32; 2],
    /// The index of the student's first largest logit.
    pub at: usize,
    /// Sums of exponentials relative to the maxima.
    pub sums: Sums,
    /// The shift of the differences in `sums.cross`.
    pub shift: f32,
    /// Whether all values and sums are finite.
    pub finite: bool,
}

/// Sums over a row.
#[derive(Clone, Copy, Default)]
pub(super) struct Sums {
    pub student: f64,
    pub teacher: f64,
    pub plain: f64,
    /// `Σ e·((x − y) − shift)`, where `e` and `x` are the first distribution's, and `y` the second's logits.
    pub cross: f64,
}

/// Coefficients of the gradient's terms, which [`TileCoefficients`] names, for exponentials relative to the row's
/// largest logits.
#[derive(Clone, Copy, Default)]
pub(super) struct Coefficients {
    pub student: f64,
    pub teacher: f64,
    pub plain: f64,
    pub difference: f64,
    /// The number subtracted from differences of logits, as an f32 and its rounding error: what is left may be small,
    /// and must keep its digits.
    pub normaliser: [f32; 2],
}

/// The factor that makes exponentials relative to `from` relative to `to`.
fn rescaling(from: f32, to: f32, scale: f32) -> f64 {
    if from == to { 1.0 } else { ((f64::from(from) - f64::from(to)) * f64::from(scale)).exp2() }
}

/// Writes and sums the exponentials of the student at the temperature, and, where asked for, those of the teacher and
/// those of the student at temperature 1.
pub(super) fn measure(inputs: Inputs<'_>, outputs: &mut Outputs<'_>) -> Measured {
    let Inputs { student, teacher, scale, plain, reversed } = inputs;
    let (mut maxima, mut least) = ([f32::NEG_INFINITY; 2], f32::INFINITY);
    let (mut sums, mut tile_of_largest, mut shift) = (Sums::default(), 0, 0.0);
    for (tile, start) in (0..student.len()).step_by(TILE).enumerate() {
        let range = start..(start + TILE).min(student.len());
        let (z, out) = (&student[range.clone()], &mut outputs.student[range.clone()]);
        let t = if teacher.is_empty() { teacher } else { &teacher[range.clone()] };
        let next = range.end..(range.end + TILE).min(student.len());
        let (next_z, next_t) = (&student[next.clone()], if teacher.is_empty() { teacher } else { &teacher[next] });
        let [[z_max, z_min], [t_max, t_min]] = [extent(z), extent(t)];
        least = least.min(z_min).min(t_min);
        if z_max > maxima[0] {
            let by = rescaling(maxima[0], z_max, scale);
            sums.student *= by;
            sums.plain *= rescaling(maxima[0], z_max, LOG2_E);
            sums.cross *= if reversed { by } else { 1.0 };
            maxima[0] = z_max;
            tile_of_largest = tile;
        }
        if t_max > maxima[1] {
            let by = rescaling(maxima[1], t_max, scale);
            sums.teacher *= by;
            sums.cross *= if reversed { 1.0 } else { by };
            maxima[1] = t_max;
        }
        if tile == 0 {
            shift = if reversed { maxima[0] - maxima[1] } else { maxima[1] - maxima[0] };
        }
        outputs.references[tile] = maxima;
        if plain == Plain::Square {
            let [sum, squares] = exponentiate::<true>(z, maxima[0], scale, out, next_z);
            sums.student += sum;
            sums.plain += squares;
        } else {
            sums.student += exponentiate::<false>(z, maxima[0], scale, out, next_z)[0];
        }
        if plain == Plain::Own {
            sums.plain += exponentiate::<false>(z, maxima[0], LOG2_E, &mut outputs.plain[range.clone()], &[])[0];
        }
        if !teacher.is_empty() {
            let teacher_out = &mut outputs.teacher[range];
            sums.teacher += exponentiate::<false>(t, maxima[1], scale, teacher_out, next_t)[0];
            sums.cross += if reversed {
                weighted_difference(out, z, t, shift)
            } else {
                weighted_difference(teacher_out, t, z, shift)
            };
        }
    }
    // NaN shows in a sum, +∞ in the largest value, −∞ in the least.
    let finite = (sums.student + sums.teacher + sums.plain + sums.cross).is_finite()
        && maxima.iter().all(|&max| max < f32::INFINITY)
        && least > f32::NEG_INFINITY;
    let first = tile_of_largest * TILE;
    let at = first + student[first..].iter().position(|&value| value == maxima[0]).unwrap_or(0);
    Measured { maxima, at, sums, shift, finite }
}

/// Turns the exponentials of the student into the gradient.
pub(super) fn write_gradient(
    inputs: Inputs<'_>,
    outputs: &mut Outputs<'_>,
    maxima: [f32; 2],
    coefficients: &Coefficients,
) {
    let Inputs { student, teacher, scale, plain, reversed } = inputs;
    let mut references = [f32::NAN; 2];
    let mut tile_coefficients =
        TileCoefficients { normaliser: coefficients.normaliser, scale, ..TileCoefficients::default() };
    for (tile, start) in (0..student.len()).step_by(TILE).enumerate() {
        if references != outputs.references[tile] {
            references = outputs.references[tile];
            let by = rescaling(references[0], maxima[0], scale);
            tile_coefficients.student = (coefficients.student * by) as f32;
            tile_coefficients.teacher = (coefficients.teacher * rescaling(references[1], maxima[1], scale)) as f32;
            tile_coefficients.difference = (coefficients.difference * by) as f32;
            tile_coefficients.plain = (coefficients.plain * rescaling(references[0], maxima[0], LOG2_E)) as f32;
        }
        let range = start..(start + TILE).min(student.len());
        let (z, out) = (&student[range.clone()], &mut outputs.student[range.clone()]);
        // Read only for `Plain::Own`.
        let own = if plain == Plain::Own { &outputs.plain[range.clone()] } else { z };
        if teacher.is_empty() {
            match plain {
                Plain::Absent | Plain::Same => alone::<false, false>(out, own, &tile_coefficients),
                Plain::Square => alone::<true, false>(out, own, &tile_coefficients),
                Plain::Own => alone::<false, true>(out, own, &tile_coefficients),
            }
            continue;
        }
        let (t, e) = (&teacher[range.clone()], &outputs.teacher[range]);
        match (reversed, plain) {
            (false, Plain::Absent | Plain::Same) => forward::<false, false>(out, e, own, z, t, &tile_coefficients),
            (false, Plain::Square) => forward::<true, false>(out, e, own, z, t, &tile_coefficients),
            (false, Plain::Own) => forward::<false, true>(out, e, own, z, t, &tile_coefficients),
            (true, Plain::Absent | Plain::Same) => reverse::<false, false>(out, own, z, t, &tile_coefficients),
            (true, Plain::Square) => reverse::<true, false>(out, own, z, t, &tile_coefficients),
            (true, Plain::Own) => reverse::<false, true>(out, own, z, t, &tile_coefficients),
        }
    }
}
