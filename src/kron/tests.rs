//! Kernels against dense oracles.

use proptest::prelude::*;

use super::*;
use crate::progress::{Parallelism, Progress};
use crate::spec::KroneckerShape;
use crate::testing::noise;

fn nearest(w: &[f32], shape: KroneckerShape) -> KroneckerSum {
    let view = MatrixView::new(w, shape.rows(), shape.columns()).unwrap();
    nearest_kronecker_sum(view, shape, &Progress::default()).unwrap()
}

/// `‖W − Ŵ‖² / ‖W‖²`, by the definition.
fn lost(w: &[f32], approximation: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let difference = squares(&mut w.iter().zip(approximation).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    difference / squares(&mut w.iter().map(|&value| f64::from(value)))
}

/// Least lost energy, from the singular values of the rearranged matrix.
fn least_lost(w: &[f32], shape: &KroneckerShape) -> f64 {
    let rearranged = faer::Mat::from_fn(shape.blocks(), shape.block_entries(), |block, entry| {
        let row = block / shape.n1 * shape.m2 + entry / shape.n2;
        let column = block % shape.n1 * shape.n2 + entry % shape.n2;
        f64::from(w[row * shape.columns() + column])
    });
    let squares: Vec<f64> = rearranged.singular_values().unwrap().iter().map(|value| value * value).collect();
    squares[shape.rank..].iter().sum::<f64>() / squares.iter().sum::<f64>()
}

fn shapes() -> impl Strategy<Value = KroneckerShape> {
    (1_usize..7, 1_usize..7, 1_usize..5, 1_usize..5, 0_usize..25).prop_map(|(m1, n1, m2, n2, rank)| {
        let rank = 1 + rank % (m1 * n1).min(m2 * n2);
        KroneckerShape { m1, n1, m2, n2, rank }
    })
}

proptest! {
    #[test]
    fn nearest_sum_loses_what_the_singular_values_say(shape in shapes(), seed in any::<u64>()) {
        let w = noise(shape.rows() * shape.columns(), seed);
        let sum = nearest(&w, shape);
        let least = least_lost(&w, &shape);
        prop_assert!((lost(&w, &sum.to_dense()) - least).abs() < 1e-5);
        prop_assert!((sum.lost_energy - least).abs() < 1e-9);
        let view = MatrixView::new(&w, shape.rows(), shape.columns()).unwrap();
        prop_assert!((lost_energy(view, shape, &Progress::default()).unwrap() - least).abs() < 1e-9);
    }

    #[test]
    fn the_matrix_is_the_sum_in_the_order_asked_for(shape in shapes(), seed in any::<u64>(), given in any::<[bool; 2]>()) {
        let order = |length: usize, step: u64| {
            let mut order: Vec<usize> = (0..length).collect();
            let keys = noise(length, seed ^ step);
            order.sort_by(|&i, &j| keys[i].total_cmp(&keys[j]));
            order
        };
        let (rows, columns) = (order(shape.rows(), 1), order(shape.columns(), 2));
        let a = noise(shape.rank * shape.blocks(), seed);
        let b = noise(shape.rank * shape.block_entries(), !seed);
        let side = |given: bool, order: &Vec<usize>| given.then(|| order.clone());
        let (some_rows, some_columns) = (side(given[0], &rows), side(given[1], &columns));
        let parallelism = if seed % 2 == 0 { Parallelism::Sequential } else { Parallelism::Rayon };
        let found = expand(shape, &a, &b, some_rows.as_deref(), some_columns.as_deref(), parallelism, &Progress::default()).unwrap();
        let dense = KroneckerSum { shape, a, b, lost_energy: 0.0 }.to_dense();
        for (i, row) in found.chunks_exact(shape.columns()).enumerate() {
            for (j, value) in row.iter().enumerate() {
                let i = if given[0] { rows[i] } else { i };
                let j = if given[1] { columns[j] } else { j };
                prop_assert!((value - dense[i * shape.columns() + j]).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn exact_sums_are_recovered(shape in shapes(), seed in any::<u64>()) {
        let (a, b) = (shape.rank * shape.blocks(), shape.rank * shape.block_entries());
        let exact = KroneckerSum { shape, a: noise(a, seed), b: noise(b, !seed), lost_energy: 0.0 };
        let w = exact.to_dense();
        let sum = nearest(&w, shape);
        prop_assert!(sum.lost_energy < 1e-12, "{}", sum.lost_energy);
        prop_assert!(lost(&w, &sum.to_dense()) < 1e-10);
    }

    #[test]
    fn factors_are_balanced_and_signed(shape in shapes(), seed in any::<u64>()) {
        let sum = nearest(&noise(shape.rows() * shape.columns(), seed), shape);
        let norm = |values: &[f32]| values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
        let mut last = f64::INFINITY;
        for (a, b) in sum.a.chunks_exact(shape.blocks()).zip(sum.b.chunks_exact(shape.block_entries())) {
            prop_assert!((norm(a) - norm(b)).abs() <= 1e-4 * norm(b) + 1e-6);
            prop_assert!(norm(b) <= last * (1.0 + 1e-5));
            last = norm(b);
            let (highest, lowest) = b.iter().fold((0.0_f32, 0.0_f32), |(h, l), &value| (h.max(value), l.min(value)));
            prop_assert!(highest >= -lowest);
        }
    }

    #[test]
    fn applying_equals_multiplying_by_the_dense_matrix(shape in shapes(), batch in 0_usize..4, seed in any::<u64>()) {
        let sum = nearest(&noise(shape.rows() * shape.columns(), seed), shape);
        let (x, dense) = (noise(batch * shape.rows(), !seed), sum.to_dense());
        let y = sum.apply(&x, batch).unwrap();
        for (row, y) in x.chunks_exact(shape.rows()).zip(y.chunks_exact(shape.columns())) {
            for (j, &y) in y.iter().enumerate() {
                let expected: f32 = row.iter().enumerate().map(|(i, &x)| x * dense[i * shape.columns() + j]).sum();
                prop_assert!((y - expected).abs() < 1e-3, "{y} {expected}");
            }
        }
    }

    #[test]
    fn an_ordered_view_is_the_matrix_it_describes(seed in any::<u64>(), rows in Just((0..6_usize).collect::<Vec<_>>()).prop_shuffle(), columns in Just((0..8_usize).collect::<Vec<_>>()).prop_shuffle()) {
        let w = noise(48, seed);
        let view = MatrixView::new(&w, 6, 8).unwrap().ordered(Some(&rows), Some(&columns));
        let copy = view.to_vec();
        for i in 0..6 {
            for j in 0..8 {
                prop_assert_eq!(copy[i * 8 + j], w[rows[i] * 8 + columns[j]]);
            }
        }
        let shape = KroneckerShape::new(6, 8, (2, 4), 2).unwrap();
        let from_view = nearest_kronecker_sum(view, shape, &Progress::default()).unwrap();
        prop_assert_eq!(from_view, nearest(&copy, shape));
    }
}

#[test]
fn a_full_width_block_is_the_truncated_singular_value_decomposition() {
    // Wide enough for the route without a Gram matrix.
    let (m, n, rank) = (1040, 1056, 5);
    let shape = KroneckerShape::new(m, n, (1, n), rank).unwrap();
    let w = noise(m * n, 1);
    let sum = nearest(&w, shape);
    let least = least_lost(&w, &shape);
    assert!((sum.lost_energy - least).abs() < 1e-9);
    assert!((lost(&w, &sum.to_dense()) - least).abs() < 1e-5);
}

#[test]
fn a_zero_matrix_loses_nothing() {
    let shape = KroneckerShape::new(4, 6, (2, 3), 3).unwrap();
    let sum = nearest(&[0.0; 24], shape);
    assert_eq!(sum.lost_energy, 0.0);
    assert!(sum.a.iter().chain(&sum.b).all(|&value| value == 0.0));
}

#[test]
fn values_near_the_ends_of_the_range_survive() {
    let shape = KroneckerShape::new(4, 6, (2, 3), 4).unwrap();
    for scale in [1e-37_f32, 1e37] {
        let w: Vec<f32> = noise(24, 2).iter().map(|&value| value * scale).collect();
        assert!(lost(&w, &nearest(&w, shape).to_dense()) < 1e-6);
    }
}

#[test]
fn bad_matrices_are_refused_by_place() {
    let shape = KroneckerShape::new(2, 3, (1, 3), 1).unwrap();
    let bad = |values: &[f32]| {
        let view = MatrixView::new(values, 2, 3).unwrap();
        nearest_kronecker_sum(view, shape, &Progress::default()).unwrap_err().to_string()
    };
    assert_eq!(bad(&[0.0, 1.0, 2.0, 3.0, f32::NAN, 5.0]), "expected finite values, got NaN at row 1, column 1");
    assert_eq!(
        bad(&[0.0, 1.0, f32::NEG_INFINITY, 3.0, 4.0, 5.0]),
        "expected finite values, got -inf at row 0, column 2"
    );
    assert!(MatrixView::new(&[0.0; 5], 2, 3).unwrap_err().to_string().contains("2×3 values"));
}

#[test]
fn a_cancelled_job_stops() {
    let progress = Progress::default();
    progress.cancel();
    let shape = KroneckerShape::new(4, 4, (2, 2), 1).unwrap();
    let w = noise(16, 3);
    let outcome = nearest_kronecker_sum(MatrixView::new(&w, 4, 4).unwrap(), shape, &progress);
    assert!(matches!(outcome, Err(crate::Error::Cancelled)));
}
