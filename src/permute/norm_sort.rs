//! The start of the search: rows and columns sorted by norm and dealt out over the blocks.

use super::orders::Orders;
use crate::kron::MatrixView;
use crate::spec::{KroneckerShape, Permute};

/// Sorts rows and columns by descending norm and deals them out over the blocks, phase by phase: the row of rank `t`
/// goes to position `(t mod m1)·m2 + t div m1`, columns alike.
///
/// The first row of every block is then large and the last one small. The energy gathers in a few entries of the block,
/// where `B` can represent it. Ties keep their order. A side that may not be permuted keeps that of `orders`.
///
/// # Cost
/// One pass over `W`.
#[must_use]
pub fn norm_sort(view: MatrixView<'_>, shape: &KroneckerShape, permute: Permute, mut orders: Orders) -> Orders {
    let mut row_energy = vec![0.0_f64; view.rows()];
    let mut column_energy = vec![0.0_f64; view.columns()];
    for (row, energy) in view.data().chunks_exact(view.columns()).zip(&mut row_energy) {
        for (&value, column) in row.iter().zip(&mut column_energy) {
            let square = f64::from(value) * f64::from(value);
            *energy += square;
            *column += square;
        }
    }
    if permute.rows() {
        orders.rows = deal(&row_energy, shape.m1, shape.m2);
    }
    if permute.columns() {
        orders.columns = deal(&column_energy, shape.n1, shape.n2);
    }
    orders
}

fn deal(energy: &[f64], blocks: usize, phases: usize) -> Vec<usize> {
    let mut ranked: Vec<usize> = (0..energy.len()).collect();
    ranked.sort_by(|&a, &b| energy[b].total_cmp(&energy[a]));
    (0..energy.len()).map(|position| ranked[position % phases * blocks + position / phases]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_rows_come_first_in_every_block() {
        // Rows of energy 0, 1, 4, 9, 16, 25 in blocks of two: phase 0 holds the three largest, phase 1 the others.
        let data: Vec<f32> = (0..6_u8).map(f32::from).collect();
        let view = MatrixView::new(&data, 6, 1).unwrap();
        let shape = KroneckerShape::new(6, 1, (2, 1), 1).unwrap();
        let start = Orders::identity(6, 1);
        assert_eq!(norm_sort(view, &shape, Permute::Both, start.clone()).rows, [5, 2, 4, 1, 3, 0]);
        assert_eq!(norm_sort(view, &shape, Permute::Columns, start).rows, [0, 1, 2, 3, 4, 5]);
    }
}
