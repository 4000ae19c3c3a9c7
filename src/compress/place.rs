//! A matrix to work on: its name, its shape and its norm.

use std::collections::HashMap;

use crate::error::Result;
use crate::family::Matrix;
use crate::fit::{Moments, Norm};
use crate::kron::MatrixView;

/// The moments of matrices by name. A matrix without moments is approximated in the Frobenius norm.
pub type Calibration<'a> = HashMap<String, Moments<'a>>;

/// A matrix, without its values.
#[derive(Clone, Debug, PartialEq)]
pub struct Place<'a> {
    /// Its name, for error messages.
    pub name: String,
    /// Its rows (in features).
    pub rows: usize,
    /// Its columns (out features).
    pub columns: usize,
    /// The norm of its approximation.
    pub moments: Moments<'a>,
}

impl Place<'_> {
    /// Its number of values.
    pub(super) fn size(&self) -> usize {
        self.rows.saturating_mul(self.columns)
    }

    /// Calls `work` with the matrix and its norm.
    ///
    /// # Errors
    /// Those of [`Norm::prepare`], [`MatrixView::new`] and `work`, in the matrix.
    pub(super) fn with<T>(&self, values: &[f32], work: impl FnOnce(MatrixView<'_>, &Norm) -> Result<T>) -> Result<T> {
        let Self { name, rows, columns, moments } = self;
        Norm::prepare(*moments, *rows, *columns)
            .and_then(|norm| work(MatrixView::new(values, *rows, *columns)?, &norm))
            .map_err(|error| error.in_tensor(name))
    }
}

/// A matrix of a checkpoint with its moments in a calibration.
pub(super) fn place<'a>(matrix: &Matrix, calibration: &Calibration<'a>) -> Place<'a> {
    let moments = calibration.get(&matrix.name).copied().unwrap_or_default();
    Place { name: matrix.name.clone(), rows: matrix.rows, columns: matrix.columns, moments }
}
