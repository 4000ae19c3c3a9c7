//! Low rank by groups of rows: the tables of embeddings, whose rows differ in importance by orders of magnitude.
//!
//! A rank costs the same for every row and is worth most for frequent tokens. Rows are sorted by the diagonal of the
//! input moment, the frequency of each token, and every group of them is fitted by itself.

use std::sync::Arc;

use faer::Mat;

use super::low_rank::{LowRank, Roots, Spectrum};
use super::moment::{Norm, Weight};
use crate::error::Result;
use crate::kron::MatrixView;
use crate::numeric::range::Rescale;
use crate::permute::Permutation;
use crate::progress::Progress;
use crate::spec::GroupedShape;

/// The share of the mean in a row's weight. A calibration sees few tokens often and most of them hardly ever, so that
/// its counts say little of a rare row: without it, the tokens that were not seen would get no rank at all. Between 0.25
/// and 0.6 the perplexity of compressed models hardly depends on it.
const SMOOTHING: f64 = 0.5;

/// A matrix in groups of rows; see [`GroupedShape`].
#[derive(Clone, Debug, PartialEq)]
pub struct GroupedLowRank {
    /// Its groups and their ranks.
    pub shape: GroupedShape,
    /// `p`: the rows of the first group, then those of the next.
    pub order: Permutation,
    /// The groups, from the most important rows to the least.
    pub groups: Vec<LowRank>,
    /// `‖W − Ŵ‖² / ‖W‖²` in the norm of the fit; 0 for a zero matrix.
    pub lost_energy: f64,
}

/// The spectra of all groups of a matrix.
#[derive(Clone)]
pub struct GroupedSpectrum {
    order: Permutation,
    groups: Vec<Spectrum>,
    /// The number of rows of each group.
    sizes: Vec<usize>,
}

impl GroupedSpectrum {
    /// Decomposes groups of `sizes` rows each of `view` in `norm`: the rows with the largest weights first, or, in a
    /// norm without weights for rows, the longest rows.
    ///
    /// # Errors
    /// [`Error::NonFinite`](crate::Error::NonFinite), [`Error::Convergence`](crate::Error::Convergence),
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    ///
    /// # Panics
    /// Unless the sizes add up to the rows.
    ///
    /// # Cost
    /// As [`Spectrum::new`], and an eigendecomposition of size `n` for each group more.
    pub fn new(view: MatrixView<'_>, norm: &Norm, sizes: &[usize], progress: &Progress) -> Result<Self> {
        assert_eq!(sizes.iter().sum::<usize>(), view.rows(), "groups of all rows");
        view.check_finite()?;
        let weights = row_weights(view, norm);
        let mut order: Vec<usize> = (0..view.rows()).collect();
        // The sort is stable: equal rows stay in their order.
        order.sort_by(|&x, &y| weights[y].total_cmp(&weights[x]));
        let roots = Arc::new(Roots::new((view.rows(), view.columns()), norm)?);
        let weighted = !matches!(norm.input, Weight::Identity);
        let mut groups = Vec::with_capacity(sizes.len());
        for rows in slices(&order, sizes) {
            let input = if weighted {
                Weight::Diagonal(rows.iter().map(|&row| (1.0 - SMOOTHING) * weights[row] + SMOOTHING).collect())
            } else {
                Weight::Identity
            };
            // The output's weight is in the roots.
            let own = Norm { input, output: Weight::Identity, scale: norm.scale };
            let values = gather(view, rows);
            let group = MatrixView::new(&values, rows.len(), view.columns())?;
            groups.push(Spectrum::with_roots(group, &own, Arc::clone(&roots), progress)?);
        }
        Ok(Self { order: Permutation::new(order)?, groups, sizes: sizes.to_vec() })
    }

    /// The energies of each group in descending order and in the units of the moments, one group after the other: as
    /// many for each as there are columns.
    #[must_use]
    pub fn energies(&self) -> Vec<f64> {
        self.groups.iter().flat_map(Spectrum::energies).collect()
    }

    /// The matrices of each group but the roots, which all groups share, for a caller who keeps them elsewhere meanwhile.
    pub fn matrices(&mut self) -> Vec<&mut Mat<f64>> {
        self.groups.iter_mut().map(Spectrum::vectors).collect()
    }

