//! The shape of a Kronecker sum, and its cost.

use crate::error::{Error, Result};

/// The factor shapes of a Kronecker sum `Σ_k A_k ⊗ B_k` with `A_k : (m1, n1)` and `B_k : (m2, n2)`.
///
/// The sum has shape `(m1·m2, n1·n2)` = (in features, out features). `(m2, n2)` is called the *block*.
///
/// ```
/// use tqcompressor::spec::KroneckerShape;
/// let shape = KroneckerShape::new(768, 3072, (2, 4), 4)?;
/// assert_eq!((shape.m1, shape.n1), (384, 768));
/// assert_eq!(shape.parameters(), 4 * (384 * 768 + 2 * 4));
/// # Ok::<(), tqcompressor::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KroneckerShape {
    /// Rows of each `A_k`.
    pub m1: usize,
    /// Columns of each `A_k`.
    pub n1: usize,
    /// Rows of each `B_k`: the block's height.
    pub m2: usize,
    /// Columns of each `B_k`: the block's width.
    pub n2: usize,
    /// Number of terms.
    pub rank: usize,
}

impl KroneckerShape {
    /// Splits an `(m, n)` matrix by `block = (m2, n2)` with `rank` terms.
    ///
    /// # Errors
    /// [`Error::Shape`] if a dimension is zero, if the block does not divide the matrix, or if the rank is not between
    /// 1 and `min(m1·n1, m2·n2)`, beyond which all terms are zero.
    pub fn new(m: usize, n: usize, block: (usize, usize), rank: usize) -> Result<Self> {
        let (m2, n2) = block;
        if m == 0 || n == 0 {
            return Err(Error::Shape {
                operation: "matrix shape",
                expected: "at least one row and one column".into(),
                got: format!("({m}, {n})"),
            });
        }
        if m2 == 0 || n2 == 0 || !m.is_multiple_of(m2) || !n.is_multiple_of(n2) {
            return Err(Error::Shape {
                operation: "block",
                expected: format!("a block that divides ({m}, {n})"),
                got: format!("({m2}, {n2})"),
            });
        }
        let shape = Self { m1: m / m2, n1: n / n2, m2, n2, rank };
        let most = shape.blocks().min(shape.block_entries());
        if rank == 0 || rank > most {
            return Err(Error::Shape {
                operation: "rank",
                expected: format!("a rank from 1 to {most} for shape ({m}, {n}) and block ({m2}, {n2})"),
                got: rank.to_string(),
            });
        }
        Ok(shape)
    }

    /// Rows of the matrix, `m1·m2` (in features).
    #[must_use]
    pub fn rows(&self) -> usize {
        self.m1 * self.m2
    }

    /// Columns of the matrix, `n1·n2` (out features).
    #[must_use]
    pub fn columns(&self) -> usize {
        self.n1 * self.n2
    }

    /// Number of blocks, `m1·n1`: the entries of one `A_k`.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.m1 * self.n1
    }

    /// Entries of a block, `m2·n2`: the entries of one `B_k`.
    #[must_use]
    pub fn block_entries(&self) -> usize {
        self.m2 * self.n2
    }

    /// Stored parameters, `rank·(m1·n1 + m2·n2)`. Permutations are integer buffers and do not count.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.rank * (self.blocks() + self.block_entries())
    }

    /// MACs to apply the sum to one vector, in the cheaper contraction order:
    /// `rank·min(m1·n1·m2 + n1·m2·n2, m1·m2·n2 + m1·n1·n2)`.
    #[must_use]
    pub fn macs(&self) -> usize {
        self.rank * self.macs_a_first().min(self.macs_b_first())
    }

    /// Whether `Aᵀ X` first, then `· B`, costs no more MACs than `X B` first.
    #[must_use]
    pub fn a_first(&self) -> bool {
        self.macs_a_first() <= self.macs_b_first()
    }

    /// The shape of the transposed sum `Σ_k A_kᵀ ⊗ B_kᵀ`.
    #[must_use]
    pub fn transposed(&self) -> Self {
        Self { m1: self.n1, n1: self.m1, m2: self.n2, n2: self.m2, rank: self.rank }
    }

    /// The shape of the exchanged sum `Σ_k B_k ⊗ A_k`: the same matrix with rows and columns in another order.
    #[must_use]
    pub fn exchanged(&self) -> Self {
        Self { m1: self.m2, n1: self.n2, m2: self.m1, n2: self.n1, rank: self.rank }
    }

    /// Whether a block has more entries than there are blocks. The exchanged sum then has the smaller Gram matrix.
    #[must_use]
    pub fn large_blocks(&self) -> bool {
        self.blocks() < self.block_entries()
    }

    fn macs_a_first(&self) -> usize {
        self.m1 * self.n1 * self.m2 + self.n1 * self.m2 * self.n2
    }

    fn macs_b_first(&self) -> usize {
        self.m1 * self.m2 * self.n2 + self.m1 * self.n1 * self.n2
    }
}

