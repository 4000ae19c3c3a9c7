//! The loops over one row of logits, compiled for every instruction set.

use super::exponential::{SMALL, exponential, small_exponential_less_one};
use crate::simd::{LANES, dispatched};

/// Values worked on at a time, so that all steps on them meet in the first-level cache. Sums within a block are f32 lanes
/// of 16 terms each; sums of blocks are f64.
const BLOCK: usize = 256;

/// How `Σ e^z` of the cross-entropy is found from `e^(z/T)`, so that no exponential is computed twice.
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

/// Largest value, where it first stands, and whether every value is finite.
pub(super) struct Extent {
    pub max: f32,
    pub at: usize,
    pub finite: bool,
}

/// Sums over a row, of exponentials of values less the row's largest.
#[derive(Clone, Copy, Default)]
pub(super) struct Sums {
    pub student: f64,
    pub teacher: f64,
    pub plain: f64,
    /// `Σ e·difference`, where `e` and `difference` are the first distribution's, against the second's.
    pub cross: f64,
}

/// Coefficients of the gradient's terms; what they multiply is said in [`write_gradient`].
#[derive(Clone, Copy, Default)]
pub(super) struct Coefficients {
    pub student: f32,
    pub teacher: f32,
    pub plain: f32,
    pub difference: f32,
    /// The logarithms of the two normalisers, student's less teacher's, as a number and what it lacks: differences of
    /// logits are only a little larger than this, and what is left of them must keep its digits.
    pub normaliser: [f32; 2],
}

dispatched! {
    /// The row's largest value, where it is, and whether all are finite. An empty row is finite, and its maximum −∞.
    pub(super) fn extent(row: &[f32]) -> Extent {
        let mut extent = Extent { max: f32::NEG_INFINITY, at: 0, finite: true };
        for (index, block) in row.chunks(BLOCK).enumerate() {
            let (chunks, rest) = block.as_chunks::<LANES>();
            let mut maxima = [f32::NEG_INFINITY; LANES];
            // Of finite values the exponent bits are never all set, so the largest magnitude tells, as an integer.
            let mut magnitudes = [0_u32; LANES];
            for chunk in chunks {
                for ((max, magnitude), &value) in maxima.iter_mut().zip(&mut magnitudes).zip(chunk) {
                    *max = if value > *max { value } else { *max };
                    *magnitude = (*magnitude).max(value.to_bits() & 0x7fff_ffff);
                }
            }
            for ((max, magnitude), &value) in maxima.iter_mut().zip(&mut magnitudes).zip(rest) {
                *max = if value > *max { value } else { *max };
                *magnitude = (*magnitude).max(value.to_bits() & 0x7fff_ffff);
            }
            extent.finite &= magnitudes.iter().all(|&bits| bits < f32::INFINITY.to_bits());
            let max = maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if max > extent.max {
                let within = block.iter().position(|&value| value == max).unwrap_or(0);
                extent = Extent { max, at: index * BLOCK + within, ..extent };
            }
        }
        extent
    }
}

dispatched! {
    /// Writes `e^((z − max)/T)` to `out`, and the teacher's and, for [`Plain::Own`], those at temperature 1 to theirs.
    pub(super) fn exponentials_and_sums(
        student: &[f32],
        teacher: &[f32],
        maxima: [f32; 2],
        inverse: f32,
        plain: Plain,
        reverse: bool,
        out: &mut [f32],
        teacher_exponentials: &mut [f32],
        plain_exponentials: &mut [f32],
    ) -> Sums {
        let [mut student_sum, mut teacher_sum, mut plain_sum, mut cross_sum] = [[0.0; LANES]; 4];
        for start in (0..student.len()).step_by(BLOCK) {
            let range = start..(start + BLOCK).min(student.len());
            let (z, out) = (&student[range.clone()], &mut out[range.clone()]);
            exponentiate(z, maxima[0], inverse, out);
            add_sum(&mut student_sum, out, |value| value);
            match plain {
                Plain::Absent | Plain::Same => {}
                Plain::Square => add_sum(&mut plain_sum, out, |value| value * value),
                Plain::Own => {
                    let plain = &mut plain_exponentials[range.clone()];
                    exponentiate(z, maxima[0], 1.0, plain);
                    add_sum(&mut plain_sum, plain, |value| value);
                }
            }
            if !teacher.is_empty() {
                let (t, teacher_out) = (&teacher[range.clone()], &mut teacher_exponentials[range]);
                exponentiate(t, maxima[1], inverse, teacher_out);
                add_sum(&mut teacher_sum, teacher_out, |value| value);
                if reverse {
                    add_weighted_difference(&mut cross_sum, out, z, t, maxima[0] - maxima[1])
                } else {
                    add_weighted_difference(&mut cross_sum, teacher_out, t, z, maxima[1] - maxima[0])
                }
            }
        }
        let sum = |lanes: [f64; LANES]| lanes.iter().sum();
        Sums { student: sum(student_sum), teacher: sum(teacher_sum), plain: sum(plain_sum), cross: sum(cross_sum) }
    }
}

