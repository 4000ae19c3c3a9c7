//! Linear maps of a forward pass: dense, or a sum of factored terms, or several such side by side.

use std::borrow::Cow;

use super::kernels::add_scaled;
use super::kronecker::{Kronecker, Way};
use super::low_rank::LowRank;
use super::order::Order;
use super::rows::Rows;
use super::thread_pool::Workers;

/// `y = x W + bias` for a `W` in × out.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    /// In features.
    pub rows: usize,
    /// Out features.
    pub columns: usize,
    /// Side by side, in the order of their columns.
    pub parts: Vec<Part>,
    /// Empty if there is none.
    pub bias: Vec<f32>,
}

/// Some columns of a linear map: a sum of terms.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub columns: usize,
    pub terms: Vec<Term>,
}

/// One term of a matrix in × out. Its rows are stored as they are read: out × in.
#[derive(Clone, Debug)]
pub(super) enum Term {
    Dense(Rows),
    Kronecker(Kronecker),
    LowRank(LowRank),
}

impl Linear {
    /// `y : (count, columns)` for `x : (count, rows)`.
    ///
    /// # Cost
    /// For few vectors every factor is read once; for many, a Kronecker sum is formed if that is the cheaper way.
    pub fn forward(&self, x: &[f32], count: usize, workers: &Workers) -> Vec<f32> {
        self.forward_by(x, count, Way::Cheapest, workers)
    }

    /// As [`forward`](Self::forward), Kronecker sums in a given way.
    pub fn forward_by(&self, x: &[f32], count: usize, way: Way, workers: &Workers) -> Vec<f32> {
        debug_assert_eq!(x.len(), count * self.rows);
        let mut y = Vec::new();
        let mut first = 0;
        for Part { columns, terms } in &self.parts {
            for term in terms {
                let (product, output) = term.times(x, count, way, workers);
                if y.is_empty() && *columns == self.columns {
                    y = output.gather(product, workers).into_owned();
                    continue;
                }
                y.resize(count * self.columns, 0.0);
                let rows = y.chunks_exact_mut(self.columns).zip(product.chunks_exact(*columns));
                workers.for_each(rows, |(y, product)| output.add(product, &mut y[first..first + columns]));
            }
            first += columns;
        }
        if !self.bias.is_empty() {
            workers.for_each(y.chunks_exact_mut(self.columns), |y| add_scaled(y, 1.0, &self.bias));
        }
        y
    }

    /// Adds column `column` of `W` to `out`: what an embedding that is stored as the map to its logits looks up.
    pub fn add_column(&self, column: usize, out: &mut [f32]) {
        let mut first = 0;
        for part in &self.parts {
            if (first..first + part.columns).contains(&column) {
                part.terms.iter().for_each(|term| term.add_column(column - first, out));
            }
            first += part.columns;
        }
    }

    /// Lets outputs come in the order in which the only term makes them: output `j` is then at place `order.at(j)`. What
    /// reads them must be told, by [`take_inputs_from`](Self::take_inputs_from).
    pub fn keep_output_order(&mut self) -> Order {
        let order = match self.only_term() {
            Some(Term::Kronecker(Kronecker { output, .. }) | Term::LowRank(LowRank::OnColumns { output, .. })) => {
                std::mem::take(output)
            }
            _ => return Order::default(),
        };
        let inverse = order.inverse();
        self.bias = (0..self.bias.len()).map(|at| self.bias[inverse.at(at)]).collect();
        order
    }

    /// Makes the map read inputs of which the `i`-th is at place `order.at(i)`.
    pub fn take_inputs_from(&mut self, order: &Order) {
        for term in self.parts.iter_mut().flat_map(|part| &mut part.terms) {
            match term {
                Term::Dense(rows) | Term::LowRank(LowRank::OnColumns { left: rows, .. }) => rows.reorder_values(order),
                Term::Kronecker(Kronecker { input, .. }) | Term::LowRank(LowRank::OnRows { input, .. }) => {
                    *input = input.after(order, self.rows);
                }
            }
        }
    }

    /// Lets the map read inputs in the order in which its only term needs them: `order.at(p)` is what is to be at place `p`.
    /// What makes them must be told, by [`put_outputs_in`](Self::put_outputs_in).
    pub fn keep_input_order(&mut self) -> Order {
        match self.only_term() {
            Some(Term::Kronecker(Kronecker { input, .. }) | Term::LowRank(LowRank::OnRows { input, .. })) => {
                std::mem::take(input)
            }
            _ => Order::default(),
        }
    }

    /// Makes the map put output `order.at(p)` at place `p`; it must have one part.
    pub fn put_outputs_in(&mut self, order: &Order) {
        debug_assert_eq!(self.parts.len(), 1);
        for term in self.parts.iter_mut().flat_map(|part| &mut part.terms) {
            match term {
                Term::Dense(rows) | Term::LowRank(LowRank::OnRows { right: rows, .. }) => rows.reorder_rows(order),
                Term::Kronecker(Kronecker { output, .. }) | Term::LowRank(LowRank::OnColumns { output, .. }) => {
                    *output = order.after(output, self.columns);
                }
            }
        }
        self.bias = (0..self.bias.len()).map(|at| self.bias[order.at(at)]).collect();
    }

    fn only_term(&mut self) -> Option<&mut Term> {
        match self.parts.as_mut_slice() {
            [Part { terms, .. }] if terms.len() == 1 => terms.first_mut(),
            _ => None,
        }
    }

    /// All its weights, in the order in which they are read.
    pub fn matrices(&mut self) -> impl Iterator<Item = &mut Rows> {
        self.parts.iter_mut().flat_map(|part| &mut part.terms).flat_map(|term| match term {
            Term::Dense(rows) | Term::Kronecker(Kronecker { a: rows, .. }) => vec![rows],
            Term::LowRank(LowRank::OnRows { left, right, .. } | LowRank::OnColumns { left, right, .. }) => {
                vec![left, right]
            }
        })
    }

    /// How often a vector is put into another order on its way through.
    pub fn gathers(&self) -> usize {
        let gathers = |term: &Term| match term {
            Term::Dense(_) => 0,
            Term::Kronecker(Kronecker { input, output, .. }) => {
                usize::from(!input.is_identity()) + usize::from(!output.is_identity())
            }
            Term::LowRank(LowRank::OnRows { input: order, .. } | LowRank::OnColumns { output: order, .. }) => {
                usize::from(!order.is_identity())
            }
        };
        self.parts.iter().flat_map(|part| &part.terms).map(gathers).sum()
    }
}

impl Term {
    /// The product `(count, n)` with `x : (count, m)`, and the order in which `y` is to be gathered from it.
    fn times<'a>(&'a self, x: &[f32], count: usize, way: Way, workers: &Workers) -> (Vec<f32>, Cow<'a, Order>) {
        match self {
            Self::Dense(rows) => (rows.times(x, count, workers), Cow::Owned(Order::default())),
            Self::Kronecker(kronecker) => kronecker.times(x, count, way, workers),
            Self::LowRank(low_rank) => low_rank.times(x, count, workers),
        }
    }

    /// Adds a column to `out`.
    fn add_column(&self, column: usize, out: &mut [f32]) {
        match self {
            Self::Dense(rows) => rows.with_row(column, |row| add_scaled(out, 1.0, row)),
            Self::Kronecker(kronecker) => kronecker.add_column(column, out),
            Self::LowRank(low_rank) => low_rank.add_column(column, out),
        }
    }
}
