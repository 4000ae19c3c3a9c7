//! All inner products that a search over one side's permutations needs. No search step reads the matrix itself.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::side::Side;
use crate::error::Result;
use crate::kron::MatrixView;
use crate::numeric::memory::zeros;
use crate::progress::{Parallelism, Progress};
use crate::spec::KroneckerShape;

/// Elements (rows or columns) whose products are formed by one matrix multiplication.
const TILE: usize = 64;

/// Inner products between the phases of a side's elements.
///
/// For the rows of `W` with the columns in a given order, `W_c` (`m × n1`) holds the columns of phase `c`, that is
/// columns `c, n2 + c, 2·n2 + c, …`. The phase Gram is `C[y, x, c, d] = ⟨W_c[y], W_d[x]⟩`, with `phases² = n2²` values
/// for each pair of rows. For the columns of `W`, read `Wᵀ`. Rows `y` and `x` are numbered as in the data, so `C` holds
/// for every row permutation, and stays valid until the order of the *other* side changes.
pub(super) struct PhaseGram {
    /// Elements on this side: rows, or columns.
    pub elements: usize,
    /// Elements of this side in a block.
    pub slots: usize,
    /// Elements of the other side in a block.
    pub phases: usize,
    /// `C[y, x, c, d]`, f32.
    products: Vec<f32>,
}

impl PhaseGram {
    /// Bytes that [`PhaseGram::new`] would allocate for its result.
    pub fn bytes(elements: usize, phases: usize) -> usize {
        elements * elements * phases * phases * size_of::<f32>()
    }

    /// The products of `side`'s elements, with the other side in the order of `view`.
    ///
    /// Cost: `elements²·phases·(length of an element)` MACs.
    pub fn new(
        view: MatrixView<'_>,
        side: Side,
        shape: &KroneckerShape,
        parallelism: Parallelism,
        progress: &Progress,
    ) -> Result<Self> {
        let (slots, phases) = side.slots_and_phases(shape);
        let (elements, length) = match side {
            Side::Rows => (view.rows(), view.columns()),
            Side::Columns => (view.columns(), view.rows()),
        };
        let inner = length / phases;
        let gathered;
        let parts = match side {
            // With one phase in the matrix's own order, nothing needs to be gathered.
            Side::Columns if phases == 1 && (0..length).all(|i| view.source_row(i) == i) => {
                MatRef::from_column_major_slice(view.data(), elements, inner)
            }
            Side::Rows => {
                gathered = gather_row_phases(view, phases);
                MatRef::from_row_major_slice(&gathered, elements * phases, inner)
            }
            Side::Columns => {
                gathered = gather_column_phases(view, phases);
                MatRef::from_column_major_slice(&gathered, elements * phases, inner)
            }
        };
        let mut gram = Self { elements, slots, phases, products: zeros(elements * elements * phases * phases) };
        gram.fill_upper(parts, parallelism, progress)?;
        gram.mirror();
        Ok(gram)
    }

    /// Products of `y`'s phases with those of every other element, `phases²` values each.
    pub fn row(&self, y: usize) -> &[f32] {
        let length = self.elements * self.phases * self.phases;
        &self.products[y * length..][..length]
    }

    /// `C[y, x, ·, ·]`.
    #[inline]
    pub fn pair(&self, y: usize, x: usize) -> &[f32] {
        let length = self.phases * self.phases;
        &self.products[(y * self.elements + x) * length..][..length]
    }

    /// The block Gram matrix under the order `p` of this side:
    /// `G[(a, c), (b, d)] = Σ_I C[p(I, a), p(I, b), c, d]`.
    pub fn block_gram(&self, order: &[usize]) -> Mat<f64> {
        let (slots, phases) = (self.slots, self.phases);
        let mut gram = Mat::zeros(slots * phases, slots * phases);
        for block in order.chunks_exact(slots) {
            for (a, &y) in block.iter().enumerate() {
                for (b, &x) in block[..=a].iter().enumerate() {
                    for (at, &product) in self.pair(y, x).iter().enumerate() {
                        gram[(a * phases + at / phases, b * phases + at % phases)] += f64::from(product);
                    }
                }
            }
        }
        gram
    }