    /// The nearest matrix to the same `view` whose groups have these ranks.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for groups that [`GroupedShape`] refuses, or of other sizes;
    /// [`Error::Overflow`](crate::Error::Overflow), [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn low_rank(&self, view: MatrixView<'_>, shape: &GroupedShape, progress: &Progress) -> Result<GroupedLowRank> {
        let (mut lost, mut total) = (0.0, 0.0);
        let mut groups = Vec::with_capacity(self.groups.len());
        for ((rows, spectrum), own) in slices(self.order.as_slice(), &self.sizes).zip(&self.groups).zip(shape.groups())
        {
            let values = gather(view, rows);
            let group = MatrixView::new(&values, rows.len(), view.columns())?;
            groups.push(spectrum.low_rank(group, own.rank, progress)?);
            let energies = spectrum.energies();
            lost += energies[own.rank..].iter().sum::<f64>();
            total += energies.iter().sum::<f64>();
        }
        let lost_energy = if total > 0.0 { (lost / total).clamp(0.0, 1.0) } else { 0.0 };
        Ok(GroupedLowRank { shape: shape.clone(), order: self.order.clone(), groups, lost_energy })
    }

    /// Its size in memory, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        // The roots are shared.
        let own = |spectrum: &Spectrum| spectrum.bytes() - spectrum.bytes_of_roots();
        self.groups.iter().map(own).sum::<usize>()
            + self.groups.first().map_or(0, Spectrum::bytes_of_roots)
            + self.order.len() * size_of::<usize>()
    }
}

/// The weight of each row in the norm, or its squared length where the norm has none.
fn row_weights(view: MatrixView<'_>, norm: &Norm) -> Vec<f64> {
    match &norm.input {
        Weight::Diagonal(values) => values.clone(),
        Weight::Full(matrix) => (0..view.rows()).map(|i| matrix[(i, i)]).collect(),
        Weight::Identity => {
            let mut row = vec![0.0_f32; view.columns()];
            let length = |i| {
                view.copy_row(i, &mut row);
                row.iter().map(|&value| f64::from(value).powi(2)).sum()
            };
            (0..view.rows()).map(length).collect()
        }
    }
}

fn slices<'a>(order: &'a [usize], sizes: &'a [usize]) -> impl Iterator<Item = &'a [usize]> {
    let mut rest = order;
    sizes.iter().map(move |&size| {
        let (rows, others) = rest.split_at(size);
        rest = others;
        rows
    })
}

fn gather(view: MatrixView<'_>, rows: &[usize]) -> Vec<f32> {
    let mut values = vec![0.0_f32; rows.len() * view.columns()];
    for (&row, to) in rows.iter().zip(values.chunks_exact_mut(view.columns())) {
        view.copy_row(row, to);
    }
    values
}

impl GroupedLowRank {
    /// All `left` factors, then all `right` factors, as they are stored.
    pub fn factors(&self) -> (Vec<f32>, Vec<f32>) {
        let all = |of: fn(&LowRank) -> &Vec<f32>| self.groups.iter().flat_map(of).copied().collect();
        (all(|group| &group.left), all(|group| &group.right))
    }

    /// The orders of the columns of all groups as one permutation of `groups · columns`: that of group `g` begins at `g ·
    /// columns`.
    #[must_use]
    pub fn column_order(&self) -> Permutation {
        let columns = self.shape.columns();
        let orders = self.groups.iter().enumerate();
        let shifted = orders.flat_map(|(g, group)| group.order.as_slice().iter().map(move |&at| g * columns + at));
        Permutation::new(shifted.collect()).expect("one permutation after the other")
    }

    /// The permutations of the groups' columns from one of all of them, as [`column_order`](Self::column_order) makes it or
    /// the inverse of it.
    ///
    /// # Errors
    /// [`Error::Permutation`](crate::Error::Permutation) for column orders that mix the groups.
    pub fn split_columns(order: &Permutation, columns: usize) -> Result<Vec<Permutation>> {
        let own = |(g, order): (usize, &[usize])| {
            // An index of another group becomes one out of range.
            Permutation::new(order.iter().map(|at| at.wrapping_sub(g * columns)).collect())
        };
        order.as_slice().chunks(columns.max(1)).enumerate().map(own).collect()
    }

    /// The dense matrix, row-major `(m, n)`, in the original order of rows and columns; sums in f64.
    #[must_use]
    pub fn to_dense(&self) -> Vec<f32> {
        let columns = self.shape.columns();
        let mut dense = vec![0.0_f32; self.shape.rows() * columns];
        let mut order = self.order.as_slice().iter();
        for group in &self.groups {
            for values in group.to_dense().chunks_exact(columns) {
                let row = order.next().expect("as many rows as in the groups");
                dense[row * columns..][..columns].copy_from_slice(values);
            }
        }
        dense
    }
}