dispatched! {
    /// Turns the exponentials `e` of the student in `out` into the gradient, and returns its sum. With `t` and `p` for the
    /// exponentials of the teacher and at temperature 1, and `d` for the difference of the shifted logits:
    /// forward `student·e + teacher·t + plain·p`, reverse `(difference·d + student)·e + plain·p`.
    ///
    /// Where `q` and `p` are near, as in a student that has learned, `q − p` would have few correct digits. There it is
    /// `p·(e^(ln q − ln p) − 1)`.
    pub(super) fn write_gradient(
        student: &[f32],
        teacher: &[f32],
        maxima: [f32; 2],
        inverse: f32,
        coefficients: Coefficients,
        plain: Plain,
        reverse: bool,
        out: &mut [f32],
        teacher_exponentials: &[f32],
        plain_exponentials: &[f32],
    ) -> f64 {
        let Coefficients { student: a, teacher: b, plain: c, difference: r, normaliser } = coefficients;
        let shift = maxima[0] - maxima[1];
        let mut total = [0.0; LANES];
        for start in (0..student.len()).step_by(BLOCK) {
            let range = start..(start + BLOCK).min(student.len());
            let out = &mut out[range.clone()];
            if teacher.is_empty() {
                for e in out.iter_mut() {
                    *e *= a;
                }
                add_sum(&mut total, out, |value| value);
                continue;
            }
            let differences = student[range.clone()].iter().zip(&teacher[range.clone()]).map(|(&z, &t)| z - t);
            if reverse {
                let entries = out.iter_mut().zip(differences.map(|difference| difference - shift));
                match plain {
                    Plain::Absent | Plain::Same => {
                        for (e, d) in entries {
                            *e *= r * d + a;
                        }
                    }
                    Plain::Square => {
                        for (e, d) in entries {
                            *e *= (r * d + a) + c * *e;
                        }
                    }
                    Plain::Own => {
                        for ((e, d), &p) in entries.zip(&plain_exponentials[range]) {
                            *e = (r * d + a) * *e + c * p;
                        }
                    }
                }
            } else {
                let of_divergence = |e: f32, t: f32, d: f32| {
                    let log_quotient = (d * inverse - normaliser[0]) - normaliser[1];
                    let near = -(b * t) * small_exponential_less_one(log_quotient);
                    if log_quotient.abs() < SMALL { near } else { a * e + b * t }
                };
                let entries = out.iter_mut().zip(&teacher_exponentials[range.clone()]).zip(differences);
                match plain {
                    Plain::Absent => {
                        for ((e, &t), d) in entries {
                            *e = of_divergence(*e, t, d);
                        }
                    }
                    Plain::Same => {
                        for ((e, &t), d) in entries {
                            *e = of_divergence(*e, t, d) + c * *e;
                        }
                    }
                    Plain::Square => {
                        for ((e, &t), d) in entries {
                            *e = of_divergence(*e, t, d) + c * (*e * *e);
                        }
                    }
                    Plain::Own => {
                        for (((e, &t), d), &p) in entries.zip(&plain_exponentials[range]) {
                            *e = of_divergence(*e, t, d) + c * p;
                        }
                    }
                }
            }
            add_sum(&mut total, out, |value| value);
        }
        total.iter().sum()
    }
}

#[inline(always)]
fn exponentiate(values: &[f32], max: f32, inverse: f32, out: &mut [f32]) {
    for (out, &value) in out.iter_mut().zip(values) {
        *out = exponential((value - max) * inverse);
    }
}

/// Adds `Σ map(value)` over one block to `total`, lane by lane.
#[inline(always)]
fn add_sum(total: &mut [f64; LANES], values: &[f32], map: impl Fn(f32) -> f32) {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0.0_f32; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += map(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += map(value);
    }
    for (total, lane) in total.iter_mut().zip(lanes) {
        *total += f64::from(lane);
    }
}

/// Adds `Σ w·((x − y) − shift)` over one block to `total`: the difference of two near logits is exact, that to a far
/// maximum is not.
#[inline(always)]
fn add_weighted_difference(total: &mut [f64; LANES], w: &[f32], x: &[f32], y: &[f32], shift: f32) {
    let ((w, w_rest), (x, x_rest), (y, y_rest)) =
        (w.as_chunks::<LANES>(), x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let term = |w: f32, x: f32, y: f32| w * ((x - y) - shift);
    let mut lanes = [0.0_f32; LANES];
    for ((w, x), y) in w.iter().zip(x).zip(y) {
        for (((lane, &w), &x), &y) in lanes.iter_mut().zip(w).zip(x).zip(y) {
            *lane += term(w, x, y);
        }
    }
    for (((lane, &w), &x), &y) in lanes.iter_mut().zip(w_rest).zip(x_rest).zip(y_rest) {
        *lane += term(w, x, y);
    }
    for (total, lane) in total.iter_mut().zip(lanes) {
        *total += f64::from(lane);
    }
}
