//! Results of fits: terms as numpy arrays, and the specs that describe them.

use numpy::{PyArray1, PyArray2, PyArray3};
use pyo3::prelude::*;

use super::arrays::{factor_arrays, indices, shaped};
use super::specs::spec_to_python;
use crate::compress::Timed;
use crate::fit::{Fit, LowRank, Term};
use crate::permute::{Decomposition, Permutation};

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<KroneckerTerm>()?;
    module.add_class::<LowRankTerm>()?;
    module.add_class::<GroupedTerm>()?;
    module.add_class::<Fitted>()
}

/// One permuted Kronecker sum: `W[p][:, q] = Σ_k A_k ⊗ B_k`.
#[pyclass(frozen, get_all, module = "tqcompressor._core")]
pub(super) struct KroneckerTerm {
    /// `A (rank, m1, n1)`, float32.
    a: Py<PyArray3<f32>>,
    /// `B (rank, m2, n2)`, float32.
    b: Py<PyArray3<f32>>,
    /// `p`, int64 gather indices.
    row_permutation: Py<PyArray1<i64>>,
    /// `q`, int64 gather indices.
    column_permutation: Py<PyArray1<i64>>,
}

#[pymethods]
impl KroneckerTerm {
    #[new]
    fn new(
        a: Py<PyArray3<f32>>,
        b: Py<PyArray3<f32>>,
        row_permutation: Py<PyArray1<i64>>,
        column_permutation: Py<PyArray1<i64>>,
    ) -> Self {
        Self { a, b, row_permutation, column_permutation }
    }
}

/// One matrix of low rank in interpolative form: `W[order] = [I; left] right`, or `W[:, order] = left [I right]` where the
/// columns are the shorter side.
#[pyclass(frozen, get_all, module = "tqcompressor._core")]
pub(super) struct LowRankTerm {
    /// `left`, float32.
    left: Py<PyArray2<f32>>,
    /// `right`, float32.
    right: Py<PyArray2<f32>>,
    /// int64 gather indices of the shorter side, with the pivots first.
    order: Py<PyArray1<i64>>,
}

#[pymethods]
impl LowRankTerm {
    #[new]
    fn new(left: Py<PyArray2<f32>>, right: Py<PyArray2<f32>>, order: Py<PyArray1<i64>>) -> Self {
        Self { left, right, order }
    }
}

/// One table in groups of rows, each of low rank: `W[row_order]` is the groups one above the other.
#[pyclass(frozen, get_all, module = "tqcompressor._core")]
pub(super) struct GroupedTerm {
    /// The `left` factors of all groups, row-major, one after the other, float32.
    left: Py<PyArray1<f32>>,
    /// The `right` factors of all groups.
    right: Py<PyArray1<f32>>,
    /// int64 gather indices of the rows.
    row_order: Py<PyArray1<i64>>,
    /// int64 gather indices of the columns of all groups, those of group `g` from `g · columns` up.
    column_order: Py<PyArray1<i64>>,
}

#[pymethods]
impl GroupedTerm {
    #[new]
    fn new(
        left: Py<PyArray1<f32>>,
        right: Py<PyArray1<f32>>,
        row_order: Py<PyArray1<i64>>,
        column_order: Py<PyArray1<i64>>,
    ) -> Self {
        Self { left, right, row_order, column_order }
    }
}

/// The fit of one matrix.
#[pyclass(frozen, get_all, module = "tqcompressor._core")]
pub(super) struct Fitted {
    /// Its spec, an object of `tqcompressor.config.specs`.
    spec: Py<PyAny>,
    /// Its terms, in the order of the spec.
    terms: Vec<Py<PyAny>>,
    /// The lost share of its energy, in the norm of the fit.
    lost_energy: f64,
    /// Wall-clock seconds.
    seconds: f64,
}

impl Fitted {
    pub fn new(py: Python<'_>, Timed { fit, seconds }: Timed) -> PyResult<Self> {
        let Fit { spec, terms, lost_energy } = fit;
        let terms = terms.into_iter().map(|term| term_to_python(py, term)).collect::<PyResult<_>>()?;
        Ok(Self { spec: spec_to_python(py, &spec)?.unbind(), terms, lost_energy, seconds })
    }
}

fn term_to_python(py: Python<'_>, term: Term) -> PyResult<Py<PyAny>> {
    Ok(match term {
        Term::Kronecker(Decomposition { sum, row_permutation, column_permutation }) => {
            let (m, n) = (sum.shape.rows(), sum.shape.columns());
            let row_permutation = order(py, row_permutation, m);
            let column_permutation = order(py, column_permutation, n);
            let (a, b) = factor_arrays(py, sum);
            let (a, b) = (a.unbind(), b.unbind());
            Py::new(py, KroneckerTerm { a, b, row_permutation, column_permutation })?.into_any()
        }
        Term::LowRank(LowRank { shape, left, right, order, .. }) => {
            let (left, right) = (shaped(py, shape.left(), left).unbind(), shaped(py, shape.right(), right).unbind());
            let order = indices(py, order.as_slice().iter().copied()).unbind();
            Py::new(py, LowRankTerm { left, right, order })?.into_any()
        }
        Term::Grouped(grouped) => {
            let (left, right) = grouped.factors();
            let of = |order: &Permutation| indices(py, order.as_slice().iter().copied()).unbind();
            let (row_order, column_order) = (of(&grouped.order), of(&grouped.column_order()));
            let (left, right) = (PyArray1::from_vec(py, left).unbind(), PyArray1::from_vec(py, right).unbind());
            Py::new(py, GroupedTerm { left, right, row_order, column_order })?.into_any()
        }
    })
}

/// The gather indices of a side; the identity for a side without a permutation.
fn order(py: Python<'_>, side: Option<Permutation>, length: usize) -> Py<PyArray1<i64>> {
    match side {
        Some(permutation) => indices(py, permutation.as_slice().iter().copied()),
        None => indices(py, 0..length),
    }
    .unbind()
}