/// Which sides of a matrix may be permuted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Permute {
    /// Neither: a plain Kronecker sum.
    None,
    /// Rows (input features) only.
    Rows,
    /// Columns (output features) only.
    Columns,
    /// Rows and columns.
    #[default]
    Both,
}

impl Permute {
    /// Every choice, with the name that configurations use.
    pub const NAMES: [(&'static str, Self); 4] =
        [("none", Self::None), ("rows", Self::Rows), ("columns", Self::Columns), ("both", Self::Both)];

    /// Reads a configuration's name for it.
    ///
    /// # Errors
    /// [`Error::Config`] if the name is none of [`Self::NAMES`].
    pub fn from_name(name: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|&(_, permute)| permute).ok_or_else(|| {
            Error::Config(format!("permute: expected \"none\", \"rows\", \"columns\" or \"both\", got {name:?}"))
        })
    }

    /// The name that configurations use.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].0
    }

    /// Whether rows may be permuted.
    #[must_use]
    pub fn rows(self) -> bool {
        matches!(self, Self::Rows | Self::Both)
    }

    /// Whether columns may be permuted.
    #[must_use]
    pub fn columns(self) -> bool {
        matches!(self, Self::Columns | Self::Both)
    }
}

/// The spec of a Kronecker sum: block, rank, and the sides that may be permuted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KroneckerSpec {
    /// The block `(m2, n2)`, in × out.
    pub block: (usize, usize),
    /// Number of Kronecker terms.
    pub rank: usize,
    /// Which sides may be permuted.
    pub permute: Permute,
}

impl KroneckerSpec {
    /// The factor shapes that this spec gives an `(m, n)` matrix.
    ///
    /// # Errors
    /// As [`KroneckerShape::new`].
    pub fn shape(&self, m: usize, n: usize) -> Result<KroneckerShape> {
        KroneckerShape::new(m, n, self.block, self.rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_follow_their_formulas() {
        let shape = KroneckerShape::new(768, 3072, (2, 4), 4).unwrap();
        assert_eq!((shape.rows(), shape.columns(), shape.blocks(), shape.block_entries()), (768, 3072, 294_912, 8));
        assert_eq!(shape.parameters(), 1_179_680);
        // A first: 384·768·2 + 768·2·4; B first: 384·2·4 + 384·768·4.
        assert_eq!(shape.macs(), 4 * 595_968);
        assert!(shape.a_first() && !shape.transposed().a_first());
        assert_eq!(shape.transposed().transposed(), shape);
    }

    #[test]
    fn misfits_are_refused_with_both_shapes_in_the_message() {
        for (block, rank, word) in
            [((5, 4), 1, "(5, 4)"), ((0, 4), 1, "(0, 4)"), ((2, 4), 9, "1 to 8"), ((2, 4), 0, "got 0")]
        {
            let message = KroneckerShape::new(768, 3072, block, rank).unwrap_err().to_string();
            assert!(message.contains(word) && message.contains("(768, 3072)"), "{message}");
        }
        assert!(KroneckerShape::new(0, 4, (1, 1), 1).is_err());
    }
}
