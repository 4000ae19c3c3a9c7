//! Second moments of the inputs of linear layers: `Σ xᵀx` over the tokens of a text.

use std::slice;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::config::DecoderConfig;
use super::model::{Decoder, fitting};
use super::thread_pool::ThreadPool;
use crate::error::{Error, Result};
use crate::numeric::spill::Spill;
use crate::progress::Progress;

/// Rows of a moment that a thread works on at a time.
const PANEL: usize = 192;

/// The sum of `xᵀx` of one layer's inputs: the panels of rows of its lower triangle, each to the end of its diagonal
/// block.
struct MomentSum {
    size: usize,
    place: Place,
}

enum Place {
    Memory(Vec<f64>),
    File(u64),
}

/// The sums of some layers: in memory up to a bound, the rest in a temporary file.
struct MomentSums {
    sums: Vec<MomentSum>,
    spill: Spill,
    /// The sum from the file that is added to.
    current: Vec<f64>,
}

impl MomentSums {
    fn new(sizes: &[usize], mut room: usize) -> Result<Self> {
        let mut spill = Spill::default();
        let place = |&size: &usize| {
            let zeros = vec![0.0; triangle(size)];
            let place = match room.checked_sub(size_of_val(&zeros[..])) {
                Some(left) => {
                    room = left;
                    Place::Memory(zeros)
                }
                None => Place::File(spill.append(&zeros)?),
            };
            Ok(MomentSum { size, place })
        };
        let sums = sizes.iter().map(place).collect::<Result<_>>()?;
        Ok(Self { sums, spill, current: Vec::new() })
    }

    fn add(&mut self, index: usize, x: &[f32], pool: &ThreadPool) -> Result<()> {
        let MomentSum { size, place } = &mut self.sums[index];
        match place {
            Place::Memory(sum) => add_products(*size, sum, x, pool),
            Place::File(place) => {
                self.current.resize(triangle(*size), 0.0);
                self.spill.read(*place, &mut self.current)?;
                add_products(*size, &mut self.current, x, pool);
                self.spill.write(*place, &self.current)?;
            }
        }
        Ok(())
    }

    /// The means; each sum is gone when its mean is there.
    fn means(mut self, tokens: usize) -> Result<Vec<Vec<f32>>> {
        let mean = |MomentSum { size, place }| {
            let sum = match place {
                Place::Memory(sum) => sum,
                Place::File(place) => {
                    self.current.resize(triangle(size), 0.0);
                    self.spill.read(place, &mut self.current)?;
                    std::mem::take(&mut self.current)
                }
            };
            Ok(mean_of(size, &sum, tokens))
        };
        self.sums.into_iter().map(mean).collect()
    }
}

/// The first row and the number of rows of each panel of a triangle.
fn panels(size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..size).step_by(PANEL).map(move |first| (first, PANEL.min(size - first)))
}

/// The numbers of all panels.
fn triangle(size: usize) -> usize {
    panels(size).map(|(first, height)| height * (first + height)).sum()
}

fn add_products(size: usize, mut sum: &mut [f64], x: &[f32], pool: &ThreadPool) {
    let x = MatRef::from_row_major_slice(x, x.len() / size, size);
    let parts: Vec<_> = panels(size)
        .map(|(first, height)| {
            let (panel, rest) = std::mem::take(&mut sum).split_at_mut(height * (first + height));
            sum = rest;
            (first, height, panel)
        })
        .collect();
    pool.for_each(parts.into_iter(), |(first, height, sum)| {
        let width = first + height;
        let mut product = vec![0.0_f32; height * width];
        let out = MatMut::from_row_major_slice_mut(&mut product, height, width);
        matmul(out, Accum::Replace, x.subcols(first, height).transpose(), x.subcols(0, width), 1.0, Par::Seq);
        sum.iter_mut().zip(&product).for_each(|(sum, &product)| *sum += f64::from(product));
    });
}

