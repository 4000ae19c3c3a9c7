//! Compression of a checkpoint into another directory. Everything is validated before anything is written, matrices are
//! decomposed in parallel, and the destination appears complete or not at all.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::budget::{BudgetMatrix, BudgetOptions, Keep, SpentBudget};
use super::journal::Journal;
use super::parallel::{Task, Timed, decompose_each};
use super::place::{Calibration, place};
use super::report::{CalibrationRecord, Report, UNCALIBRATED_BUDGET, source_name};
use super::spectrum_store::SpectrumStore;
use super::tensors::{Content, Output, outputs, write_codes, write_factors};
use crate::checkpoint::files::{CARD_FILE, EVALUATION_FILE, FIGURE_FILE, REPORT_FILE, is_weight_file, module_folders};
use crate::checkpoint::read::{Checkpoint, Tensor};
use crate::checkpoint::staging::{Destination, StagingDirectory};
use crate::checkpoint::write::{Slot, Writer};
use crate::error::{Error, Result};
use crate::family::{Kind, Matrix};
use crate::numeric::Float;
use crate::plan::{Job, Model, Plan, TQConfig};
use crate::progress::Progress;
use crate::spec::Usage;

/// Bytes copied between two checks for cancellation.
pub(super) const COPIED: usize = 4 << 20;

/// The phase of a compression after the fits; see [`Progress::begin`].
const WRITING: &str = "write";

/// The name of eight-bit integers as a dtype.
const INT8: &str = "int8";

/// Options of the written checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The dtype of every floating tensor; `None` keeps each tensor's own.
    pub dtype: Option<Float>,
    /// Whether all weights that matrix products read become eight-bit integers with scales: the factors of low rank, the
    /// larger factor of a Kronecker sum, and the matrices that stay dense. [`expand_checkpoint`](super::expand_checkpoint)
    /// has no use for it.
    pub int8: bool,
    /// Whether a destination that holds a checkpoint is replaced.
    pub overwrite: bool,
    /// The largest weight file, in bytes. Larger ones are split into shards.
    pub max_shard_bytes: u64,
    /// What the moments were measured on, for the report.
    pub calibration: Option<CalibrationRecord>,
    /// What else the report states of the run.
    pub facts: Map<String, Value>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dtype: None,
            int8: false,
            overwrite: false,
            max_shard_bytes: 5_000_000_000,
            calibration: None,
            facts: Map::new(),
        }
    }
}

impl Options {
    /// Reads the dtype of a result by its name; none keeps the dtype of each tensor.
    ///
    /// # Errors
    /// [`Error::Dtype`] if it is neither "int8" nor the name of a [`Float`].
    pub fn with_dtype(self, name: Option<&str>) -> Result<Self> {
        let int8 = name == Some(INT8);
        let float = name.filter(|_| !int8).map(Float::from_name).transpose()?;
        Ok(Self { dtype: float, int8, ..self })
    }

    fn dtype_name(&self) -> Option<&'static str> {
        if self.int8 { Some(INT8) } else { self.dtype.map(Float::name) }
    }
}

/// The report of `plan` for a checkpoint, before compression.
#[must_use]
pub fn planned_report(checkpoint: &Checkpoint, plan: &Plan) -> Report {
    let mut report = Report {
        source: Some(source_name(checkpoint.directory())),
        bytes_before: Some(checkpoint.weight_bytes()),
        ..Report::planned(plan)
    };
    for (matrix, job) in report.matrices.iter_mut().zip(&plan.jobs) {
        matrix.count_macs(usage(checkpoint, &job.matrix));
    }
    report
}

/// Distributes a budget over matrices of a checkpoint, given by name.
///
/// # Errors
/// [`Error::Config`] for a name that is not a matrix of the checkpoint; those of [`SpentBudget::spend`].
pub fn spend_budget(
    checkpoint: &Checkpoint,
    names: &[String],
    calibration: &Calibration<'_>,
    options: BudgetOptions,
    keep: &Keep,
    spectra: Option<&Arc<SpectrumStore>>,
    progress: &Progress,
) -> Result<SpentBudget> {
    let matrices = Model::of_checkpoint(checkpoint).matrices(Some(names))?;
    let mut by_name: HashMap<_, _> = matrices.into_iter().map(|matrix| (matrix.name.clone(), matrix)).collect();
    let matrices = names.iter().map(|name| {
        by_name.remove(name).ok_or_else(|| Error::Config(format!("budget: '{name}' is no matrix of the checkpoint")))
    });
    let matrices = matrices.collect::<Result<Vec<_>>>()?;
    let budgeted: Vec<_> = matrices
        .iter()
        .map(|matrix| BudgetMatrix {
            place: place(matrix, calibration),
            module: matrix.module.clone(),
            usage: usage(checkpoint, matrix),
        })
        .collect();
    SpentBudget::spend(&budgeted, options, keep, spectra, progress, |i| checkpoint.matrix(&matrices[i]))
}

