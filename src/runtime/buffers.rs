//! Memory for the results of the steps of a forward pass, which the following steps use again.
//!
//! The system hands out fresh memory page by page, as it is first written: with many tokens a sixth of the time of a
//! forward pass, most of it on one thread.

use std::mem::take;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use faer::{MatMut, MatRef};

/// What dropped buffers leave behind.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<f32>>>>);

/// Some values, whose memory goes back where it came from.
#[derive(Debug)]
pub(super) struct Buffer {
    /// At least as many as are used.
    values: Vec<f32>,
    length: usize,
    home: Buffers,
}

impl Buffers {
    /// A buffer whose values are arbitrary until they are written; in debug builds, not a number.
    pub fn get(&self, length: usize) -> Buffer {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is large enough. One that is much too large would be missed elsewhere.
        let fits = |values: &Vec<f32>| (length..=2 * length).contains(&values.len());
        let best = free.iter().enumerate().filter(|(_, values)| fits(values)).min_by_key(|(_, values)| values.len());
        let mut values = match best.map(|(at, _)| at) {
            Some(at) => free.swap_remove(at),
            None => vec![0.0; length],
        };
        if cfg!(debug_assertions) {
            values.fill(f32::NAN);
        }
        Buffer { values, length, home: self.clone() }
    }

    /// Gives all free memory back to the system.
    pub fn release(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Buffer {
    /// As a row-major matrix.
    pub fn matrix(&self, rows: usize, columns: usize) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(self, rows, columns)
    }

    /// As a row-major matrix.
    pub fn matrix_mut(&mut self, rows: usize, columns: usize) -> MatMut<'_, f32> {
        MatMut::from_row_major_slice_mut(self, rows, columns)
    }

    /// The values, which do not come back.
    pub fn into_vec(mut self) -> Vec<f32> {
        let mut values = take(&mut self.values);
        values.truncate(self.length);
        values
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = take(&mut self.values);
        if !values.is_empty() {
            self.home.0.lock().unwrap_or_else(PoisonError::into_inner).push(values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_where_it_fits() {
        let buffers = Buffers::default();
        let place = |length| buffers.get(length).as_ptr();
        let (first, second) = (buffers.get(100), buffers.get(160));
        let (small, large) = (first.as_ptr(), second.as_ptr());
        drop((first, second));
        // The smallest that fits; neither of a tenth of the size nor of less than what is wanted.
        assert_eq!((place(90), place(100), place(101), place(160)), (small, small, large, large));
        assert!(![small, large].contains(&place(10)) && ![small, large].contains(&place(161)));
        let taken = buffers.get(90).into_vec();
        assert_eq!((taken.as_ptr(), taken.len()), (small, 90));
        buffers.release();
        assert!(buffers.0.lock().unwrap().is_empty());
    }

    #[test]
    fn what_nobody_wrote_is_seen() {
        let buffers = Buffers::default();
        buffers.get(8).fill(1.0);
        assert!(buffers.get(8).iter().all(|value| value.is_nan()) || !cfg!(debug_assertions));
    }
}
