//! One budget of parameters spent over the matrices of a model.
//!
//! Every matrix has a curve: the energy that it loses at each rank, and the parameters that the rank takes; kept dense, it
//! loses nothing. Spending parameter after parameter where it saves most is a walk along the lower convex hulls of these
//! curves in the order of their slopes (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers",
//! 1988), optimal but for the last step, where what is left of the budget goes to whichever rank still fits.

use crate::error::{Error, Result};
use crate::spec::{LowRankShape, MatrixSpec};

/// A matrix that the budget may be spent on.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Rows (in features, or the vocabulary).
    pub rows: usize,
    /// Columns (out features, or the dimension).
    pub columns: usize,
    /// Its energies in descending order ([`crate::fit::spectrum`]): rank `k` loses all but the first `k`.
    pub energies: Vec<f64>,
}

/// What the energies of different matrices mean to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting {
    /// They add up as they are: with the gradients at the outputs they are losses of the whole model.
    Absolute,
    /// Each matrix counts by its lost energy's share of its own, times its parameters: without gradients nothing says how
    /// much the model minds an error, and energies of different layers cannot be compared.
    Relative,
}

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// At most so many parameters in all candidates together.
    Parameters(usize),
    /// As few parameters as lose at most this share of the energy of all candidates together.
    LostEnergy(f64),
}

/// What became of one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Its rank; `None` if it stays dense.
    pub rank: Option<usize>,
    /// Its parameters.
    pub parameters: usize,
    /// The share of its energy that this is expected to lose.
    pub lost_energy: f64,
}

impl Choice {
    /// What the matrix becomes; `None` if it stays dense.
    #[must_use]
    pub fn spec(&self) -> Option<MatrixSpec> {
        self.rank.map(MatrixSpec::low_rank)
    }
}

/// Spends the budget. Choices come in the order of the candidates; the same candidates give the same choices.
///
/// # Errors
/// [`Error::Config`] if not even rank 1 of every matrix fits, naming the fewest parameters that would do; or for a share of
/// energy that is not between 0 and 1.
///
/// # Cost
/// `O(R log R)` for `R` ranks in all.
///
/// ```
/// use tqcompressor::plan::{Candidate, Target, Weighting, allocate};
/// let flat = Candidate { rows: 8, columns: 8, energies: vec![1.0; 8] };
/// let steep = Candidate { energies: vec![8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], ..flat.clone() };
/// let choices = allocate(&[flat, steep], Weighting::Absolute, Target::Parameters(79))?;
/// // Rank 1 is all that the second one needs; the first one can stay dense.
/// assert_eq!((choices[0].rank, choices[1].rank), (None, Some(1)));
/// # Ok::<(), tqcompressor::Error>(())
/// ```
pub fn allocate(candidates: &[Candidate], weighting: Weighting, target: Target) -> Result<Vec<Choice>> {
    let curves = candidates.iter().map(|candidate| Curve::new(candidate, weighting)).collect::<Result<Vec<_>>>()?;
    let least: usize = curves.iter().map(|curve| curve.points[0].parameters).sum();
    let (most, allowed) = match target {
        Target::Parameters(most) => (most, 0.0),
        Target::LostEnergy(share) if (0.0..=1.0).contains(&share) => {
            (usize::MAX, share * curves.iter().map(|curve| curve.total).sum::<f64>())
        }
        Target::LostEnergy(share) => {
            return Err(Error::Config(format!("lost energy: expected a share from 0 to 1, got {share}")));
        }
    };
    if least > most {
        return Err(Error::Config(format!(
            "budget: {most} parameters are left for {} matrices, which need {least} at rank 1",
            curves.len()
        )));
    }
    let mut steps: Vec<Step> = curves.iter().enumerate().flat_map(|(i, curve)| curve.steps(i)).collect();
    // Equal slopes in the order of the candidates: a sort that keeps it.
    steps.sort_by(|left, right| right.slope.total_cmp(&left.slope));

    let mut chosen = vec![0; curves.len()];
    let mut closed = vec![false; curves.len()];
    let mut left = most - least;
    let mut lost: f64 = curves.iter().map(|curve| curve.points[0].lost).sum();
    for Step { candidate, to, .. } in steps {
        if lost <= allowed && matches!(target, Target::LostEnergy(_)) {
            break;
        }
        if closed[candidate] {
            continue;
        }
        let points = &curves[candidate].points;
        let from = &points[chosen[candidate]];
        // All of the step, or as much of it as fits, after which nothing more of this curve does.
        let fits = |at: usize| points[at].parameters - from.parameters <= left;
        let reached = if fits(to) { to } else { (chosen[candidate]..to).rev().find(|&at| fits(at)).unwrap_or(0) };
        closed[candidate] = reached < to;
        left -= points[reached].parameters - from.parameters;
        lost -= from.lost - points[reached].lost;
        chosen[candidate] = reached;
    }
    Ok(curves.iter().zip(chosen).map(|(curve, at)| curve.choice(at)).collect())
}

/// A place on a matrix's curve.
struct Point {
    /// `None` for dense.
    rank: Option<usize>,
    parameters: usize,
    lost: f64,
}

struct Curve {
    /// Ascending in parameters, descending in lost energy.
    points: Vec<Point>,
    total: f64,
}

/// A segment of a curve's lower convex hull.
struct Step {
    candidate: usize,
    to: usize,
    slope: f64,
}

