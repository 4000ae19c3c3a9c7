//! `Runtime`, a decoder without torch, and `Tokenizer`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use numpy::{PyArray1, PyArray2};
use pyo3::prelude::*;

use super::arrays::shaped;
use super::errors::warn;
use super::jobs;
use crate::error::{Error, Result};
use crate::numeric::Float;
use crate::progress::Progress;
use crate::runtime::{self, Continuation, Decoder, Sampling, ThreadPool};

/// Logits computed between two checks for Ctrl-C: 16 MB.
const LOGITS: usize = 1 << 22;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(native_refusal, module)?)?;
    module.add_class::<Runtime>()?;
    module.add_class::<Tokenizer>()?;
    module.add_class::<DecodeStream>()
}

/// Why the native runtime does not compute the model of a `config.json`, given as its text.
#[pyfunction]
fn native_refusal(py: Python<'_>, config: &str) -> PyResult<Option<String>> {
    jobs::run_here(py, |_| {
        let config = serde_json::from_str(config).map_err(|error| Error::Config(format!("config.json: {error}")))?;
        Ok(runtime::refusal(&config))
    })
}

/// A model in memory, and its number of threads.
#[pyclass(frozen, module = "tqcompressor._core")]
struct Runtime {
    model: Decoder,
    threads: Option<usize>,
}

/// `(log-likelihoods, whether each token was the most probable one)`.
type Scores<'py> = (Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<bool>>);

#[pymethods]
impl Runtime {
    #[staticmethod]
    #[pyo3(signature = (directory, threads, progress, *, int8 = false, kv_dtype = "float32"))]
    fn load(
        py: Python<'_>,
        directory: PathBuf,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
        int8: bool,
        kv_dtype: &str,
    ) -> PyResult<Self> {
        let kv_float = jobs::run_here(py, |_| Float::from_name(kv_dtype))?;
        let pool = jobs::rayon_pool(threads)?;
        let model = jobs::run(py, progress, |progress| pool.install(|| Decoder::load_as(&directory, int8, progress)))?;
        warn(py, model.warning())?;
        Ok(Self { model: model.with_cache_of(kv_float), threads })
    }

    #[getter]
    fn parameters(&self) -> usize {
        self.model.size().parameters
    }

    #[getter]
    fn bytes(&self) -> usize {
        self.model.size().bytes
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.model.config().vocabulary
    }

    #[getter]
    fn context(&self) -> usize {
        self.model.config().positions
    }

    #[getter]
    fn bos_token_id(&self) -> Option<u32> {
        self.model.config().begin_token
    }

    #[getter]
    fn eos_token_id(&self) -> Vec<u32> {
        self.model.config().end_tokens.clone()
    }

