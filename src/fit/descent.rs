//! Descent on the factors of all terms of a sum: L-BFGS with a preconditioner.
//!
//! J. Nocedal, "Updating quasi-Newton matrices with limited storage", Mathematics of Computation 35 (1980). It needs a
//! third of the norm evaluations of alternating least squares by conjugate gradients for the same lost energy.
//!
//! The factors and the residual are f64. The norm is applied to the residual in f32, as are gradients and steps: this
//! rounds them in proportion to the residual, not to the matrix.

use std::collections::VecDeque;
use std::ops::AddAssign;

use faer::{Mat, MatRef};

use super::factors::Factors;
use super::moment::{Norm, Real, inner, product, single};
use super::preconditioner::{BlockWeights, Preconditioner};
use crate::error::Result;
use crate::progress::Progress;

/// Steps in the history of the curvature.
const MEMORY: usize = 10;
/// The least decrease of a step, as a share of what the slope predicts (Armijo's rule).
const ARMIJO: f64 = 1e-4;
/// The descent ends at a smaller relative decrease.
const CONVERGED: f64 = 2e-5;

/// Factors of every term, or a gradient, or a step: `(a, b)` of each.
type Point = Vec<(Mat<f32>, Mat<f32>)>;

/// Lowers `‖W − Σ_t K_t‖²` by at most `iterations` steps and returns it. Never raises it.
///
/// Cost, each step: [`Norm::apply`] and `3·rank·m·n` MACs for every term.
pub(super) fn descend(
    terms: &mut [Factors],
    target: MatRef<'_, f64>,
    norm: &Norm,
    iterations: usize,
    progress: &Progress,
) -> Result<f64> {
    let single = norm.to_single();
    let (mut energy, mut gradient) = evaluate(terms, target, &single);
    let preconditioners: Vec<Preconditioner> =
        terms.iter().map(|factors| BlockWeights::new(factors, norm).preconditioner(factors)).collect();
    let mut history = History::default();
    for _ in 0..iterations {
        progress.check()?;
        let (mut direction, mut slope) = history.direction(&gradient, &preconditioners);
        if slope >= 0.0 {
            history.clear();
            (direction, slope) = history.direction(&gradient, &preconditioners);
        }
        if slope.is_nan() || slope >= -CONVERGED * CONVERGED * energy {
            break;
        }
        let mut length = 1.0;
        let found = loop {
            let tried = moved(terms, &direction, length);
            let (tried_energy, tried_gradient) = evaluate(&tried, target, &single);
            // `energy` falls by twice the slope of its half.
            if tried_energy <= energy + 2.0 * ARMIJO * length * slope {
                break Some((tried, tried_energy, tried_gradient));
            }
            // The minimum of the parabola through both energies and the slope.
            let excess = tried_energy - energy - 2.0 * length * slope;
            length *= (-length * slope / excess).clamp(0.1, 0.5);
            if length < 1e-6 || excess.is_nan() {
                break None;
            }
            progress.check()?;
        };
        let Some((tried, tried_energy, tried_gradient)) = found else { break };
        for (factors, tried) in terms.iter_mut().zip(tried) {
            *factors = tried;
        }
        history.push(scaled(&direction, length), difference(&tried_gradient, &gradient));
        let decrease = energy - tried_energy;
        (energy, gradient) = (tried_energy, tried_gradient);
        if decrease <= CONVERGED * energy {
            break;
        }
    }
    Ok(energy)
}

/// The residual `W − Σ_t K_t`.
pub(super) fn residual(terms: &[Factors], target: MatRef<'_, f64>) -> Mat<f64> {
    let mut error = target.to_owned();
    terms.iter().for_each(|factors| factors.subtract_from(&mut error));
    error
}

/// `W` without all terms but one.
pub(super) fn left_to(which: usize, terms: &[Factors], target: MatRef<'_, f64>) -> Mat<f64> {
    let mut left = target.to_owned();
    for (other, factors) in terms.iter().enumerate() {
        if other != which {
            factors.subtract_from(&mut left);
        }
    }
    left
}

