//! The search against its definition: what each step claims to raise, and what the whole promises.

use proptest::prelude::*;

use super::anneal::{Schedule, anneal, swap_gains_for_tests};
use super::assign::alternate_assignment;
use super::phase_gram::PhaseGram;
use super::projector::Projector;
use super::*;
use crate::error::Error;
use crate::kron::{MatrixView, block_gram, lost_energy};
use crate::progress::{Parallelism, Progress};
use crate::spec::{KroneckerShape, KroneckerSpec, Permute};
use crate::testing::noise;

fn shapes() -> impl Strategy<Value = KroneckerShape> {
    (1_usize..6, 1_usize..6, 1_usize..5, 1_usize..5, 0_usize..25).prop_map(|(m1, n1, m2, n2, rank)| {
        let rank = 1 + rank % (m1 * n1).min(m2 * n2);
        KroneckerShape { m1, n1, m2, n2, rank }
    })
}

fn spec(shape: &KroneckerShape, permute: Permute) -> KroneckerSpec {
    KroneckerSpec { block: (shape.m2, shape.n2), rank: shape.rank, permute }
}

/// Noise whose rows and columns differ in size, as those of trained weights do.
fn uneven(m: usize, n: usize, seed: u64) -> Vec<f32> {
    let scales = noise(m + n, seed ^ 1);
    let scale = |index: usize| (2.0 * scales[index]).exp();
    noise(m * n, seed).iter().enumerate().map(|(at, &value)| value * scale(at / n) * scale(m + at % n)).collect()
}

fn random_order(length: usize, seed: u64) -> Vec<usize> {
    let keys = noise(length, seed);
    let mut order: Vec<usize> = (0..length).collect();
    order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]));
    order
}

fn row_gram(view: MatrixView<'_>, shape: &KroneckerShape) -> PhaseGram {
    PhaseGram::new(view, Side::Rows, shape, Parallelism::Sequential, &Progress::default()).unwrap()
}

