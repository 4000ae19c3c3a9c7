//! Fits against dense oracles, and what they promise: no step loses, no sum is worse than its terms.

use faer::{Mat, MatRef};
use proptest::prelude::*;

use super::descent::{descend, residual};
use super::factors::Factors;
use super::weighted::{ASSIGNMENTS, start, upcast};
use super::weighted_permutation::improve_orders;
use super::*;
use crate::error::{Error, Result};
use crate::kron::eigenvectors;
use crate::kron::{MatrixView, nearest_kronecker_sum};
use crate::permute::{Effort, Permutation, decompose};
use crate::progress::{Parallelism, Progress};
use crate::spec::{KroneckerSpec, MatrixSpec, Permute, TermSpec, Usage};
use crate::testing::noise;

/// A second moment of `samples` random vectors whose entries differ in size: singular if there are few.
fn moment(side: usize, samples: usize, seed: u64) -> Vec<f32> {
    let x = noise(samples * side, seed);
    let scale = |i: usize| (i as f64 * 0.7).sin().exp();
    let entry = |i: usize, j: usize| {
        let products = (0..samples).map(|s| f64::from(x[s * side + i]) * f64::from(x[s * side + j]));
        (products.sum::<f64>() * scale(i) * scale(j)) as f32
    };
    (0..side * side).map(|at| entry(at / side, at % side)).collect()
}

/// The norms that there are: none, diagonal, full and singular ones, on either side.
fn norm(kind: usize, m: usize, n: usize, seed: u64) -> Norm {
    let (input, output) = (moment(m, m / 2 + 1, seed), moment(n, 2 * n, seed ^ 7));
    let diagonal: Vec<f32> = (0..m).map(|i| input[i * (m + 1)]).collect();
    let moments = match kind {
        0 => Moments::default(),
        1 => Moments { input: Some(Moment::Diagonal(&diagonal)), output: None },
        2 => Moments { input: Some(Moment::Full(&input)), output: None },
        3 => Moments { input: None, output: Some(Moment::Full(&output)) },
        4 => Moments { input: Some(Moment::Diagonal(&diagonal)), output: Some(Moment::Full(&output)) },
        _ => Moments { input: Some(Moment::Full(&input)), output: Some(Moment::Full(&output)) },
    };
    Norm::prepare(moments, m, n).unwrap()
}
const NORMS: usize = 6;

fn dense_weight(weight: &Weight, side: usize) -> Mat<f64> {
    Mat::from_fn(side, side, |i, j| match weight {
        Weight::Full(matrix) => matrix[(i, j)],
        Weight::Diagonal(values) if i == j => values[i],
        Weight::Identity if i == j => 1.0,
        _ => 0.0,
    })
}

/// `‖E‖²` by its definition.
fn energy(norm: &Norm, error: MatRef<'_, f64>) -> f64 {
    let (input, output) = (dense_weight(&norm.input, error.nrows()), dense_weight(&norm.output, error.ncols()));
    let product = &input * error * &output * error.transpose();
    (0..error.nrows()).map(|i| product[(i, i)]).sum()
}

/// The lost energy of row-major dense terms by its definition.
fn lost(norm: &Norm, target: MatRef<'_, f64>, terms: &[Term]) -> f64 {
    let mut error = target.to_owned();
    for term in terms {
        for (at, value) in term.to_dense().into_iter().enumerate() {
            error[(at / target.ncols(), at % target.ncols())] -= f64::from(value);
        }
    }
    energy(norm, error.as_ref()) / energy(norm, target)
}

fn fitted(view: MatrixView<'_>, spec: &MatrixSpec, norm: &Norm) -> Result<Fit> {
    fit(view, spec, norm, Effort::Fast, 1, Parallelism::Sequential, &Progress::default())
}

fn within(view: MatrixView<'_>, limits: Limits, norm: &Norm, effort: Effort) -> Result<Fit> {
    let progress = Progress::default();
    fit_within(view, limits, norm, &Spectrum::new(view, norm, &progress)?, effort, &progress)
}

fn kronecker(block: (usize, usize), rank: usize, permute: Permute) -> TermSpec {
    TermSpec::Kronecker(KroneckerSpec { block, rank, permute })
}