    /// Fills the products of tiles on and above the diagonal.
    fn fill_upper(&mut self, parts: MatRef<'_, f32>, parallelism: Parallelism, progress: &Progress) -> Result<()> {
        let (elements, phases) = (self.elements, self.phases);
        let element_length = elements * phases * phases;
        let fill = |(tile, rows): (usize, &mut [f32])| -> Result<()> {
            progress.check()?;
            let first = tile * TILE;
            let (high, wide) = (rows.len() / element_length * phases, (elements - first) * phases);
            let mut product = vec![0.0_f32; high * wide];
            // In pieces, so that a cancelled job ends soon.
            for start in (0..wide).step_by(16 * TILE) {
                progress.check()?;
                let width = (wide - start).min(16 * TILE);
                matmul(
                    MatMut::from_row_major_slice_mut(&mut product, high, wide).subcols_mut(start, width),
                    Accum::Replace,
                    parts.subrows(first * phases, high),
                    parts.subrows(first * phases + start, width).transpose(),
                    1.0,
                    Par::Seq,
                );
            }
            for (row, products) in product.chunks_exact(wide).enumerate() {
                let (y, c) = (row / phases, row % phases);
                let to =
                    &mut rows[y * element_length + first * phases * phases..][..(elements - first) * phases * phases];
                for (pair, values) in to.chunks_exact_mut(phases * phases).zip(products.chunks_exact(phases)) {
                    pair[c * phases..][..phases].copy_from_slice(values);
                }
            }
            Ok(())
        };
        match parallelism {
            Parallelism::Rayon => self.products.par_chunks_mut(TILE * element_length).enumerate().try_for_each(fill),
            Parallelism::Sequential => self.products.chunks_mut(TILE * element_length).enumerate().try_for_each(fill),
        }
    }

    /// Copies `C[y, x, c, d]` to `C[x, y, d, c]` for `x` beyond `y`'s tile.
    fn mirror(&mut self) {
        let (elements, phases) = (self.elements, self.phases);
        let pair = phases * phases;
        for y_tile in (0..elements).step_by(TILE) {
            let y_end = (y_tile + TILE).min(elements);
            let (upper, lower) = self.products.split_at_mut(y_end * elements * pair);
            for (x, row) in lower.chunks_exact_mut(elements * pair).enumerate() {
                let x = y_end + x;
                for y in y_tile..y_end {
                    let from = &upper[(y * elements + x) * pair..][..pair];
                    let to = &mut row[y * pair..][..pair];
                    for c in 0..phases {
                        for d in 0..phases {
                            to[d * phases + c] = from[c * phases + d];
                        }
                    }
                }
            }
        }
    }
}

/// `(rows·phases) × (columns/phases)`, row-major: row `(y, c)` holds the entries of phase `c` of row `y`.
fn gather_row_phases(view: MatrixView<'_>, phases: usize) -> Vec<f32> {
    let inner = view.columns() / phases;
    let mut row = vec![0.0; view.columns()];
    let mut parts = vec![0.0; view.rows() * view.columns()];
    for (i, part) in parts.chunks_exact_mut(phases * inner).enumerate() {
        view.copy_row(i, &mut row);
        for (j, values) in row.chunks_exact(phases).enumerate() {
            for (c, &value) in values.iter().enumerate() {
                part[c * inner + j] = value;
            }
        }
    }
    parts
}

/// `(columns·phases) × (rows/phases)`, column-major: column `I` holds, for each column `j`, the entries of block row
/// `I`.
fn gather_column_phases(view: MatrixView<'_>, phases: usize) -> Vec<f32> {
    let mut row = vec![0.0; view.columns()];
    let mut parts = vec![0.0; view.rows() * view.columns()];
    for (block_row, part) in parts.chunks_exact_mut(phases * view.columns()).enumerate() {
        for a in 0..phases {
            view.copy_row(block_row * phases + a, &mut row);
            for (values, &value) in part.chunks_exact_mut(phases).zip(&row) {
                values[a] = value;
            }
        }
    }
    parts
}