proptest! {
    #[test]
    fn a_phase_gram_knows_the_block_gram_of_every_order(shape in shapes(), seed in any::<u64>()) {
        let (m, n) = (shape.rows(), shape.columns());
        let w = uneven(m, n, seed);
        let (rows, columns) = (random_order(m, seed), random_order(n, !seed));
        let progress = Progress::default();
        let view = MatrixView::new(&w, m, n).unwrap();
        let expected = block_gram(view.ordered(Some(&rows), Some(&columns)), &shape, &progress).unwrap();
        let scale = view.energy();
        let by_rows = row_gram(view.ordered(None, Some(&columns)), &shape).block_gram(&rows);
        let by_columns = PhaseGram::new(view.ordered(Some(&rows), None), Side::Columns, &shape, Parallelism::Rayon, &progress)
            .unwrap()
            .block_gram(&columns);
        for i in 0..shape.block_entries() {
            for j in 0..=i {
                prop_assert!((expected[(i, j)] - by_rows[(i, j)]).abs() < 1e-5 * scale);
                // The column side numbers block entries column by column.
                let turned = |entry: usize| entry % shape.n2 * shape.m2 + entry / shape.n2;
                let (high, low) = (turned(i).max(turned(j)), turned(i).min(turned(j)));
                prop_assert!((expected[(i, j)] - by_columns[(high, low)]).abs() < 1e-5 * scale);
            }
        }
    }

    #[test]
    fn a_swap_gains_what_the_projected_energy_gains(shape in shapes(), seed in any::<u64>()) {
        prop_assume!(shape.m1 > 1);
        let w = uneven(shape.rows(), shape.columns(), seed);
        let view = MatrixView::new(&w, shape.rows(), shape.columns()).unwrap();
        let gram = row_gram(view, &shape);
        let mut order = random_order(shape.rows(), seed);
        let projector = Projector::fit(&gram, &order, shape.rank).unwrap();
        let before = projector.energy(&gram, &order);
        for (x, y) in [(0, shape.m2), (shape.m2 - 1, shape.rows() - 1), (0, shape.rows() - 1)] {
            let gain = swap_gains_for_tests(&gram, &projector, &order, x, y);
            order.swap(x, y);
            let gained = projector.energy(&gram, &order) - before;
            order.swap(x, y);
            for gain in gain {
                prop_assert!((f64::from(gain) - gained).abs() < 1e-5 * view.energy(), "{gain} {gained}");
            }
        }
    }

    #[test]
    fn assignment_never_lowers_the_energy_kept(shape in shapes(), seed in any::<u64>()) {
        let w = uneven(shape.rows(), shape.columns(), seed);
        let view = MatrixView::new(&w, shape.rows(), shape.columns()).unwrap();
        let gram = row_gram(view, &shape);
        let mut order = random_order(shape.rows(), seed);
        let before = Projector::fit(&gram, &order, shape.rank).unwrap().kept;
        let kept = alternate_assignment(&gram, &mut order, shape.rank, 3, &Progress::default()).unwrap();
        prop_assert!(kept >= before);
        Permutation::new(order.clone()).unwrap();
        let checked = Projector::fit(&gram, &order, shape.rank).unwrap().kept;
        prop_assert!((checked - kept).abs() <= 1e-9 * view.energy());
    }

    #[test]
    fn the_search_is_never_worse_than_no_permutation(shape in shapes(), seed in any::<u64>(), permute in 0_usize..4, plain in any::<bool>()) {
        let (m, n) = (shape.rows(), shape.columns());
        let w = if plain { noise(m * n, seed) } else { uneven(m, n, seed) };
        let view = MatrixView::new(&w, m, n).unwrap();
        let permute = Permute::NAMES[permute].1;
        let progress = Progress::default();
        let mut last = lost_energy(view, shape, &progress).unwrap();
        for effort in [Effort::Fast, Effort::Balanced] {
            let (orders, lost) = find_permutation(view, shape, permute, effort, seed, Parallelism::Sequential, &progress).unwrap();
            prop_assert!(lost <= last + 1e-6, "{effort:?} {lost} {last}");
            last = lost;
            let ordered = view.ordered(Some(&orders.rows), Some(&orders.columns));
            prop_assert_eq!(lost, lost_energy(ordered, shape, &progress).unwrap());
            let (rows, columns) = (Permutation::new(orders.rows).unwrap(), Permutation::new(orders.columns).unwrap());
            prop_assert!(permute.rows() || rows.is_identity());
            prop_assert!(permute.columns() || columns.is_identity());
        }
    }

    #[test]
    fn a_decomposition_is_the_matrix_it_came_from_but_for_the_lost_energy(shape in shapes(), seed in any::<u64>(), permute in 0_usize..4) {
        let (m, n) = (shape.rows(), shape.columns());
        let w = uneven(m, n, seed);
        let spec = spec(&shape, Permute::NAMES[permute].1);
        let found = decompose(&w, (m, n), &spec, Effort::Fast, seed, Parallelism::Rayon, &Progress::default()).unwrap();
        prop_assert_eq!(found.row_permutation.is_some(), spec.permute.rows());
        prop_assert_eq!(found.column_permutation.is_some(), spec.permute.columns());
        let dense = found.to_dense();
        let difference: f64 = w.iter().zip(&dense).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
        let lost = difference / MatrixView::new(&w, m, n).unwrap().energy();
        prop_assert!((lost - found.sum.lost_energy).abs() < 1e-5);
        let x = noise(2 * m, seed);
        for (x, y) in x.chunks_exact(m).zip(found.apply(&x, 2).unwrap().chunks_exact(n)) {
            for (j, &y) in y.iter().enumerate() {
                let terms = x.iter().enumerate().map(|(i, &x)| f64::from(x) * f64::from(dense[i * n + j]));
                let (sum, size) = terms.fold((0.0, 1.0), |(sum, size), term| (sum + term, size + term.abs()));
                prop_assert!((f64::from(y) - sum).abs() < 1e-5 * size);
            }
        }
    }
}

#[test]
fn norm_structure_is_found_and_more_effort_finds_more() {
    let (m, n) = (96, 128);
    // Mostly noise: nothing hides the difference between a short search and a long one.
    let w: Vec<f32> = uneven(m, n, 5).iter().map(|value| value.signum() * value.abs().powf(0.3)).collect();
    let view = MatrixView::new(&w, m, n).unwrap();
    let shape = KroneckerShape::new(m, n, (2, 4), 4).unwrap();
    let progress = Progress::default();
    let lost =
        |effort| find_permutation(view, shape, Permute::Both, effort, 0, Parallelism::Rayon, &progress).unwrap().1;
    let none = lost_energy(view, shape, &progress).unwrap();
    let (fast, balanced, best) = (lost(Effort::Fast), lost(Effort::Balanced), lost(Effort::Best));
    assert!(fast < 0.9 * none && balanced < fast && best <= balanced, "{none} {fast} {balanced} {best}");
}

