//! Losses against naive f64 oracles.

use proptest::prelude::*;

use super::*;
use crate::error::{Error, Result};
use crate::numeric::{Element, Values, ValuesMut};
use crate::progress::{Parallelism, Progress};

const IGNORE: i64 = -100;

/// Uniform values in (−scale, scale) that depend on `seed` only.
fn noise(length: usize, seed: u64, scale: f32) -> Vec<f32> {
    crate::testing::noise(length, seed).into_iter().map(|value| scale * value).collect()
}

fn log_softmax(row: &[f32], temperature: f64) -> Vec<f64> {
    let scaled: Vec<f64> = row.iter().map(|&value| f64::from(value) / temperature).collect();
    let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + scaled.iter().map(|value| (value - max).exp()).sum::<f64>().ln();
    scaled.iter().map(|value| value - log_sum).collect()
}

/// One row by the definitions. The entry at the label and those of two distributions that are both near to 1 are taken
/// through `exp_m1`, for the oracle must not cancel either.
fn oracle_row(z: &[f32], t: &[f32], label: usize, objective: &Objective) -> (f64, Vec<f64>) {
    let temperature = objective.temperature;
    let (log_q, log_p, log_s) = (log_softmax(z, temperature), log_softmax(t, temperature), log_softmax(z, 1.0));
    let reverse = objective.direction == Direction::Reverse;
    let divergence: f64 =
        log_q.iter().zip(&log_p).map(|(q, p)| if reverse { q.exp() * (q - p) } else { p.exp() * (p - q) }).sum();
    let gradient = (0..z.len()).map(|i| {
        let of_divergence =
            if reverse { log_q[i].exp() * (log_q[i] - log_p[i] - divergence) } else { log_q[i].exp() - log_p[i].exp() };
        let of_cross_entropy = if i == label { log_s[i].exp_m1() } else { log_s[i].exp() };
        objective.divergence * of_divergence / temperature + objective.cross_entropy * of_cross_entropy
    });
    (objective.divergence * divergence - objective.cross_entropy * log_s[label], gradient.collect())
}

/// The loss and its gradient, which is the same in other memory, full of NaN before, and over the logits.
fn try_run(student: &[f32], batch: &Batch<'_>, objective: &Objective) -> Result<(f64, Vec<f32>)> {
    let (parallelism, progress) = (Parallelism::Sequential, Progress::default());
    let (mut apart, mut over) = (vec![f32::NAN; student.len()], student.to_vec());
    let target = Student::Apart(Values::F32(student), ValuesMut::F32(&mut apart));
    let value = distillation_loss(target, batch, objective, parallelism, &progress)?;
    let target = Student::Overwritten(ValuesMut::F32(&mut over));
    assert_eq!(distillation_loss(target, batch, objective, parallelism, &progress)?, value);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&over), bits(&apart));
    let target = Student::Read(Values::F32(student));
    assert_eq!(distillation_loss(target, batch, objective, parallelism, &progress)?, value);
    Ok((value, apart))
}

fn run(student: &[f32], batch: &Batch<'_>, objective: &Objective) -> (f64, Vec<f32>) {
    try_run(student, batch, objective).unwrap()
}

/// Entries above 1e-3 of their row's largest, to `tolerance` of themselves; the others to as much of that limit.
fn assert_close(found: &[f32], expected: &[f64], tolerance: f64) {
    let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    for (index, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let allowed = tolerance * expected.abs().max(1e-3 * largest);
        let error = (f64::from(found) - expected).abs();
        assert!(error <= allowed, "entry {index}: {found:e}, expected {expected:e}");
    }
}

