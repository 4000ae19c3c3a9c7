//! Large blocks of memory.

use crate::portable;

/// Zeros, on huge pages where the system has them.
///
/// In a buffer of many megabytes, page faults on first writes and TLB misses on random reads of small pages cost more
/// than the work itself.
///
/// ```
/// assert_eq!(tqcompressor::numeric::memory::zeros::<f32>(3), [0.0; 3]);
/// ```
#[must_use]
pub fn zeros<T: Copy + Default>(length: usize) -> Vec<T> {
    // The system returns zeroed memory, so no page is touched before its first use.
    let mut values = vec![T::default(); length];
    prefer_huge_pages(&mut values);
    values
}

/// Asks for huge pages for a large block; smaller ones stay as they are.
pub fn prefer_huge_pages<T>(values: &mut [T]) {
    if size_of_val(values) > 4 << 20 {
        portable::prefer_huge_pages(values);
    }
}
