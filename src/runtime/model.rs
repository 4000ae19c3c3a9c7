//! The forward pass of a decoder: embeddings, blocks, the final norm and the head.

use std::slice;

use super::attention::{Heads, KvCache, Span, attend};
use super::buffers::Buffer;
use super::config::{Activation, DecoderConfig};
use super::kernels::{add_scaled, gelu_tanh, layer_norm, multiply, rms_norm, silu};
use super::kronecker::Strategy;
use super::linear::Linear;
use super::order::Order;
use super::thread_pool::ThreadPool;
use crate::error::{Error, Result};
use crate::family::{DecoderRoles, Family};
use crate::numeric::Float;
use crate::progress::Progress;

/// Values of one task of an elementwise operation.
const PIECE: usize = 1 << 14;

/// Tokens of one forward pass over several sequences: enough for full matrix products, and few enough for f32 sums of
/// second moments.
const TOKENS: usize = 2048;

/// The number of leading sequences, at least 1, that one forward pass reads.
pub(super) fn fitting(sequences: &[&[u32]]) -> usize {
    let mut tokens = 0;
    let fits = sequences.iter().take_while(|sequence| {
        tokens += sequence.len();
        tokens <= TOKENS
    });
    fits.count().max(1)
}

/// A decoder with a language-model head, dense or compressed, in memory.
///
/// Weights stay in the dtype that they are stored in; everything is computed in f32.
#[derive(Clone, Debug)]
pub struct Decoder {
    pub(super) config: DecoderConfig,
    pub(super) family: &'static Family,
    pub(super) roles: &'static DecoderRoles,
    pub(super) model_type: String,
    /// The token embedding, stored as the map from hidden states to logits. A lookup reads a column.
    pub(super) tokens: Linear,
    /// The position embedding, stored likewise, where there is one.
    pub(super) positions: Option<Linear>,
    pub(super) blocks: Vec<Block>,
    pub(super) last_norm: Norm,
    /// `None` if tied to the token embedding.
    pub(super) head: Option<Linear>,
    pub(super) warning: Option<String>,
    pub(super) size: Size,
    /// The dtype of cached keys and values.
    pub(super) cache_float: Float,
}

/// How large a model is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Elements of the floating-point tensors, a tied head counted once.
    pub parameters: usize,
    /// Stored bytes of all tensors, the permutations included.
    pub bytes: usize,
}

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub attention_norm: Norm,
    /// To queries, keys and values, side by side.
    pub query_key_value: Linear,
    pub attention_projection: Linear,
    pub mlp_norm: Norm,
    /// To the hidden units; to their gates and to what these are multiplied with, side by side.
    pub expansion: Linear,
    /// Hidden value `i` is at place `hidden_order.at(i)` of what `expansion` returns and `projection` reads.
    pub hidden_order: Order,
    pub projection: Linear,
}

/// A norm with its weights.
#[derive(Clone, Debug)]
pub(super) enum Norm {
    Layer { weight: Vec<f32>, bias: Vec<f32> },
    Rms { weight: Vec<f32> },
}

/// Keys and values of one sequence's tokens so far, for all layers.
#[derive(Clone, Debug)]
pub struct Cache {
    length: usize,
    capacity: usize,
    layers: Vec<KvCache>,
}

impl Cache {
    /// The number of tokens so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are no tokens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// Receives the inputs of every linear layer: `(count, rows)` values, and the names in configs of the layers that read
/// them ("h.0.mlp.c_fc"; "layers.0.mlp.gate_proj" and "layers.0.mlp.up_proj"; "lm_head").
pub type Observer<'a> = &'a mut dyn FnMut(&[String], &[f32]) -> Result<()>;

impl Decoder {
    /// Its hyperparameters.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Its `model_type`.
    #[must_use]
    pub fn model_type(&self) -> &str {
        &self.model_type
    }

    /// The names of its embeddings in configs: that of tokens ("wte"), and that of positions where there is one.
    #[must_use]
    pub fn embeddings(&self) -> (&str, Option<&str>) {
        (self.family.token_embedding.as_deref().unwrap_or_default(), self.roles.position_embedding.as_deref())
    }

    /// The name of its head in configs: "lm_head".
    #[must_use]
    pub fn head_name(&self) -> &str {
        self.family.output_head.as_deref().unwrap_or_default()
    }

    /// The same with caches that keep keys and values in this dtype; float32 by default. Half the size is float16, whose
    /// values are rounded to 11 bits.
    #[must_use]
    pub fn with_cache_of(self, cache_float: Float) -> Self {
        Self { cache_float, ..self }
    }

    /// How large it is.
    #[must_use]
    pub fn size(&self) -> Size {
        self.size
    }

    /// An empty cache for a sequence of up to `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::Config`] for more than the model's context.
    pub fn cache(&self, capacity: usize) -> Result<Cache> {
        if capacity > self.config.positions {
            return Err(Error::Config(format!(
                "tokens: expected at most {} in a sequence (the model's context), got {capacity}",
                self.config.positions
            )));
        }
        let layers = self.blocks.iter().map(|_| KvCache::new(self.heads(0), capacity, self.cache_float)).collect();
        Ok(Cache { length: 0, capacity, layers })
    }

