//! One row of logits: its loss, and the gradient written while the exponentials are still in cache.

use super::distillation::{Direction, Objective};
use super::kernels::{Coefficients, Plain, exponentials_and_sums, extent, write_gradient};

/// Which of the two rows holds a NaN or an infinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotFinite {
    Student,
    Teacher,
}

/// Exponentials of a row that are needed until its gradient is written. Grown once, then used again for every row.
#[derive(Default)]
pub(super) struct Exponentials {
    teacher: Vec<f32>,
    plain: Vec<f32>,
}

/// A row of logits with what stands for it in the loss.
pub(super) struct Row<'a> {
    pub student: &'a [f32],
    pub teacher: Option<&'a [f32]>,
    pub label: Option<usize>,
}

/// The loss of one row, not yet divided by the number of rows. Leaves in `out` its gradient times `scale`, if `gradient`;
/// otherwise `out` is only scratch.
///
/// The gradient's entries sum to zero. Where the student is nearly sure, that gives the entry at its largest logit, which
/// as a difference of numbers near 1 would have no correct digit in f32.
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
    let inverse = 1.0 / temperature;
    let plain = match label {
        None => Plain::Absent,
        Some(_) if temperature == 1.0 => Plain::Same,
        Some(_) if temperature == 2.0 => Plain::Square,
        Some(_) => Plain::Own,
    };
    let largest = extent(row.student);
    if !largest.finite {
        return Err(NotFinite::Student);
    }
    let mut teacher_max = 0.0;
    if let Some(teacher) = teacher {
        let extent = extent(teacher);
        if !extent.finite {
            return Err(NotFinite::Teacher);
        }
        teacher_max = extent.max;
        exponentials.teacher.resize(width, 0.0);
    }
    if plain == Plain::Own {
        exponentials.plain.resize(width, 0.0);
    }
    let teacher = teacher.unwrap_or(&[]);
    let maxima = [largest.max, teacher_max];
    let Exponentials { teacher: teacher_exponentials, plain: plain_exponentials } = exponentials;
    let reverse = direction == Direction::Reverse;
    let sums = exponentials_and_sums(
        row.student,
        teacher,
        maxima,
        inverse as f32,
        plain,
        reverse,
        out,
        teacher_exponentials,
        plain_exponentials,
    );

    let mut loss = 0.0;
    let mut coefficients = Coefficients::default();
    let scale = gradient.unwrap_or(0.0);
    if !teacher.is_empty() {
        let log_ratio = sums.student.ln() - sums.teacher.ln();
        let weight = divergence * inverse * scale;
        if reverse {
            // Rounding could make it a little negative, which no divergence is.
            let divergent = (sums.cross * inverse / sums.student - log_ratio).max(0.0);
            loss += divergence * divergent;
            coefficients.difference = (weight * inverse / sums.student) as f32;
            coefficients.student = (weight / sums.student * (-log_ratio - divergent)) as f32;
        } else {
            loss += divergence * (sums.cross * inverse / sums.teacher + log_ratio).max(0.0);
            coefficients.student = (weight / sums.student) as f32;
            coefficients.teacher = (-weight / sums.teacher) as f32;
            let normaliser = (f64::from(largest.max) - f64::from(teacher_max)) * f64::from(inverse as f32) + log_ratio;
            coefficients.normaliser = [normaliser as f32, (normaliser - f64::from(normaliser as f32)) as f32];
        }
    }
    if let Some(label) = label {
        let total = if plain == Plain::Same { sums.student } else { sums.plain };
        loss += cross_entropy * (total.ln() - (f64::from(row.student[label]) - f64::from(largest.max)));
        let coefficient = (cross_entropy * scale / total) as f32;
        if plain == Plain::Same && (reverse || teacher.is_empty()) {
            coefficients.student += coefficient;
        } else {
            coefficients.plain = coefficient;
        }
    }
    if gradient.is_some() {
        // The largest exponential is 1: more than half of the sum of one of the student's distributions.
        let sure = sums.student < 2.0 || (label.is_some() && plain != Plain::Same && sums.plain < 2.0);
        if sure {
            // Exponentials of zero give an entry of zero, so that the sum is that of all other entries.
            out[largest.at] = 0.0;
            for exponentials in [&mut *teacher_exponentials, &mut *plain_exponentials] {
                if let Some(value) = exponentials.get_mut(largest.at) {
                    *value = 0.0;
                }
            }
        }
        let mut others = write_gradient(
            row.student,
            teacher,
            maxima,
            inverse as f32,
            coefficients,
            plain,
            reverse,
            out,
            teacher_exponentials,
            plain_exponentials,
        );
        if let Some(label) = label
            && !(sure && label == largest.at)
        {
            out[label] -= (cross_entropy * scale) as f32;
            others -= cross_entropy * scale;
        }
        if sure {
            out[largest.at] = -others as f32;
        }
    }
    Ok(loss)
}
