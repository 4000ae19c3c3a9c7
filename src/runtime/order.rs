//! Reordering of vectors.

use faer::MatMut;

use super::buffers::Buffer;
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

    /// Gathers each of several concatenated vectors; nothing for the identity.
    pub fn gather(&self, x: &[f32], pool: &ThreadPool) -> Option<Buffer> {
        let length = self.0.as_ref()?.len();
        let mut gathered = pool.buffer(x.len());
        let vectors = gathered.chunks_exact_mut(length).zip(x.chunks_exact(length));
        pool.for_each(vectors, |(gathered, x)| self.gather_from(x, 0, gathered));
        Some(gathered)
    }

    /// Elements `first`, `first + 1`, … of a gathered vector.
    pub fn gather_from(&self, x: &[f32], first: usize, gathered: &mut [f32]) {
        match &self.0 {
            None => gathered.copy_from_slice(&x[first..first + gathered.len()]),
            Some(indices) => {
                gathered.iter_mut().zip(&indices[first..]).for_each(|(value, &at)| *value = x[at as usize]);
            }
        }
    }

    /// Writes gathered vectors to the rows of `y`, or adds them.
    pub fn place(&self, x: &[f32], y: MatMut<'_, f32>, adds: bool, pool: &ThreadPool) {
        let length = (x.len() / y.nrows().max(1)).max(1);
        pool.for_each(y.row_iter_mut().zip(x.chunks_exact(length)), |(y, x)| {
            let y = y.try_as_row_major_mut().expect("rows are contiguous").as_slice_mut();
            match &self.0 {
                _ if !adds => self.gather_from(x, 0, y),
                None => y.iter_mut().zip(x).for_each(|(y, x)| *y += x),
                Some(indices) => y.iter_mut().zip(indices).for_each(|(y, &at)| *y += x[at as usize]),
            }
        });
    }

    /// Adds a vector, element `i` to where `i` is gathered from.
    pub fn scatter_add(&self, x: &[f32], sum: &mut [f32]) {
        match &self.0 {
            None => sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x),
            Some(indices) => x.iter().zip(indices).for_each(|(x, &at)| sum[at as usize] += x),
        }
    }
}
