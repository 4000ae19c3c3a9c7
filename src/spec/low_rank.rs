//! The shape of a low-rank matrix, and its cost.

use crate::error::{Error, Result};

/// The shape of a low-rank matrix in interpolative form.
///
/// A matrix of rank `k` equals `[I; T] R` once a permutation has moved `k` independent rows, `R`, to the top. The
/// identity is not stored, so `k·(m + n − k)` numbers suffice, where two plain factors take `k·(m + n)`. The permuted
/// side is the shorter one: `[I; T] R` for `m ≤ n`, `L [I T]` otherwise (Cheng, Gimbutas, Martinsson and Rokhlin, "On
/// the compression of low rank matrices", 2005).
///
/// ```
/// use tqcompressor::spec::LowRankShape;
/// let shape = LowRankShape::new(768, 768, 224)?;
/// assert_eq!(shape.parameters(), 224 * (2 * 768 - 224));
/// # Ok::<(), tqcompressor::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LowRankShape {
    /// Rows of the matrix (in features).
    pub rows: usize,
    /// Columns of the matrix (out features).
    pub columns: usize,
    /// Its rank.
    pub rank: usize,
}

impl LowRankShape {
    /// # Errors
    /// [`Error::Shape`] unless the rank is between 1 and `min(m, n) − 1`: a higher one saves nothing.
    pub fn new(rows: usize, columns: usize, rank: usize) -> Result<Self> {
        let most = rows.min(columns).saturating_sub(1);
        if rank == 0 || rank > most {
            return Err(Error::Shape {
                operation: "rank",
                expected: format!("a rank from 1 to {most} for a low-rank matrix of shape ({rows}, {columns})"),
                got: rank.to_string(),
            });
        }
        Ok(Self { rows, columns, rank })
    }

    /// Whether the pivots are rows (`m ≤ n`); they are columns otherwise.
    #[must_use]
    pub fn pivots_on_rows(&self) -> bool {
        self.rows <= self.columns
    }

    /// The shape of `left`: `(m − k, k)` with pivots on rows, else `(m, k)`.
    #[must_use]
    pub fn left(&self) -> (usize, usize) {
        (if self.pivots_on_rows() { self.rows - self.rank } else { self.rows }, self.rank)
    }

    /// The shape of `right`: `(k, n)` with pivots on rows, else `(k, n − k)`.
    #[must_use]
    pub fn right(&self) -> (usize, usize) {
        (self.rank, if self.pivots_on_rows() { self.columns } else { self.columns - self.rank })
    }

    /// Stored parameters, `k·(m + n − k)`: also the MACs of a product with one vector.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.rank * (self.rows + self.columns - self.rank)
    }

    /// The largest rank whose parameters do not exceed `parameters`; 0 if even rank 1 does.
    #[must_use]
    pub fn largest_rank(rows: usize, columns: usize, parameters: usize) -> usize {
        let most = rows.min(columns).saturating_sub(1);
        // k·(m + n − k) grows up to k = (m + n)/2, which is beyond `most`.
        let (mut low, mut high) = (0, most + 1);
        while low + 1 < high {
            let middle = low.midpoint(high);
            if middle * (rows + columns - middle) <= parameters {
                low = middle;
            } else {
                high = middle;
            }
        }
        low.min(most)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranks_that_save_nothing_are_refused() {
        for rank in [0, 5, 6] {
            assert!(LowRankShape::new(5, 8, rank).unwrap_err().to_string().contains("1 to 4"));
        }
        assert!(LowRankShape::new(1, 8, 1).is_err());
    }

    proptest! {
        #[test]
        fn the_largest_rank_fits_and_the_next_does_not(m in 2..60_usize, n in 2..60_usize, parameters in 0..4000_usize) {
            let rank = LowRankShape::largest_rank(m, n, parameters);
            let size = |rank| LowRankShape::new(m, n, rank).map(|shape| shape.parameters());
            if rank > 0 {
                prop_assert!(size(rank).unwrap() <= parameters);
                let shape = LowRankShape::new(m, n, rank).unwrap();
                let (left, right) = (shape.left(), shape.right());
                prop_assert_eq!(left.0 * left.1 + right.0 * right.1, shape.parameters());
                prop_assert!(shape.parameters() < m * n);
            }
            if let Ok(more) = size(rank + 1) {
                prop_assert!(more > parameters);
            }
        }
    }
}
