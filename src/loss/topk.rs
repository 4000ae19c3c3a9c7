//! The distillation loss against a teacher's most probable tokens.

use std::f64::consts::{LN_2, LOG2_E};

use super::distillation::non_finite;
use super::kernels::{Coefficients, Inputs, Outputs, Plain, measure, write_gradient};
use super::labels::{Labels, rows_of_logits};
use super::logits::{NotFinite, Row};
use super::objective::{Direction, Objective};
use super::parallel::sum_over_rows;
use super::student::Student;
use super::tiles::TILE;
use crate::error::{Error, Result};
use crate::progress::{Parallelism, Progress};

/// Tolerance of a sum of probabilities above 1: rounding to half precision may exceed it.
const EXCESS: f64 = 1e-3;
/// Replaces logits that are handled separately: finite, with an exponential of 0 beside any other.
const APART: f32 = f32::MIN;

/// The teacher's most probable tokens for each of `rows` tokens.
#[derive(Clone, Copy, Debug)]
pub struct TopKBatch<'a> {
    /// The teacher's `count` most probable tokens, `(rows, count)`, distinct within a row.
    pub tokens: &'a [i64],
    /// The teacher's softmax at the objective's temperature on these tokens, `(rows, count)`.
    pub probabilities: &'a [f32],
    /// Tokens per row, at least one.
    pub count: usize,
    /// One token per row; without labels every row counts.
    pub labels: Option<&'a [i64]>,
    /// Columns.
    pub vocabulary: usize,
    /// The label of rows that do not count: they are not read, and their gradient is exactly zero.
    pub ignore_index: i64,
}

/// [`distillation_loss`](super::distillation_loss) with all tokens that the teacher does not name merged into one: the
/// tail. The teacher's tail has the mass `p_tail = 1 − Σp`, the student's the sum of its own probabilities. A row's
/// divergence is `Σ p·ln(p/q) + p_tail·ln(p_tail/q_tail)`, its gradient `(q − p)/T` on the named tokens and `q·(1 −
/// p_tail/q_tail)/T` on the others.
///
/// Where the probabilities sum to more than 1, or name the whole vocabulary, they are divided by their sum.
///
/// # Errors
/// [`Error::Shape`], [`Error::Label`], [`Error::SoftLabel`] for a token outside the vocabulary or named twice and for
/// invalid probabilities or a sum above 1.001, [`Error::Config`] for the reverse divergence,
/// [`Error::NonFinite`] in "student_logits", [`Error::Cancelled`].
///
/// # Cost
/// That of the loss without a teacher, and two exponentials in f64 per named token.
pub fn topk_distillation_loss(
    student: Student<'_>,
    batch: &TopKBatch<'_>,
    objective: &Objective,
    parallelism: Parallelism,
    progress: &Progress,
) -> Result<f64> {
    let rows = batch.check(&student, objective)?;
    let labels = Labels { labels: batch.labels, ignore_index: batch.ignore_index };
    let work = |scratch: &mut Scratch, row: usize, scale, student: Student<'_>| {
        progress.advance(1);
        let Some(label) = labels.of(row) else {
            student.clear_gradient();
            return Ok(0.0);
        };
        let range = row * batch.count..(row + 1) * batch.count;
        let (tokens, probabilities) = (&batch.tokens[range.clone()], &batch.probabilities[range]);
        let Scratch { student: buffers, named } = scratch;
        student.work(buffers, |student, out| {
            named.gather(student, tokens, probabilities, label, objective, row)?;
            named
                .row_loss(objective, scale, out)
                .map_err(|which| non_finite(which, row, &Row { student, teacher: None, label: None }))
        })
    };
    progress.expect(rows as u64);
    let scale = 1.0 / labels.counted(rows).max(1) as f64;
    sum_over_rows(student, batch.vocabulary, scale, parallelism, progress, work)
}

impl TopKBatch<'_> {
    /// Checks everything but the values, and returns the number of rows.
    fn check(&self, student: &Student<'_>, objective: &Objective) -> Result<usize> {
        let shape = |operation, expected, got: String| Err(Error::Shape { operation, expected, got });
        let rows = rows_of_logits(student.values(), self.vocabulary)?;
        student.check()?;
        if !(1..=self.vocabulary).contains(&self.count) {
            return shape("teacher_tokens", format!("1 to {} per row", self.vocabulary), self.count.to_string());
        }
        for (name, length) in
            [("teacher_tokens", self.tokens.len()), ("teacher_probabilities", self.probabilities.len())]
        {
            if rows.checked_mul(self.count) != Some(length) {
                return shape(name, format!("{rows} rows of {}", self.count), format!("{length} values"));
            }
        }
        if objective.direction == Direction::Reverse {
            return Err(Error::Config("reverse: the reverse divergence needs the teacher's whole distribution".into()));
        }
        Labels { labels: self.labels, ignore_index: self.ignore_index }.check(rows, self.vocabulary, objective)?;
        Ok(rows)
    }
}