fn check_that_a_sum_is_never_worse(kind: usize, seed: u64, wide: bool) -> Result<(), TestCaseError> {
    let (m, n) = if wide { (8, 12) } else { (12, 8) };
    let w = noise(m * n, seed);
    let view = MatrixView::new(&w, m, n).unwrap();
    let norm = norm(kind, m, n, seed);
    let terms =
        vec![TermSpec::LowRank { rank: 2 }, kronecker((2, 2), 2, Permute::Both), kronecker((4, 2), 1, Permute::Rows)];
    let sum = fitted(view, &MatrixSpec::new(terms.clone()).unwrap(), &norm).unwrap();
    prop_assert_eq!(sum.terms.len(), 3);
    let measured = lost(&norm, upcast(view).as_ref(), &sum.terms);
    prop_assert!((sum.lost_energy - measured).abs() < 1e-9);
    for term in terms {
        let alone = fitted(view, &term.into(), &norm).unwrap();
        prop_assert!(sum.lost_energy <= alone.lost_energy + 1e-6, "{} {}", sum.lost_energy, alone.lost_energy);
    }
    Ok(())
}

#[test]
fn a_sum_in_whose_norm_low_rank_hides_an_error_is_not_worse_either() {
    check_that_a_sum_is_never_worse(0, 12_759_736_732_004_735_097, true).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn low_rank_loses_the_tail_of_the_whitened_spectrum(
        m in 2..10_usize, n in 2..10_usize, rank in 0..9_usize, kind in 0..NORMS, seed in any::<u64>(),
    ) {
        let rank = 1 + rank % (m.min(n) - 1);
        let w = noise(m * n, seed);
        let view = MatrixView::new(&w, m, n).unwrap();
        let norm = norm(kind, m, n, seed);
        let target = upcast(view);
        let (left, right) = (norm.input.roots().unwrap().0, norm.output.roots().unwrap().0);
        let whitened = dense_weight(&left, m) * &target * dense_weight(&right, n);
        let (energies, _) = eigenvectors((&whitened * whitened.transpose()).as_ref()).unwrap();
        let total: f64 = energies.iter().sum();
        let tail = energies[..m - rank].iter().sum::<f64>() / total;

        let fit = fitted(view, &MatrixSpec::low_rank(rank), &norm).unwrap();
        prop_assert!((fit.lost_energy - tail).abs() < 1e-9);
        prop_assert!((lost(&norm, target.as_ref(), &fit.terms) - tail).abs() < 1e-5);
        let energies = Spectrum::new(view, &norm, &Progress::default()).unwrap().energies();
        let tail_of_spectrum = energies[rank..].iter().sum::<f64>() / energies.iter().sum::<f64>();
        prop_assert!((tail_of_spectrum - tail).abs() < 1e-9);
    }

    #[test]
    fn the_interpolative_form_repeats_its_pivots(m in 8..30_usize, n in 8..30_usize, rank in 1..7_usize, seed in any::<u64>()) {
        let w = noise(m * n, seed);
        let view = MatrixView::new(&w, m, n).unwrap();
        let term = low_rank(view, rank, &Norm::frobenius(), &Progress::default()).unwrap();
        let dense = term.to_dense();
        let (coefficients, on_rows) = if m <= n { (&term.left, true) } else { (&term.right, false) };
        // Greedy pivots bound them by 2^rank; in practice they stay near 1.
        prop_assert!(coefficients.iter().all(|value| value.abs() < 8.0));
        for (k, &pivot) in term.order.as_slice()[..rank].iter().enumerate() {
            if on_rows {
                prop_assert_eq!(&dense[pivot * n..][..n], &term.right[k * n..][..n]);
            } else {
                prop_assert!((0..m).all(|i| dense[i * n + pivot] == term.left[i * rank + k]));
            }
        }
    }

    #[test]
    fn no_step_of_a_fit_raises_what_is_lost(kind in 0..NORMS, seed in any::<u64>(), rank in 1..7_usize) {
        let (m, n) = (12, 8);
        let w = noise(m * n, seed);
        let target = upcast(MatrixView::new(&w, m, n).unwrap());
        let norm = norm(kind, m, n, seed);
        let progress = Progress::default();
        let spec = KroneckerSpec { block: (3, 2), rank: rank.min(6), permute: Permute::Both };
        let mut terms = vec![start(target.as_ref(), &spec, &norm, ASSIGNMENTS, &progress).unwrap()];
        let left = |terms: &[Factors]| energy(&norm, residual(terms, target.as_ref()).as_ref());
        let total = energy(&norm, target.as_ref());
        let mut last = left(&terms);
        prop_assert!(last <= total * (1.0 + 1e-9));
        terms.push(Factors::low_rank(
            Mat::from_fn(m, 2, |i, k| 0.1 * f64::from(w[i * 2 + k])),
            Mat::from_fn(n, 2, |j, k| 0.1 * f64::from(w[j * 2 + k])),
        ));
        last = last.max(left(&terms));
        for _ in 0..4 {
            let found = descend(&mut terms, target.as_ref(), &norm, 2, &progress).unwrap();
            let now = left(&terms);
            // The descent evaluates the norm in f32.
            prop_assert!((found - now).abs() <= 1e-6 * total);
            prop_assert!(now <= last + 1e-7 * total);
            let rest = residual(&terms[1..], target.as_ref());
            let changed = improve_orders(&mut terms[0], rest.as_ref(), &norm, Permute::Both, &progress).unwrap();
            last = left(&terms);
            prop_assert!((changed && last < now) || (!changed && last == now));
            Permutation::new(terms[0].row_permutation.clone()).unwrap();
            Permutation::new(terms[0].column_permutation.clone()).unwrap();
        }
    }

    #[test]
    fn a_sum_is_never_worse_than_its_terms(kind in 0..NORMS, seed in any::<u64>(), wide in any::<bool>()) {
        check_that_a_sum_is_never_worse(kind, seed, wide)?;
    }

    #[test]
    fn a_weighted_fit_is_better_in_its_norm_than_the_nearest_in_another(kind in 1..NORMS, seed in any::<u64>()) {
        let (m, n) = (12, 8);
        let w = noise(m * n, seed);
        let view = MatrixView::new(&w, m, n).unwrap();
        let norm = norm(kind, m, n, seed);
        let term = kronecker((3, 2), 2, Permute::None);
        let TermSpec::Kronecker(spec) = term else { unreachable!() };
        let term = MatrixSpec::from(term);
        let weighted = fitted(view, &term, &norm).unwrap();
        let plain = fitted(view, &term, &Norm::frobenius()).unwrap();
        let target = upcast(view);
        let measured = lost(&norm, target.as_ref(), &weighted.terms);
        prop_assert!((weighted.lost_energy - measured).abs() < 1e-9);
        prop_assert!(measured <= lost(&norm, target.as_ref(), &plain.terms) + 1e-6);
        // A norm that is only called weighted has a closed form to compare with.
        let identity = Norm { input: Weight::Diagonal(vec![1.0; m]), output: Weight::Identity, scale: 1.0 };
        let nearest = nearest_kronecker_sum(view, spec.shape(m, n).unwrap(), &Progress::default()).unwrap();
        let found = fitted(view, &term, &identity).unwrap();
        prop_assert!((found.lost_energy - nearest.lost_energy).abs() < 1e-5);
    }

    #[test]
    fn a_fit_keeps_within_its_limits(
        m in 4..16_usize, n in 4..16_usize, share in 0.3..0.9_f64, kind in 0..NORMS, seed in any::<u64>(),
        cap in prop::option::of(0.5..4.0_f64), looked_up in any::<bool>(),
    ) {
        let w = noise(m * n, seed);
        let view = MatrixView::new(&w, m, n).unwrap();
        let norm = norm(kind, m, n, seed);
        let parameters = ((m * n) as f64 * share) as usize;
        let usage = if looked_up { Usage::TiedLookup } else { Usage::Map };
        let limits = Limits { parameters, macs: cap.map(|cap| ((cap * (m * n) as f64) as usize, usage)) };
        let fits = |spec: &MatrixSpec| {
            spec.parameters(m, n).unwrap() <= parameters
                && limits.macs.is_none_or(|(most, usage)| spec.macs(m, n, usage).unwrap() <= most)
        };
        let ranks = (1..m.min(n)).rev();
        let Some(rank) = ranks.into_iter().find(|&rank| fits(&MatrixSpec::low_rank(rank))) else { return Ok(()) };
        let low_rank = fitted(view, &MatrixSpec::low_rank(rank), &norm).unwrap();
        for effort in [Effort::Fast, Effort::Balanced, Effort::Best] {
            let within =
                within(view, limits, &norm, effort).unwrap();
            prop_assert!(fits(&within.spec));
            prop_assert!(within.lost_energy <= low_rank.lost_energy + 1e-9);
            prop_assert!((within.lost_energy - lost(&norm, upcast(view).as_ref(), &within.terms)).abs() < 1e-5);
        }
    }
}

