//! Causal self-attention with a key-value cache.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::kernels::{dot_rows, softmax, weighted_sum};
use super::thread_pool::ThreadPool;

/// Queries of one matrix product.
const QUERIES: usize = 64;
/// MACs below which distributing the work takes longer than the work.
const SEQUENTIAL: usize = 1 << 15;

/// Keys and values of one layer for one sequence, each `(heads, capacity, head width)`.
#[derive(Clone, Debug)]
pub(super) struct KvCache {
    keys: Vec<f32>,
    values: Vec<f32>,
    capacity: usize,
}

/// The shape of attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub heads: usize,
    /// Of a head.
    pub width: usize,
    /// The factor of the scores.
    pub scale: f32,
}

/// One sequence: its new tokens, and how many it had before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub tokens: usize,
    pub before: usize,
}

impl KvCache {
    /// Room for `capacity` tokens.
    pub fn new(heads: Heads, capacity: usize) -> Self {
        let values = heads.heads * heads.width * capacity;
        Self { keys: vec![0.0; values], values: vec![0.0; values], capacity }
    }
}

/// `y : (tokens, d)` from `qkv : (tokens, 3·d)`, the new tokens of all `spans` one behind the other; their keys and
/// values are added to `caches`.
pub(super) fn attend(
    heads: Heads,
    qkv: &[f32],
    spans: &[Span],
    caches: &mut [&mut KvCache],
    pool: &ThreadPool,
) -> Vec<f32> {
    let Heads { heads: count, width, .. } = heads;
    let d = count * width;
    let mut first = 0;
    for (span, cache) in spans.iter().zip(caches.iter_mut()) {
        for (t, row) in qkv[first * 3 * d..].chunks_exact(3 * d).take(span.tokens).enumerate() {
            for head in 0..count {
                let at = (head * cache.capacity + span.before + t) * width;
                cache.keys[at..at + width].copy_from_slice(&row[d + head * width..][..width]);
                cache.values[at..at + width].copy_from_slice(&row[2 * d + head * width..][..width]);
            }
        }
        first += span.tokens;
    }
    // (head, token, width) of every sequence: one task per head and sequence.
    let mut by_head = vec![0.0; qkv.len() / 3];
    let mut tasks = Vec::with_capacity(spans.len() * count);
    let (mut rest, mut first, mut work) = (by_head.as_mut_slice(), 0, 0);
    for (span, cache) in spans.iter().zip(caches.iter()) {
        for head in 0..count {
            let out;
            (out, rest) = rest.split_at_mut(span.tokens * width);
            let queries = &qkv[first * 3 * d..][..span.tokens * 3 * d];
            tasks.push((queries, head, *span, &**cache, out));
        }
        first += span.tokens;
        work += span.tokens * (span.before + span.tokens) * d;
    }
    let one = |(queries, head, span, cache, out)| attend_head(heads, queries, head, span, cache, out);
    if work < SEQUENTIAL {
        tasks.into_iter().for_each(one);
    } else {
        pool.for_each(tasks.into_iter(), one);
    }
    let mut y = vec![0.0; by_head.len()];
    let mut first = 0;
    for span in spans {
        let sequence = first * d..(first + span.tokens) * d;
        for (head, rows) in by_head[sequence.clone()].chunks_exact(span.tokens.max(1) * width).enumerate() {
            for (y, row) in y[sequence.clone()].chunks_exact_mut(d).zip(rows.chunks_exact(width)) {
                y[head * width..][..width].copy_from_slice(row);
            }
        }
        first += span.tokens;
    }
    y
}

fn attend_head(heads: Heads, qkv: &[f32], head: usize, span: Span, cache: &KvCache, out: &mut [f32]) {
    let Heads { heads: count, width, scale } = heads;
    let Span { tokens, before } = span;
    let d = count * width;
    let known = head * cache.capacity * width..(head * cache.capacity + before + tokens) * width;
    let (keys, values) = (&cache.keys[known.clone()], &cache.values[known]);
    if tokens == 1 {
        let query = &qkv[head * width..][..width];
        let mut scores = vec![0.0; before + 1];
        dot_rows(keys, width, query, 1, &mut scores);
        softmax(&mut scores, scale);
        weighted_sum(out, &scores, values);
        return;
    }
    let queries = MatRef::from_row_major_slice(qkv, tokens, 3 * d).subcols(head * width, width);
    let mut scores = vec![0.0; QUERIES.min(tokens) * (before + tokens)];
    for first in (0..tokens).step_by(QUERIES) {
        let rows = QUERIES.min(tokens - first);
        // Keys that the last of these queries sees.
        let seen = before + first + rows;
        let keys = MatRef::from_row_major_slice(&keys[..seen * width], seen, width);
        let values = MatRef::from_row_major_slice(&values[..seen * width], seen, width);
        let scores = &mut scores[..rows * seen];
        let product = MatMut::from_row_major_slice_mut(scores, rows, seen);
        matmul(product, Accum::Replace, queries.subrows(first, rows), keys.transpose(), 1.0, Par::Seq);
        for (row, scores) in scores.chunks_exact_mut(seen).enumerate() {
            let (past, future) = scores.split_at_mut(before + first + row + 1);
            softmax(past, scale);
            future.fill(0.0);
        }
        let out = MatMut::from_row_major_slice_mut(&mut out[first * width..][..rows * width], rows, width);
        let scores = MatRef::from_row_major_slice(scores, rows, seen);
        matmul(out, Accum::Replace, scores, values, 1.0, Par::Seq);
    }
}
