//! The spec of one matrix: a sum of one or more Kronecker or low-rank terms.

use std::fmt;

use super::grouped::{GroupedShape, RowGroup};
use super::kronecker::KroneckerSpec;
use super::low_rank::LowRankShape;
use crate::error::{Error, Result};

/// How a model uses a matrix for each token. MACs follow from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Usage {
    /// A linear map: a product with one vector.
    #[default]
    Map,
    /// An embedding: a lookup of one row.
    Lookup,
    /// An embedding that is also the output head.
    TiedLookup,
}

impl Usage {
    const NAMES: [(&'static str, Self); 3] =
        [("map", Self::Map), ("lookup", Self::Lookup), ("tied_lookup", Self::TiedLookup)];

    /// Reads the name that the Python side uses.
    ///
    /// # Errors
    /// [`Error::Config`] if it is none of "map", "lookup", "tied_lookup".
    pub fn from_name(name: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|&(_, usage)| usage).ok_or_else(|| {
            Error::Config(format!("usage: expected \"map\", \"lookup\" or \"tied_lookup\", got {name:?}"))
        })
    }

    /// MACs for one token of a dense `(m, n)` matrix: `m·n`, and none for a lookup.
    #[must_use]
    pub fn dense_macs(self, m: usize, n: usize) -> usize {
        if self == Self::Lookup { 0 } else { m * n }
    }
}

/// One term of a sum.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TermSpec {
    /// A permuted Kronecker sum.
    Kronecker(KroneckerSpec),
    /// A low-rank matrix in interpolative form.
    LowRank {
        /// Its rank.
        rank: usize,
    },
    /// An embedding whose rows are in groups of different ranks. It is the only term.
    Grouped(Vec<RowGroup>),
}

impl TermSpec {
    /// The parameters of this term of an `(m, n)` matrix.
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not fit.
    pub fn parameters(&self, m: usize, n: usize) -> Result<usize> {
        match self {
            Self::Kronecker(spec) => Ok(spec.shape(m, n)?.parameters()),
            Self::LowRank { rank } => Ok(LowRankShape::new(m, n, *rank)?.parameters()),
            Self::Grouped(groups) => Ok(GroupedShape::new(m, n, groups)?.parameters()),
        }
    }

    /// MACs for one token of an `(m, n)` matrix that is this term. A product with a vector takes
    /// [`KroneckerShape::macs`](super::KroneckerShape::macs) or a low rank's parameters, and, where
    /// rows are looked up, those that make one row: `rank·n`, less the columns that a low rank holds as they are.
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not fit.
    pub fn macs(&self, m: usize, n: usize, usage: Usage) -> Result<usize> {
        let (product, row) = match self {
            Self::Kronecker(spec) => (spec.shape(m, n)?.macs(), spec.rank * n),
            Self::LowRank { rank } => {
                let shape = LowRankShape::new(m, n, *rank)?;
                (shape.parameters(), rank * shape.right().1)
            }
            Self::Grouped(groups) => {
                let shape = GroupedShape::new(m, n, groups)?;
                (shape.parameters(), shape.row_macs())
            }
        };
        Ok(match usage {
            Usage::Map => product,
            Usage::Lookup => row,
            Usage::TiedLookup => product + row,
        })
    }
}

/// The spec of one matrix: a sum of one or more terms.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MatrixSpec {
    terms: Vec<TermSpec>,
}

impl From<KroneckerSpec> for MatrixSpec {
    fn from(spec: KroneckerSpec) -> Self {
        Self { terms: vec![TermSpec::Kronecker(spec)] }
    }
}

impl From<TermSpec> for MatrixSpec {
    fn from(term: TermSpec) -> Self {
        Self { terms: vec![term] }
    }
}

impl MatrixSpec {
    /// A low-rank matrix.
    #[must_use]
    pub fn low_rank(rank: usize) -> Self {
        TermSpec::LowRank { rank }.into()
    }

    /// A sum of terms.
    ///
    /// # Errors
    /// [`Error::Config`] if there are none, or groups of rows beside other terms.
    pub fn new(terms: Vec<TermSpec>) -> Result<Self> {
        if terms.is_empty() {
            return Err(Error::Config("terms: expected at least one, got none".into()));
        }
        let spec = Self { terms };
        if spec.is_grouped() && spec.terms.len() > 1 {
            return Err(Error::Config("terms: expected Kronecker sums and low rank, got groups of rows".into()));
        }
        Ok(spec)
    }

    /// The terms, at least one.
    #[must_use]
    pub fn terms(&self) -> &[TermSpec] {
        &self.terms
    }