#[test]
fn descent_ends_at_the_closed_form_where_there_is_one() {
    let (m, n) = (24, 16);
    let w = noise(m * n, 3);
    let view = MatrixView::new(&w, m, n).unwrap();
    let target = upcast(view);
    let spec = KroneckerSpec { block: (4, 4), rank: 3, permute: Permute::None };
    let shape = spec.shape(m, n).unwrap();
    let progress = Progress::default();
    let nearest = nearest_kronecker_sum(view, shape, &progress).unwrap();
    let values = noise(3 * (shape.blocks() + shape.block_entries()), 4);
    let mut factors = Factors::zeros(shape);
    factors.a = Mat::from_fn(shape.blocks(), 3, |i, k| f64::from(values[i * 3 + k]));
    factors.b = Mat::from_fn(shape.block_entries(), 3, |i, k| f64::from(values[3 * shape.blocks() + i * 3 + k]));
    let norm = Norm::frobenius();
    let left = descend(std::slice::from_mut(&mut factors), target.as_ref(), &norm, 500, &progress).unwrap();
    let lost = left / norm.energy(target.as_ref());
    assert!(lost < nearest.lost_energy * 1.01 && lost > nearest.lost_energy * (1.0 - 1e-6), "{lost} {nearest:?}");
}

#[test]
fn orders_help_a_scrambled_kronecker_product_in_every_norm() {
    let (m, n) = (24, 16);
    let (a, b) = (noise(6 * 4, 5), noise(4 * 4, 6));
    let rows: Vec<usize> = (0..m).map(|i| i * 7 % m).collect();
    let columns: Vec<usize> = (0..n).map(|j| j * 5 % n).collect();
    let w: Vec<f32> = (0..m * n)
        .map(|at| {
            let (i, j) = (rows[at / n], columns[at % n]);
            a[i / 4 * 4 + j / 4] * b[i % 4 * 4 + j % 4]
        })
        .collect();
    let view = MatrixView::new(&w, m, n).unwrap();
    for kind in 1..NORMS {
        let norm = norm(kind, m, n, 8);
        let lost = |permute, effort| {
            let spec = KroneckerSpec { block: (4, 4), rank: 2, permute };
            weighted_kronecker(view, spec, &norm, effort, &Progress::default()).unwrap().sum.lost_energy
        };
        let (without, with) = (lost(Permute::None, Effort::Best), lost(Permute::Both, Effort::Best));
        assert!(with < 0.9 * without, "norm {kind}: {with} {without}");
    }
}

