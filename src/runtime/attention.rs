//! Causal self-attention with a key-value cache, whose heads several query heads may share.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::buffers::Buffer;
use super::kernels::{add_scaled, dot_rows, softmax, weighted_sum};
use super::thread_pool::ThreadPool;
use crate::error::{Error, Result};
use crate::numeric::Element;
use crate::numeric::{Float, OwnedValues};

/// Queries of one matrix product.
const QUERIES: usize = 64;
/// Queries of one task.
const TASK: usize = 4 * QUERIES;
/// MACs below which distributing the work takes longer than the work.
const SEQUENTIAL: usize = 1 << 15;
/// Values of a half-precision cache that are widened at a time.
const WIDENED: usize = 1 << 13;

/// Keys and values of one layer for one sequence, each `(key-value heads, capacity, head width)`.
#[derive(Clone, Debug)]
pub(super) struct KvCache {
    keys: OwnedValues,
    values: OwnedValues,
    float: Float,
    capacity: usize,
}

/// The shape of attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    /// Of queries.
    pub heads: usize,
    /// Of keys and values; each serves as many consecutive query heads as any other.
    pub key_value_heads: usize,
    /// Of a head.
    pub width: usize,
    /// The factor of the scores.
    pub scale: f32,
    /// The number of tokens that a token sees, itself included.
    pub window: Option<usize>,
}

/// One sequence: its new tokens, and how many it had before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub tokens: usize,
    pub before: usize,
}

impl Heads {
    /// Values of the queries, keys and values of a token.
    pub fn row(self) -> usize {
        (self.heads + 2 * self.key_value_heads) * self.width
    }