    fn logits<'py>(&self, py: Python<'py>, sequences: Vec<Vec<u32>>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let logits = self.run(py, None, |pool, progress| {
            let sequences = slices(&sequences);
            let caches = sequences.iter().map(|tokens| self.model.cache(tokens.len()));
            let mut caches = caches.collect::<Result<Vec<_>>>()?;
            let mut caches: Vec<_> = caches.iter_mut().collect();
            let hidden = self.model.forward(&sequences, &mut caches, None, pool, progress)?;
            let config = self.model.config();
            let mut logits = Vec::with_capacity(hidden.len() / config.width * config.vocabulary);
            for hidden in hidden.chunks((LOGITS / config.vocabulary).max(1) * config.width) {
                progress.check()?;
                logits.extend(self.model.logits(hidden, pool));
            }
            Ok(logits)
        })?;
        let vocab_size = self.vocab_size();
        Ok(shaped(py, (logits.len() / vocab_size, vocab_size), logits))
    }

    fn score<'py>(&self, py: Python<'py>, sequences: Vec<Vec<u32>>, scored: Vec<usize>) -> PyResult<Scores<'py>> {
        let scores = self.run(py, None, |pool, progress| {
            let sequences = slices(&sequences);
            if sequences.len() != scored.len() {
                return Err(Error::Config(format!(
                    "scored: expected one number for each of {} sequences, got {}",
                    sequences.len(),
                    scored.len()
                )));
            }
            self.model.score(&sequences, &scored, pool, progress)
        })?;
        let likelihoods = scores.iter().map(|score| score.log_likelihood).collect();
        let right = scores.iter().map(|score| score.most_probable).collect();
        Ok((PyArray1::from_vec(py, likelihoods), PyArray1::from_vec(py, right)))
    }

    #[allow(clippy::too_many_arguments)]
    fn generate(
        &self,
        py: Python<'_>,
        prompts: Vec<Vec<u32>>,
        max_new_tokens: usize,
        temperature: f64,
        top_k: usize,
        top_p: f64,
        seed: u64,
        eos_token_id: Vec<u32>,
        on_tokens: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Vec<u32>>> {
        let pool = jobs::thread_pool(self.threads)?;
        let sampling = Sampling { temperature, top_k, top_p, seed };
        let continuation = Continuation { most: max_new_tokens, end_tokens: &eos_token_id, sampling };
        let fresh = Mutex::new(Vec::new());
        let tell = |py: Python<'_>| match &on_tokens {
            None => Ok(()),
            Some(tell) => {
                let tokens = std::mem::take(&mut *fresh.lock().expect("no thread panicked"));
                if tokens.is_empty() { Ok(()) } else { tell.call1(py, (tokens,)).map(|_| ()) }
            }
        };
        let job = |progress: &Progress| {
            let pool = pool;
            let keep = |prompt: usize, token: u32| {
                if on_tokens.is_some() {
                    fresh.lock().expect("no thread panicked").push((prompt, token));
                }
            };
            self.model.generate(&slices(&prompts), &continuation, keep, &pool, progress)
        };
        jobs::run_watched(py, |py, _| tell(py), job)
    }

    /// Whether the head is the token embedding.
    #[getter]
    fn tied(&self) -> bool {
        self.model.tied()
    }

    #[getter]
    fn model_type(&self) -> &str {
        self.model.model_type()
    }

    /// The names of the embeddings in configs: of tokens, and of positions.
    #[getter]
    fn embeddings(&self) -> (&str, Option<&str>) {
        self.model.embeddings()
    }

    #[getter]
    fn output_head(&self) -> &str {
        self.model.head_name()
    }

    fn linear_layers(&self) -> Vec<(Vec<String>, usize)> {
        self.model.linear_layers()
    }

    fn input_moments<'py>(
        &self,
        py: Python<'py>,
        sequences: Vec<Vec<u32>>,
        names: Vec<String>,
        max_memory: usize,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Bound<'py, PyArray2<f32>>>> {
        let moments = self.run(py, progress, |pool, progress| {
            self.model.input_moments(&slices(&sequences), &names, max_memory, pool, progress)
        })?;
        let square = |moment: Vec<f32>| {
            let size = moment.len().isqrt();
            shaped(py, (size, size), moment)
        };
        Ok(moments.into_iter().map(square).collect())
    }
}

impl Runtime {
    /// As [`jobs::run`], with the threads of a forward pass.
    fn run<T: Send>(
        &self,
        py: Python<'_>,
        callback: Option<Py<PyAny>>,
        job: impl FnOnce(&ThreadPool, &Progress) -> Result<T> + Send,
    ) -> PyResult<T> {
        let pool = jobs::thread_pool(self.threads)?;
        jobs::run(py, callback, |progress| {
            // Moved in, because a `ThreadPool` is not `Sync`.
            let pool = pool;
            job(&pool, progress)
        })
    }
}

fn slices(sequences: &[Vec<u32>]) -> Vec<&[u32]> {
    sequences.iter().map(Vec::as_slice).collect()
}

/// The tokenizer of a checkpoint.
#[pyclass(frozen, module = "tqcompressor._core")]
struct Tokenizer(Arc<runtime::Tokenizer>);

#[pymethods]
impl Tokenizer {
    #[staticmethod]
    fn load(py: Python<'_>, directory: PathBuf) -> PyResult<Self> {
        Ok(Self(Arc::new(jobs::run(py, None, |_| runtime::Tokenizer::load(&directory))?)))
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.vocabulary()
    }

    #[getter]
    fn bos_token_id(&self) -> Option<u32> {
        self.0.begin_token()
    }

    #[getter]
    fn eos_token_id(&self) -> Option<u32> {
        self.0.end_token()
    }

    fn encode(&self, py: Python<'_>, text: String) -> PyResult<Vec<u32>> {
        let tokenizer = Arc::clone(&self.0);
        jobs::run_detached(py, move || tokenizer.encode(&text))
    }

    fn decode(&self, py: Python<'_>, tokens: Vec<u32>, skip_special_tokens: bool) -> PyResult<String> {
        jobs::run_here(py, |_| self.0.decode(&tokens, skip_special_tokens))
    }

    fn decode_stream(&self, skip_special_tokens: bool) -> DecodeStream {
        DecodeStream(Mutex::new(runtime::DecodeStream::new(Arc::clone(&self.0), skip_special_tokens)))
    }
}

/// The text of tokens that come one after another.
#[pyclass(frozen, module = "tqcompressor._core")]
struct DecodeStream(Mutex<runtime::DecodeStream>);

#[pymethods]
impl DecodeStream {
    fn push(&self, py: Python<'_>, tokens: Vec<u32>) -> PyResult<String> {
        jobs::run_here(py, |_| self.0.lock().unwrap_or_else(PoisonError::into_inner).push(&tokens))
    }
}
