//! A read-only matrix with its rows and columns in any order, without a copy.

use crate::error::{Error, Result};
use crate::numeric::range::{Rescale, in_safe_range, largest_magnitude};

/// An `(m, n)` row-major matrix `W`, read as `W[rows][:, columns]`.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    data: &'a [f32],
    shape: (usize, usize),
    row_order: Option<&'a [usize]>,
    column_order: Option<&'a [usize]>,
}

impl<'a> MatrixView<'a> {
    /// Views row-major `data` of shape `(m, n)` in its own order.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` does not hold `m·n` values.
    pub fn new(data: &'a [f32], m: usize, n: usize) -> Result<Self> {
        if m.checked_mul(n) != Some(data.len()) {
            return Err(Error::Shape {
                operation: "matrix",
                expected: format!("{m}×{n} values"),
                got: format!("{} values", data.len()),
            });
        }
        Ok(Self { data, shape: (m, n), row_order: None, column_order: None })
    }

    /// The same data with `rows` and `columns` as its orders (gather indices, replacing those it had).
    ///
    /// # Panics
    /// If an order has another length than the side it orders.
    #[must_use]
    pub fn ordered(self, rows: Option<&'a [usize]>, columns: Option<&'a [usize]>) -> Self {
        assert!(rows.is_none_or(|order| order.len() == self.shape.0), "one index per row");
        assert!(columns.is_none_or(|order| order.len() == self.shape.1), "one index per column");
        Self { row_order: rows, column_order: columns, ..self }
    }

    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape.0
    }

    /// Columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.shape.1
    }

    /// The data behind the view, row-major, in its own order.
    #[must_use]
    pub fn data(&self) -> &'a [f32] {
        self.data
    }

    /// The index in the data of the view's row `i`.
    #[must_use]
    pub fn source_row(&self, i: usize) -> usize {
        self.row_order.map_or(i, |order| order[i])
    }

    /// The index in the data of the view's column `j`.
    #[must_use]
    pub fn source_column(&self, j: usize) -> usize {
        self.column_order.map_or(j, |order| order[j])
    }

    /// Writes the view's row `i` into `row`.
    ///
    /// # Panics
    /// If `row` is not one row long.
    pub fn copy_row(&self, i: usize, row: &mut [f32]) {
        let n = self.columns();
        let source = &self.data[self.source_row(i) * n..][..n];
        match self.column_order {
            None => row.copy_from_slice(source),
            Some(order) => {
                assert_eq!(row.len(), n);
                for (value, &j) in row.iter_mut().zip(order) {
                    *value = source[j];
                }
            }
        }
    }

    /// The view as a matrix of its own, row-major.
    #[must_use]
    pub fn to_vec(&self) -> Vec<f32> {
        let n = self.columns();
        let mut copy = vec![0.0; self.data.len()];
        for (i, row) in copy.chunks_exact_mut(n).enumerate() {
            self.copy_row(i, row);
        }
        copy
    }

    /// `Σ W²`, summed in f64.
    #[must_use]
    pub fn energy(&self) -> f64 {
        self.data.iter().map(|&value| f64::from(value).powi(2)).sum()
    }

    /// # Errors
    /// [`Error::NonFinite`] with the position of the first NaN or infinity.
    pub fn check_finite(&self) -> Result<()> {
        if largest_magnitude(self.data).is_finite() {
            return Ok(());
        }
        match self.data.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => {
                Err(Error::NonFinite { value: self.data[at], row: at / self.columns(), column: at % self.columns() })
            }
        }
    }

    /// The result of `work` for this view. Values far from 1 are scaled by a power of two for `work`: their products
    /// would overflow in f32, or vanish.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for a value that is not finite, [`Error::Overflow`] if f32 cannot hold the result, and those
    /// of `work`.
    pub(crate) fn in_safe_range<T: Rescale>(self, work: impl FnOnce(MatrixView<'_>) -> Result<T>) -> Result<T> {
        self.check_finite()?;
        let (data, exponent) = in_safe_range(self.data);
        let result = work(MatrixView { data: &data, ..self })?;
        if exponent == 0 {
            return Ok(result);
        }
        result
            .rescaled(exponent)
            .ok_or_else(|| Error::Overflow { what: "a factor", largest: largest_magnitude(self.data) })
    }
}