fn usage(checkpoint: &Checkpoint, matrix: &Matrix) -> Usage {
    match matrix.kind {
        Kind::Conv1d | Kind::Linear => Usage::Map,
        Kind::Embedding if checkpoint.has_tied_head() && checkpoint.family().is_token_embedding(&matrix.tensor) => {
            Usage::TiedLookup
        }
        Kind::Embedding => Usage::Lookup,
    }
}

/// The source of the fits of a checkpoint's matrices.
#[derive(Clone, Copy)]
pub enum Fits<'a> {
    /// They are computed, in the norms of a calibration.
    Made(&'a Calibration<'a>),
    /// A budget planned for the matrices of these names, in the norms of a calibration, holds them.
    Spent {
        /// The budget.
        budget: &'a SpentBudget,
        /// The names of its matrices, in order.
        names: &'a [String],
        /// The moments that it was planned with.
        calibration: &'a Calibration<'a>,
    },
}

impl Fits<'_> {
    fn calibrated(&self) -> bool {
        let (Self::Made(calibration) | Self::Spent { calibration, .. }) = self;
        calibration.values().any(|moments| moments.input.is_some() || moments.output.is_some())
    }

    fn note(&self) -> Option<&'static str> {
        (matches!(self, Self::Spent { .. }) && !self.calibrated()).then_some(UNCALIBRATED_BUDGET)
    }
}

/// The positions of a plan's matrices in `names`.
fn which(plan: &Plan, names: &[String]) -> Result<Vec<usize>> {
    let places: HashMap<_, _> = names.iter().enumerate().map(|(i, name)| (name.as_str(), i)).collect();
    let place = |job: &Job| {
        let name = job.matrix.name.as_str();
        places.get(name).copied().ok_or_else(|| Error::Config(format!("budget: '{name}' was not part of it")))
    };
    plan.jobs.iter().map(place).collect()
}

/// Compresses a checkpoint into the directory `destination`, on the current rayon pool. The bytes written do not depend
/// on the number of threads.
///
/// The result holds the weights, `config.json` with a `quantization_config`, and `compression_report.json`. The tokenizer and every other file of `source` without weights are copied. For each
/// module `M` with `W[p][:, q] ≈ Σ A_k ⊗ B_k`, the weights hold `M.A` (rank, m1, n1), `M.B` (rank, m2, n2), and the
/// gather indices of the forward pass for each permuted side: `M.input_permutation` (`p`; its inverse in an embedding)
/// and `M.output_permutation` (the inverse of `q`). A low-rank matrix has `M.left`, `M.right` and one permutation. A
/// table in groups of rows has the factors of all groups one after the other in `M.left` and `M.right`, the place of
/// each row in `M.input_permutation`, and the inverse orders of all groups' columns in `M.output_permutation`, that of
/// group `g` from `g·n` up. A sum of several terms has the tensors of each term, under `M.terms.0`, `M.terms.1` and so on.
///
/// With `int8`, factors are I8, and beside a factor `M.left` is `M.left_scale` in BF16. A matrix that stays dense has
/// `M.codes` and `M.codes_scale` in place of `M.weight`. There is one scale for each column of a factor in × out, which is
/// an output of the product; in an embedding, which is read by rows and whose rows are the outputs of the head, one for
/// each row. All other tensors stay as they are.
///
/// # Errors
/// Any of [`Error`], naming the tensor or the path. After an error or a cancellation, no output remains.
///
/// # Cost
/// Memory: one matrix per thread and the workspace of its decomposition. The source is memory-mapped.
pub fn compress_checkpoint(
    checkpoint: &Checkpoint,
    destination: &Path,
    config: &TQConfig,
    fits: Fits<'_>,
    options: &Options,
    progress: &Progress,
) -> Result<Report> {
    let (plan, outputs) = prepared(checkpoint, config, options)?;
    let journal = Journal::open(Destination::check(destination, checkpoint, options.overwrite)?, &Map::new(), false)?;
    compress_planned(checkpoint, &journal, plan, &outputs, fits, options, progress)?.commit(&journal)
}

/// As [`compress_checkpoint`], for the destination of `journal`, with the fits that are in it. Those of a budget must
/// have been planned with the same journal. `options.overwrite` is that of the journal's destination, which is untouched
/// until the result is committed.
///
/// # Errors
/// Those of [`compress_checkpoint`], but for the destination.
pub fn compress_journaled(
    checkpoint: &Checkpoint,
    journal: &Journal,
    config: &TQConfig,
    fits: Fits<'_>,
    options: &Options,
    progress: &Progress,
) -> Result<Written> {
    let (plan, outputs) = prepared(checkpoint, config, options)?;
    compress_planned(checkpoint, journal, plan, &outputs, fits, options, progress)
}

