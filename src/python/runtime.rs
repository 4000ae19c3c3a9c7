//! `Runtime`: a GPT-2 that computes without torch.

use std::path::PathBuf;
use std::sync::Mutex;

use numpy::{PyArray1, PyArray2};
use pyo3::prelude::*;

use super::arrays::shaped;
use super::jobs;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::runtime::{Continuation, Gpt2, Sampling};

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Runtime>()
}

/// A model in memory, and the threads that it computes with.
#[pyclass(frozen, module = "tqcompressor._core")]
struct Runtime {
    model: Gpt2,
    threads: Option<usize>,
}

/// `(log-likelihoods, whether each token was the most probable one)`.
type Scores<'py> = (Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<bool>>);

#[pymethods]
impl Runtime {
    #[staticmethod]
    fn load(py: Python<'_>, directory: PathBuf, threads: Option<usize>, progress: Option<Py<PyAny>>) -> PyResult<Self> {
        let pool = jobs::pool(threads)?;
        let model = jobs::run(py, progress, |progress| pool.install(|| Gpt2::load(&directory, progress)))?;
        Ok(Self { model, threads })
    }

    #[getter]
    fn vocabulary(&self) -> usize {
        self.model.config().vocabulary
    }

    #[getter]
    fn context(&self) -> usize {
        self.model.config().positions
    }

    #[getter]
    fn begin_token(&self) -> Option<u32> {
        self.model.config().begin_token
    }

    #[getter]
    fn end_tokens(&self) -> Vec<u32> {
        self.model.config().end_tokens.clone()
    }

    fn logits<'py>(&self, py: Python<'py>, sequences: Vec<Vec<u32>>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let workers = jobs::workers(self.threads)?;
        let logits = jobs::run(py, None, |progress| {
            let workers = workers;
            let sequences: Vec<_> = sequences.iter().map(Vec::as_slice).collect();
            let caches = sequences.iter().map(|tokens| self.model.cache(tokens.len()));
            let mut caches = caches.collect::<Result<Vec<_>>>()?;
            let mut caches: Vec<_> = caches.iter_mut().collect();
            let hidden = self.model.forward(&sequences, &mut caches, None, &workers, progress)?;
            Ok(self.model.logits(&hidden, &workers))
        })?;
        let vocabulary = self.vocabulary();
        Ok(shaped(py, (logits.len() / vocabulary, vocabulary), logits))
    }

    fn score<'py>(&self, py: Python<'py>, sequences: Vec<Vec<u32>>, scored: Vec<usize>) -> PyResult<Scores<'py>> {
        let workers = jobs::workers(self.threads)?;
        let scores = jobs::run(py, None, |progress| {
            let workers = workers;
            let sequences: Vec<_> = sequences.iter().map(Vec::as_slice).collect();
            if sequences.len() != scored.len() {
                return Err(Error::Config(format!(
                    "scored: expected one number for each of {} sequences, got {}",
                    sequences.len(),
                    scored.len()
                )));
            }
            self.model.score(&sequences, &scored, &workers, progress)
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
        end_tokens: Vec<u32>,
        on_tokens: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Vec<u32>>> {
        let workers = jobs::workers(self.threads)?;
        let sampling = Sampling { temperature, top_k, top_p, seed };
        let continuation = Continuation { most: max_new_tokens, end_tokens: &end_tokens, sampling };
        let fresh = Mutex::new(Vec::new());
        let tell = |py: Python<'_>| match &on_tokens {
            None => Ok(()),
            Some(tell) => {
                let tokens = std::mem::take(&mut *fresh.lock().expect("no thread panicked"));
                if tokens.is_empty() { Ok(()) } else { tell.call1(py, (tokens,)).map(|_| ()) }
            }
        };
        let job = |progress: &Progress| {
            let workers = workers;
            let prompts: Vec<_> = prompts.iter().map(Vec::as_slice).collect();
            let keep = |prompt: usize, token: u32| {
                if on_tokens.is_some() {
                    fresh.lock().expect("no thread panicked").push((prompt, token));
                }
            };
            self.model.generate(&prompts, &continuation, keep, &workers, progress)
        };
        jobs::run_watched(py, |py, _| tell(py), job)
    }
}
