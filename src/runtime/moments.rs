//! Second moments of the inputs of linear layers: `Σ xᵀx` over the tokens of a text.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::model::{Block, Gpt2, fitting};
use super::thread_pool::ThreadPool;
use crate::error::{Error, Result};
use crate::progress::Progress;

/// Rows of a moment that a thread works on at a time.
const PANEL: usize = 192;

/// The sum of `xᵀx` of one layer's inputs: `(size, size)`, of which the lower triangle is kept.
struct MomentSum {
    size: usize,
    sum: Vec<f64>,
}

impl MomentSum {
    fn add(&mut self, x: &[f32], pool: &ThreadPool) {
        let size = self.size;
        let x = MatRef::from_row_major_slice(x, x.len() / size, size);
        pool.for_each(self.sum.chunks_mut(PANEL * size).enumerate(), |(index, sum)| {
            let (first, height) = (index * PANEL, sum.len() / size);
            let width = first + height;
            let mut product = vec![0.0_f32; height * width];
            let out = MatMut::from_row_major_slice_mut(&mut product, height, width);
            matmul(out, Accum::Replace, x.subcols(first, height).transpose(), x.subcols(0, width), 1.0, Par::Seq);
            for (sum, product) in sum.chunks_exact_mut(size).zip(product.chunks_exact(width)) {
                sum.iter_mut().zip(product).for_each(|(sum, &product)| *sum += f64::from(product));
            }
        });
    }

    fn mean(mut self, tokens: usize) -> Vec<f32> {
        for i in 0..self.size {
            for j in 0..i {
                self.sum[j * self.size + i] = self.sum[i * self.size + j];
            }
        }
        self.sum.iter().map(|sum| (sum / tokens as f64) as f32).collect()
    }
}

impl Gpt2 {
    /// `E[xᵀx]`, row-major `(m, m)`, of the inputs of the layers in `names` ("h.0.attn.c_attn", "lm_head"), over all
    /// tokens of all `sequences`.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that is no linear layer, no tokens, a token out of range or a sequence longer than
    /// the context; [`Error::Cancelled`].
    ///
    /// # Cost
    /// A forward pass, `m²` MACs a token and name, and `12·m²` bytes for each name.
    ///
    /// # Source
    /// Wang et al., *SVD-LLM*, arXiv 2403.07378.
    pub fn input_moments(
        &self,
        sequences: &[&[u32]],
        names: &[String],
        pool: &ThreadPool,
        progress: &Progress,
    ) -> Result<Vec<Vec<f32>>> {
        let tokens: usize = sequences.iter().map(|sequence| sequence.len()).sum();
        if tokens == 0 {
            return Err(Error::Config("tokens: expected at least one, got none".into()));
        }
        let layers = self.linear_layers();
        let moment = |name: &String| match layers.iter().find(|(known, _)| known == name) {
            Some(&(_, size)) => Ok(MomentSum { size, sum: vec![0.0; size * size] }),
            None => Err(Error::Config(format!("names: expected linear layers, got {name:?}"))),
        };
        let mut moments = names.iter().map(moment).collect::<Result<Vec<_>>>()?;
        progress.expect(tokens as u64);
        let mut rest = sequences;
        while !rest.is_empty() {
            let (batch, others) = rest.split_at(fitting(rest));
            let mut caches = batch.iter().map(|tokens| self.cache(tokens.len())).collect::<Result<Vec<_>>>()?;
            let mut observe = |name: &str, x: &[f32]| {
                progress.check()?;
                if let Some(at) = names.iter().position(|wanted| wanted == name) {
                    moments[at].add(x, pool);
                }
                Ok(())
            };
            self.forward(batch, &mut caches.iter_mut().collect::<Vec<_>>(), Some(&mut observe), pool, progress)?;
            progress.advance(batch.iter().map(|sequence| sequence.len() as u64).sum());
            rest = others;
        }
        Ok(moments.into_iter().map(|moment| moment.mean(tokens)).collect())
    }

    /// Every linear layer by its name in configs, in model order, with its number of inputs; the head, if the
    /// checkpoint says that it has one, is "lm_head".
    #[must_use]
    pub fn linear_layers(&self) -> Vec<(String, usize)> {
        let of_block = |(layer, block): (usize, &Block)| {
            [
                ("attn.c_attn", &block.query_key_value),
                ("attn.c_proj", &block.attention_projection),
                ("mlp.c_fc", &block.expansion),
                ("mlp.c_proj", &block.projection),
            ]
            .map(|(module, linear)| (format!("h.{layer}.{module}"), linear.rows))
        };
        let head = self.config.language_model.then(|| ("lm_head".to_owned(), self.config.width));
        self.blocks.iter().enumerate().flat_map(of_block).chain(head).collect()
    }
}