/// A compressed checkpoint that is written beside its destination. Dropped without [`commit`](Self::commit), it leaves no
/// trace.
#[derive(Debug)]
pub struct Written {
    stage: StagingDirectory,
    report: Report,
}

impl Written {
    /// Its report.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Adds a small file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&self, name: &str, contents: &[u8]) -> Result<()> {
        self.stage.write(name, contents)
    }

    /// Makes it the destination of its journal.
    ///
    /// # Errors
    /// [`Error::Destination`] if the destination was filled meanwhile; [`Error::Io`].
    pub fn commit(self, journal: &Journal) -> Result<Report> {
        self.stage.commit()?;
        journal.succeed();
        Ok(self.report)
    }
}

/// The plan of a config, and the tensors that it makes.
fn prepared<'a>(checkpoint: &'a Checkpoint, config: &TQConfig, options: &Options) -> Result<(Plan, Vec<Output<'a>>)> {
    let mut plan = Plan::for_checkpoint(checkpoint, config)?;
    let outputs = outputs(checkpoint, &plan, options.dtype, options.int8)?;
    if plan.jobs.is_empty() && !options.int8 {
        return Err(Error::Config("specs: expected at least one matrix, or int8 as the dtype, got neither".into()));
    }
    let dense = || outputs.iter().filter_map(|output| output.module(checkpoint)).collect();
    plan.config.int8 = options.int8.then(dense);
    Ok((plan, outputs))
}

/// Makes the fits of a plan, or takes them from the journal, and writes the destination.
fn compress_planned(
    checkpoint: &Checkpoint,
    journal: &Journal,
    plan: Plan,
    outputs: &[Output<'_>],
    fits: Fits<'_>,
    options: &Options,
    progress: &Progress,
) -> Result<Written> {
    let start = Instant::now();
    let source = checkpoint.directory();
    check_finite(checkpoint, &plan, progress)?;

    let stage = StagingDirectory::within(journal.claim())?;
    let slots: Vec<_> = outputs.iter().map(|output| output.slot.clone()).collect();
    let writer = Writer::create(stage.directory(), &slots, options.max_shard_bytes)?;

    let calibrated = fits.calibrated();
    let calibration = options.calibration.clone().filter(|_| calibrated);
    let facts = options.facts.clone();
    let mut report = Report { calibrated, calibration, note: fits.note(), facts, ..planned_report(checkpoint, &plan) };
    let matrices = Mutex::new(&mut report.matrices);
    let load = |i: usize| checkpoint.matrix(&plan.jobs[i].matrix);
    let finish = |i: usize, Timed { fit, seconds }| {
        write_factors(&writer, &plan.jobs[i].matrix, &fit, options.int8)?;
        let mut matrices = matrices.lock().expect("no thread panicked");
        matrices[i].lost_energy = Some(fit.lost_energy);
        matrices[i].seconds = Some(seconds);
        Ok(())
    };
    match fits {
        Fits::Made(calibration) => {
            let (mut tasks, mut left) = (Vec::new(), Vec::new());
            for (i, job) in plan.jobs.iter().enumerate() {
                let task = Task { place: place(&job.matrix, calibration), spec: job.spec.clone() };
                match journal.fit(i, &task.place)? {
                    Some(done) => finish(i, done)?,
                    None => {
                        tasks.push(task);
                        left.push(i);
                    }
                }
            }
            let finish = |at: usize, timed: Timed| {
                journal.put_fit(left[at], &timed)?;
                finish(left[at], timed)
            };
            decompose_each(&tasks, plan.config.effort, plan.config.seed, progress, |at| load(left[at]), finish)?;
        }
        Fits::Spent { budget, names, calibration, .. } => {
            let places: Vec<_> = plan.jobs.iter().map(|job| place(&job.matrix, calibration)).collect();
            budget.fit_each(&which(&plan, names)?, &places, progress, load, finish)?;
        }
    }
    progress.check()?;

    progress.begin(WRITING);
    let copied = |output: &Output<'_>| match output.content {
        Content::Copy(tensor) | Content::Codes { tensor, .. } => tensor.elements(),
        Content::Factor | Content::Guard => 0,
    };
    progress.expect(outputs.iter().map(copied).sum::<usize>() as u64);
    for output in outputs {
        match output.content {
            Content::Copy(tensor) => copy(checkpoint, tensor, &output.slot, &writer, progress)?,
            Content::Guard => writer.write(&output.slot.name, 0, &[0])?,
            Content::Codes { name, tensor, per } => {
                progress.check()?;
                let shape = &tensor.shape;
                let values = checkpoint.floats(name, shape)?;
                write_codes(&writer, &output.slot.name, name, &values, (shape[0], shape[1]), per)?;
            }
            // Written with the codes, or with the fits.
            Content::Factor => {}
        }
        progress.advance(copied(output) as u64);
    }

    report.dtype = options.dtype_name();
    report.bytes_after = Some(writer.bytes());
    writer.finish()?;
    for name in carried(source)? {
        progress.check()?;
        stage.copy(source, &name)?;
        report.carried.push(name.to_string_lossy().into_owned());
    }
    stage.write("config.json", config_json(checkpoint, &plan.config, options.dtype).as_bytes())?;
    report.seconds = Some(start.elapsed().as_secs_f64());
    stage.write(REPORT_FILE, (report.to_json(true) + "\n").as_bytes())?;
    progress.check()?;
    Ok(Written { stage, report })
}