    /// The Kronecker spec, if that is the only term.
    #[must_use]
    pub fn as_kronecker(&self) -> Option<&KroneckerSpec> {
        match self.terms.as_slice() {
            [TermSpec::Kronecker(spec)] => Some(spec),
            _ => None,
        }
    }

    /// Whether it is a table of groups of rows, which only an embedding can be.
    #[must_use]
    pub fn is_grouped(&self) -> bool {
        self.terms.iter().any(|term| matches!(term, TermSpec::Grouped(_)))
    }

    /// The parameters of an `(m, n)` matrix of this spec.
    ///
    /// # Errors
    /// [`Error::Shape`] if a term does not fit the matrix.
    pub fn parameters(&self, m: usize, n: usize) -> Result<usize> {
        self.terms.iter().map(|term| term.parameters(m, n)).sum()
    }

    /// The MACs for one token of an `(m, n)` matrix of this spec.
    ///
    /// # Errors
    /// [`Error::Shape`] if a term does not fit the matrix.
    pub fn macs(&self, m: usize, n: usize, usage: Usage) -> Result<usize> {
        self.terms.iter().map(|term| term.macs(m, n, usage)).sum()
    }
}

impl fmt::Display for TermSpec {
    /// As in "block 2 × 4, rank 4, permuted both" and "low rank 224".
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kronecker(KroneckerSpec { block: (m2, n2), rank, permute }) => {
                write!(formatter, "block {m2} × {n2}, rank {rank}, permuted {}", permute.name())
            }
            Self::LowRank { rank } => write!(formatter, "low rank {rank}"),
            Self::Grouped(groups) => {
                let ranks: Vec<_> = groups.iter().map(|group| group.rank.to_string()).collect();
                write!(formatter, "low rank {} by groups", ranks.join("/"))
            }
        }
    }
}

impl fmt::Display for MatrixSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (t, term) in self.terms.iter().enumerate() {
            write!(formatter, "{}{term}", if t == 0 { "" } else { " + " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Permute;

    #[test]
    fn a_sum_without_terms_or_of_groups_is_refused() {
        assert!(MatrixSpec::new(Vec::new()).is_err());
        let grouped = TermSpec::Grouped(vec![RowGroup { rows: 8, rank: 1 }]);
        assert!(MatrixSpec::new(vec![grouped.clone(), TermSpec::LowRank { rank: 1 }]).is_err());
        assert_eq!(MatrixSpec::new(vec![grouped]).unwrap().to_string(), "low rank 1 by groups");
    }

    #[test]
    fn macs_are_those_of_the_terms_and_of_what_is_done_with_them() {
        let kronecker = TermSpec::Kronecker(KroneckerSpec { block: (2, 4), rank: 3, permute: Permute::Both });
        let low_rank = TermSpec::LowRank { rank: 5 };
        // B first would take 6·2·4 + 6·8·4 = 240; A first takes 6·8·2 + 8·2·4 = 160 for each of the three.
        let of = |term: &TermSpec, usage| term.macs(12, 32, usage).unwrap();
        let of_table = |term: &TermSpec, usage| term.macs(32, 12, usage).unwrap();
        assert_eq!((of(&kronecker, Usage::Map), of(&kronecker, Usage::Lookup)), (480, 96));
        // Pivots on rows, so that a row takes all columns of `right`: `[I; T] R`.
        assert_eq!((of(&low_rank, Usage::Map), of(&low_rank, Usage::Lookup)), (5 * 39, 5 * 32));
        // A table is higher than wide: a row of `L [I T]`.
        assert_eq!(low_rank.macs(32, 12, Usage::Lookup).unwrap(), 5 * 7);
        let grouped = TermSpec::Grouped(vec![RowGroup { rows: 14, rank: 5 }, RowGroup { rows: 18, rank: 2 }]);
        assert_eq!(of_table(&grouped, Usage::Map), 5 * (14 + 12 - 5) + 2 * (18 + 12 - 2));
        // (14 · 5 · 7 + 18 · 2 · 10) / 32 is 26.6.
        assert_eq!(of_table(&grouped, Usage::Lookup), 27);
        let both = MatrixSpec::new(vec![low_rank, kronecker]).unwrap();
        assert_eq!(both.macs(12, 32, Usage::TiedLookup).unwrap(), 480 + 96 + 5 * 39 + 5 * 32);
        assert_eq!([Usage::Map, Usage::Lookup, Usage::TiedLookup].map(|usage| usage.dense_macs(12, 32)), [384, 0, 384]);
        assert!(both.macs(12, 30, Usage::Map).is_err() && Usage::from_name("head").is_err());
    }
}
