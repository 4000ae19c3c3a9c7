//! One parameter budget, distributed over the matrices of a model.
//!
//! Every matrix has a curve: its lost energy at each rank against the parameters of that rank. A dense matrix loses
//! nothing. The algorithm walks along the lower convex hulls of these curves in the order of their slopes, so each
//! parameter goes where it saves most (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
//! quantizers", 1988). The result is optimal except for the last step, where the rest of the budget goes to any rank
//! that still fits. A cap on MACs is enforced during the walk. MACs grow with the rank as parameters do, so the walk
//! ends at whichever limit it meets first.

use crate::error::{Error, Result};
use crate::spec::{MatrixSpec, TermSpec, Usage};

/// A matrix that the budget may compress.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Rows (in features, or the vocabulary).
    pub rows: usize,
    /// Columns (out features, or the embedding dimension).
    pub columns: usize,
    /// The operation in which the model uses it for every token.
    pub usage: Usage,
    /// Its energies in descending order ([`crate::fit::spectrum`]). Rank `k` loses all but the first `k`.
    pub energies: Vec<f64>,
}

/// How energies of different matrices are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting {
    /// Energies are added unscaled. With gradients at the outputs they are losses of the whole model.
    Absolute,
    /// Each matrix is weighted by its number of parameters: its term is the lost share of its energy times that number.
    /// Without gradients, the sensitivity of the loss to each layer is unknown and energies of different layers cannot
    /// be compared.
    Relative,
}

/// The target of a budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// At most this number of parameters in all candidates together.
    Parameters(usize),
    /// The fewest parameters that lose at most this share of the energy of all candidates together.
    LostEnergy(f64),
}

/// The choice for one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Its rank; `None` if it stays dense.
    pub rank: Option<usize>,
    /// Its parameters.
    pub parameters: usize,
    /// Its MACs for one token.
    pub macs: usize,
    /// The share of its energy that it is expected to lose.
    pub lost_energy: f64,
}

impl Candidate {
    /// The MACs for one token of the dense matrix.
    #[must_use]
    pub fn dense_macs(&self) -> usize {
        self.usage.dense_macs(self.rows, self.columns)
    }

    /// The choice of a given rank.
    ///
    /// # Errors
    /// [`Error::Shape`] for a rank that saves no parameters.
    pub fn choice_of_rank(&self, rank: usize) -> Result<Choice> {
        let term = TermSpec::LowRank { rank };
        let total: f64 = self.energies.iter().sum();
        let lost: f64 = self.energies.iter().skip(rank).sum();
        Ok(Choice {
            rank: Some(rank),
            parameters: term.parameters(self.rows, self.columns)?,
            macs: term.macs(self.rows, self.columns, self.usage)?,
            lost_energy: if total > 0.0 { lost / total } else { 0.0 },
        })
    }
}

impl Choice {
    /// The spec of the choice; `None` if the matrix stays dense.
    #[must_use]
    pub fn spec(&self) -> Option<MatrixSpec> {
        self.rank.map(MatrixSpec::low_rank)
    }
}