    /// The last hidden states, normalised, `(tokens of all sequences, width)`, of new tokens behind those of their
    /// caches, which they are added to. Sequences may be of any lengths: none is padded.
    ///
    /// # Errors
    /// [`Error::Config`] for a token out of range, a sequence longer than its cache, or a key or value that the dtype of
    /// the cache does not hold; [`Error::Cancelled`]; what `observer` returns.
    ///
    /// # Cost
    /// A MAC per token and parameter of the blocks, and `2·width` per pair of tokens and layer. Memory grows with the
    /// tokens and not with their square.
    pub fn forward(
        &self,
        sequences: &[&[u32]],
        caches: &mut [&mut Cache],
        observer: Option<Observer<'_>>,
        pool: &ThreadPool,
        progress: &Progress,
    ) -> Result<Vec<f32>> {
        let hidden = self.hidden(sequences, caches, observer, pool, progress).map(Buffer::into_vec);
        pool.buffers().release();
        hidden
    }

    fn hidden(
        &self,
        sequences: &[&[u32]],
        caches: &mut [&mut Cache],
        mut observer: Option<Observer<'_>>,
        pool: &ThreadPool,
        progress: &Progress,
    ) -> Result<Buffer> {
        let d = self.config.width;
        for (sequence, cache) in sequences.iter().zip(caches.iter()) {
            self.check(sequence, cache)?;
        }
        let spans: Vec<_> = sequences
            .iter()
            .zip(caches.iter())
            .map(|(sequence, cache)| Span { tokens: sequence.len(), before: cache.length })
            .collect();
        let positions = spans.iter().flat_map(|span| span.before..span.before + span.tokens);
        let turns = self.config.rotary.as_ref().map(|rotary| rotary.turns(positions));
        let turned = self.config.heads + self.config.key_value_heads;
        let mut x = self.embed(sequences, &spans, pool);
        let count = x.len() / d;
        let product = |map: &Linear, x: &[f32]| map.times(x, count, Strategy::Cheapest, pool);
        let observed = observer.is_some();
        let mut observe = |layer: usize, modules: &[String], x: &[f32]| match &mut observer {
            None => Ok(()),
            Some(observer) => observer(&self.in_layer(layer, modules), x),
        };
        for (layer, block) in self.blocks.iter().enumerate() {
            progress.check()?;
            let normed = block.attention_norm.forward(&x, self.config.epsilon, pool);
            observe(layer, &self.roles.attention, &normed)?;
            let mut qkv = product(&block.query_key_value, &normed);
            drop(normed);
            let heads = self.heads(layer);
            if let Some(turns) = &turns {
                turns.apply(&mut qkv, heads.row(), turned, pool);
            }
            let mut kv_caches: Vec<_> = caches.iter_mut().map(|cache| &mut cache.layers[layer]).collect();
            let attended = attend(heads, &qkv, &spans, &mut kv_caches, pool)?;
            drop(qkv);
            observe(layer, slice::from_ref(&self.roles.attention_output), &attended)?;
            add(&mut x, &product(&block.attention_projection, &attended), pool);
            drop(attended);
            progress.check()?;
            let normed = block.mlp_norm.forward(&x, self.config.epsilon, pool);
            observe(layer, &self.roles.mlp, &normed)?;
            let mut inner = product(&block.expansion, &normed);
            drop(normed);
            if self.roles.gated() {
                inner = self.config.activation.gate(&inner, self.config.inner, pool);
            } else {
                self.config.activation.apply(&mut inner, pool);
            }
            if observed {
                let gathered = block.hidden_order.gather(&inner, pool);
                observe(layer, slice::from_ref(&self.roles.mlp_output), gathered.as_deref().unwrap_or(&inner))?;
            }
            add(&mut x, &product(&block.projection, &inner), pool);
        }
        for (span, cache) in spans.iter().zip(caches.iter_mut()) {
            cache.length += span.tokens;
        }
        let hidden = self.last_norm.forward(&x, self.config.epsilon, pool);
        if let Some(observer) = &mut observer {
            observer(&[self.head_name().to_owned()], &hidden)?;
        }
        Ok(hidden)
    }

    /// Logits `(count, vocabulary)` of hidden states `(count, width)`.
    ///
    /// # Cost
    /// Two MACs per state and parameter of the head.
    #[must_use]
    pub fn logits(&self, hidden: &[f32], pool: &ThreadPool) -> Vec<f32> {
        self.head.as_ref().unwrap_or(&self.tokens).forward(hidden, hidden.len() / self.config.width, pool)
    }

    /// What its user should hear about its checkpoint, as [`Checkpoint::warning`](crate::checkpoint::read::Checkpoint::warning).
    #[must_use]
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// Whether the head is the token embedding.
    #[must_use]
    pub fn tied(&self) -> bool {
        self.head.is_none()
    }