proptest! {
    #[test]
    fn values_and_gradients_are_the_oracles(
        rows in 1_usize..4,
        vocabulary in 1_usize..2500,
        scale in 0.5_f32..12.0,
        temperature in prop_oneof![Just(1.0), Just(2.0), 0.5_f64..10.0],
        alpha in prop_oneof![Just(0.0), Just(1.0), 0.0_f64..1.0],
        reverse in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (student, teacher) = (noise(rows * vocabulary, seed, scale), noise(rows * vocabulary, !seed, scale));
        let mut labels: Vec<i64> = (0..rows).map(|row| ((seed >> (row + 3)) % vocabulary as u64) as i64).collect();
        if rows > 1 {
            labels[1] = IGNORE;
        }
        let direction = if reverse { Direction::Reverse } else { Direction::Forward };
        let objective = Objective::new(temperature, alpha * temperature * temperature, 1.0 - alpha, direction).unwrap();
        let batch = Batch {
            teacher: Some(Values::F32(&teacher)),
            labels: Some(&labels),
            vocabulary,
            ignore_index: IGNORE,
        };
        let (value, gradient) = run(&student, &batch, &objective);
        let counted = labels.iter().filter(|&&label| label != IGNORE).count() as f64;
        let mut expected_value = 0.0;
        for (row, &label) in labels.iter().enumerate() {
            let range = row * vocabulary..(row + 1) * vocabulary;
            if label == IGNORE {
                prop_assert!(gradient[range].iter().all(|&value| value == 0.0));
                continue;
            }
            let (value, expected) = oracle_row(&student[range.clone()], &teacher[range.clone()], label as usize, &objective);
            expected_value += value / counted;
            let expected: Vec<f64> = expected.iter().map(|value| value / counted).collect();
            // A vocabulary of one has no gradient at all.
            if vocabulary > 1 {
                assert_close(&gradient[range], &expected, 1e-4);
            } else {
                prop_assert!(gradient[range].iter().all(|value| value.abs() < 1e-6));
            }
        }
        prop_assert!((value - expected_value).abs() <= 2e-6 * (1.0 + expected_value.abs() + temperature * temperature));
    }

    #[test]
    fn a_head_gives_what_its_logits_give(rows in 1_usize..7, vocabulary in 1_usize..50, width in 1_usize..9, seed in any::<u64>()) {
        let (hidden, weight) = (noise(rows * width, seed, 1.0), noise(vocabulary * width, seed ^ 1, 2.0));
        let teacher = noise(rows * 3, seed ^ 2, 1.0);
        let teacher_weight = noise(vocabulary * 3, seed ^ 3, 2.0);
        let labels: Vec<i64> = (0..rows).map(|row| if row == 1 { IGNORE } else { (row % vocabulary) as i64 }).collect();
        let student = Head { hidden: &hidden, weight: &weight, width };
        let teacher = Head { hidden: &teacher, weight: &teacher_weight, width: 3 };
        let objective = Objective::distillation(2.0, 0.5).unwrap();
        let batch = HeadBatch {
            student, teacher: Some(teacher), labels: Some(&labels), rows, vocabulary, ignore_index: IGNORE,
        };
        let progress = Progress::default();
        let (mut by_states, mut by_head) = (vec![f32::NAN; hidden.len()], vec![f32::NAN; weight.len()]);
        let gradients = HeadGradients { hidden: &mut by_states, weight: &mut by_head };
        let value = head_loss(&batch, &objective, Some(gradients), Parallelism::Sequential, &progress).unwrap();
        prop_assert_eq!(head_loss(&batch, &objective, None, Parallelism::Sequential, &progress).unwrap(), value);
        let product = |head: &Head<'_>| -> Vec<f32> {
            let rows = head.hidden.chunks(head.width);
            rows.flat_map(|h| head.weight.chunks(head.width).map(|w| h.iter().zip(w).map(|(a, b)| a * b).sum())).collect()
        };
        let (logits, teacher_logits) = (product(&student), product(&teacher));
        let (expected, by_logits) = run(
            &logits,
            &Batch {
                teacher: Some(Values::F32(&teacher_logits)),
                labels: Some(&labels),
                vocabulary,
                ignore_index: IGNORE,
            },
            &objective,
        );
        prop_assert!((value - expected).abs() < 1e-5);
        for row in 0..rows {
            for column in 0..width {
                let by_hidden: f32 =
                    (0..vocabulary).map(|token| by_logits[row * vocabulary + token] * weight[token * width + column]).sum();
                prop_assert!((by_states[row * width + column] - by_hidden).abs() < 1e-5);
            }
        }
        for token in 0..vocabulary {
            for column in 0..width {
                let by_weight: f32 =
                    (0..rows).map(|row| by_logits[row * vocabulary + token] * hidden[row * width + column]).sum();
                prop_assert!((by_head[token * width + column] - by_weight).abs() < 1e-5);
            }
        }
    }
}

fn batch<'a>(teacher: &'a [f32], labels: &'a [i64], vocabulary: usize) -> Batch<'a> {
    Batch { teacher: Some(Values::F32(teacher)), labels: Some(labels), vocabulary, ignore_index: IGNORE }
}

#[test]
fn sure_rows_keep_their_digits() {
    // Both distributions nearly one at the same entry: their difference has no digit left in f32.
    let (mut student, mut teacher) = (noise(2000, 1, 1.0), noise(2000, 2, 1.0));
    (student[1500], teacher[1500]) = (22.0, 21.0);
    for (temperature, direction) in [(1.0, Direction::Forward), (1.3, Direction::Forward), (1.0, Direction::Reverse)] {
        for weights in [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)] {
            let objective = Objective::new(temperature, weights.0, weights.1, direction).unwrap();
            let (_, gradient) = run(&student, &batch(&teacher, &[1500], 2000), &objective);
            let (_, mut expected) = oracle_row(&student, &teacher, 1500, &objective);
            expected[1500] = 0.0;
            expected[1500] = -expected.iter().sum::<f64>();
            assert_close(&gradient, &expected, 1e-4);
        }
    }
}

