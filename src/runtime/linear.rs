//! Linear maps of a forward pass: dense, or a sum of factored terms, or several such side by side in some order.

use std::iter;

use candle_core::{Device, Tensor};
use faer::MatRef;

use super::buffers::Buffer;
use super::kernels::add_scaled;
use super::kronecker::{Kronecker, Strategy};
use super::low_rank::LowRank;
use super::order::Order;
use super::rows::{FEW, Rows, Weights};
use super::thread_pool::ThreadPool;
use crate::error::{Error, Result};
use crate::permute::Permutation;
use crate::spec::KroneckerShape;

/// `y = x W + bias` for a `W` in × out, as a model runs it.
#[derive(Clone, Debug)]
pub struct Linear {
    /// In features.
    pub(super) rows: usize,
    /// Out features.
    pub(super) columns: usize,
    /// Side by side, in the order of their columns.
    pub(super) parts: Vec<Part>,
    /// Where each output is among the columns of the parts.
    pub(super) outputs: Order,
    /// Empty without a bias.
    pub(super) bias: Vec<f32>,
}

/// Some columns of a linear map: a sum of terms.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub columns: usize,
    pub terms: Vec<StoredTerm>,
}

/// One term of a matrix in × out. Its rows are stored as they are read: out × in.
#[derive(Clone, Debug)]
pub(super) enum StoredTerm {
    Dense(Rows),
    Kronecker(Kronecker),
    LowRank(LowRank),
}

impl Linear {
    /// The map of a dense matrix `w : (m, n)`, row-major.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `w` has `m·n` values.
    ///
    /// ```
    /// use tqcompressor::runtime::{Linear, ThreadPool};
    /// let linear = Linear::dense(&[1.0, 2.0, 3.0, 4.0], 2, 2)?;
    /// let pool = ThreadPool::new(1).expect("no thread is started");
    /// assert_eq!(linear.forward(&[1.0, 10.0], 1, &pool), [31.0, 42.0]);
    /// # Ok::<(), tqcompressor::Error>(())
    /// ```
    pub fn dense(w: &[f32], m: usize, n: usize) -> Result<Self> {
        let w = tensor("W", w, &[m, n])?;
        Ok(Self::of_term(m, n, StoredTerm::Dense(Rows::new(&Weights::from(w).transposed())?)))
    }

    /// The map of `W` with `W[p][:, q] = Σ_k A_k ⊗ B_k`, for `a : (rank, m1, n1)` and `b : (rank, m2, n2)`, row-major.
    ///
    /// # Errors
    /// [`Error::Shape`] for factors or permutations of another length than `shape` says.
    pub fn kronecker(shape: KroneckerShape, a: &[f32], b: &[f32], p: &Permutation, q: &Permutation) -> Result<Self> {
        let KroneckerShape { m1, n1, m2, n2, rank } = shape;
        let (a, b) = (tensor("A", a, &[rank, m1, n1])?, tensor("B", b, &[rank, m2, n2])?);
        for (name, permutation, length) in [("p", p, shape.rows()), ("q", q, shape.columns())] {
            if permutation.len() != length {
                return Err(unlike(
                    name,
                    format!("a permutation of {length}"),
                    format!("one of {}", permutation.len()),
                ));
            }
        }
        let kronecker = Kronecker::new(shape, &a.into(), &b.into(), p, &q.inverse())?;
        Ok(Self::of_term(shape.rows(), shape.columns(), StoredTerm::Kronecker(kronecker)))
    }

    /// Several maps of the same inputs as one, whose outputs are theirs side by side. Dense maps become one matrix.
    ///
    /// # Errors
    /// Of no map, of maps of other inputs, and of maps whose outputs are in an order.
    pub(super) fn side_by_side(maps: Vec<Self>) -> Result<Self> {
        let rows = maps.first().map_or(0, |map| map.rows);
        let columns = maps.iter().map(|map| map.columns).sum();
        if maps.is_empty() || maps.iter().any(|map| map.rows != rows || !map.outputs.is_identity()) {
            return Err(unlike("maps side by side", format!("maps of {rows} inputs"), format!("{} maps", maps.len())));
        }
        let mut bias = Vec::new();
        if maps.iter().any(|map| !map.bias.is_empty()) {
            for map in &maps {
                bias.extend_from_slice(&map.bias);
                bias.resize(bias.len() + map.columns - map.bias.len(), 0.0);
            }
        }
        let mut parts: Vec<Part> = Vec::new();
        for part in maps.into_iter().flat_map(|map| map.parts) {
            if let (Some(last), [StoredTerm::Dense(below)]) = (parts.last_mut(), part.terms.as_slice())
                && let [StoredTerm::Dense(above)] = last.terms.as_mut_slice()
                && above.can_stack(below)
            {
                above.stack(below)?;
                last.columns += part.columns;
            } else {
                parts.push(part);
            }
        }
        Ok(Self { rows, columns, parts, outputs: Order::default(), bias })
    }

