//! Large blocks of memory.

/// Zeros, on huge pages where the system has them. In a block of many megabytes the small pages would cost more than the
/// work on it: each is asked for when it is first written, and looked up when it is read in random order.
///
/// ```
/// assert_eq!(tqcompressor::numeric::memory::zeros::<f32>(3), [0.0; 3]);
/// ```
#[must_use]
pub fn zeros<T: Copy + Default>(length: usize) -> Vec<T> {
    // Asks the system for zeroed memory, so that no page is touched before it is used.
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
            // Advice only: if it is refused, the work is slower, not wrong.
            // SAFETY: the range lies inside the allocation, and the advice changes no contents.
            let _ = unsafe { madvise(start.add(skip).cast(), (bytes - skip) / PAGE * PAGE, Advice::LinuxHugepage) };
        }
    }
    values
}
