//! The two sides of a matrix.

use crate::spec::KroneckerShape;

/// A side of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its rows (input features).
    Rows,
    /// Its columns (output features).
    Columns,
}

impl Side {
    /// The number of rows or columns.
    pub(super) fn elements(self, shape: &KroneckerShape) -> usize {
        match self {
            Self::Rows => shape.rows(),
            Self::Columns => shape.columns(),
        }
    }

    /// Elements of this side in a block ("slots"), and of the other side ("phases").
    pub(super) fn slots_and_phases(self, shape: &KroneckerShape) -> (usize, usize) {
        match self {
            Self::Rows => (shape.m2, shape.n2),
            Self::Columns => (shape.n2, shape.m2),
        }
    }
}