    /// The number of gathers per token: permutations that could not be merged into a neighbouring map.
    #[must_use]
    pub fn gathers(&self) -> usize {
        let maps = |block: &Block| {
            [&block.query_key_value, &block.attention_projection, &block.expansion, &block.projection]
                .map(Linear::gathers)
        };
        let head = self.head.as_ref().unwrap_or(&self.tokens);
        self.blocks.iter().flat_map(maps).sum::<usize>() + head.gathers()
    }

    fn heads(&self, layer: usize) -> Heads {
        let DecoderConfig { heads, key_value_heads, head_width, scale_scores, scale_by_layer, .. } = self.config;
        let by_width = if scale_scores { (head_width as f32).sqrt().recip() } else { 1.0 };
        let by_layer = if scale_by_layer { ((layer + 1) as f32).recip() } else { 1.0 };
        let window = self.config.window(layer);
        Heads { heads, key_value_heads, width: head_width, scale: by_width * by_layer, window }
    }

    /// The names in configs of modules of a layer.
    pub(super) fn in_layer(&self, layer: usize, modules: &[String]) -> Vec<String> {
        modules.iter().map(|module| format!("{}{layer}.{module}", self.family.layer_prefix())).collect()
    }

    fn check(&self, sequence: &[u32], cache: &Cache) -> Result<()> {
        let vocabulary = self.config.vocabulary;
        if let Some(token) = sequence.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Error::Config(format!("tokens: expected 0 to {}, got {token}", vocabulary - 1)));
        }
        let length = cache.length + sequence.len();
        if length > cache.capacity {
            return Err(Error::Config(format!(
                "tokens: expected at most {} in a sequence, got {length}",
                cache.capacity
            )));
        }
        Ok(())
    }

    fn embed(&self, sequences: &[&[u32]], spans: &[Span], pool: &ThreadPool) -> Buffer {
        let d = self.config.width;
        let tokens =
            sequences.iter().zip(spans).flat_map(|(sequence, span)| sequence.iter().copied().zip(span.before..));
        let tokens: Vec<_> = tokens.collect();
        let mut x = pool.buffer(tokens.len() * d);
        pool.for_each(x.chunks_exact_mut(d).zip(tokens), |(row, (token, position))| {
            row.fill(0.0);
            self.tokens.add_column(token as usize, row);
            if let Some(positions) = &self.positions {
                positions.add_column(position, row);
            }
        });
        x
    }
}

impl Norm {
    fn forward(&self, x: &[f32], epsilon: f32, pool: &ThreadPool) -> Buffer {
        let mut y = pool.buffer(x.len());
        let (Self::Layer { weight, .. } | Self::Rms { weight }) = self;
        let d = weight.len();
        let rows = (PIECE / d).max(1);
        pool.for_each(y.chunks_mut(rows * d).zip(x.chunks(rows * d)), |(y, x)| {
            for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                match self {
                    Self::Layer { weight, bias } => layer_norm(x, epsilon, weight, bias, y),
                    Self::Rms { weight } => rms_norm(x, epsilon, weight, y),
                }
            }
        });
        y
    }
}

/// `x += y`
fn add(x: &mut [f32], y: &[f32], pool: &ThreadPool) {
    pool.for_each(x.chunks_mut(PIECE).zip(y.chunks(PIECE)), |(x, y)| add_scaled(x, 1.0, y));
}

impl Activation {
    fn apply(self, values: &mut [f32], pool: &ThreadPool) {
        pool.for_each(values.chunks_mut(PIECE), |values| self.of(values));
    }

    /// `activation(gate) · up`, `(count, inner)`, of rows of gates and what they are multiplied with, `(count, 2·inner)`.
    fn gate(self, rows: &[f32], inner: usize, pool: &ThreadPool) -> Buffer {
        let mut products = pool.buffer(rows.len() / 2);
        let at_a_time = (PIECE / inner).max(1);
        let pieces = products.chunks_mut(at_a_time * inner).zip(rows.chunks(at_a_time * 2 * inner));
        pool.for_each(pieces, |(products, rows)| {
            for (products, row) in products.chunks_exact_mut(inner).zip(rows.chunks_exact(2 * inner)) {
                let (gates, others) = row.split_at(inner);
                products.copy_from_slice(gates);
                self.of(products);
                multiply(products, others);
            }
        });
        products
    }

    fn of(self, values: &mut [f32]) {
        match self {
            Self::GeluTanh => gelu_tanh(values),
            Self::Silu => silu(values),
            Self::Gelu => values.iter_mut().for_each(|x| {
                let x64 = f64::from(*x);
                *x = (0.5 * x64 * (1.0 + candle_core::cpu::erf::erf_f64(x64 * std::f64::consts::FRAC_1_SQRT_2))) as f32;
            }),
            Self::Relu => values.iter_mut().for_each(|x| *x = x.max(0.0)),
            Self::Tanh => values.iter_mut().for_each(|x| *x = x.tanh()),
        }
    }
}
