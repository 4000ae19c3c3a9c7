//! Distances between hidden states of student and teacher.

use super::parallel::sum_over_rows;
use super::student::Student;
use crate::error::{Error, Result};
use crate::numeric::Values;
use crate::numeric::simd::{LANES, dispatched};
use crate::progress::{Parallelism, Progress};

/// A distance between two vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HiddenDistance {
    /// `‖s − t‖² / width`.
    MeanSquaredError,
    /// `1 − s·t / (‖s‖‖t‖)`; where either is zero, 1 with a zero gradient.
    Cosine,
}

impl HiddenDistance {
    /// Reads "mse" or "cosine".
    ///
    /// # Errors
    /// [`Error::Config`] for any other name.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "mse" => Ok(Self::MeanSquaredError),
            "cosine" => Ok(Self::Cosine),
            other => Err(Error::Config(format!("kind: expected \"mse\" or \"cosine\", got \"{other}\""))),
        }
    }
}

/// What the hidden states of `rows` tokens are compared with.
#[derive(Clone, Copy, Debug)]
pub struct HiddenBatch<'a> {
    /// The teacher's states, `(rows, width)`; any of the dtypes.
    pub teacher: Values<'a>,
    /// Values per row.
    pub width: usize,
    /// The rows that count; all without a mask. Other rows are not read, and their gradient is exactly zero.
    pub mask: Option<&'a [bool]>,
}

/// The mean distance over the rows that count; its gradient by the student's states is written where [`Student`] says.
///
/// All sums are f64. No row that counts: the loss is 0.
///
/// # Errors
/// [`Error::Shape`] and [`Error::Dtype`], with nothing written; [`Error::NonFinite`] in "student_hidden" or
/// "teacher_hidden" and [`Error::Cancelled`].
///
/// # Cost
/// One pass; memory: up to three rows of f32 per thread.
pub fn hidden_state_loss(
    student: Student<'_>,
    batch: &HiddenBatch<'_>,
    distance: HiddenDistance,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<f64> {
    let rows = batch.check(&student)?;
    let counted = batch.mask.map_or(rows, |mask| mask.iter().filter(|&&counts| counts).count());
    let work = |scratch: &mut ([Vec<f32>; 2], Vec<f32>), row: usize, scale: Option<f64>, student: Student<'_>| {
        progress.advance(1);
        if batch.mask.is_some_and(|mask| !mask[row]) {
            student.clear_gradient();
            return Ok(0.0);
        }
        let (buffers, buffer) = scratch;
        let teacher = batch.teacher.row(row, batch.width, buffer);
        student.work(buffers, |student, out| distance.of_row(row, [student, teacher], scale, out))
    };
    progress.expect(rows as u64);
    sum_over_rows(student, batch.width, 1.0 / counted.max(1) as f64, parallelism, progress, work)
}

impl HiddenDistance {
    /// The distance of a row's student and teacher, and its gradient times `scale`, where it is wanted, in `out`.
    fn of_row(self, row: usize, [student, teacher]: [&[f32]; 2], scale: Option<f64>, out: &mut [f32]) -> Result<f64> {
        let products = Products::of(student, teacher);
        // Squares of finite f32 are finite in f64, as are their sums.
        for (name, values, squares) in
            [("student_hidden", student, products.student), ("teacher_hidden", teacher, products.teacher)]
        {
            if !squares.is_finite() {
                let column = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
                return Err(Error::NonFinite { value: values[column], row, column }.in_tensor(name));
            }
        }
        // The gradient is `own·s + other·t`.
        let (value, own, other) = match self {
            Self::MeanSquaredError => {
                let width = student.len() as f64;
                (products.difference / width, 2.0 / width, -2.0 / width)
            }
            Self::Cosine => {
                let norms = products.student.sqrt() * products.teacher.sqrt();
                if norms == 0.0 {
                    (1.0, 0.0, 0.0)
                } else {
                    let cosine = products.inner / norms;
                    (1.0 - cosine, cosine / products.student, -1.0 / norms)
                }
            }
        };
        if let Some(scale) = scale {
            combine(student, teacher, own * scale, other * scale, out);
        }
        Ok(value)
    }
}

impl HiddenBatch<'_> {
    fn check(&self, student: &Student<'_>) -> Result<usize> {
        let shape = |operation, expected, got: String| Err(Error::Shape { operation, expected, got });
        let values = student.values().len();
        if self.width == 0 || !values.is_multiple_of(self.width) {
            let expected = format!("rows of at least one value, here {}", self.width);
            return shape("student_hidden", expected, format!("{values} values"));
        }
        student.check()?;
        if self.teacher.len() != values {
            return shape("teacher_hidden", format!("the student's {values} values"), self.teacher.len().to_string());
        }
        let rows = values / self.width;
        match self.mask {
            Some(mask) if mask.len() != rows => shape("mask", format!("{rows}, one per row"), mask.len().to_string()),
            _ => Ok(rows),
        }
    }
}

