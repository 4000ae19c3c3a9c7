//! Simulated annealing over swaps of two elements, without a matrix product or an SVD per swap.
//!
//! A swap changes the kept energy `tr(M G)` for the current projector `M` by a few products of the [`PhaseGram`], so
//! millions of swaps per second can be tried. `M` is refitted between rounds. The kept energy is the maximum over all
//! projectors, so a refit never lowers it.

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use super::phase_gram::PhaseGram;
use super::projector::Projector;
use crate::error::Result;
use crate::numeric::simd::{dispatched, prefetch};
use crate::progress::Progress;

/// The temperatures and the length of an annealing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    /// Temperature of the first round, as a share of an element's mean energy.
    pub start: f64,
    /// Temperature of the last round, likewise.
    pub end: f64,
    /// Rounds; the projector is refitted after each.
    pub rounds: usize,
    /// Swaps tried in a round, for each element; fewer where a swap costs more than [`SWAP_MACS`].
    pub moves: usize,
}

/// MACs per swap up to which all moves of a schedule are made: those of a block of (8, 8). Costlier swaps get fewer
/// moves, so that the time stays the same.
const SWAP_MACS: usize = 512;

/// Anneals `order` and returns the energy kept. The new order may be worse than the old one.
///
/// Cost: `rounds·moves·elements` swaps at `slots·phases²` MACs and `4·slots` cache lines each.
pub(super) fn anneal(
    gram: &PhaseGram,
    order: &mut [usize],
    rank: usize,
    energy: f64,
    schedule: Schedule,
    seed: u64,
    progress: &Progress,
) -> Result<f64> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let unit = energy / gram.elements as f64;
    let cooling = (schedule.end / schedule.start).powf(1.0 / (schedule.rounds.max(2) - 1) as f64);
    let mut projector = Projector::fit(gram, order, rank)?;
    let macs = gram.slots * gram.phases * gram.phases;
    let moves = (schedule.moves * SWAP_MACS / macs.max(SWAP_MACS)).max(1);
    // Some ten milliseconds.
    let at_once = (50_000 * SWAP_MACS / macs.max(SWAP_MACS)).max(1);
    let mut own = Vec::new();
    for round in 0..schedule.rounds {
        let temperature = (unit * schedule.start * cooling.powi(round as i32)) as f32;
        own_energies(gram, &projector, &mut own);
        let mut left = moves * gram.elements;
        while left > 0 {
            progress.check()?;
            let moves = left.min(at_once);
            left -= moves;
            let state = State { gram, projector: &projector, own: &own, temperature };
            match gram.phases {
                1 => try_swaps::<1>(&state, order, moves, &mut random),
                2 => try_swaps::<4>(&state, order, moves, &mut random),
                4 => try_swaps::<16>(&state, order, moves, &mut random),
                8 => try_swaps::<64>(&state, order, moves, &mut random),
                _ => try_swaps::<0>(&state, order, moves, &mut random),
            }
        }
        projector = Projector::fit(gram, order, rank)?;
        progress.advance(gram.elements as u64);
    }
    Ok(projector.kept)
}

/// `own[y·slots + a]`: energy of element `y` alone in slot `a`, independent of the rest of the block.
fn own_energies(gram: &PhaseGram, projector: &Projector, own: &mut Vec<f32>) {
    own.clear();
    for y in 0..gram.elements {
        for a in 0..gram.slots {
            let terms = gram.pair(y, y).iter().zip(projector.between(a, a));
            own.push(terms.map(|(product, coefficient)| product * coefficient).sum());
        }
    }
}

struct State<'a> {
    gram: &'a PhaseGram,
    projector: &'a Projector,
    own: &'a [f32],
    temperature: f32,
}

dispatched! {
    /// Metropolis swaps of two elements of different blocks; `PAIR` is `phases²`, or 0 for any.
    fn try_swaps<const PAIR: usize>(state: &State<'_>, order: &mut [usize], moves: usize, random: &mut Xoshiro256PlusPlus) {
        let mut ahead = [(0, 0); AHEAD];
        for next in &mut ahead {
            *next = draw(state, order, random);
        }
        for step in 0..moves {
            let (x, y) = std::mem::replace(&mut ahead[step % AHEAD], draw(state, order, random));
            if x / state.gram.slots == y / state.gram.slots {
                continue;
            }
            let gain = swap_gain::<PAIR>(state, order, x, y);
            if gain >= 0.0 || accepts(gain, state.temperature, random) {
                order.swap(x, y);
            }
        }
    }
}