/// Buffers that a thread reuses for all of its rows.
#[derive(Default)]
struct Scratch {
    student: [Vec<f32>; 2],
    named: Named,
}

/// A token that is handled separately.
struct Token {
    at: usize,
    logit: f64,
    /// The teacher's probability, or 0 for a label that the teacher does not name.
    probability: f64,
    /// Whether the teacher names it; otherwise it is only the label.
    named: bool,
}

/// A row split into the named tokens and the label, and all others, the tail.
///
/// The named tokens are handled in f64, so that the gradient keeps its digits where the student is nearly sure of one.
/// The mass of the tail is a sum, not a difference from 1.
#[derive(Default)]
struct Named {
    tokens: Vec<Token>,
    /// The index of the label in `tokens`.
    label: Option<usize>,
    tail: f64,
    /// The row with [`APART`] for every one of `tokens`.
    others: Vec<f32>,
    plain: Vec<f32>,
    references: Vec<[f32; 2]>,
}

impl Named {
    fn gather(
        &mut self,
        student: &[f32],
        tokens: &[i64],
        probabilities: &[f32],
        label: Option<usize>,
        objective: &Objective,
        row: usize,
    ) -> Result<()> {
        let wrong = |problem: String| Err(Error::SoftLabel { row, problem });
        self.others.clear();
        self.others.extend_from_slice(student);
        self.tokens.clear();
        self.label = None;
        let mut sum = 0.0;
        if objective.divergence > 0.0 {
            for (&token, &probability) in tokens.iter().zip(probabilities) {
                let Some(at) = usize::try_from(token).ok().filter(|&at| at < student.len()) else {
                    return wrong(format!("teacher_tokens: expected 0 to {}, got {token}", student.len() - 1));
                };
                if self.others[at] == APART && student[at] != APART {
                    return wrong(format!("teacher_tokens: expected distinct tokens, got {token} twice"));
                }
                if !(0.0..=f32::INFINITY).contains(&probability) {
                    return wrong(format!("teacher_probabilities: expected numbers from 0 to 1, got {probability}"));
                }
                self.others[at] = APART;
                let probability = f64::from(probability);
                sum += probability;
                self.tokens.push(Token { at, logit: f64::from(student[at]), probability, named: true });
            }
            if sum > 1.0 + EXCESS {
                return wrong(format!("teacher_probabilities: expected a sum of at most 1, got {sum:.6}"));
            }
            let whole = self.tokens.len() == student.len();
            if whole && sum < 1.0 - EXCESS {
                let problem = format!("of the whole vocabulary: expected a sum of 1, got {sum:.6}");
                return wrong(format!("teacher_probabilities {problem}"));
            }
            if whole || sum > 1.0 {
                self.tokens.iter_mut().for_each(|token| token.probability /= sum);
                sum = 1.0;
            }
        }
        self.tail = 1.0 - sum;
        if let Some(at) = label.filter(|_| objective.cross_entropy > 0.0) {
            let known = self.tokens.iter().position(|token| token.at == at);
            self.label = Some(known.unwrap_or(self.tokens.len()));
            if known.is_none() {
                self.others[at] = APART;
                self.tokens.push(Token { at, logit: f64::from(student[at]), probability: 0.0, named: false });
            }
        }
        Ok(())
    }