impl Rescale for GroupedLowRank {
    fn rescaled(self, exponent: i32) -> Option<Self> {
        let groups = self.groups.into_iter().map(|group| group.rescaled(exponent));
        Some(Self { groups: groups.collect::<Option<_>>()?, ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::{Moment, Moments, low_rank};
    use crate::spec::RowGroup;
    use crate::testing::noise;

    const SIZES: [usize; 3] = [9, 9, 22];
    const RANKS: [usize; 3] = [5, 3, 1];
    const COLUMNS: usize = 6;

    fn shape() -> GroupedShape {
        let groups: Vec<_> = SIZES.iter().zip(RANKS).map(|(&rows, rank)| RowGroup { rows, rank }).collect();
        GroupedShape::new(40, COLUMNS, &groups).unwrap()
    }

    #[test]
    fn every_group_is_the_low_rank_fit_of_its_rows_and_frequent_rows_come_first() {
        let values = noise(40 * COLUMNS, 1);
        let frequencies: Vec<f32> = (0..40).map(|i| ((i * 7) % 40) as f32).collect();
        let gradients: Vec<f32> = (0..COLUMNS).map(|i| 1.0 + i as f32).collect();
        let moments =
            Moments { input: Some(Moment::Diagonal(&frequencies)), output: Some(Moment::Diagonal(&gradients)) };
        let norm = Norm::prepare(moments, 40, COLUMNS).unwrap();
        let view = MatrixView::new(&values, 40, COLUMNS).unwrap();
        let progress = Progress::default();
        let spectrum = GroupedSpectrum::new(view, &norm, &SIZES, &progress).unwrap();
        let found = spectrum.low_rank(view, &shape(), &progress).unwrap();
        let counts: Vec<_> = found.order.as_slice().iter().map(|&row| frequencies[row]).collect();
        assert!(counts.windows(2).all(|pair| pair[0] >= pair[1]), "{counts:?}");

        let Weight::Diagonal(weights) = &norm.input else { panic!() };
        let dense = found.to_dense();
        let (mut lost, mut total, mut first) = (0.0, 0.0, 0);
        for ((size, rank), energies) in SIZES.into_iter().zip(RANKS).zip(spectrum.energies().chunks(COLUMNS)) {
            let rows = &found.order.as_slice()[first..][..size];
            first += size;
            let input = rows.iter().map(|&row| 0.5 * weights[row] + 0.5).collect();
            let own = Norm { input: Weight::Diagonal(input), ..norm.clone() };
            let group = gather(view, rows);
            let expected =
                low_rank(MatrixView::new(&group, size, COLUMNS).unwrap(), rank, &own, &progress).unwrap().to_dense();
            for (&row, expected) in rows.iter().zip(expected.chunks_exact(COLUMNS)) {
                for (found, expected) in dense[row * COLUMNS..].iter().zip(expected) {
                    assert!((found - expected).abs() < 1e-5);
                }
            }
            lost += energies[rank..].iter().sum::<f64>();
            total += energies.iter().sum::<f64>();
        }
        assert!((found.lost_energy - lost / total).abs() < 1e-12);
    }

    #[test]
    fn the_stored_form_of_the_columns_can_be_taken_apart_and_nothing_else_can() {
        let values = noise(40 * COLUMNS, 2);
        let view = MatrixView::new(&values, 40, COLUMNS).unwrap();
        let progress = Progress::default();
        let spectrum = GroupedSpectrum::new(view, &Norm::frobenius(), &SIZES, &progress).unwrap();
        let found = spectrum.low_rank(view, &shape(), &progress).unwrap();
        let orders: Vec<_> = found.groups.iter().map(|group| group.order.clone()).collect();
        assert_eq!(GroupedLowRank::split_columns(&found.column_order(), COLUMNS).unwrap(), orders);
        let mut mixed = found.column_order().as_slice().to_vec();
        mixed.swap(0, COLUMNS);
        assert!(GroupedLowRank::split_columns(&Permutation::new(mixed).unwrap(), COLUMNS).is_err());
        let (left, right) = found.factors();
        assert_eq!((left.len(), right.len()), (shape().left(), shape().right()));
    }
}