#[test]
fn one_kronecker_sum_in_the_frobenius_norm_is_the_search_for_it() {
    let (m, n) = (12, 16);
    let w = noise(m * n, 2);
    let spec = KroneckerSpec { block: (2, 4), rank: 3, permute: Permute::Both };
    let progress = Progress::default();
    let searched = decompose(&w, (m, n), &spec, Effort::Fast, 1, Parallelism::Sequential, &progress).unwrap();
    let view = MatrixView::new(&w, m, n).unwrap();
    let fit = fitted(view, &spec.into(), &Norm::frobenius()).unwrap();
    assert_eq!(fit.terms, [Term::Kronecker(searched)]);
    // A view in another order is another matrix.
    let order: Vec<usize> = (0..m).rev().collect();
    let ordered = view.ordered(Some(&order), None);
    let copy = ordered.to_vec();
    let copied = fitted(MatrixView::new(&copy, m, n).unwrap(), &spec.into(), &Norm::frobenius()).unwrap();
    assert_eq!(fitted(ordered, &spec.into(), &Norm::frobenius()).unwrap(), copied);
}

fn specs() -> [MatrixSpec; 3] {
    let kronecker = kronecker((2, 4), 2, Permute::Both);
    [
        MatrixSpec::low_rank(3),
        kronecker.clone().into(),
        MatrixSpec::new(vec![TermSpec::LowRank { rank: 2 }, kronecker]).unwrap(),
    ]
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let (m, n) = (12, 16);
    let w = noise(m * n, 9);
    let view = MatrixView::new(&w, m, n).unwrap();
    for kind in 0..NORMS {
        let norm = norm(kind, m, n, 4);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let progress = Progress::default();
                let fits = specs()
                    .map(|spec| fit(view, &spec, &norm, Effort::Fast, 5, Parallelism::Rayon, &progress).unwrap());
                let limits = Limits::of_parameters(100);
                (fits, within(view, limits, &norm, Effort::Best).unwrap())
            })
        };
        assert_eq!(run(1), run(3));
    }
}

