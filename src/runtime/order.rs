//! Reordering of vectors.

use std::borrow::Cow;

use super::thread_pool::ThreadPool;

/// Gather indices of vectors of one length: element `i` of the result is element `indices[i]`. The identity costs
/// nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Order(Option<Vec<u32>>);

impl Order {
    /// Takes a permutation's indices.
    pub fn new(indices: impl Iterator<Item = usize>) -> Self {
        let indices: Vec<_> = indices.map(|at| u32::try_from(at).expect("fewer than 2³² features")).collect();
        let identity = indices.iter().enumerate().all(|(i, &at)| i == at as usize);
        Self((!identity).then_some(indices))
    }

    /// Whether this is the identity.
    pub fn is_identity(&self) -> bool {
        self.0.is_none()
    }

    /// Where element `i` comes from.
    pub fn at(&self, i: usize) -> usize {
        self.0.as_ref().map_or(i, |indices| indices[i] as usize)
    }

    /// The order that gathers by `before` and then by `self`, for vectors of `length`.
    pub fn after(&self, before: &Self, length: usize) -> Self {
        Self::new((0..length).map(|i| before.at(self.at(i))))
    }

    /// The inverse order.
    pub fn inverse(&self) -> Self {
        let Some(indices) = &self.0 else { return Self(None) };
        let mut inverse = vec![0; indices.len()];
        for (i, &at) in (0..).zip(indices) {
            inverse[at as usize] = i;
        }
        Self(Some(inverse))
    }

    /// Gathers each of several concatenated vectors.
    pub fn gather<'a>(&self, x: impl Into<Cow<'a, [f32]>>, pool: &ThreadPool) -> Cow<'a, [f32]> {
        let x = x.into();
        let Some(indices) = &self.0 else { return x };
        let mut gathered = vec![0.0; x.len()];
        let vectors = gathered.chunks_exact_mut(indices.len()).zip(x.chunks_exact(indices.len()));
        pool.for_each(vectors, |(gathered, x)| {
            for (value, &at) in gathered.iter_mut().zip(indices) {
                *value = x[at as usize];
            }
        });
        Cow::Owned(gathered)
    }

    /// Adds a gathered vector to another.
    pub fn add(&self, x: &[f32], sum: &mut [f32]) {
        match &self.0 {
            None => sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x),
            Some(indices) => sum.iter_mut().zip(indices).for_each(|(sum, &at)| *sum += x[at as usize]),
        }
    }

    /// Adds a vector, element `i` to where `i` was gathered from: the transpose of [`add`](Self::add).
    pub fn scatter_add(&self, x: &[f32], sum: &mut [f32]) {
        match &self.0 {
            None => self.add(x, sum),
            Some(indices) => x.iter().zip(indices).for_each(|(x, &at)| sum[at as usize] += x),
        }
    }
}
