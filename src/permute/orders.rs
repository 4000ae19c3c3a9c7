//! An order of a matrix's rows together with one of its columns.

use crate::spec::KroneckerShape;

/// An order of rows and one of columns, as gather indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orders {
    /// Row order `p`.
    pub rows: Vec<usize>,
    /// Column order `q`.
    pub columns: Vec<usize>,
}

impl Orders {
    /// The identity orders.
    #[must_use]
    pub fn identity(m: usize, n: usize) -> Self {
        Self { rows: (0..m).collect(), columns: (0..n).collect() }
    }

    /// Orders for the exchanged sum, from those for one of this shape: `A ⊗ B` and `B ⊗ A` differ by a perfect shuffle.
    pub(super) fn exchanged(&self, shape: &KroneckerShape) -> Self {
        let shuffle = |order: &[usize], blocks: usize, slots: usize| {
            (0..order.len()).map(|position| order[position % blocks * slots + position / blocks]).collect()
        };
        Self { rows: shuffle(&self.rows, shape.m1, shape.m2), columns: shuffle(&self.columns, shape.n1, shape.n2) }
    }
}