#[test]
fn degenerate_moments_and_matrices_are_ordinary() {
    let (m, n) = (12, 16);
    let w = noise(m * n, 9);
    let zeros = vec![0.0_f32; m * n];
    let rank_one: Vec<f32> = (0..m * m).map(|at| ((at / m + 1) * (at % m + 1)) as f32).collect();
    let ill: Vec<f32> =
        (0..m * m).map(|at| if at / m == at % m { 10.0_f32.powi(-2 * (at / m) as i32) } else { 0.0 }).collect();
    let none = vec![0.0; m * m];
    for input in [&rank_one, &ill, &none] {
        let norm = Norm::prepare(Moments { input: Some(Moment::Full(input)), output: None }, m, n).unwrap();
        for spec in specs() {
            let fit = fitted(MatrixView::new(&w, m, n).unwrap(), &spec, &norm).unwrap();
            assert!(fit.lost_energy > 0.0 && fit.lost_energy < 1.0, "{fit:?}");
            let fit = fitted(MatrixView::new(&zeros, m, n).unwrap(), &spec, &norm).unwrap();
            assert_eq!(fit.lost_energy, 0.0);
            assert!(fit.terms.iter().all(|term| term.to_dense().iter().all(|&value| value == 0.0)));
        }
        let of = |w: &[f32]| {
            let view = MatrixView::new(w, m, n).unwrap();
            within(view, Limits::of_parameters(90), &norm, Effort::Balanced).unwrap()
        };
        assert_eq!(of(&zeros).lost_energy, 0.0);
        assert!(of(&w).lost_energy < 1.0);
    }
}

#[test]
fn what_cannot_be_fitted_is_refused() {
    let (m, n) = (12, 16);
    let mut w = noise(m * n, 9);
    let norm = norm(5, m, n, 4);
    let progress = Progress::default();
    let limited = |w: &[f32], limits| {
        let view = MatrixView::new(w, m, n).unwrap();
        fit_within(view, limits, &norm, &Spectrum::new(view, &norm, &progress)?, Effort::Balanced, &progress)
    };
    let within = |w: &[f32], parameters| limited(w, Limits::of_parameters(parameters));
    assert!(matches!(within(&w, m + n - 2), Err(Error::Shape { operation: "parameters", .. })));
    let starved = Limits { macs: Some((m + n - 2, Usage::Map)), ..Limits::of_parameters(90) };
    assert!(matches!(limited(&w, starved), Err(Error::Shape { operation: "MACs", .. })));
    let misfit = MatrixSpec::new(vec![TermSpec::LowRank { rank: 2 }, kronecker((5, 4), 1, Permute::Both)]).unwrap();
    assert!(matches!(fitted(MatrixView::new(&w, m, n).unwrap(), &misfit, &norm), Err(Error::Shape { .. })));
    w[20] = f32::NAN;
    assert!(matches!(within(&w, 90), Err(Error::NonFinite { row: 1, column: 4, .. })));
    for spec in specs() {
        let fit = fitted(MatrixView::new(&w, m, n).unwrap(), &spec, &norm);
        assert!(matches!(fit, Err(Error::NonFinite { row: 1, column: 4, .. })));
    }
    progress.cancel();
    assert!(matches!(within(&noise(m * n, 9), 90), Err(Error::Cancelled)));
}