#[test]
fn rows_whose_largest_logit_comes_last_are_the_oracles() {
    // Exponentials are relative to the largest logit so far, which here is another one in every tile.
    let ramp = |seed, slope: f32| -> Vec<f32> {
        noise(6000, seed, 3.0).iter().zip(0..).map(|(value, index)| value + slope * index as f32).collect()
    };
    for (student, teacher) in
        [(ramp(1, 0.01), ramp(2, -0.01)), (ramp(1, -0.01), ramp(2, 0.01)), (ramp(1, 0.1), ramp(2, 0.1))]
    {
        for (temperature, direction) in
            [(1.0, Direction::Forward), (2.0, Direction::Forward), (0.7, Direction::Reverse)]
        {
            let objective = Objective::new(temperature, 1.0, 1.0, direction).unwrap();
            let (value, gradient) = run(&student, &batch(&teacher, &[5990], 6000), &objective);
            let (expected_value, expected) = oracle_row(&student, &teacher, 5990, &objective);
            assert!((value - expected_value).abs() < 1e-6 * expected_value, "{value}, expected {expected_value}");
            assert_close(&gradient, &expected, 1e-4);
        }
    }
}

#[test]
fn logits_of_ten_thousand_are_finite() {
    let student: Vec<f32> = noise(300, 1, 1e4);
    let teacher: Vec<f32> = noise(300, 2, 1e4);
    for direction in [Direction::Forward, Direction::Reverse] {
        for temperature in [0.5, 1.0, 2.0, 10.0] {
            let objective = Objective::new(temperature, 1.0, 1.0, direction).unwrap();
            let (value, gradient) = run(&student, &batch(&teacher, &[7, 8, 9], 100), &objective);
            assert!(value.is_finite() && gradient.iter().all(|value| value.is_finite()));
        }
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let (rows, vocabulary) = (37, 1303);
    let (student, teacher) = (noise(rows * vocabulary, 1, 5.0), noise(rows * vocabulary, 2, 5.0));
    let labels: Vec<i64> = (0..rows as i64).collect();
    let objective = Objective::distillation(3.0, 0.4).unwrap();
    let batch = batch(&teacher, &labels, vocabulary);
    let expected = run(&student, &batch, &objective);
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut over = student.clone();
        let value = pool.install(|| {
            let target = Student::Overwritten(ValuesMut::F32(&mut over));
            distillation_loss(target, &batch, &objective, Parallelism::Rayon, &Progress::default())
        });
        assert_eq!((value.unwrap(), over), expected);
    }
}

#[test]
fn halves_are_their_upcast_values_with_a_rounded_gradient() {
    fn check<T: Element + PartialEq + std::fmt::Debug>(
        values: impl Fn(&[T]) -> Values<'_>,
        values_mut: impl Fn(&mut [T]) -> ValuesMut<'_>,
    ) {
        let (student, teacher) = (noise(3000, 1, 4.0), noise(3000, 2, 4.0));
        let labels = [3, IGNORE, 999];
        let objective = Objective::distillation(2.0, 0.5).unwrap();
        let (mut halves, mut upcast, mut rounded) =
            (vec![T::default(); 3000], vec![0.0; 3000], vec![T::default(); 3000]);
        T::downcast(&student, &mut halves);
        T::upcast(&halves, &mut upcast);
        let batch = batch(&teacher, &labels, 1000);
        let (expected_value, expected) = run(&upcast, &batch, &objective);
        T::downcast(&expected, &mut rounded);
        let mut apart = halves.clone();
        apart.reverse();
        let loss = |student: Student<'_>| {
            distillation_loss(student, &batch, &objective, Parallelism::Sequential, &Progress::default()).unwrap()
        };
        assert_eq!(loss(Student::Apart(values(&halves), values_mut(&mut apart))), expected_value);
        assert_eq!(loss(Student::Overwritten(values_mut(&mut halves))), expected_value);
        assert_eq!((apart, halves), (rounded.clone(), rounded));
    }
    check(|values| Values::F16(values), |values| ValuesMut::F16(values));
    check(|values| Values::Bf16(values), |values| ValuesMut::Bf16(values));
}

#[test]
fn a_place_that_does_not_fit_is_refused_and_left() {
    let (values, objective) = (noise(10, 1, 1.0), Objective::distillation(2.0, 0.5).unwrap());
    let refused = |student: Student<'_>| {
        let batch = batch(&values, &[1, 2], 5);
        distillation_loss(student, &batch, &objective, Parallelism::Sequential, &Progress::default()).unwrap_err()
    };
    let mut short = [7.0; 9];
    let error = refused(Student::Apart(Values::F32(&values), ValuesMut::F32(&mut short)));
    assert!(matches!(error, Error::Shape { operation: "out", .. }) && short == [7.0; 9], "{error}");
    let mut halves = [half::f16::ONE; 10];
    let error = refused(Student::Apart(Values::F32(&values), ValuesMut::F16(&mut halves)));
    assert!(matches!(error, Error::Dtype { .. }) && halves == [half::f16::ONE; 10], "{error}");
}

