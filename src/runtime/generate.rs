//! Text generation, token by token.

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use super::kernels::largest;
use super::model::{Cache, Decoder, fitting};
use super::thread_pool::ThreadPool;
use crate::error::{Error, Result};
use crate::progress::Progress;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// The divisor of the logits; 0 takes the most probable token.
    pub temperature: f64,
    /// Sample from this many of the most probable tokens; 0 for all.
    pub top_k: usize,
    /// Sample from the most probable tokens that together have this probability; 1 for all.
    pub top_p: f64,
    /// Seed of the sampling. Each sequence of a batch has its own generator, so that it does not depend on the others.
    pub seed: u64,
}

impl Sampling {
    /// The most probable token each time.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] naming the value.
    pub fn check(&self) -> Result<()> {
        if !(0.0..f64::INFINITY).contains(&self.temperature) {
            return Err(Error::Config(format!("temperature: expected at least 0, got {}", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::Config(format!("top_p: expected above 0 and at most 1, got {}", self.top_p)));
        }
        Ok(())
    }
}

/// The parameters of a generation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Continuation<'a> {
    /// The maximum number of new tokens.
    pub most: usize,
    /// Tokens after which a sequence ends.
    pub end_tokens: &'a [u32],
    /// How tokens are chosen.
    pub sampling: Sampling,
}

impl Decoder {
    /// Continues every prompt by up to `most` tokens, fewer where one of `end_tokens` comes first, which is the last
    /// one returned. `on_token` is called for every token as soon as it is known, with the number of its prompt.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty prompt, a token out of range, or more tokens than the model's context holds;
    /// [`Error::Cancelled`].
    ///
    /// # Cost
    /// One pass over the prompts, some at a time, then one pass over the weights for a token of all of them. The caches
    /// hold `2·layers·width` values a token.
    pub fn generate(
        &self,
        prompts: &[&[u32]],
        continuation: &Continuation<'_>,
        on_token: impl Fn(usize, u32),
        pool: &ThreadPool,
        progress: &Progress,
    ) -> Result<Vec<Vec<u32>>> {
        let Continuation { most, end_tokens, ref sampling } = *continuation;
        sampling.check()?;
        let context = self.config.positions;
        for prompt in prompts {
            if prompt.is_empty() {
                return Err(Error::Config("prompt: expected at least one token, got none".into()));
            }
            if prompt.len().saturating_add(most) > context {
                return Err(Error::Config(format!(
                    "prompt: expected at most {} tokens, so that {most} more fit into the context of {context}, got {}",
                    context.saturating_sub(most),
                    prompt.len()
                )));
            }
        }
        let mut generated = vec![Vec::new(); prompts.len()];
        if most == 0 || prompts.is_empty() {
            return Ok(generated);
        }
        progress.expect((prompts.len() * most) as u64);
        // The last token needs no cache entry: nothing follows it.
        let caches = prompts.iter().map(|prompt| self.cache(prompt.len() + most - 1)).collect::<Result<Vec<_>>>()?;
        let random = |i: usize| Xoshiro256PlusPlus::seed_from_u64(sampling.seed.wrapping_add(i as u64));
        let mut active: Vec<_> =
            caches.into_iter().enumerate().map(|(i, cache)| Active { index: i, cache, random: random(i) }).collect();
        let mut next: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.to_vec()).collect();
        while !active.is_empty() {
            let mut caches: Vec<_> = active.iter_mut().map(|active| &mut active.cache).collect();
            let sequences: Vec<_> = next.iter().map(Vec::as_slice).collect();
            let (mut states, mut read) = (Vec::new(), 0);
            while read < sequences.len() {
                let range = read..read + fitting(&sequences[read..]);
                let (sequences, caches) = (&sequences[range.clone()], &mut caches[range.clone()]);
                let hidden = self.forward(sequences, caches, None, pool, progress)?;
                states.extend(last_states(&hidden, sequences, self.config.width));
                read = range.end;
            }
            let logits = self.logits(&states, pool);
            progress.check()?;
            let rows = logits.chunks_exact(self.config.vocabulary);
            next = active
                .iter_mut()
                .zip(rows)
                .map(|(active, row)| vec![choose(row, sampling, &mut active.random)])
                .collect();
            for (active, token) in active.iter().zip(&next) {
                generated[active.index].push(token[0]);
                on_token(active.index, token[0]);
                progress.advance(1);
            }
            let goes_on =
                |active: &Active, token: u32| generated[active.index].len() < most && !end_tokens.contains(&token);
            let both = active.into_iter().zip(next).filter(|(active, token)| goes_on(active, token[0]));
            (active, next) = both.unzip();
        }
        progress.finish();
        Ok(generated)
    }
}

/// A sequence that has not ended.
struct Active {
    index: usize,
    cache: Cache,
    random: Xoshiro256PlusPlus,
}

/// The last hidden state of every sequence.
fn last_states(hidden: &[f32], sequences: &[&[u32]], width: usize) -> impl Iterator<Item = f32> {
    let mut end = 0;
    let states = sequences.iter().flat_map(move |sequence| {
        end += sequence.len();
        &hidden[(end - 1) * width..end * width]
    });
    states.copied()
}

/// The first of the largest.
pub(super) fn most_probable(logits: &[f32]) -> usize {
    let most = largest(logits);
    logits.iter().position(|&logit| logit == most).unwrap_or(0)
}

fn choose(logits: &[f32], sampling: &Sampling, random: &mut Xoshiro256PlusPlus) -> u32 {
    let Sampling { temperature, top_k, top_p, .. } = *sampling;
    let token = |at: usize| u32::try_from(at).expect("tokens are u32");
    if temperature == 0.0 {
        return token(most_probable(logits));
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let descending = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
    if (1..order.len()).contains(&top_k) {
        order.select_nth_unstable_by(top_k - 1, descending);
        order.truncate(top_k);
    }
    order.sort_unstable_by(descending);
    let largest = f64::from(logits[order[0]]);
    let mut weights: Vec<f64> =
        order.iter().map(|&at| ((f64::from(logits[at]) - largest) / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    if top_p < 1.0 {
        let mut seen = 0.0;
        let kept = weights.iter().take_while(|&&weight| {
            let before = seen;
            seen += weight / total;
            before < top_p
        });
        let kept = kept.count();
        weights.truncate(kept);
    }
    // 53 random bits make a uniform number in [0, 1).
    let mut left = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64 * weights.iter().sum::<f64>();
    for (&at, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return token(at);
        }
    }
    token(order[weights.len() - 1])
}