/// The whole symmetric matrix.
fn mean_of(size: usize, mut sum: &[f64], tokens: usize) -> Vec<f32> {
    let mut mean = vec![0.0; size * size];
    for (first, height) in panels(size) {
        let (panel, rest) = sum.split_at(height * (first + height));
        sum = rest;
        for (i, row) in (first..).zip(panel.chunks_exact(first + height)) {
            for (j, &sum) in row[..=i].iter().enumerate() {
                let value = (sum / tokens as f64) as f32;
                (mean[i * size + j], mean[j * size + i]) = (value, value);
            }
        }
    }
    mean
}

impl Decoder {
    /// `E[xᵀx]`, row-major `(m, m)`, of the inputs of the layers in `names` ("h.0.attn.c_attn", "lm_head"), over all
    /// tokens of all `sequences`. Of layers that share their inputs it is enough to name one. The sums take `max_memory` bytes and that of one layer; what exceeds it is in a
    /// temporary file.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that is no linear layer, no tokens, a token out of range or a sequence longer than
    /// the context; [`Error::Cancelled`]; [`Error::Io`] for a temporary file that cannot be written.
    ///
    /// # Cost
    /// A forward pass, little more than `m²/2` MACs a token and name, and `4·m²` bytes for each name beside the result,
    /// which takes as much.
    ///
    /// # Source
    /// Wang et al., *SVD-LLM*, arXiv 2403.07378.
    pub fn input_moments(
        &self,
        sequences: &[&[u32]],
        names: &[String],
        max_memory: usize,
        pool: &ThreadPool,
        progress: &Progress,
    ) -> Result<Vec<Vec<f32>>> {
        let tokens: usize = sequences.iter().map(|sequence| sequence.len()).sum();
        if tokens == 0 {
            return Err(Error::Config("tokens: expected at least one, got none".into()));
        }
        let layers = self.linear_layers();
        let size = |name: &String| match layers.iter().find(|(known, _)| known.contains(name)) {
            Some(&(_, size)) => Ok(size),
            None => Err(Error::Config(format!("names: expected linear layers, got {name:?}"))),
        };
        let mut moments = MomentSums::new(&names.iter().map(size).collect::<Result<Vec<_>>>()?, max_memory)?;
        progress.expect(tokens as u64);
        let mut rest = sequences;
        while !rest.is_empty() {
            let (batch, others) = rest.split_at(fitting(rest));
            let mut caches = batch.iter().map(|tokens| self.cache(tokens.len())).collect::<Result<Vec<_>>>()?;
            let mut observe = |readers: &[String], x: &[f32]| {
                progress.check()?;
                for (at, _) in names.iter().enumerate().filter(|(_, wanted)| readers.contains(wanted)) {
                    moments.add(at, x, pool)?;
                }
                Ok(())
            };
            self.forward(batch, &mut caches.iter_mut().collect::<Vec<_>>(), Some(&mut observe), pool, progress)?;
            progress.advance(batch.iter().map(|sequence| sequence.len() as u64).sum());
            rest = others;
        }
        moments.means(tokens)
    }

    /// All linear layers in model order: the names in configs of those that share their inputs, and the number of
    /// inputs; the head, if the checkpoint says that it has one, is the last.
    #[must_use]
    pub fn linear_layers(&self) -> Vec<(Vec<String>, usize)> {
        let DecoderConfig { width, heads, head_width, inner, .. } = self.config;
        let modules = [
            (self.roles.attention.as_slice(), width),
            (slice::from_ref(&self.roles.attention_output), heads * head_width),
            (&self.roles.mlp, width),
            (slice::from_ref(&self.roles.mlp_output), inner),
        ];
        let of_layer = |layer: usize| modules.map(|(modules, inputs)| (self.in_layer(layer, modules), inputs));
        let head = self.config.language_model.then(|| (vec![self.head_name().to_owned()], width));
        (0..self.blocks.len()).flat_map(of_layer).chain(head).collect()
    }
}
