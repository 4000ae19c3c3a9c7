//! Permutations as gather indices.

use crate::error::{Error, Result};

/// A validated permutation, held as gather indices: element `i` of the permuted sequence is element `p[i]` of the
/// original.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Permutation(Vec<usize>);

impl Permutation {
    /// The identity permutation.
    #[must_use]
    pub fn identity(length: usize) -> Self {
        Self((0..length).collect())
    }

    /// Checks that every index from 0 to `indices.len() − 1` comes once.
    ///
    /// # Errors
    /// [`Error::Permutation`] naming the first index that is out of range or repeated.
    pub fn new(indices: Vec<usize>) -> Result<Self> {
        let mut seen = vec![false; indices.len()];
        for (at, &index) in indices.iter().enumerate() {
            let fault = match seen.get_mut(index) {
                None => "is out of range",
                Some(seen) if *seen => "is repeated",
                Some(seen) => {
                    *seen = true;
                    continue;
                }
            };
            return Err(Error::Permutation { length: indices.len(), problem: format!("entry {at}, {index}, {fault}") });
        }
        Ok(Self(indices))
    }

    /// The gather indices.
    #[must_use]
    pub fn as_slice(&self) -> &[usize] {
        &self.0
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this is the identity.
    #[must_use]
    pub fn is_identity(&self) -> bool {
        self.0.iter().enumerate().all(|(at, &index)| at == index)
    }

    /// The inverse permutation.
    #[must_use]
    pub fn inverse(&self) -> Self {
        let mut inverse = vec![0; self.len()];
        for (at, &index) in self.0.iter().enumerate() {
            inverse[index] = at;
        }
        Self(inverse)
    }

    /// The permutation that gathers by `self` and then by `next`.
    ///
    /// # Panics
    /// If the lengths differ.
    #[must_use]
    pub fn then(&self, next: &Self) -> Self {
        assert_eq!(self.len(), next.len(), "permutations of the same length");
        Self(next.0.iter().map(|&index| self.0[index]).collect())
    }

    /// `values` in the permuted order.
    ///
    /// # Panics
    /// If the lengths differ.
    #[must_use]
    pub fn gather<T: Copy>(&self, values: &[T]) -> Vec<T> {
        assert_eq!(self.len(), values.len(), "one value per index");
        self.0.iter().map(|&index| values[index]).collect()
    }
}