/// Swaps drawn ahead of the current one, so that their products are prefetched in time.
const AHEAD: usize = 4;

/// Draws a swap and prefetches the products of its gain for the current order.
#[inline(always)]
fn draw(state: &State<'_>, order: &[usize], random: &mut Xoshiro256PlusPlus) -> (usize, usize) {
    let bits = random.next_u64();
    let (x, y) = (below(order.len(), bits as u32), below(order.len(), (bits >> 32) as u32));
    let (at_x, at_y) = (order[x], order[y]);
    for start in [x - x % state.gram.slots, y - y % state.gram.slots] {
        for &neighbour in &order[start..start + state.gram.slots] {
            prefetch(&state.gram.pair(neighbour, at_x)[0]);
            prefetch(&state.gram.pair(neighbour, at_y)[0]);
        }
    }
    (x, y)
}

/// A number below `limit` from 32 random bits.
#[inline(always)]
fn below(limit: usize, bits: u32) -> usize {
    ((u64::from(bits) * limit as u64) >> 32) as usize
}

/// Metropolis' rule, `u < exp(gain / temperature)` for a uniform `u`.
#[inline(always)]
fn accepts(gain: f32, temperature: f32, random: &mut Xoshiro256PlusPlus) -> bool {
    // exp(−16) is below 1 in 8 million: skip the exponential.
    if gain < -16.0 * temperature {
        return false;
    }
    let uniform = (random.next_u64() >> 40) as f32 * (1.0 / (1_u32 << 24) as f32);
    uniform < (gain / temperature).exp()
}

/// Change of the kept energy if the elements at positions `x` and `y`, in different blocks, are swapped.
#[inline(always)]
fn swap_gain<const PAIR: usize>(state: &State<'_>, order: &[usize], x: usize, y: usize) -> f32 {
    let State { gram, projector, own, .. } = *state;
    let slots = gram.slots;
    let (a, b) = (x % slots, y % slots);
    let (at_x, at_y) = (order[x], order[y]);
    let alone = own[at_y * slots + a] - own[at_x * slots + a] + own[at_x * slots + b] - own[at_y * slots + b];
    let mut lanes = [0.0_f32; 64];
    let mut sum = 0.0;
    let mut add = |neighbour: usize, comes: usize, goes: usize, coefficients: &[f32]| {
        let (comes, goes) = (gram.pair(neighbour, comes), gram.pair(neighbour, goes));
        if PAIR == 0 {
            for ((&comes, &goes), &coefficient) in comes.iter().zip(goes).zip(coefficients) {
                sum += coefficient * (comes - goes);
            }
        } else {
            let comes: &[f32; PAIR] = comes.try_into().expect("PAIR products");
            let goes: &[f32; PAIR] = goes.try_into().expect("PAIR products");
            let coefficients: &[f32; PAIR] = coefficients.try_into().expect("PAIR coefficients");
            for lane in 0..PAIR {
                lanes[lane] += coefficients[lane] * (comes[lane] - goes[lane]);
            }
        }
    };
    for e in 0..slots {
        if e != a {
            add(order[x - a + e], at_y, at_x, projector.between(e, a));
        }
        if e != b {
            add(order[y - b + e], at_x, at_y, projector.between(e, b));
        }
    }
    if PAIR > 0 {
        let mut width = PAIR / 2;
        while width > 0 {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
            width /= 2;
        }
        sum = lanes[0];
    }
    2.0 * sum + alone
}

/// The gain of a swap by the kernel for this number of products and by the one for any number.
#[cfg(test)]
pub(super) fn swap_gains_for_tests(
    gram: &PhaseGram,
    projector: &Projector,
    order: &[usize],
    x: usize,
    y: usize,
) -> [f32; 2] {
    let mut own = Vec::new();
    own_energies(gram, projector, &mut own);
    let state = State { gram, projector, own: &own, temperature: 0.0 };
    let by_width = match gram.phases {
        1 => swap_gain::<1>(&state, order, x, y),
        2 => swap_gain::<4>(&state, order, x, y),
        4 => swap_gain::<16>(&state, order, x, y),
        _ => swap_gain::<0>(&state, order, x, y),
    };
    [by_width, swap_gain::<0>(&state, order, x, y)]
}
