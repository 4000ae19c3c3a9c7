//! Large blocks of memory.

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
    #[cfg_attr(not(target_os = "linux"), allow(unused_mut))]
    let mut values = vec![T::default(); length];
    #[cfg(target_os = "linux")]
    {
        use rustix::mm::{Advice, madvise};
        const PAGE: usize = 4096;
        let bytes = length * size_of::<T>();
        let start = values.as_mut_ptr().cast::<u8>();
        let skip = start.align_offset(PAGE);
        if bytes > 4 << 20 {
            // If the advice is refused, the work is slower, not wrong.
            // SAFETY: the range lies inside the allocation, and the advice changes no contents.
            let _ = unsafe { madvise(start.add(skip).cast(), (bytes - skip) / PAGE * PAGE, Advice::LinuxHugepage) };
        }
    }
    values
}
