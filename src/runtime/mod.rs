//! Decoders on the CPU without torch: GPT-2, and Llama with its relatives. A block is described once, by
//! [`DecoderRoles`](crate::family::DecoderRoles) and [`DecoderConfig`], and every family fills the description. Weights are candle tensors; the kernels are this crate's.
//!
//! Every linear map stores its weights out × in, one output per row: a dense matrix, the factors of a permuted
//! Kronecker sum, or those of a low-rank matrix. One token reads every row once, at the speed of memory. Many tokens
//! are a matrix product. Results do not depend on the number of threads.

mod attention;
mod buffers;
mod config;
mod factors;
mod generate;
mod kernels;
mod kronecker;
mod linear;
mod load;
mod low_rank;
mod model;
mod moments;
mod order;
mod rotary;
mod rows;
mod score;
#[cfg(test)]
mod tests;
mod thread_pool;
mod tokenizer;

pub use config::{Activation, Biases, DecoderConfig, refusal};
pub use factors::{Factor, Sides, times_kronecker, times_low_rank};
pub use generate::{Continuation, Sampling};
pub use kronecker::Strategy;
pub use linear::Linear;
pub use model::{Cache, Decoder, Observer, Size};
pub use rotary::Rotary;
pub use score::TokenScore;
pub use thread_pool::ThreadPool;
pub use tokenizer::{DecodeStream, Tokenizer};