#[test]
fn a_large_block_is_searched_as_well_as_a_small_one() {
    // (2, 4) blocks of (32, 24) entries, and the other way round: the same sums in another order.
    let (m, n) = (64, 96);
    let w = uneven(m, n, 10);
    let lost = |block| {
        let spec = KroneckerSpec { block, rank: 3, permute: Permute::Both };
        decompose(&w, (m, n), &spec, Effort::Balanced, 0, Parallelism::Rayon, &Progress::default())
            .unwrap()
            .sum
            .lost_energy
    };
    assert!((lost((32, 24)) - lost((2, 4))).abs() < 1e-6);
}

#[test]
fn a_seed_decides_and_threads_do_not() {
    let (m, n) = (160, 192);
    let w = uneven(m, n, 6);
    let run = |threads, seed, parallelism| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let spec = KroneckerSpec { block: (2, 4), rank: 3, permute: Permute::Both };
        pool.install(|| {
            decompose(&w, (m, n), &spec, Effort::Balanced, seed, parallelism, &Progress::default()).unwrap()
        })
    };
    let one = run(1, 0, Parallelism::Sequential);
    for threads in [1, 2, 4] {
        assert_eq!(one, run(threads, 0, Parallelism::Rayon));
    }
    assert_ne!(one.row_permutation, run(1, 1, Parallelism::Sequential).row_permutation);
}

#[test]
fn annealing_at_rest_only_climbs() {
    let shape = KroneckerShape::new(64, 64, (4, 2), 3).unwrap();
    let w = uneven(64, 64, 7);
    let view = MatrixView::new(&w, 64, 64).unwrap();
    let gram = row_gram(view, &shape);
    let mut order: Vec<usize> = (0..64).collect();
    let before = Projector::fit(&gram, &order, 3).unwrap().kept;
    let schedule = Schedule { start: 1e-12, end: 1e-12, rounds: 4, moves: 200 };
    let kept = anneal(&gram, &mut order, 3, view.energy(), schedule, 1, &Progress::default()).unwrap();
    assert!(kept > before * 1.05, "{before} {kept}");
    Permutation::new(order).unwrap();
}

#[test]
fn work_is_announced_as_it_is_done() {
    let (m, n) = (32, 48);
    let w = uneven(m, n, 8);
    for (permute, effort) in
        [(Permute::Both, Effort::Balanced), (Permute::None, Effort::Fast), (Permute::Rows, Effort::Best)]
    {
        let spec = KroneckerSpec { block: (2, 4), rank: 2, permute };
        let progress = Progress::default();
        progress.expect(work(spec.shape(m, n).unwrap(), permute, effort));
        decompose(&w, (m, n), &spec, effort, 0, Parallelism::Rayon, &progress).unwrap();
        let (done, total) = progress.counts();
        assert_eq!(done, total, "{permute:?} {effort:?}");
    }
}

#[test]
fn a_cancelled_search_stops() {
    let progress = Progress::default();
    progress.cancel();
    let spec = KroneckerSpec { block: (2, 4), rank: 2, permute: Permute::Both };
    let w = noise(32 * 32, 9);
    let outcome = decompose(&w, (32, 32), &spec, Effort::Best, 0, Parallelism::Rayon, &progress);
    assert!(matches!(outcome, Err(Error::Cancelled)));
}

proptest! {
    #[test]
    fn inverse_and_composition_agree_with_gathering(order in Just((0..40_usize).collect::<Vec<_>>()).prop_shuffle()) {
        let permutation = Permutation::new(order).unwrap();
        let values: Vec<usize> = (100..140).collect();
        let gathered = permutation.gather(&values);
        prop_assert_eq!(permutation.inverse().gather(&gathered), values.clone());
        prop_assert!(permutation.then(&permutation.inverse()).is_identity());
        prop_assert_eq!(permutation.then(&permutation).gather(&values), permutation.gather(&gathered));
    }
}

#[test]
fn what_is_no_permutation_is_refused() {
    assert!(Permutation::new(vec![1, 0, 1]).unwrap_err().to_string().contains("entry 2, 1, is repeated"));
    assert!(Permutation::new(vec![0, 3]).unwrap_err().to_string().contains("entry 1, 3, is out of range"));
}