/// Distributes the budget, with at most `most_macs` for one token of all candidates together. Choices are in the order
/// of the candidates. Equal candidates give equal choices.
///
/// # Errors
/// [`Error::Config`] if rank 1 of every matrix exceeds a limit (the message states the smallest limit that suffices),
/// if the share of energy cannot be reached within the MACs, or if the share is not between 0 and 1.
///
/// # Cost
/// `O(R log R)` for `R` ranks in total.
///
/// ```
/// use tqcompressor::plan::{Candidate, Target, Weighting, allocate};
/// use tqcompressor::spec::Usage;
/// let flat = Candidate { rows: 8, columns: 8, usage: Usage::Map, energies: vec![1.0; 8] };
/// let steep = Candidate { energies: vec![8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], ..flat.clone() };
/// let choices = allocate(&[flat, steep], Weighting::Absolute, Target::Parameters(79), None)?;
/// // The second matrix needs rank 1 only, so the first one can stay dense.
/// assert_eq!((choices[0].rank, choices[1].rank), (None, Some(1)));
/// # Ok::<(), tqcompressor::Error>(())
/// ```
pub fn allocate(
    candidates: &[Candidate],
    weighting: Weighting,
    target: Target,
    most_macs: Option<usize>,
) -> Result<Vec<Choice>> {
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
    let mut macs: usize = curves.iter().map(|curve| curve.points[0].macs).sum();
    let cap = most_macs.unwrap_or(usize::MAX);
    if macs > cap {
        return Err(too_few_macs(candidates, cap, "rank 1 of every matrix", macs));
    }
    let mut steps: Vec<Step> = curves.iter().enumerate().flat_map(|(i, curve)| curve.steps(i)).collect();
    // The sort is stable: equal slopes stay in the order of the candidates.
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
        // Take the whole step, or the part of it that fits. After a partial step, no further step of this curve fits.
        let fits =
            |at: usize| points[at].parameters - from.parameters <= left && macs - from.macs + points[at].macs <= cap;
        let reached = if fits(to) { to } else { (chosen[candidate]..to).rev().find(|&at| fits(at)).unwrap_or(0) };
        closed[candidate] = reached < to;
        left -= points[reached].parameters - from.parameters;
        lost -= from.lost - points[reached].lost;
        macs = macs - from.macs + points[reached].macs;
        chosen[candidate] = reached;
    }
    // If no curve was closed, the remaining difference is rounding.
    if let (Target::LostEnergy(share), true) = (target, lost > allowed && closed.contains(&true)) {
        let needed = allocate(candidates, weighting, target, None)?.iter().map(|choice| choice.macs).sum();
        return Err(too_few_macs(candidates, cap, &format!("a lost energy of {share}"), needed));
    }
    Ok(curves.iter().zip(chosen).map(|(curve, at)| curve.choice(at)).collect())
}

fn too_few_macs(candidates: &[Candidate], cap: usize, what: &str, needed: usize) -> Error {
    let dense: usize = candidates.iter().map(Candidate::dense_macs).sum();
    // Round up to four digits, so that the stated share suffices despite rounding in the product.
    let share = ((1e4 * needed as f64 / dense as f64).floor() + 1.0) / 1e4;
    let compared = if dense == 0 { "none".into() } else { format!("{dense}, so that a share of {share} would do") };
    Error::Config(format!(
        "max_macs: {cap} macs for one token are allowed, but {what} takes {needed}; the dense matrices take \
         {compared}"
    ))
}

/// A point on a matrix's curve.
struct Point {
    /// `None` for dense.
    rank: Option<usize>,
    parameters: usize,
    macs: usize,
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
        let Candidate { rows, columns, usage, ref energies } = *candidate;
        let sum: f64 = energies.iter().sum();
        let scale = match weighting {
            Weighting::Absolute => 1.0,
            Weighting::Relative if sum > 0.0 => (rows * columns) as f64 / sum,
            Weighting::Relative => 0.0,
        };
        // Sum from the smallest energy up, so that the tail of a large spectrum is exact.
        let mut tails = vec![0.0; energies.len() + 1];
        for (k, energy) in energies.iter().enumerate().rev() {
            tails[k] = tails[k + 1] + energy * scale;
        }
        let mut points = Vec::with_capacity(energies.len());
        for rank in 1..rows.min(columns) {
            let term = TermSpec::LowRank { rank };
            points.push(Point {
                rank: Some(rank),
                parameters: term.parameters(rows, columns)?,
                macs: term.macs(rows, columns, usage)?,
                lost: tails[rank.min(energies.len())],
            });
        }
        let macs = candidate.dense_macs();
        points.push(Point { rank: None, parameters: rows * columns, macs, lost: 0.0 });
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
        let Point { rank, parameters, macs, lost } = self.points[at];
        Choice { rank, parameters, macs, lost_energy: if self.total > 0.0 { lost / self.total } else { 0.0 } }
    }
}

#[cfg(test)]
mod tests;
