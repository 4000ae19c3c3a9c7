//! The projector onto the blocks that the factors can represent, which a search step keeps fixed.

use faer::Mat;

use super::phase_gram::PhaseGram;
use crate::error::Result;
use crate::kron::top_eigenvectors;

/// The projector of one order: all that a search step needs of `A` and `B`.
///
/// With the leading eigenvectors `V` of the block Gram `G`, the nearest Kronecker sum projects every block onto `V`,
/// and keeps the energy `tr(M G)` with `M = V Vᵀ`.
pub(super) struct Projector {
    /// Energy kept by the nearest Kronecker sum, the sum of the leading eigenvalues.
    pub kept: f64,
    /// `M[(a, c), (b, d)]`, stored as `[a][b][c][d]`: one coefficient for each product of a [`PhaseGram`] pair.
    coefficients: Vec<f32>,
    pub slots: usize,
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

    /// Energy `tr(M G)` kept by this projector under another order.
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
