//! Alternating assignment: refit the factors, then find the best order of a side's elements for these factors.

use super::jonker_volgenant::solve_assignment;
use super::phase_gram::PhaseGram;
use super::projector::Projector;
use crate::error::Result;
use crate::numeric::simd::dispatched;
use crate::progress::Progress;

/// Improves `order` by alternating refit and assignment, at most `iterations` times; returns the energy kept.
///
/// For fixed factors `K = Σ_k A_k ⊗ B_k` the best order maximises `⟨W[p], K⟩`, a linear assignment problem whose costs
/// are sums of [`PhaseGram`] products. Neither refit nor assignment lowers the energy kept, except by the rounding of
/// f32 costs, which is checked.
///
/// Cost, each iteration: `elements²·slots·phases²` MACs and one assignment problem of size `elements`.
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
    fn subtract_products<const PAIR: usize>(cost: &mut [f32], products: &[f32], coefficients: &[f32]) {
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