/// `‖E‖²` and half of its gradient.
fn evaluate(terms: &[Factors], target: MatRef<'_, f64>, norm: &Norm<f32>) -> (f64, Point) {
    let error = single(residual(terms, target).as_ref());
    let weighted = norm.apply(error.as_ref());
    let energy = inner(weighted.as_ref(), error.as_ref());
    let gradient = terms
        .iter()
        .map(|factors| {
            let gathered = factors.gather(weighted.as_ref());
            let (a, b) = (single(factors.a.as_ref()), single(factors.b.as_ref()));
            let (mut a, mut b) = (product(gathered.as_ref(), b.as_ref()), product(gathered.transpose(), a.as_ref()));
            for factor in [&mut a, &mut b] {
                factor.col_iter_mut().for_each(|column| column.iter_mut().for_each(|value| *value = -*value));
            }
            (a, b)
        })
        .collect();
    (energy, gradient)
}

fn moved(terms: &[Factors], direction: &Point, length: f64) -> Vec<Factors> {
    let moved = |factors: &Factors, (a, b): &(Mat<f32>, Mat<f32>)| {
        let mut factors = factors.clone();
        add_scaled(&mut factors.a, a, length);
        add_scaled(&mut factors.b, b, length);
        factors
    };
    terms.iter().zip(direction).map(|(factors, step)| moved(factors, step)).collect()
}

/// The last steps and the changes of the gradient over them.
#[derive(Default)]
struct History(VecDeque<(Point, Point, f64)>);

impl History {
    fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds a step, unless the function was not convex along it.
    fn push(&mut self, step: Point, change: Point) {
        let curvature = dot(&step, &change);
        if curvature > 1e-12 * (dot(&step, &step) * dot(&change, &change)).sqrt() {
            self.0.push_back((step, change, curvature.recip()));
            if self.0.len() > MEMORY {
                self.0.pop_front();
            }
        }
    }

    /// The step to take, and the slope along it.
    fn direction(&self, gradient: &Point, preconditioners: &[Preconditioner]) -> (Point, f64) {
        let precondition = |point: &Point| -> Point {
            point.iter().zip(preconditioners).map(|((a, b), by)| by.apply(a.as_ref(), b.as_ref())).collect()
        };
        let mut direction = scaled(gradient, -1.0);
        let mut shares = Vec::with_capacity(self.0.len());
        for (step, change, inverse) in self.0.iter().rev() {
            let share = inverse * dot(step, &direction);
            add(&mut direction, change, -share);
            shares.push(share);
        }
        direction = precondition(&direction);
        if let Some((_, change, inverse)) = self.0.back() {
            let scale = (inverse * dot(change, &precondition(change))).recip();
            direction = scaled(&direction, scale);
        }
        for ((step, change, inverse), share) in self.0.iter().zip(shares.iter().rev()) {
            let other = inverse * dot(change, &direction);
            add(&mut direction, step, share - other);
        }
        let slope = dot(&direction, gradient);
        (direction, slope)
    }
}

fn dot(x: &Point, y: &Point) -> f64 {
    let pairs = x.iter().zip(y);
    pairs.map(|(x, y)| inner(x.0.as_ref(), y.0.as_ref()) + inner(x.1.as_ref(), y.1.as_ref())).sum()
}

fn add(x: &mut Point, y: &Point, scale: f64) {
    for (x, y) in x.iter_mut().zip(y) {
        add_scaled(&mut x.0, &y.0, scale);
        add_scaled(&mut x.1, &y.1, scale);
    }
}

fn scaled(x: &Point, scale: f64) -> Point {
    let scaled = |x: &Mat<f32>| Mat::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] * scale as f32);
    x.iter().map(|(a, b)| (scaled(a), scaled(b))).collect()
}

fn difference(x: &Point, y: &Point) -> Point {
    let mut difference = scaled(x, 1.0);
    add(&mut difference, y, -1.0);
    difference
}

/// `x += scale·y`.
fn add_scaled<T: Real + From<f32> + AddAssign>(x: &mut Mat<T>, y: &Mat<f32>, scale: f64) {
    let scale = T::from_f64_impl(scale);
    for (x, y) in x.col_iter_mut().zip(y.col_iter()) {
        for (x, y) in x.iter_mut().zip(y.iter()) {
            *x += scale * T::from(*y);
        }
    }
}