    fn of_term(rows: usize, columns: usize, term: StoredTerm) -> Self {
        Self {
            rows,
            columns,
            parts: vec![Part { columns, terms: vec![term] }],
            outputs: Order::default(),
            bias: Vec::new(),
        }
    }

    /// `y : (count, columns)` for `x : (count, rows)`.
    ///
    /// # Panics
    /// Unless `x` has `count·rows` values.
    ///
    /// # Cost
    /// For few vectors every factor is read once. For many, a Kronecker sum is expanded if that is expected to be
    /// faster.
    #[must_use]
    pub fn forward(&self, x: &[f32], count: usize, pool: &ThreadPool) -> Vec<f32> {
        self.forward_by(x, count, Strategy::Cheapest, pool)
    }

    /// As [`forward`](Self::forward), with a given strategy for Kronecker sums.
    #[must_use]
    pub fn forward_by(&self, x: &[f32], count: usize, strategy: Strategy, pool: &ThreadPool) -> Vec<f32> {
        self.times(x, count, strategy, pool).into_vec()
    }

    /// As [`forward`](Self::forward), in memory of the pool.
    pub(super) fn times(&self, x: &[f32], count: usize, strategy: Strategy, pool: &ThreadPool) -> Buffer {
        assert_eq!(x.len(), count * self.rows, "count · rows values");
        let few = count <= FEW;
        if few
            && let [Part { terms, .. }] = &*self.parts
            && let [StoredTerm::Dense(rows)] = &**terms
        {
            return self.finished(rows.times(x, count, pool), pool);
        }
        let all = self.parts.iter().flat_map(|part| &part.terms);
        let low_rank: Vec<_> =
            all.filter_map(|term| if let StoredTerm::LowRank(term) = term { Some(term) } else { None }).collect();
        let low_rank = if few { LowRank::times_together(&low_rank, x, count, pool) } else { Vec::new() };
        let mut low_rank = low_rank.into_iter();
        let mut y = pool.buffer(count * self.columns);
        let mut first = 0;
        for Part { columns, terms } in &self.parts {
            let mut y = y.matrix_mut(count, self.columns).subcols_mut(first, *columns);
            for (term, adds) in terms.iter().zip(iter::once(false).chain(iter::repeat(true))) {
                let y = y.as_mut();
                match term {
                    StoredTerm::Dense(rows) if few => {
                        Order::default().place(&rows.times(x, count, pool), y, adds, pool);
                    }
                    StoredTerm::Dense(rows) => {
                        rows.times_many(MatRef::from_row_major_slice(x, count, self.rows), y, adds, pool);
                    }
                    StoredTerm::Kronecker(kronecker) => kronecker.times(x, y, adds, strategy, pool),
                    StoredTerm::LowRank(_) if few => {
                        let (product, order) = low_rank.next().expect("a product of each");
                        order.place(&product, y, adds, pool);
                    }
                    StoredTerm::LowRank(low_rank) => low_rank.times_many(x, y, adds, pool),
                }
            }
            first += columns;
        }
        self.finished(y, pool)
    }

    /// Outputs in their order, with the bias.
    fn finished(&self, y: Buffer, pool: &ThreadPool) -> Buffer {
        let mut y = self.outputs.gather(&y, pool).unwrap_or(y);
        if !self.bias.is_empty() {
            pool.for_each(y.chunks_exact_mut(self.columns), |y| add_scaled(y, 1.0, &self.bias));
        }
        y
    }

    /// Adds column `column` of `W` to `out`: what an embedding that is stored as the map to its logits looks up.
    pub(super) fn add_column(&self, column: usize, out: &mut [f32]) {
        let column = self.outputs.at(column);
        let mut first = 0;
        for part in &self.parts {
            if (first..first + part.columns).contains(&column) {
                part.terms.iter().for_each(|term| term.add_column(column - first, out));
            }
            first += part.columns;
        }
    }