/// Checks every weight to compress, so that an invalid one is found before minutes of work.
fn check_finite(checkpoint: &Checkpoint, plan: &Plan, progress: &Progress) -> Result<()> {
    let mut names: Vec<_> = plan.jobs.iter().map(|job| job.matrix.tensor.as_str()).collect();
    names.dedup();
    let results = names.par_iter().map(|name| {
        progress.check()?;
        let result = checkpoint.check_finite(name);
        checkpoint.release(&checkpoint.tensors()[*name]);
        result
    });
    // Collect all results first, so that the error reported is that of the first faulty tensor in the model.
    results.collect::<Vec<_>>().into_iter().collect()
}

/// Copies a tensor in pieces, converted if its slot has another dtype.
pub(super) fn copy(
    checkpoint: &Checkpoint,
    tensor: &Tensor,
    slot: &Slot,
    writer: &Writer,
    progress: &Progress,
) -> Result<()> {
    let bytes = checkpoint.bytes(tensor);
    if tensor.dtype == slot.dtype {
        for (i, piece) in bytes.chunks(COPIED).enumerate() {
            progress.check()?;
            writer.write(&slot.name, (i * COPIED) as u64, piece)?;
        }
    } else {
        let from = Float::from_dtype(tensor.dtype).map_err(|error| error.in_tensor(&slot.name))?;
        let mut values = Vec::new();
        let mut first = 0;
        for piece in bytes.chunks(COPIED) {
            progress.check()?;
            values.resize(piece.len() / from.size(), 0.0);
            from.upcast(piece, &mut values);
            writer.write_floats(&slot.name, first, &values)?;
            first += values.len();
        }
    }
    checkpoint.release(tensor);
    Ok(())
}

/// The files of `source` to copy, by their names in it: all but weights, pickles, hidden files, and files that are
/// written anew; and those in the folders of a sentence-transformers model.
pub(super) fn carried(source: &Path) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for name in files_in(source)? {
        let text = name.to_string_lossy();
        let written = ["config.json", CARD_FILE, REPORT_FILE, FIGURE_FILE, EVALUATION_FILE].contains(&&*text);
        let skipped = written || text.starts_with('.') || text.ends_with(".index.json") || is_weight_file(&text);
        if !skipped {
            names.push(name);
        }
    }
    for folder in module_folders(source)? {
        // A module's own weights stay with it.
        names.extend(files_in(&source.join(&folder))?.into_iter().map(|name| Path::new(&folder).join(name)));
    }
    names.sort_unstable();
    Ok(names)
}

fn files_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(Error::io(directory))? {
        let entry = entry.map_err(Error::io(directory))?;
        // Follow links: huggingface_hub's cache consists of them.
        if entry.path().is_file() {
            names.push(entry.file_name().into());
        }
    }
    Ok(names)
}

/// The source's `config.json` with the resolved configuration and the dtype of the result. It says that the head is not
/// tied, where the weights say so and the key means nothing else.
fn config_json(source: &Checkpoint, config: &TQConfig, dtype: Option<Float>) -> String {
    let mut object = config_of(source.config(), dtype);
    if source.warning().is_some() && source.family().ties_head_alone() {
        object.insert("tie_word_embeddings".into(), false.into());
    }
    object.insert("quantization_config".into(), config.to_value());
    format!("{:#}\n", Value::Object(object))
}

/// The config of the source, with the dtype of the result where one was asked for.
pub(super) fn config_of(source: &Map<String, Value>, dtype: Option<Float>) -> Map<String, Value> {
    let mut object = source.clone();
    if let Some(float) = dtype {
        let key =
            if !object.contains_key("dtype") && object.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        object.insert(key.into(), float.name().into());
    }
    object
}

#[cfg(test)]
mod tests;