/// A fit without its lost energy, with factors divided by the given power of two.
fn terms_at(fit: &Fit, exponent: i32) -> Vec<Vec<f64>> {
    let scaled = |values: &[f32], exponent: i32| {
        values.iter().map(|&value| f64::from(value) * 2.0_f64.powi(-exponent)).collect::<Vec<_>>()
    };
    let factors = |term: &Term| match term {
        Term::Kronecker(term) => [scaled(&term.sum.a, exponent / 2), scaled(&term.sum.b, exponent / 2)],
        Term::LowRank(term) if term.shape.pivots_on_rows() => [scaled(&term.left, 0), scaled(&term.right, exponent)],
        Term::LowRank(term) => [scaled(&term.left, exponent), scaled(&term.right, 0)],
        Term::Grouped(term) => {
            let (left, right) = term.factors();
            [scaled(&left, exponent), scaled(&right, 0)]
        }
    };
    fit.terms.iter().flat_map(factors).collect()
}

#[test]
fn a_fit_does_not_depend_on_the_scale_of_the_matrix() {
    for ((m, n), kind, spec) in [(24, 16), (16, 24)]
        .into_iter()
        .flat_map(|shape| [0, 1, 5].into_iter().flat_map(move |kind| specs().map(|spec| (shape, kind, spec))))
    {
        let (w, norm) = (noise(m * n, 11), norm(kind, m, n, 3));
        let at = |exponent: i32| {
            let scaled: Vec<f32> = w.iter().map(|&value| value * 2.0_f32.powi(exponent)).collect();
            let view = MatrixView::new(&scaled, m, n).unwrap();
            let limits = Limits::of_parameters(m * n / 2);
            [fitted(view, &spec, &norm).unwrap(), within(view, limits, &norm, Effort::Balanced).unwrap()]
        };
        let expected = at(0);
        for exponent in [-100, -80, -20, 20, 84, 120] {
            for (fit, expected) in at(exponent).iter().zip(&expected) {
                assert_eq!(terms_at(fit, exponent), terms_at(expected, 0), "2^{exponent}, norm {kind}, {spec:?}");
                assert_eq!((fit.lost_energy, &fit.spec), (expected.lost_energy, &expected.spec), "2^{exponent}");
            }
        }
    }
}

#[test]
fn a_fit_does_not_depend_on_the_scale_of_the_moments() {
    let (m, n) = (16, 12);
    let w = noise(m * n, 4);
    let view = MatrixView::new(&w, m, n).unwrap();
    let moments = (moment(m, 9, 1), moment(n, 20, 2));
    for spec in specs() {
        let at = |exponent: i32| {
            let scaled = |values: &[f32]| values.iter().map(|&v| v * 2.0_f32.powi(exponent)).collect::<Vec<_>>();
            let (input, output) = (scaled(&moments.0), scaled(&moments.1));
            let both = Moments { input: Some(Moment::Full(&input)), output: Some(Moment::Full(&output)) };
            fitted(view, &spec, &Norm::prepare(both, m, n).unwrap()).unwrap()
        };
        for exponent in [-90, 100] {
            assert_eq!(at(exponent), at(0), "2^{exponent}, {spec:?}");
        }
    }
}

