//! One row of logits: its loss, and its gradient, written while the exponentials are still in the cache.

use std::f64::consts::{LN_2, LOG2_E};

use super::kernels::{Coefficients, Inputs, Outputs, Plain, measure, write_gradient};
use super::objective::{Direction, Objective};
use super::tiles::{TILE, sum};

/// The row that holds a NaN or an infinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotFinite {
    Student,
    Teacher,
}

/// Exponentials of a row, kept until its gradient is written. The buffers are reused for every row.
#[derive(Default)]
pub(super) struct Exponentials {
    teacher: Vec<f32>,
    plain: Vec<f32>,
    references: Vec<[f32; 2]>,
}

/// A row of logits, with the teacher's logits and its label.
pub(super) struct Row<'a> {
    pub student: &'a [f32],
    pub teacher: Option<&'a [f32]>,
    pub label: Option<usize>,
}

impl Plain {
    /// How the cross-entropy's exponentials follow from those at this temperature.
    pub(super) fn at(temperature: f64) -> Self {
        match temperature {
            1.0 => Self::Same,
            2.0 => Self::Square,
            _ => Self::Own,
        }
    }
}

/// The loss of one row, not yet divided by the number of rows. `gradient` is the factor of the gradient, which is
/// written to `out`; without one, `out` is scratch.
///
/// The gradient's entries sum to zero. Where the student is nearly sure, the entry at the largest logit is computed
/// from that sum: a difference of numbers near 1 would have no correct digit in f32.
pub(super) fn row_loss(
    row: &Row<'_>,
    objective: &Objective,
    gradient: Option<f64>,
    out: &mut [f32],
    exponentials: &mut Exponentials,
) -> Result<f64, NotFinite> {
    let width = row.student.len();
    let Objective { temperature, divergence, cross_entropy, direction } = *objective;
    let teacher = row.teacher.filter(|_| divergence > 0.0);
    let label = row.label.filter(|_| cross_entropy > 0.0);
    // Without a divergence there is no temperature.
    let temperature = if teacher.is_some() { temperature } else { 1.0 };
    let plain = if label.is_some() { Plain::at(temperature) } else { Plain::Absent };
    let reverse = direction == Direction::Reverse;
    let exponent_scale = (LOG2_E / temperature) as f32;
    // The inverse temperature of the exponentials, with the rounding of their scale.
    let inverse = f64::from(exponent_scale) * LN_2;
    exponentials.references.resize(width.div_ceil(TILE), [0.0; 2]);
    exponentials.teacher.resize(if teacher.is_some() { width } else { 0 }, 0.0);
    exponentials.plain.resize(if plain == Plain::Own { width } else { 0 }, 0.0);
    let inputs = Inputs {
        student: row.student,
        teacher: teacher.unwrap_or(&[]),
        scale: exponent_scale,
        plain,
        reversed: reverse,
    };
    let mut outputs = Outputs {
        student: out,
        teacher: &mut exponentials.teacher,
        plain: &mut exponentials.plain,
        references: &mut exponentials.references,
    };
    let measured = measure(inputs, &mut outputs);
    if !measured.finite {
        let infinite = |values: &[f32]| values.iter().any(|value| !value.is_finite());
        if infinite(row.student) {
            return Err(NotFinite::Student);
        }
        if teacher.is_some_and(infinite) {
            return Err(NotFinite::Teacher);
        }
    }
    let (sums, at) = (measured.sums, measured.at);

    let mut loss = 0.0;
    let mut coefficients = Coefficients::default();
    let scale = gradient.unwrap_or(0.0);
    let maxima = measured.maxima.map(f64::from);
    if teacher.is_some() {
        // `T·ln Σe^(z/T)` of the student less that of the teacher.
        let normaliser = (maxima[0] - maxima[1]) + (sums.student.ln() - sums.teacher.ln()) / inverse;
        let (first, excess) = if reverse { (sums.student, -normaliser) } else { (sums.teacher, normaliser) };
        // Rounding may make it slightly negative.
        let divergent = ((sums.cross / first + (f64::from(measured.shift) + excess)) * inverse).max(0.0);
        loss += divergence * divergent;
        let weight = divergence / temperature * scale;
        let taken = if reverse {
            coefficients.difference = weight * inverse / sums.student;
            normaliser + divergent / inverse
        } else {
            coefficients.student = weight / sums.student;
            coefficients.teacher = weight / sums.teacher;
            normaliser
        };
        coefficients.normaliser = [taken as f32, (taken - f64::from(taken as f32)) as f32];
    }
    if let Some(label) = label {
        let total = if plain == Plain::Same { sums.student } else { sums.plain };
        loss += cross_entropy * (total.ln() - (f64::from(row.student[label]) - maxima[0]));
        let coefficient = cross_entropy * scale / total;
        if plain == Plain::Same && (reverse || teacher.is_none()) {
            coefficients.student += coefficient;
        } else {
            coefficients.plain = coefficient;
        }
    }
    if gradient.is_some() {
        // The largest exponential is 1. Here it is more than half of the sum of one of the student's distributions.
        let sure = sums.student < 2.0 || (label.is_some() && plain != Plain::Same && sums.plain < 2.0);
        if sure {
            // With its exponentials set to zero this entry is zero, and the sum covers all other entries.
            outputs.student[at] = 0.0;
            for exponentials in [&mut *outputs.teacher, &mut *outputs.plain] {
                if let Some(value) = exponentials.get_mut(at) {
                    *value = 0.0;
                }
            }
        }
        write_gradient(inputs, &mut outputs, measured.maxima, &coefficients);
        let out = outputs.student;
        if let Some(label) = label
            && !(sure && label == at)
        {
            out[label] -= (cross_entropy * scale) as f32;
        }
        if sure {
            out[at] = -out.chunks(TILE).map(sum).sum::<f64>() as f32;
        }
    }
    Ok(loss)
}
