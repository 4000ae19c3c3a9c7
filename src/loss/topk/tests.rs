//! The top-k loss against its definition in f64.

use super::*;
use crate::numeric::{Values, ValuesMut};
use crate::testing::noise;

const VOCABULARY: usize = 2300;

fn logits(seed: u64, scale: f32) -> Vec<f32> {
    noise(VOCABULARY, seed).into_iter().map(|value| scale * value).collect()
}

fn log_softmax(row: &[f32], temperature: f64) -> Vec<f64> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted: Vec<f64> = row.iter().map(|&value| (f64::from(value) - f64::from(max)) / temperature).collect();
    let log_sum = shifted.iter().map(|value| value.exp()).sum::<f64>().ln();
    shifted.iter().map(|value| value - log_sum).collect()
}

/// The teacher's likeliest tokens with their probabilities.
fn likeliest(teacher: &[f32], count: usize, temperature: f64) -> (Vec<i64>, Vec<f32>) {
    let mut order: Vec<usize> = (0..teacher.len()).collect();
    order.sort_by(|&a, &b| teacher[b].total_cmp(&teacher[a]));
    let log_p = log_softmax(teacher, temperature);
    order[..count].iter().map(|&token| (token as i64, log_p[token].exp() as f32)).unzip()
}

fn run(student: &[f32], tokens: &[i64], probabilities: &[f32], label: i64, objective: &Objective) -> (f64, Vec<f32>) {
    let labels = [label];
    let batch = TopKBatch {
        tokens,
        probabilities,
        count: tokens.len(),
        labels: Some(&labels),
        vocabulary: VOCABULARY,
        ignore_index: -100,
    };
    let progress = Progress::default();
    let (mut apart, mut over) = (vec![f32::NAN; student.len()], student.to_vec());
    let loss = |student: Student<'_>| {
        topk_distillation_loss(student, &batch, objective, Parallelism::Sequential, &progress).unwrap()
    };
    let value = loss(Student::Apart(Values::F32(student), ValuesMut::F32(&mut apart)));
    assert_eq!(loss(Student::Overwritten(ValuesMut::F32(&mut over))), value);
    assert_eq!(over, apart);
    (value, apart)
}

#[test]
fn values_and_gradients_are_the_definitions() {
    for (case, temperature) in [1.0, 2.0, 3.3].into_iter().enumerate() {
        for (count, scale) in [(1, 1.0), (7, 5.0), (64, 30.0), (VOCABULARY, 5.0)] {
            let (student, teacher) = (logits(case as u64, scale), logits(case as u64 + 10, scale));
            let (tokens, probabilities) = likeliest(&teacher, count, temperature);
            for label in [tokens[0], 1234] {
                let objective = Objective::distillation(temperature, 0.6).unwrap();
                let (value, gradient) = run(&student, &tokens, &probabilities, label, &objective);
                let (log_q, log_s) = (log_softmax(&student, temperature), log_softmax(&student, 1.0));
                let mut p = vec![None; VOCABULARY];
                for (&token, &probability) in tokens.iter().zip(&probabilities) {
                    p[token as usize] = Some(f64::from(probability));
                }
                let named: f64 = p.iter().flatten().sum();
                let (norm, p_tail) = if count == VOCABULARY { (named, 0.0) } else { (1.0, 1.0 - named) };
                let q_tail: f64 = log_q.iter().zip(&p).filter(|(_, p)| p.is_none()).map(|(q, _)| q.exp()).sum();
                let mut divergence = if p_tail > 0.0 { p_tail * (p_tail / q_tail).ln() } else { 0.0 };
                let mut expected = Vec::new();
                for (index, p) in p.iter().enumerate() {
                    let q = log_q[index].exp();
                    let by_divergence = match p {
                        Some(p) => {
                            divergence += p / norm * ((p / norm).ln() - log_q[index]);
                            q - p / norm
                        }
                        None => q * (1.0 - p_tail / q_tail),
                    };
                    let hard = if index as i64 == label { log_s[index].exp_m1() } else { log_s[index].exp() };
                    expected.push(objective.divergence / temperature * by_divergence + objective.cross_entropy * hard);
                }
                let hard = -log_s[label as usize];
                let expected_value = objective.divergence * divergence + objective.cross_entropy * hard;
                assert!((value - expected_value).abs() < 2e-6 * (1.0 + expected_value), "{value} {expected_value}");
                let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
                for (&found, expected) in gradient.iter().zip(expected) {
                    let allowed = 1e-4 * expected.abs().max(1e-3 * largest);
                    assert!((f64::from(found) - expected).abs() <= allowed, "{found:e}, expected {expected:e}");
                }
            }
        }
    }
}

#[test]
fn a_tail_of_almost_nothing_keeps_its_digits() {
    // The student's tail is about 1e-14: nothing of it is left of 1 in f32.
    let mut student = logits(1, 1.0);
    student[17] = 40.0;
    let objective = Objective::new(1.0, 1.0, 0.0, Direction::Forward).unwrap();
    let (value, gradient) = run(&student, &[17], &[0.5], 17, &objective);
    let log_tail =
        student.iter().enumerate().filter(|&(at, _)| at != 17).map(|(_, &z)| f64::from(z).exp()).sum::<f64>().ln();
    let expected = 0.5 * 0.5_f64.ln() + 0.5 * (0.5_f64.ln() - (log_tail - 40.0));
    assert!((value - expected).abs() < 1e-6 * expected, "{value}, expected {expected}");
    assert!((gradient[17] - 0.5).abs() < 1e-6);
    assert!((gradient.iter().map(|&value| f64::from(value)).sum::<f64>()).abs() < 1e-6);
}