impl Curve {
    fn new(candidate: &Candidate, weighting: Weighting) -> Result<Self> {
        let Candidate { rows, columns, ref energies } = *candidate;
        let sum: f64 = energies.iter().sum();
        let scale = match weighting {
            Weighting::Absolute => 1.0,
            Weighting::Relative if sum > 0.0 => (rows * columns) as f64 / sum,
            Weighting::Relative => 0.0,
        };
        // Summed from the small end, so that the tail of a large spectrum is exact.
        let mut tails = vec![0.0; energies.len() + 1];
        for (k, energy) in energies.iter().enumerate().rev() {
            tails[k] = tails[k + 1] + energy * scale;
        }
        let mut points = Vec::with_capacity(energies.len());
        for rank in 1..rows.min(columns) {
            let parameters = LowRankShape::new(rows, columns, rank)?.parameters();
            points.push(Point { rank: Some(rank), parameters, lost: tails[rank.min(energies.len())] });
        }
        points.push(Point { rank: None, parameters: rows * columns, lost: 0.0 });
        Ok(Self { points, total: tails[0] })
    }

    /// The segments of the lower convex hull, from left to right.
    fn steps(&self, candidate: usize) -> Vec<Step> {
        let slope = |from: usize, to: usize| {
            let (from, to) = (&self.points[from], &self.points[to]);
            (from.lost - to.lost) / (to.parameters - from.parameters) as f64
        };
        let mut hull: Vec<usize> = vec![0];
        for to in 1..self.points.len() {
            while let [.., before, last] = hull[..] {
                if slope(before, last) > slope(last, to) {
                    break;
                }
                hull.pop();
            }
            hull.push(to);
        }
        hull.windows(2).map(|pair| Step { candidate, to: pair[1], slope: slope(pair[0], pair[1]) }).collect()
    }

    fn choice(&self, at: usize) -> Choice {
        let Point { rank, parameters, lost } = self.points[at];
        Choice { rank, parameters, lost_energy: if self.total > 0.0 { lost / self.total } else { 0.0 } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let candidate =
            (2..40_usize, 2..40_usize, 0.1..3.0_f64, 0.0..9.0_f64).prop_map(|(rows, columns, decay, size)| {
                let energies = (0..rows.min(columns)).map(|k| size * (-decay * k as f64).exp()).collect();
                Candidate { rows, columns, energies }
            });
        prop::collection::vec(candidate, 1..6)
    }

    fn least(candidates: &[Candidate]) -> usize {
        candidates.iter().map(|each| Curve::new(each, Weighting::Absolute).unwrap().points[0].parameters).sum()
    }

    proptest! {
        #[test]
        fn a_budget_is_kept_and_what_is_left_buys_nothing_more(
            candidates in candidates(), share in 0.0..1.0_f64, relative in any::<bool>(),
        ) {
            let weighting = if relative { Weighting::Relative } else { Weighting::Absolute };
            let dense: usize = candidates.iter().map(|each| each.rows * each.columns).sum();
            let most = least(&candidates) + ((dense - least(&candidates)) as f64 * share) as usize;
            let choices = allocate(&candidates, weighting, Target::Parameters(most)).unwrap();
            let spent: usize = choices.iter().map(|choice| choice.parameters).sum();
            prop_assert!(spent <= most);
            for (candidate, choice) in candidates.iter().zip(&choices) {
                let curve = Curve::new(candidate, weighting).unwrap();
                let next = curve.points.iter().find(|point| point.parameters > choice.parameters);
                // A curve that loses nothing any more may stay where it is.
                if let Some(next) = next {
                    prop_assert!(spent + next.parameters - choice.parameters > most);
                }
            }
            prop_assert_eq!(&choices, &allocate(&candidates, weighting, Target::Parameters(most)).unwrap());
        }

        #[test]
        fn no_exchange_of_single_ranks_between_two_matrices_does_better(seed in 0..1000_u64) {
            // Two curves of equal shape, so that every exchange is feasible.
            let energies = |start: u64| (0..12).map(|k| ((start + 3) as f64 / (k + 1) as f64).powi(2)).collect();
            let pair = [1, 7].map(|start| Candidate { rows: 12, columns: 12, energies: energies(start * seed % 11) });
            let choices = allocate(&pair, Weighting::Absolute, Target::Parameters(150)).unwrap();
            let loss = |ranks: [usize; 2]| -> f64 {
                pair.iter().zip(ranks).map(|(each, rank)| each.energies[rank..].iter().sum::<f64>()).sum()
            };
            let size = |rank: usize| rank * (24 - rank);
            let ranks = [0, 1].map(|i| choices[i].rank.unwrap_or(12));
            for first in 1..12 {
                for second in 1..12 {
                    if size(first) + size(second) <= size(ranks[0]) + size(ranks[1]) {
                        // Optimal but for the last step of one matrix.
                        let slack = pair.iter().flat_map(|each| &each.energies[1..]).fold(0.0_f64, |a, &b| a.max(b));
                        prop_assert!(loss(ranks) <= loss([first, second]) + slack);
                    }
                }
            }
        }

        #[test]
        fn a_target_of_lost_energy_is_met(candidates in candidates(), share in 0.0..1.0_f64) {
            let choices = allocate(&candidates, Weighting::Relative, Target::LostEnergy(share)).unwrap();
            let (mut lost, mut total) = (0.0, 0.0);
            for (candidate, choice) in candidates.iter().zip(&choices) {
                let curve = Curve::new(candidate, Weighting::Relative).unwrap();
                total += curve.total;
                lost += choice.lost_energy * curve.total;
            }
            prop_assert!(lost <= share * total + 1e-9);
        }
    }

    #[test]
    fn too_small_a_budget_says_what_would_do() {
        let one = Candidate { rows: 8, columns: 8, energies: vec![1.0; 8] };
        let error = allocate(&[one.clone(), one.clone()], Weighting::Absolute, Target::Parameters(29)).unwrap_err();
        assert!(error.to_string().contains("need 30"), "{error}");
        assert!(allocate(&[one], Weighting::Absolute, Target::LostEnergy(1.5)).is_err());
    }
}
