//! One parameter budget, distributed over the matrices of a model.
//!
//! Every matrix has a curve: its lost energy at each rank against the parameters of that rank. A dense matrix loses
//! nothing. The algorithm walks along the lower convex hulls of these curves in the order of their slopes, so each
//! parameter goes where it saves most (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
//! quantizers", 1988). The result is optimal except for the last step, where the rest of the budget goes to any rank
//! that still fits. A cap on MACs is enforced during the walk. MACs grow with the rank as parameters do, so the walk
//! ends at whichever limit it meets first.
//!
//! A matrix in groups of rows has one curve too: its points are the ranks that the same walk over its groups passes.

use crate::error::{Error, Result};
use crate::spec::{LowRankShape, MatrixSpec, RowGroup, TermSpec, Usage};

/// A matrix that the budget may compress.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Rows (in features, or the vocabulary).
    pub rows: usize,
    /// Columns (out features, or the embedding dimension).
    pub columns: usize,
    /// The operation in which the model uses it for every token.
    pub usage: Usage,
    /// Its energies in descending order ([`crate::fit::Spectrum::energies`]): rank `k` loses all but the first `k`. Of a
    /// matrix in groups of rows, those of each group, one after the other, as many as there are columns.
    pub energies: Vec<f64>,
    /// The number of rows of each group; empty for a matrix of one rank.
    pub groups: Vec<usize>,
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
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Its low rank; `None` if it stays dense.
    pub term: Option<TermSpec>,
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
            parameters: term.parameters(self.rows, self.columns)?,
            macs: term.macs(self.rows, self.columns, self.usage)?,
            lost_energy: if total > 0.0 { lost / total } else { 0.0 },
            term: Some(term),
        })
    }
}

impl Choice {
    /// The spec of the choice; `None` if the matrix stays dense.
    #[must_use]
    pub fn spec(&self) -> Option<MatrixSpec> {
        self.term.clone().map(MatrixSpec::from)
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
/// use tqcompressor::spec::{TermSpec, Usage};
/// let flat = Candidate { rows: 8, columns: 8, usage: Usage::Map, energies: vec![1.0; 8], groups: vec![] };
/// let steep = Candidate { energies: vec![8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], ..flat.clone() };
/// let choices = allocate(&[flat, steep], Weighting::Absolute, Target::Parameters(79), None)?;
/// // The second matrix needs rank 1 only, so the first one can stay dense.
/// assert_eq!((&choices[0].term, &choices[1].term), (&None, &Some(TermSpec::LowRank { rank: 1 })));
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
    /// The rank, or that of each group; none for dense.
    ranks: Vec<usize>,
    parameters: usize,
    macs: usize,
    lost: f64,
}

struct Curve<'a> {
    candidate: &'a Candidate,
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

/// The energy that is lost at each rank from 0: the sums of all energies but the first.
fn tails(energies: &[f64], scale: f64) -> Vec<f64> {
    // Sum from the smallest energy up, so that the tail of a large spectrum is exact.
    let mut tails = vec![0.0; energies.len() + 1];
    for (k, energy) in energies.iter().enumerate().rev() {
        tails[k] = tails[k + 1] + energy * scale;
    }
    tails
}

/// The points of the lower convex hull, with the slope of the segment that ends in each; that of the first is infinite.
/// `at` is the parameters and the lost energy of a point.
fn hull(points: usize, at: impl Fn(usize) -> (usize, f64)) -> Vec<(usize, f64)> {
    let slope = |from: usize, to: usize| {
        let (from, to) = (at(from), at(to));
        (from.1 - to.1) / (to.0 - from.0) as f64
    };
    let mut hull: Vec<(usize, f64)> = vec![(0, f64::INFINITY)];
    for to in 1..points {
        // The first point stays.
        while let [_, .., (last, before)] = hull[..] {
            if before > slope(last, to) {
                break;
            }
            hull.pop();
        }
        let from = hull[hull.len() - 1].0;
        hull.push((to, slope(from, to)));
    }
    hull
}

impl<'a> Curve<'a> {
    fn new(candidate: &'a Candidate, weighting: Weighting) -> Result<Self> {
        let Candidate { rows, columns, ref energies, ref groups, .. } = *candidate;
        let sum: f64 = energies.iter().sum();
        let scale = match weighting {
            Weighting::Absolute => 1.0,
            Weighting::Relative if sum > 0.0 => (rows * columns) as f64 / sum,
            Weighting::Relative => 0.0,
        };
        let mut points = Vec::with_capacity(energies.len());
        let total = if groups.is_empty() {
            let tails = tails(energies, scale);
            for rank in 1..rows.min(columns) {
                points.push(candidate.point(vec![rank], tails[rank.min(energies.len())])?);
            }
            tails[0]
        } else {
            candidate.by_groups(scale, &mut points)?
        };
        let macs = candidate.dense_macs();
        points.push(Point { ranks: Vec::new(), parameters: rows * columns, macs, lost: 0.0 });
        Ok(Self { candidate, points, total })
    }

