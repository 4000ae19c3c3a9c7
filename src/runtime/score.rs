//! Log-likelihoods of texts.

use super::generate::most_probable;
use super::kernels::sum_of_exponentials;
use super::model::Decoder;
use super::thread_pool::ThreadPool;
use crate::error::{Error, Result};
use crate::progress::Progress;

/// Logits in memory at a time.
const LOGITS: usize = 1 << 23;

/// The score of one token, given those before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// `ln p`, in nats.
    pub log_likelihood: f64,
    /// Whether no token was more probable.
    pub most_probable: bool,
}

impl Decoder {
    /// Scores the last `scored[i]` tokens of each sequence, given all tokens before them, sequence by sequence.
    ///
    /// # Errors
    /// [`Error::Config`] for a token out of range, a sequence longer than the context by more than the last token,
    /// which is never read, or a first token that is to be scored; [`Error::Cancelled`].
    ///
    /// # Cost
    /// One forward pass, and logits for the scored tokens only, a bounded number of them at a time.
    pub fn score(
        &self,
        sequences: &[&[u32]],
        scored: &[usize],
        pool: &ThreadPool,
        progress: &Progress,
    ) -> Result<Vec<TokenScore>> {
        let (d, vocabulary) = (self.config.width, self.config.vocabulary);
        for (sequence, &scored) in sequences.iter().zip(scored) {
            if scored >= sequence.len() {
                return Err(Error::Config(format!(
                    "scored: expected fewer than the {} tokens of the sequence, got {scored}",
                    sequence.len()
                )));
            }
            // The inputs are checked by `forward`.
            let last = sequence[sequence.len() - 1];
            if last as usize >= vocabulary {
                return Err(Error::Config(format!("tokens: expected 0 to {}, got {last}", vocabulary - 1)));
            }
        }
        let inputs: Vec<_> = sequences.iter().map(|sequence| &sequence[..sequence.len() - 1]).collect();
        let mut caches = inputs.iter().map(|input| self.cache(input.len())).collect::<Result<Vec<_>>>()?;
        let hidden = self.forward(&inputs, &mut caches.iter_mut().collect::<Vec<_>>(), None, pool, progress)?;
        drop(caches);
        let (mut states, mut targets, mut end) = (Vec::new(), Vec::new(), 0);
        for ((sequence, input), &scored) in sequences.iter().zip(&inputs).zip(scored) {
            end += input.len();
            states.extend_from_slice(&hidden[(end - scored) * d..end * d]);
            targets.extend_from_slice(&sequence[sequence.len() - scored..]);
        }
        let at_a_time = (LOGITS / vocabulary).max(1);
        let mut scores = Vec::with_capacity(targets.len());
        for (states, targets) in states.chunks(at_a_time * d).zip(targets.chunks(at_a_time)) {
            progress.check()?;
            let logits = self.logits(states, pool);
            let score = |(row, &target): (&[f32], &u32)| {
                let best = most_probable(row);
                let difference = f64::from(row[target as usize]) - f64::from(row[best]);
                let log_likelihood = difference - sum_of_exponentials(row, row[best]).ln();
                TokenScore { log_likelihood, most_probable: best == target as usize }
            };
            let first = scores.len();
            scores.resize(first + targets.len(), TokenScore { log_likelihood: 0.0, most_probable: false });
            let rows = logits.chunks_exact(vocabulary).zip(targets).zip(&mut scores[first..]);
            pool.for_each(rows, |(row, out)| *out = score(row));
        }
        Ok(scores)
    }
}