/// Inner products of two vectors.
#[derive(Clone, Copy)]
struct Products {
    student: f64,
    teacher: f64,
    inner: f64,
    /// `‖s − t‖²`.
    difference: f64,
}

impl Products {
    fn of(student: &[f32], teacher: &[f32]) -> Self {
        let [student, teacher, inner, difference] = products(student, teacher);
        Self { student, teacher, inner, difference }
    }
}

dispatched! {
    /// `‖s‖²`, `‖t‖²`, `s·t` and `‖s − t‖²`.
    fn products(student: &[f32], teacher: &[f32]) -> [f64; 4] {
        let mut lanes = [[0.0_f64; LANES]; 4];
        let ((s, s_rest), (t, t_rest)) = (student.as_chunks::<LANES>(), teacher.as_chunks::<LANES>());
        for (s, t) in s.iter().zip(t) {
            for (lane, (&s, &t)) in s.iter().zip(t).enumerate() {
                accumulate(&mut lanes, lane, s, t);
            }
        }
        for (lane, (&s, &t)) in s_rest.iter().zip(t_rest).enumerate() {
            accumulate(&mut lanes, lane, s, t);
        }
        lanes.map(|lanes| lanes.iter().sum())
    }
}

#[inline(always)]
fn accumulate(lanes: &mut [[f64; LANES]; 4], lane: usize, s: f32, t: f32) {
    let (s, t) = (f64::from(s), f64::from(t));
    lanes[0][lane] += s * s;
    lanes[1][lane] += t * t;
    lanes[2][lane] += s * t;
    lanes[3][lane] += (s - t) * (s - t);
}

dispatched! {
    /// `out = own·s + other·t`, in f64, rounded once.
    fn combine(student: &[f32], teacher: &[f32], own: f64, other: f64, out: &mut [f32]) {
        for ((out, &s), &t) in out.iter_mut().zip(student).zip(teacher) {
            *out = (own * f64::from(s) + other * f64::from(t)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::numeric::ValuesMut;
    use crate::testing::noise;

    proptest! {
        #[test]
        fn hidden_distances_are_the_oracles(rows in 1_usize..5, width in 1_usize..200, seed in any::<u64>()) {
            let [student, teacher] = [seed, !seed].map(|seed| -> Vec<f32> {
                noise(rows * width, seed).into_iter().map(|value| 3.0 * value).collect()
            });
            let batch = HiddenBatch { teacher: Values::F32(&teacher), width, mask: None };
            for distance in [HiddenDistance::MeanSquaredError, HiddenDistance::Cosine] {
                let (mut apart, mut gradient) = (vec![f32::NAN; student.len()], student.clone());
                let loss = |student: Student<'_>| {
                    hidden_state_loss(student, &batch, distance, Parallelism::Sequential, &Progress::default()).unwrap()
                };
                let value = loss(Student::Overwritten(ValuesMut::F32(&mut gradient)));
                prop_assert_eq!(loss(Student::Apart(Values::F32(&student), ValuesMut::F32(&mut apart))), value);
                prop_assert_eq!(&apart, &gradient);
                // Central differences of the definition in f64.
                let definition = |student: &[f64]| -> f64 {
                    let rows = student.chunks(width).zip(teacher.chunks(width)).map(|(s, t)| {
                        let t: Vec<f64> = t.iter().map(|&value| f64::from(value)).collect();
                        let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                        match distance {
                            HiddenDistance::MeanSquaredError => {
                                s.iter().zip(&t).map(|(s, t)| (s - t).powi(2)).sum::<f64>() / width as f64
                            }
                            HiddenDistance::Cosine => 1.0 - inner(s, &t) / (inner(s, s) * inner(&t, &t)).sqrt(),
                        }
                    });
                    rows.sum::<f64>() / (student.len() / width) as f64
                };
                let mut point: Vec<f64> = student.iter().map(|&value| f64::from(value)).collect();
                prop_assert!((value - definition(&point)).abs() < 1e-9 * (1.0 + value));
                for index in (0..point.len()).step_by(7) {
                    let (at, step) = (point[index], 1e-4);
                    // Where a state is nearly zero its direction, and so the cosine, turns too fast for differences.
                    if at.abs() < 0.1 {
                        continue;
                    }
                    point[index] = at + step;
                    let above = definition(&point);
                    point[index] = at - step;
                    let difference = (above - definition(&point)) / (2.0 * step);
                    point[index] = at;
                    prop_assert!((f64::from(gradient[index]) - difference).abs() < 1e-4, "{} {}", gradient[index], difference);
                }
            }
        }
    }
}
