//! What the tests of several modules share.

/// Uniform values in (−1, 1) that depend on `seed` only.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<f32> {
    use rand_xoshiro::rand_core::{Rng, SeedableRng};
    let mut random = rand_xoshiro::Xoshiro256PlusPlus::seed_from_u64(seed);
    (0..length).map(|_| (random.next_u64() >> 40) as f32 / (1_u32 << 23) as f32 - 1.0).collect()
}