    /// The segments of the lower convex hull, from left to right.
    fn steps(&self, candidate: usize) -> Vec<Step> {
        let at = |i: usize| (self.points[i].parameters, self.points[i].lost);
        hull(self.points.len(), at).into_iter().skip(1).map(|(to, slope)| Step { candidate, to, slope }).collect()
    }

    fn choice(&self, at: usize) -> Choice {
        let Point { ref ranks, parameters, macs, lost } = self.points[at];
        let term = (!ranks.is_empty()).then(|| self.candidate.term(ranks));
        Choice { term, parameters, macs, lost_energy: if self.total > 0.0 { lost / self.total } else { 0.0 } }
    }
}

impl Candidate {
    fn term(&self, ranks: &[usize]) -> TermSpec {
        if self.groups.is_empty() {
            return TermSpec::LowRank { rank: ranks[0] };
        }
        let group = |(&rows, &rank)| RowGroup { rows, rank };
        TermSpec::Grouped(self.groups.iter().zip(ranks).map(group).collect())
    }

    fn point(&self, ranks: Vec<usize>, lost: f64) -> Result<Point> {
        let term = self.term(&ranks);
        let parameters = term.parameters(self.rows, self.columns)?;
        Ok(Point { parameters, macs: term.macs(self.rows, self.columns, self.usage)?, lost, ranks })
    }

    /// Adds the points of a matrix in groups: from rank 1 of each group, one rank more at a time where that saves most
    /// energy for its parameters. Returns its whole energy.
    fn by_groups(&self, scale: f64, points: &mut Vec<Point>) -> Result<f64> {
        let tails: Vec<_> = self.energies.chunks(self.columns).map(|energies| tails(energies, scale)).collect();
        let mut steps: Vec<(f64, usize, usize)> = Vec::new();
        for (g, (&rows, tails)) in self.groups.iter().zip(&tails).enumerate() {
            let at = |i: usize| {
                let shape = LowRankShape { rows, columns: self.columns, rank: i + 1 };
                (shape.parameters(), tails[i + 1])
            };
            let hull = hull(self.columns - 1, at).into_iter().skip(1);
            steps.extend(hull.map(|(to, slope)| (slope, g, to + 1)));
        }
        // The sort is stable: equal slopes stay in the order of the groups, and those of one group in theirs.
        steps.sort_by(|left, right| right.0.total_cmp(&left.0));
        let mut ranks = vec![1; self.groups.len()];
        let lost = |ranks: &[usize]| ranks.iter().zip(&tails).map(|(&rank, tails)| tails[rank]).sum();
        points.push(self.point(ranks.clone(), lost(&ranks))?);
        for (_, g, to) in steps {
            while ranks[g] < to {
                ranks[g] += 1;
                points.push(self.point(ranks.clone(), lost(&ranks))?);
            }
        }
        Ok(tails.iter().map(|tails| tails[0]).sum())
    }
}

#[cfg(test)]
mod tests;