    /// The first position that a token at `position` sees.
    fn first_seen(self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

impl KvCache {
    /// Room for `capacity` tokens.
    pub fn new(heads: Heads, capacity: usize, float: Float) -> Self {
        let length = heads.key_value_heads * heads.width * capacity;
        Self { keys: OwnedValues::zeros(float, length), values: OwnedValues::zeros(float, length), float, capacity }
    }

    /// Adds the keys and values of a token, from its row of queries, keys and values.
    fn add(&mut self, heads: Heads, row: &[f32], position: usize) -> Result<()> {
        let Heads { heads: count, key_value_heads, width, .. } = heads;
        let (keys, values) = row[count * width..].split_at(key_value_heads * width);
        for (head, (key, value)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            let at = (head * self.capacity + position) * width;
            self.keys.write(at, key).and_then(|()| self.values.write(at, value)).map_err(|value| {
                let name = self.float.name();
                Error::Config(format!(
                    "kv_dtype {name}: a key or value of {value:.1e} is beyond its range: load the model with kv_dtype float32"
                ))
            })?;
        }
        Ok(())
    }
}

/// `y : (tokens, heads · width)` from `qkv`, the queries, keys and values of the new tokens of all `spans`, one row
/// behind the other; their keys and values are added to `caches`.
///
/// # Errors
/// [`Error::Config`] for a key or value that the dtype of the cache does not hold.
pub(super) fn attend(
    heads: Heads,
    qkv: &[f32],
    spans: &[Span],
    caches: &mut [&mut KvCache],
    pool: &ThreadPool,
) -> Result<Buffer> {
    let Heads { heads: count, width, .. } = heads;
    let (d, row) = (count * width, heads.row());
    let mut first = 0;
    for (span, cache) in spans.iter().zip(caches.iter_mut()) {
        for (t, values) in qkv[first * row..].chunks_exact(row).take(span.tokens).enumerate() {
            cache.add(heads, values, span.before + t)?;
        }
        first += span.tokens;
    }
    let mut y = pool.buffer(qkv.len() / row * d);
    // Some tokens of a head each.
    let mut tasks = Vec::with_capacity(spans.len() * count);
    let (mut rest, mut first, mut work) = (y.matrix_mut(qkv.len() / row, d), 0, 0);
    for (span, cache) in spans.iter().zip(caches.iter()) {
        let queries = &qkv[first * row..][..span.tokens * row];
        // A token that is decoded takes dot products; one that a text leaves for the last task takes what its others take.
        let alone = span.tokens == 1;
        let mut of_span;
        (of_span, rest) = rest.split_at_row_mut(span.tokens);
        for head in 0..count {
            let mut of_head;
            (of_head, of_span) = of_span.split_at_col_mut(width);
            for (piece, queries) in queries.chunks(TASK * row).enumerate() {
                let span = Span { tokens: queries.len() / row, before: span.before + piece * TASK };
                let out;
                (out, of_head) = of_head.split_at_row_mut(span.tokens);
                tasks.push((Task { queries, head, span, alone }, &**cache, out));
            }
        }
        first += span.tokens;
        work += span.tokens * (span.before + span.tokens) * d;
    }
    let one = |(task, cache, out): (Task<'_>, &KvCache, MatMut<'_, f32>)| match (&cache.keys, &cache.values) {
        (OwnedValues::F32(keys), OwnedValues::F32(values)) => task.attend(heads, keys, values, cache.capacity, out),
        (OwnedValues::F16(keys), OwnedValues::F16(values)) => task.attend(heads, keys, values, cache.capacity, out),
        (OwnedValues::Bf16(keys), OwnedValues::Bf16(values)) => task.attend(heads, keys, values, cache.capacity, out),
        _ => unreachable!("keys and values have one dtype"),
    };
    if work < SEQUENTIAL {
        tasks.into_iter().for_each(one);
    } else {
        pool.for_each(tasks.into_iter(), one);
    }
    Ok(y)
}

/// One head of some consecutive tokens of a sequence.
struct Task<'a> {
    /// Their rows of queries, keys and values.
    queries: &'a [f32],
    head: usize,
    span: Span,
    /// Whether the sequence has one new token.
    alone: bool,
}

impl Task<'_> {
    /// The output of the head, `(tokens, width)`. Its scores are those of [`QUERIES`] tokens at a time, so that memory
    /// grows with the length of the sequence and not with its square.
    fn attend<T: Element>(self, heads: Heads, keys: &[T], values: &[T], capacity: usize, mut out: MatMut<'_, f32>) {
        let Heads { heads: count, key_value_heads, width, scale, .. } = heads;
        let Self { queries: qkv, head, span, alone } = self;
        let Span { tokens, before } = span;
        let row = heads.row();
        // The cached tokens that any of these sees.
        let seen_first = heads.first_seen(before);
        let stored = head / (count / key_value_heads) * capacity;
        let known = (stored + seen_first) * width..(stored + before + tokens) * width;
        let (keys, values) = (&keys[known.clone()], &values[known]);
        if alone {
            let query = &qkv[head * width..][..width];
            let mut scores = vec![0.0; before + 1 - seen_first];
            dot_rows(keys, width, query, 1, &mut scores);
            softmax(&mut scores, scale);
            let out = out.row_mut(0);
            weighted_rows(out.try_as_row_major_mut().expect("a row is contiguous").as_slice_mut(), &scores, values);
            return;
        }
        let (mut wide_keys, mut wide_values) = (Vec::new(), Vec::new());
        let (keys, values) = (T::as_f32(keys, &mut wide_keys), T::as_f32(values, &mut wide_values));
        let queries = MatRef::from_row_major_slice(qkv, tokens, row).subcols(head * width, width);
        let mut scores = vec![0.0; QUERIES.min(tokens) * (before + tokens - seen_first)];
        for first in (0..tokens).step_by(QUERIES) {
            let rows = QUERIES.min(tokens - first);
            // Keys from that which the first of these queries sees first to that which the last one sees last.
            let (begin, end) = (heads.first_seen(before + first), before + first + rows);
            let (range, seen) = ((begin - seen_first) * width..(end - seen_first) * width, end - begin);
            let keys = MatRef::from_row_major_slice(&keys[range.clone()], seen, width);
            let values = MatRef::from_row_major_slice(&values[range], seen, width);
            let scores = &mut scores[..rows * seen];
            let product = MatMut::from_row_major_slice_mut(scores, rows, seen);
            matmul(product, Accum::Replace, queries.subrows(first, rows), keys.transpose(), 1.0, Par::Seq);
            for (row, scores) in scores.chunks_exact_mut(seen).enumerate() {
                let position = before + first + row;
                let (past, future) = scores.split_at_mut(position + 1 - begin);
                let (unseen, past) = past.split_at_mut(heads.first_seen(position) - begin);
                softmax(past, scale);
                unseen.fill(0.0);
                future.fill(0.0);
            }
            let scores = MatRef::from_row_major_slice(scores, rows, seen);
            matmul(out.as_mut().subrows_mut(first, rows), Accum::Replace, scores, values, 1.0, Par::Seq);
        }
    }
}

