//! Low rank with a rank of its own for each group of rows.

use std::ops::Range;

use super::low_rank::LowRankShape;
use crate::error::{Error, Result};

/// Some rows of a matrix, and their rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowGroup {
    /// The number of rows.
    pub rows: usize,
    /// The rank of these rows.
    pub rank: usize,
}

/// A table whose rows are sorted by importance and cut into groups, each of low rank with factors of its own.
///
/// `W[p]` is the groups one above the other. Group `g` has `n_g` rows, more than there are columns `d`, and is
/// `left_g [I right_g]` with its columns permuted, so that it takes `k_g·(n_g + d − k_g)` numbers. Frequent tokens get
/// a higher rank than rare ones (Chen, Si, Li, Chelba and Hsieh, "GroupReduce", arXiv 1806.06950).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupedShape {
    groups: Vec<LowRankShape>,
}

impl GroupedShape {
    /// The shape of an `(m, n)` matrix of these groups.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the groups have `m` rows together, each has more rows than columns, and each rank is from
    /// 1 to `n − 1`.
    pub fn new(m: usize, n: usize, groups: &[RowGroup]) -> Result<Self> {
        let rows = groups.iter().fold(0_usize, |sum, group| sum.saturating_add(group.rows));
        if groups.is_empty() || rows != m {
            return Err(Error::Shape {
                operation: "groups",
                expected: format!("groups of {m} rows together, for a matrix of shape ({m}, {n})"),
                got: format!("{rows} rows in {} groups", groups.len()),
            });
        }
        if let Some(short) = groups.iter().find(|group| group.rows <= n) {
            return Err(Error::Shape {
                operation: "groups",
                expected: format!("more rows in every group than the {n} columns"),
                got: format!("a group of {} rows", short.rows),
            });
        }
        let groups = groups.iter().map(|group| LowRankShape::new(group.rows, n, group.rank)).collect::<Result<_>>()?;
        Ok(Self { groups })
    }

    /// The shape of each group, from the most important rows to the least.
    #[must_use]
    pub fn groups(&self) -> &[LowRankShape] {
        &self.groups
    }

    /// All rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.groups.iter().map(|group| group.rows).sum()
    }

    /// Columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.groups[0].columns
    }

    /// Numbers in all `left` factors, stored one after the other.
    #[must_use]
    pub fn left(&self) -> usize {
        self.groups.iter().map(|group| group.left().0 * group.left().1).sum()
    }

    /// Numbers in all `right` factors, stored one after the other.
    #[must_use]
    pub fn right(&self) -> usize {
        self.groups.iter().map(|group| group.right().0 * group.right().1).sum()
    }

    /// Rows of all `left` factors.
    #[must_use]
    pub fn left_rows(&self) -> usize {
        self.groups.iter().map(|group| group.left().0).sum()
    }

    /// Rows of all `right` factors.
    #[must_use]
    pub fn right_rows(&self) -> usize {
        self.groups.iter().map(|group| group.right().0).sum()
    }

    /// Each group with the places of its numbers in all `left` and in all `right` factors.
    pub fn pieces(&self) -> impl Iterator<Item = (&LowRankShape, Range<usize>, Range<usize>)> {
        let (mut left, mut right) = (0, 0);
        self.groups.iter().map(move |group| {
            let next = |end: &mut usize, (height, width): (usize, usize)| {
                let start = *end;
                *end += height * width;
                start..*end
            };
            (group, next(&mut left, group.left()), next(&mut right, group.right()))
        })
    }

    /// Stored parameters, `Σ_g k_g·(n_g + n − k_g)`: also the MACs of a product with one vector.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.groups.iter().map(LowRankShape::parameters).sum()
    }

    /// MACs that make one row, the mean over all rows, rounded up.
    #[must_use]
    pub fn row_macs(&self) -> usize {
        let all: usize = self.groups.iter().map(|group| group.rows * group.right().0 * group.right().1).sum();
        all.div_ceil(self.rows())
    }

    /// The numbers of rows into which a table of shape `(m, n)` is cut: pairs of groups, each twice as high as the pair
    /// before, from `1.5·n` rows up. `None` for a table that is too small for two groups, or has one column.
    ///
    /// ```
    /// use tqcompressor::spec::GroupedShape;
    /// assert_eq!(GroupedShape::cut(8192, 256), Some(vec![384, 384, 768, 768, 1536, 1536, 2816]));
    /// assert_eq!(GroupedShape::cut(512, 256), None);
    /// ```
    #[must_use]
    pub fn cut(m: usize, n: usize) -> Option<Vec<usize>> {
        if n < 2 {
            return None;
        }
        let mut sizes = Vec::new();
        let (mut left, mut size) = (m, n.checked_mul(3)?.div_ceil(2));
        // What is left over is at least as high as the group before.
        while left >= 2 * size {
            sizes.push(size);
            left -= size;
            size *= 1 + usize::from(sizes.len() % 2 == 0);
        }
        sizes.push(left);
        (sizes.len() > 1 && sizes.iter().all(|&rows| rows > n)).then_some(sizes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_cut_groups_are_all_rows_and_high_enough(m in 1..5000_usize, n in 1..300_usize) {
            if let Some(sizes) = GroupedShape::cut(m, n) {
                prop_assert!(sizes.len() > 1 && sizes.iter().sum::<usize>() == m);
                let groups: Vec<_> = sizes.iter().map(|&rows| RowGroup { rows, rank: 1 }).collect();
                let shape = GroupedShape::new(m, n, &groups).unwrap();
                prop_assert_eq!(shape.left() + shape.right(), shape.parameters());
                prop_assert_eq!((shape.rows(), shape.columns()), (m, n));
                let (_, left, right) = shape.pieces().last().unwrap();
                prop_assert_eq!((left.end, right.end), (shape.left(), shape.right()));
            } else {
                prop_assert!(n == 1 || m < 3 * n + 2);
            }
        }
    }

    #[test]
    fn groups_that_do_not_fit_are_refused() {
        let group = |rows, rank| RowGroup { rows, rank };
        for (groups, words) in [
            (vec![], "0 rows in 0 groups"),
            (vec![group(9, 2), group(10, 2)], "19 rows"),
            (vec![group(16, 2), group(4, 2)], "a group of 4 rows"),
            (vec![group(10, 2), group(10, 4)], "1 to 3"),
            (vec![group(usize::MAX, 2), group(10, 4)], "groups of 20 rows"),
        ] {
            let error = GroupedShape::new(20, 4, &groups).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
