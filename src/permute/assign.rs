//! Alternating assignment: refit the factors, then place a side's elements as well as these factors allow.

use faer::Mat;

use super::jonker_volgenant::solve_assignment;
use super::phase_gram::PhaseGram;
use crate::error::Result;
use crate::kron::top_eigenvectors;
use crate::progress::Progress;
use crate::simd::dispatched;

/// The factors' block space under an order: what a step of the search needs to know of `A` and `B`.
///
/// With the leading eigenvectors `V` of the block Gram `G`, the nearest Kronecker sum projects every block onto `V`, and
/// keeps the energy `tr(M G)` with `M = V Vᵀ`.
pub(super) struct Projector {
    /// Energy kept by the nearest Kronecker sum, the sum of the leading eigenvalues.
    pub kept: f64,
    /// `M[(a, c), (b, d)]`, stored as `[a][b][c][d]`: one coefficient for each product of a [`PhaseGram`] pair.
    coefficients: Vec<f32>,
    slots: usize,
    pair: usize,
}

impl Projector {
    /// Fits the factors to `order`.
    ///
    /// Cost: `elements·slots·phases²` additions and an eigendecomposition of size `slots·phases`.
    pub fn fit(gram: &PhaseGram, order: &[usize], rank: usize) -> Result<Self> {
        let (slots, phases) = (gram.slots, gram.phases);
        let (vectors, values) = top_eigenvectors(&gram.block_gram(order), rank)?;
        let projector: Mat<f64> = &vectors * vectors.transpose();
        let mut coefficients = Vec::with_capacity(projector.nrows() * projector.ncols());
        for a in 0..slots {
            for b in 0..slots {
                for c in 0..phases {
                    coefficients.extend((0..phases).map(|d| projector[(a * phases + c, b * phases + d)] as f32));
                }
            }
        }
        let kept = values[..rank].iter().sum();
        Ok(Self { kept, coefficients, slots, pair: phases * phases })
    }

    /// Energy `tr(M G)` that these factors' block space keeps under another order.
    #[cfg(test)]
    pub fn energy(&self, gram: &PhaseGram, order: &[usize]) -> f64 {
        let blocks = order.chunks_exact(self.slots);
        let pairs = blocks.flat_map(|block| {
            (0..self.slots).flat_map(move |a| (0..self.slots).map(move |b| (a, b, block[a], block[b])))
        });
        let energies = pairs.flat_map(|(a, b, y, x)| gram.pair(y, x).iter().zip(self.between(a, b)));
        energies.map(|(&product, &coefficient)| f64::from(product) * f64::from(coefficient)).sum()
    }

    /// Coefficients of the products between an element in slot `a` and one in slot `b` of the same block.
    #[inline]
    pub fn between(&self, a: usize, b: usize) -> &[f32] {
        &self.coefficients[(a * self.slots + b) * self.pair..][..self.pair]
    }
}

/// Improves `order` by alternating refit and assignment, at most `iterations` times; returns the energy kept.
///
/// For fixed factors `K = Σ_k A_k ⊗ B_k` the best order maximises `⟨W[p], K⟩`, a linear assignment problem whose costs are
/// sums of [`PhaseGram`] products. Refit and assignment each raise the energy kept, so it never falls; it is checked all
/// the same, since the costs are f32.
///
/// Cost, each iteration: `elements²·slots·phases²` multiplies and one assignment problem of size `elements`.
pub(super) fn alternate_assignment(
    gram: &PhaseGram,
    order: &mut Vec<usize>,
    rank: usize,
    iterations: usize,
    progress: &Progress,
) -> Result<f64> {
    let mut projector = Projector::fit(gram, order, rank)?;
    let mut cost = vec![0.0_f32; gram.elements * gram.elements];
    for _ in 0..iterations {
        assignment_cost(gram, order, &projector, &mut cost, progress)?;
        let improved = solve_assignment(&cost, gram.elements, progress)?;
        let next = Projector::fit(gram, &improved, rank)?;
        if next.kept <= projector.kept * (1.0 + 1e-5) {
            if next.kept > projector.kept {
                *order = improved;
                projector = next;
            }
            break;
        }
        *order = improved;
        projector = next;
    }
    Ok(projector.kept)
}

/// `cost[s, y] = −⟨K[s], W[y]⟩` for every position `s` and element `y`.
fn assignment_cost(
    gram: &PhaseGram,
    order: &[usize],
    projector: &Projector,
    cost: &mut [f32],
    progress: &Progress,
) -> Result<()> {
    let slots = projector.slots;
    for (block, costs) in order.chunks_exact(slots).zip(cost.chunks_exact_mut(slots * gram.elements)) {
        progress.check()?;
        costs.fill(0.0);
        for (a, &element) in block.iter().enumerate() {
            for (e, costs) in costs.chunks_exact_mut(gram.elements).enumerate() {
                let (products, coefficients) = (gram.row(element), projector.between(a, e));
                match gram.phases {
                    1 => subtract_products::<1>(costs, products, coefficients),
                    2 => subtract_products::<4>(costs, products, coefficients),
                    4 => subtract_products::<16>(costs, products, coefficients),
                    8 => subtract_products::<64>(costs, products, coefficients),
                    _ => subtract_products::<0>(costs, products, coefficients),
                }
            }
        }
    }
    Ok(())
}

dispatched! {
    /// `cost[y] −= ⟨products[y], coefficients⟩`; `PAIR` is the number of coefficients, or 0 for any number.
    fn subtract_products[const PAIR: usize](cost: &mut [f32], products: &[f32], coefficients: &[f32]) {
        if PAIR == 0 {
            for (cost, products) in cost.iter_mut().zip(products.chunks_exact(coefficients.len())) {
                *cost -= products.iter().zip(coefficients).map(|(product, coefficient)| product * coefficient).sum::<f32>();
            }
        } else {
            let coefficients: &[f32; PAIR] = coefficients.try_into().expect("PAIR coefficients");
            for (cost, products) in cost.iter_mut().zip(products.as_chunks::<PAIR>().0) {
                let mut lanes = [0.0_f32; PAIR];
                for lane in 0..PAIR {
                    lanes[lane] = products[lane] * coefficients[lane];
                }
                let mut width = PAIR / 2;
                while width > 0 {
                    for lane in 0..width {
                        lanes[lane] += lanes[lane + width];
                    }
                    width /= 2;
                }
                *cost -= lanes[0];
            }
        }
    }
}