#[test]
fn a_factor_beyond_the_range_is_refused() {
    // The projection of the first row onto the leading direction has an entry that is a sixth larger.
    let w = [f32::MAX, f32::MAX, f32::MAX, 0.0];
    let view = MatrixView::new(&w, 2, 2).unwrap();
    let error = fitted(view, &MatrixSpec::low_rank(1), &Norm::frobenius()).unwrap_err();
    assert!(matches!(error, Error::Overflow { largest: f32::MAX, .. }), "{error}");
    let halved = w.map(|value| value / 2.0);
    let fit = fitted(MatrixView::new(&halved, 2, 2).unwrap(), &MatrixSpec::low_rank(1), &Norm::frobenius()).unwrap();
    assert!(fit.terms[0].to_dense().iter().all(|value| value.is_finite()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_norm_beyond_low_rank_leaves_out_its_directions(
        m in 3..10_usize, n in 3..10_usize, rank in 0..9_usize, kind in 0..NORMS, seed in any::<u64>(),
    ) {
        let rank = 1 + rank % (m.min(n) - 1);
        let (w, change) = (noise(m * n, seed), noise(m * n, seed ^ 5));
        let norm = norm(kind, m, n, seed);
        let of = |values: &[f32]| upcast(MatrixView::new(values, m, n).unwrap());
        let (target, change) = (of(&w), of(&change));
        let spectrum = Spectrum::new(MatrixView::new(&w, m, n).unwrap(), &norm, &Progress::default()).unwrap();
        // The scale of the spectrum does not matter.
        let scaled = Mat::from_fn(m, n, |i, j| 4.0 * target[(i, j)]);
        let beyond = spectrum.whitened.beyond(scaled.as_ref(), rank, &norm, &spectrum.roots);

        let (left, right) = (norm.input.roots().unwrap().0, norm.output.roots().unwrap().0);
        let whitened = |x: &Mat<f64>| dense_weight(&left, m) * x * dense_weight(&right, n);
        let x = whitened(&target);
        let leading = |gram: Mat<f64>| {
            let (_, vectors) = eigenvectors(gram.as_ref()).unwrap();
            vectors.subcols(vectors.ncols() - rank, rank).to_owned()
        };
        let (u, v) = (leading(&x * x.transpose()), leading(x.transpose() * &x));
        let without = |x: Mat<f64>| {
            let x = &x - &u * (u.transpose() * &x);
            &x - (&x * &v) * v.transpose()
        };
        for (matrix, name) in [(&target, "the matrix"), (&change, "a change")] {
            let expected = energy(&Norm::frobenius(), without(whitened(matrix)).as_ref());
            let all = energy(&norm, matrix.as_ref());
            // The ridge of both sides adds a little.
            let found = energy(&beyond, matrix.as_ref());
            prop_assert!((found - expected).abs() < 0.01 * all, "{}: {} {} of {}", name, found, expected, all);
        }
    }
}

/// A matrix of rank 2, and two Kronecker products in orders of their own.
fn mixture(m: usize, n: usize, seed: u64) -> Vec<f32> {
    let mut w: Vec<f32> = noise(m * n, seed).iter().map(|value| 0.05 * value).collect();
    let (left, right) = (noise(m * 2, seed + 1), noise(n * 2, seed + 2));
    for (at, value) in w.iter_mut().enumerate() {
        *value += (0..2).map(|k| left[at / n * 2 + k] * right[at % n * 2 + k]).sum::<f32>();
    }
    for term in 0..2_usize {
        // Both factors are sparse, as are those of large entries: no low rank is near.
        let sparse = |length: usize, seed: u64| noise(length, seed).iter().map(|v| v.powi(3)).collect::<Vec<_>>();
        let (a, b) = (sparse(m * n / 16, seed + 10 + term as u64), sparse(16, seed + 20 + term as u64));
        let order = |side: usize, step: usize| (0..side).map(move |i| i * step % side).collect::<Vec<_>>();
        let (rows, columns) = (order(m, [5, 7][term]), order(n, [7, 5][term]));
        for (at, value) in w.iter_mut().enumerate() {
            let (i, j) = (rows[at / n], columns[at % n]);
            *value += 3.0 * a[i / 4 * (n / 4) + j / 4] * b[i % 4 * 4 + j % 4];
        }
    }
    w
}

#[test]
fn kronecker_terms_with_orders_of_their_own_replace_low_rank_and_take_no_more_macs() {
    for (m, n) in [(48, 32), (32, 48), (36, 36)] {
        let w = mixture(m, n, 3);
        let view = MatrixView::new(&w, m, n).unwrap();
        let limits = Limits { parameters: m * n / 2, macs: Some((m * n, Usage::Map)) };
        for kind in 0..NORMS {
            let norm = norm(kind, m, n, 6);
            let [low_rank, balanced, best] = [Effort::Fast, Effort::Balanced, Effort::Best]
                .map(|effort| within(view, limits, &norm, effort).unwrap());
            assert!(balanced.lost_energy < 0.9 * low_rank.lost_energy, "{m} {n} {kind}: {balanced:?}");
            assert!(best.lost_energy < 1.02 * balanced.lost_energy, "{m} {n} {kind}: {best:?}");
            for fit in [&balanced, &best] {
                assert!(fit.spec.macs(m, n, Usage::Map).unwrap() <= m * n);
                let permuted = |term: &Term| match term {
                    Term::Kronecker(sum) => sum.row_permutation.is_some() && sum.column_permutation.is_some(),
                    _ => false,
                };
                assert!(fit.terms[1..].iter().all(permuted) && fit.terms.len() > 1, "{m} {n} {kind}");
            }
        }
    }
}
