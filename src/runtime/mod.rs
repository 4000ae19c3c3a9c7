//! GPT-2 on the processor without torch: weights are candle tensors, the loops over them are ours.
//!
//! A linear map reads its weights out × in, one output a row, whatever its kind: a dense matrix, the factors of a permuted
//! Kronecker sum, or those of a low-rank one. One token reads every row once, as fast as memory gives them; many tokens are
//! a matrix product. Results do not depend on the number of threads.

mod attention;
mod config;
mod generate;
mod kernels;
mod kronecker;
mod linear;
mod load;
mod low_rank;
mod model;
mod moments;
mod order;
mod rows;
mod score;
#[cfg(test)]
mod tests;
mod thread_pool;
mod tokenizer;

pub use config::{Activation, Gpt2Config};
pub use generate::{Continuation, Sampling};
pub use kronecker::Strategy;
pub use linear::Linear;
pub use model::{Cache, Gpt2, Observer, Size};
pub use score::TokenScore;
pub use thread_pool::ThreadPool;
pub use tokenizer::{DecodeStream, Tokenizer};