/// `out = Σ_t weights[t] · rows[t]` for rows one behind the other.
fn weighted_rows<T: Element>(out: &mut [f32], weights: &[f32], rows: &[T]) {
    if T::FLOAT == Float::F32 {
        return weighted_sum(out, weights, T::as_f32(rows, &mut Vec::new()));
    }
    let width = out.len();
    let at_a_time = (WIDENED / width).max(1);
    let (mut scratch, mut sum) = (Vec::new(), vec![0.0; width]);
    out.fill(0.0);
    for (weights, rows) in weights.chunks(at_a_time).zip(rows.chunks(at_a_time * width)) {
        weighted_sum(&mut sum, weights, T::as_f32(rows, &mut scratch));
        add_scaled(out, 1.0, &sum);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::noise;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Each head against a loop over all pairs of tokens, whether they come at once, in pieces or one by one.
        #[test]
        fn attention_is_that_of_a_naive_loop(
            groups in 1..4_usize, key_value_heads in 1..4_usize, width in 1..9_usize, window in prop::option::of(1..90_usize),
            tokens in prop::sample::select(vec![1, 2, 65, 150, 300]), cut in 0..300_usize, float in 0..3_usize, seed in any::<u64>(),
        ) {
            let float = [Float::F32, Float::F16, Float::Bf16][float];
            let heads = Heads { heads: groups * key_value_heads, key_value_heads, width, scale: 0.7, window };
            let (row, d, pool) = (heads.row(), heads.heads * width, ThreadPool::new(2).unwrap());
            let qkv = noise(tokens * row, seed);
            let run = |pieces: &[usize]| {
                let mut cache = KvCache::new(heads, tokens + 3, float);
                let (mut found, mut before) = (Vec::new(), 0);
                for &piece in pieces {
                    let span = Span { tokens: piece, before };
                    let rows = &qkv[before * row..(before + piece) * row];
                    found.extend_from_slice(&attend(heads, rows, &[span], &mut [&mut cache], &pool).unwrap());
                    before += piece;
                }
                found
            };
            let cut = cut.min(tokens - 1);
            let found = [run(&[tokens]), run(&[cut, tokens - cut]), run(&vec![1; tokens])];
            let tolerance = match float {
                Float::F32 => 1e-5,
                Float::F16 => 2e-3,
                Float::Bf16 => 2e-2,
            };
            for t in 0..tokens {
                for head in 0..heads.heads {
                    let part = |t: usize, part: usize| &qkv[t * row + part * width..][..width];
                    let shared = heads.heads + head / groups;
                    let first = window.map_or(0, |window| (t + 1).saturating_sub(window));
                    let dot = |s: usize| part(t, head).iter().zip(part(s, shared)).map(|(a, b)| f64::from(a * b)).sum::<f64>();
                    let weights: Vec<f64> = (first..=t).map(|s| (0.7 * dot(s)).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for i in 0..width {
                        let value = |s: usize| f64::from(part(s, shared + key_value_heads)[i]);
                        let exact: f64 = (first..=t).zip(&weights).map(|(s, weight)| weight / total * value(s)).sum();
                        for found in &found {
                            let difference = (f64::from(found[t * d + head * width + i]) - exact).abs();
                            prop_assert!(difference < tolerance, "{} of {}", difference, tolerance);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_a_half_does_not_hold_is_refused() {
        let heads = Heads { heads: 1, key_value_heads: 1, width: 2, scale: 1.0, window: None };
        for at in 2..6 {
            let mut row = [1.0; 6];
            row[at] = 7e4;
            let span = Span { tokens: 1, before: 0 };
            let run = |float| {
                let (mut cache, pool) = (KvCache::new(heads, 1, float), ThreadPool::new(1).unwrap());
                attend(heads, &row, &[span], &mut [&mut cache], &pool)
            };
            let message = run(Float::F16).unwrap_err().to_string();
            assert!(message.contains("float16") && message.contains("7.0e4"), "{message}");
            assert!(run(Float::F32).unwrap()[0].is_finite());
        }
    }
}