#[test]
fn no_row_that_counts_gives_zero() {
    let objective = Objective::distillation(2.0, 0.5).unwrap();
    assert_eq!(run(&[], &batch(&[], &[], 5), &objective), (0.0, vec![]));
    // Ignored rows are not read.
    let values = [f32::NAN; 10];
    assert_eq!(run(&values, &batch(&values, &[IGNORE; 2], 5), &objective), (0.0, vec![0.0; 10]));
}

#[test]
fn bad_input_is_refused() {
    let objective = Objective::distillation(2.0, 0.5).unwrap();
    let refused =
        |student: &[f32], batch: &Batch<'_>, objective: &Objective| try_run(student, batch, objective).unwrap_err();
    let (mut student, teacher) = (noise(10, 1, 1.0), noise(10, 2, 1.0));
    assert!(matches!(refused(&student, &batch(&teacher[..5], &[1, 2], 5), &objective), Error::Shape { .. }));
    assert!(matches!(refused(&student, &batch(&teacher, &[1], 5), &objective), Error::Shape { .. }));
    assert!(matches!(refused(&student, &batch(&teacher, &[], 0), &objective), Error::Shape { .. }));
    for label in [-1, 5] {
        let error = refused(&student, &batch(&teacher, &[1, label], 5), &objective);
        assert!(matches!(error, Error::Label { row: 1, vocabulary: 5, .. }), "{error}");
    }
    let unlabelled = Batch { labels: None, ..batch(&teacher, &[], 5) };
    assert!(matches!(refused(&student, &unlabelled, &objective), Error::Config(_)));
    let alone = Batch { teacher: None, ..batch(&teacher, &[1, 2], 5) };
    assert!(matches!(refused(&student, &alone, &objective), Error::Config(_)));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        student[8] = bad;
        for (error, name) in [
            (refused(&student, &batch(&teacher, &[1, 2], 5), &objective), "student_logits"),
            (refused(&teacher, &batch(&student, &[1, 2], 5), &objective), "teacher_logits"),
        ] {
            let message = error.to_string();
            assert!(message.contains(name) && message.contains("row 1, column 3"), "{message}");
        }
        let alone = Batch { teacher: None, ..batch(&[], &[1, 2], 5) };
        let message =
            refused(&student, &alone, &Objective::new(1.0, 0.0, 1.0, Direction::Forward).unwrap()).to_string();
        assert!(message.contains("row 1, column 3"), "{message}");
    }
    for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-9] {
        assert!(Objective::distillation(temperature, 0.5).is_err());
    }
    for alpha in [-0.1, 1.1, f64::NAN] {
        assert!(Objective::distillation(1.0, alpha).is_err());
    }
}

#[test]
fn a_cancelled_loss_stops() {
    let (values, progress) = (noise(10, 1, 1.0), Progress::default());
    progress.cancel();
    let objective = Objective::distillation(2.0, 0.5).unwrap();
    let student = Student::Read(Values::F32(&values));
    let error = distillation_loss(student, &batch(&values, &[1, 2], 5), &objective, Parallelism::Rayon, &progress);
    assert!(matches!(error, Err(Error::Cancelled)));
}

#[test]
fn the_bits_are_the_same_on_every_instruction_set() {
    use crate::numeric::simd::level::testing::on_each;
    let vocabulary = 2311;
    let (student, teacher) = (noise(2 * vocabulary, 1, 9.0), noise(2 * vocabulary, 2, 9.0));
    let mut close = teacher.clone();
    close.iter_mut().zip(&student).for_each(|(close, other)| *close += 1e-4 * other);
    let halves = crate::testing::noise(2 * vocabulary, 3).into_iter().map(half::f16::from_f32).collect::<Vec<_>>();
    for direction in [Direction::Forward, Direction::Reverse] {
        let objective = Objective::new(2.0, 0.6, 0.4, direction).unwrap();
        for student in [&student, &close] {
            for teacher in [Values::F32(&teacher), Values::F16(&halves)] {
                let labels = [7, IGNORE];
                let batch = Batch { teacher: Some(teacher), labels: Some(&labels), vocabulary, ignore_index: IGNORE };
                let results = on_each(|| run(student, &batch, &objective));
                for (set, (value, gradient)) in &results {
                    assert_eq!(value.to_bits(), results[0].1.0.to_bits(), "{set:?} {direction:?}");
                    assert!(gradient.iter().zip(&results[0].1.1).all(|(a, b)| a.to_bits() == b.to_bits()), "{set:?}");
                }
            }
        }
    }
}