    /// The loss of the gathered row, not yet divided by the number of rows, and its gradient times `gradient` in `out`.
    fn row_loss(
        &mut self,
        objective: &Objective,
        gradient: Option<f64>,
        out: &mut [f32],
    ) -> std::result::Result<f64, NotFinite> {
        let width = self.others.len();
        let Objective { temperature, divergence, cross_entropy, .. } = *objective;
        let temperature = if divergence > 0.0 { temperature } else { 1.0 };
        let plain = if self.label.is_some() { Plain::at(temperature) } else { Plain::Absent };
        let exponent_scale = (LOG2_E / temperature) as f32;
        let inverse = f64::from(exponent_scale) * LN_2;
        self.references.resize(width.div_ceil(TILE), [0.0; 2]);
        self.plain.resize(if plain == Plain::Own { width } else { 0 }, 0.0);
        let inputs = Inputs { student: &self.others, teacher: &[], scale: exponent_scale, plain, reversed: false };
        let mut outputs =
            Outputs { student: out, teacher: &mut [], plain: &mut self.plain, references: &mut self.references };
        let mut measured = measure(inputs, &mut outputs);
        if !measured.finite || self.tokens.iter().any(|token| !token.logit.is_finite()) {
            return Err(NotFinite::Student);
        }
        if self.tokens.len() == width {
            // The tail is empty: only placeholders were measured.
            measured.sums = Default::default();
        }
        let others_max = f64::from(measured.maxima[0]);
        let plain_sum = if plain == Plain::Same { measured.sums.student } else { measured.sums.plain };
        // Logarithms of sums of exponentials, at the temperature and at 1.
        let others = LogSum { max: others_max * inverse, sum: measured.sums.student };
        let tail =
            self.tokens.iter().filter(|token| !token.named).fold(others, |sum, token| sum.and(token.logit * inverse));
        let all =
            self.tokens.iter().filter(|token| token.named).fold(tail, |sum, token| sum.and(token.logit * inverse));
        let plain_others = LogSum { max: others_max, sum: plain_sum };
        let plain_all = self.tokens.iter().fold(plain_others, |sum, token| sum.and(token.logit));

        let scale = gradient.unwrap_or(0.0);
        let weight = divergence / temperature * scale;
        let mut loss = 0.0;
        // The gradient per unit of the student's probability in the tail.
        let mut of_tail = 0.0;
        if divergence > 0.0 {
            let named = self.tokens.iter().filter(|token| token.probability > 0.0);
            let mut divergent: f64 = named
                .map(|token| token.probability * (token.probability.ln() - (token.logit * inverse - all.logarithm())))
                .sum();
            if self.tail > 0.0 {
                divergent += self.tail * (self.tail.ln() - (tail.logarithm() - all.logarithm()));
            }
            loss += divergence * divergent.max(0.0);
            // `q·(1 − p_tail/q_tail) = q/q_tail·(q_tail − p_tail)`, which is finite where `q_tail` rounds to 0.
            of_tail = weight * ((tail.logarithm() - all.logarithm()).exp() - self.tail);
        }
        if let Some(label) = self.label {
            loss += cross_entropy * (plain_all.logarithm() - self.tokens[label].logit);
        }
        if gradient.is_none() {
            return Ok(loss);
        }
        let hard = if self.label.is_some() { cross_entropy * scale } else { 0.0 };
        let mut coefficients = Coefficients {
            student: if of_tail == 0.0 { 0.0 } else { of_tail / tail.relative_to(others.max) },
            ..Coefficients::default()
        };
        let of_plain = if hard == 0.0 { 0.0 } else { hard / plain_all.relative_to(plain_others.max) };
        if plain == Plain::Same {
            coefficients.student += of_plain;
        } else {
            coefficients.plain = of_plain;
        }
        write_gradient(inputs, &mut outputs, measured.maxima, &coefficients);
        for (index, token) in self.tokens.iter().enumerate() {
            let q = if token.named {
                weight * ((token.logit * inverse - all.logarithm()).exp() - token.probability)
            } else {
                of_tail * (token.logit * inverse - tail.logarithm()).exp()
            };
            let s = token.logit - plain_all.logarithm();
            let by_hard = match self.label {
                None => 0.0,
                // `s − 1` keeps its digits where the student is nearly sure of the label.
                Some(label) if label == index => hard * s.exp_m1(),
                Some(_) => hard * s.exp(),
            };
            outputs.student[token.at] = (q + by_hard) as f32;
        }
        Ok(loss)
    }
}

/// `ln Σ e^x`, kept as the largest `x` and the sum relative to it.
#[derive(Clone, Copy)]
struct LogSum {
    max: f64,
    sum: f64,
}

impl LogSum {
    fn and(self, x: f64) -> Self {
        if x > self.max {
            Self { max: x, sum: self.sum * (self.max - x).exp() + 1.0 }
        } else {
            Self { max: self.max, sum: self.sum + (x - self.max).exp() }
        }
    }

    fn logarithm(self) -> f64 {
        self.max + self.sum.ln()
    }

    /// `Σ e^(x − max)` for another maximum.
    fn relative_to(self, max: f64) -> f64 {
        self.sum * (self.max - max).exp()
    }
}

#[cfg(test)]
mod tests;
