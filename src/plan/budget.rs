//! One budget of parameters spent over the matrices of a model.
//!
//! Every matrix has a curve: the energy that it loses at each rank, and the parameters that the rank takes; kept dense,
//! it loses nothing. Spending parameter after parameter where it saves most is a walk along the lower convex hulls of
//! these curves in the order of their slopes (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
//! quantizers", 1988), optimal but for the last step, where what is left of the budget goes to whichever rank still
//! fits. A cap on MACs is kept on the way: a low rank takes as many as it has parameters, so that the walk ends at
//! whichever limit is met first.

use crate::error::{Error, Result};
use crate::spec::{MatrixSpec, TermSpec, Usage};

/// A matrix that the budget may be spent on.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Rows (in features, or the vocabulary).
    pub rows: usize,
    /// Columns (out features, or the dimension).
    pub columns: usize,
    /// What is done with it for every token.
    pub usage: Usage,
    /// Its energies in descending order ([`crate::fit::spectrum`]): rank `k` loses all but the first `k`.
    pub energies: Vec<f64>,
}

/// What the energies of different matrices mean to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting {
    /// They add up as they are: with the gradients at the outputs they are losses of the whole model.
    Absolute,
    /// Each matrix counts by its lost energy's share of its own, times its parameters: without gradients nothing says
    /// how sensitive the loss is to an error, and energies of different layers cannot be compared.
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
    /// Its MACs for one token.
    pub macs: usize,
    /// The share of its energy that this is expected to lose.
    pub lost_energy: f64,
}

impl Candidate {
    /// The MACs for one token that it takes dense.
    #[must_use]
    pub fn dense_macs(&self) -> usize {
        self.usage.dense_macs(self.rows, self.columns)
    }

    /// What becomes of it at some rank.
    ///
    /// # Errors
    /// [`Error::Shape`] for a rank that saves nothing.
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
    /// What the matrix becomes; `None` if it stays dense.
    #[must_use]
    pub fn spec(&self) -> Option<MatrixSpec> {
        self.rank.map(MatrixSpec::low_rank)
    }
}

/// Spends the budget, with at most `most_macs` for one token of all candidates together. Choices come in the order
/// of the candidates; the same candidates give the same choices.
///
/// # Errors
/// [`Error::Config`] if not even rank 1 of every matrix fits, naming the fewest parameters, or MACs, that would do;
/// if a share of energy cannot be reached with so few MACs; or for one that is not between 0 and 1.
///
/// # Cost
/// `O(R log R)` for `R` ranks in all.
///
/// ```
/// use tqcompressor::plan::{Candidate, Target, Weighting, allocate};
/// use tqcompressor::spec::Usage;
/// let flat = Candidate { rows: 8, columns: 8, usage: Usage::Map, energies: vec![1.0; 8] };
/// let steep = Candidate { energies: vec![8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], ..flat.clone() };
/// let choices = allocate(&[flat, steep], Weighting::Absolute, Target::Parameters(79), None)?;
/// // Rank 1 is all that the second one needs; the first one can stay dense.
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
        let fits =
            |at: usize| points[at].parameters - from.parameters <= left && macs - from.macs + points[at].macs <= cap;
        let reached = if fits(to) { to } else { (chosen[candidate]..to).rev().find(|&at| fits(at)).unwrap_or(0) };
        closed[candidate] = reached < to;
        left -= points[reached].parameters - from.parameters;
        lost -= from.lost - points[reached].lost;
        macs = macs - from.macs + points[reached].macs;
        chosen[candidate] = reached;
    }
    // Where no curve was closed, what is left of it is rounding.
    if let (Target::LostEnergy(share), true) = (target, lost > allowed && closed.contains(&true)) {
        let needed = allocate(candidates, weighting, target, None)?.iter().map(|choice| choice.macs).sum();
        return Err(too_few_macs(candidates, cap, &format!("a lost energy of {share}"), needed));
    }
    Ok(curves.iter().zip(chosen).map(|(curve, at)| curve.choice(at)).collect())
}

fn too_few_macs(candidates: &[Candidate], cap: usize, what: &str, needed: usize) -> Error {
    let dense: usize = candidates.iter().map(Candidate::dense_macs).sum();
    // The next four digits up, so that the share that is named is enough whatever it is multiplied to.
    let share = ((1e4 * needed as f64 / dense as f64).floor() + 1.0) / 1e4;
    let compared = if dense == 0 { "none".into() } else { format!("{dense}, so that a share of {share} would do") };
    Error::Config(format!(
        "max_macs: {cap} macs for one token are allowed, but {what} takes {needed}; the dense matrices take \
         {compared}"
    ))
}

/// A place on a matrix's curve.
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
        // Summed from the small end, so that the tail of a large spectrum is exact.
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