    /// Leaves the outputs in the order of the only term: output `j` is then at position `order.at(j)`. The map that
    /// reads them needs [`take_inputs_from`](Self::take_inputs_from).
    pub(super) fn keep_output_order(&mut self) -> Order {
        let order = match self.only_term() {
            Some(
                StoredTerm::Kronecker(Kronecker { output, .. })
                | StoredTerm::LowRank(LowRank::OnColumns { output, .. }),
            ) => std::mem::take(output),
            _ => return Order::default(),
        };
        let inverse = order.inverse();
        self.bias = (0..self.bias.len()).map(|at| self.bias[inverse.at(at)]).collect();
        order
    }

    /// Reads input `i` from position `order.at(i)`.
    pub(super) fn take_inputs_from(&mut self, order: &Order) {
        for term in self.parts.iter_mut().flat_map(|part| &mut part.terms) {
            match term {
                StoredTerm::Dense(rows) | StoredTerm::LowRank(LowRank::OnColumns { left: rows, .. }) => {
                    rows.reorder_values(order)
                }
                StoredTerm::Kronecker(Kronecker { input, .. }) | StoredTerm::LowRank(LowRank::OnRows { input, .. }) => {
                    *input = input.after(order, self.rows);
                }
            }
        }
    }

    /// Reads the inputs in the order of the only term: input `order.at(p)` must be at position `p`. The map that makes
    /// them needs [`put_outputs_in`](Self::put_outputs_in).
    pub(super) fn keep_input_order(&mut self) -> Order {
        match self.only_term() {
            Some(
                StoredTerm::Kronecker(Kronecker { input, .. }) | StoredTerm::LowRank(LowRank::OnRows { input, .. }),
            ) => std::mem::take(input),
            _ => Order::default(),
        }
    }

    /// Puts output `order.at(p)` at position `p`. The map must have one part.
    pub(super) fn put_outputs_in(&mut self, order: &Order) {
        debug_assert_eq!(self.parts.len(), 1);
        for term in self.parts.iter_mut().flat_map(|part| &mut part.terms) {
            match term {
                StoredTerm::Dense(rows) | StoredTerm::LowRank(LowRank::OnRows { right: rows, .. }) => {
                    rows.reorder_rows(order)
                }
                StoredTerm::Kronecker(Kronecker { output, .. })
                | StoredTerm::LowRank(LowRank::OnColumns { output, .. }) => {
                    *output = order.after(output, self.columns);
                }
            }
        }
        self.bias = (0..self.bias.len()).map(|at| self.bias[order.at(at)]).collect();
    }

    fn only_term(&mut self) -> Option<&mut StoredTerm> {
        match self.parts.as_mut_slice() {
            [Part { terms, .. }] if terms.len() == 1 => terms.first_mut(),
            _ => None,
        }
    }

    /// All its weights, in the order in which they are read.
    pub(super) fn matrices(&mut self) -> impl Iterator<Item = &mut Rows> {
        self.parts.iter_mut().flat_map(|part| &mut part.terms).flat_map(|term| match term {
            StoredTerm::Dense(rows) | StoredTerm::Kronecker(Kronecker { a: rows, .. }) => vec![rows],
            StoredTerm::LowRank(LowRank::OnRows { left, right, .. } | LowRank::OnColumns { left, right, .. }) => {
                vec![left, right]
            }
        })
    }

    /// The number of gathers per vector.
    pub(super) fn gathers(&self) -> usize {
        let gathers = |term: &StoredTerm| match term {
            StoredTerm::Dense(_) => 0,
            StoredTerm::Kronecker(Kronecker { input, output, .. }) => {
                usize::from(!input.is_identity()) + usize::from(!output.is_identity())
            }
            StoredTerm::LowRank(LowRank::OnRows { input: order, .. } | LowRank::OnColumns { output: order, .. }) => {
                usize::from(!order.is_identity())
            }
        };
        usize::from(!self.outputs.is_identity())
            + self.parts.iter().flat_map(|part| &part.terms).map(gathers).sum::<usize>()
    }
}

impl StoredTerm {
    /// Adds a column to `out`.
    fn add_column(&self, column: usize, out: &mut [f32]) {
        match self {
            Self::Dense(rows) => rows.with_row(column, |row| add_scaled(out, 1.0, row)),
            Self::Kronecker(kronecker) => kronecker.add_column(column, out),
            Self::LowRank(low_rank) => low_rank.add_column(column, out),
        }
    }
}

fn tensor(name: &'static str, values: &[f32], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &Device::Cpu)
        .map_err(|_| unlike(name, format!("values of shape {shape:?}"), format!("{} values", values.len())))
}

fn unlike(operation: &'static str, expected: String, got: String) -> Error {
    Error::Shape { operation, expected, got }
}
