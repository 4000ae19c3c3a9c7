//! Second moments as arguments from Python.

use numpy::{PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::arrays::{contiguous, matrix};
use crate::compress::{Calibration, Place};
use crate::error::{Error, Result};
use crate::fit::{Moment, Moments};

/// A second moment: `(d,)`, its diagonal, or `(d, d)`.
#[derive(FromPyObject)]
pub(super) enum MomentArray<'py> {
    Diagonal(PyReadonlyArray1<'py, f32>),
    Full(PyReadonlyArray2<'py, f32>),
}

impl MomentArray<'_> {
    fn moment(&self) -> Result<Moment<'_>> {
        match self {
            Self::Diagonal(values) => Ok(Moment::Diagonal(contiguous(values.as_slice().ok(), "moment")?)),
            Self::Full(values) => {
                let (values, (rows, columns)) = matrix(values)?;
                if rows != columns {
                    let (expected, got) = ("a square matrix".into(), format!("({rows}, {columns})"));
                    return Err(Error::Shape { operation: "moment", expected, got });
                }
                Ok(Moment::Full(values))
            }
        }
    }
}

/// The input and output moment of one matrix.
pub(super) type MomentArrays<'py> = (Option<MomentArray<'py>>, Option<MomentArray<'py>>);

/// The moments of one matrix.
pub(super) fn moments<'a>((input, output): &'a MomentArrays<'_>) -> Result<Moments<'a>> {
    let moment = |array: &'a Option<MomentArray<'_>>| array.as_ref().map(MomentArray::moment).transpose();
    Ok(Moments { input: moment(input)?, output: moment(output)? })
}

/// Moments by matrix name.
pub(super) fn calibration<'a>(arrays: &'a [(String, MomentArrays<'_>)]) -> Result<Calibration<'a>> {
    arrays
        .iter()
        .map(|(name, arrays)| Ok((name.clone(), moments(arrays).map_err(|error| error.in_tensor(name))?)))
        .collect()
}

/// A matrix and its values.
pub(super) fn place<'a>(
    array: &'a PyReadonlyArray2<'_, f32>,
    name: &str,
    arrays: &'a MomentArrays<'_>,
) -> Result<(Place<'a>, &'a [f32])> {
    let (values, (rows, columns)) = matrix(array)?;
    let moments = moments(arrays).map_err(|error| error.in_tensor(name))?;
    Ok((Place { name: name.to_owned(), rows, columns, moments }, values))
}

/// Returns an error unless all lengths equal `count`, the first one.
pub(super) fn same_length(count: usize, others: &[usize]) -> Result<()> {
    if others.iter().all(|&length| length == count) {
        return Ok(());
    }
    let (expected, got) = (format!("{count} of everything"), format!("{others:?}"));
    Err(Error::Shape { operation: "lists of matrices", expected, got })
}
