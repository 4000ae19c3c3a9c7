"""Plan, inspect and compress a checkpoint on disk, without torch."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import _core
from .._core import SpentBudget
from ..calibration.calibration import Calibration, load_calibration
from ..config.choices import (
    DEFAULT_EFFORT,
    DEFAULT_SEED,
    Dtype,
    Effort,
    Engine,
    Objective,
    StoredDtype,
    dtype_name,
    stored_dtype,
)
from ..config.recipes import ConfigOption, resolve_config
from ..config.tq_config import FORMAT_VERSION, INT8, QUANT_METHOD, TQConfig
from ..data.text import TextOption
from ..data.tokenize import CALIBRATION_SEQ_LEN
from ..decomposition.norm import Moments
from ..errors import CheckpointError, ConfigError, DestinationError
from ..utils import validate
from ..utils.engines import is_native
from ..utils.hub import StrPath, local_directory
from ..utils.progress import ProgressOption, announce, phase_reporter, reporter
from ..utils.sizes import byte_count
from ..utils.utf8 import read_json
from .budget import (
    Budget,
    Spending,
    calibrated,
    check_options,
    matrix_patterns,
    meaning,
    moments_of,
    stored_sizes,
)
from .budget_plan import BudgetPlan, BudgetRequest
from .card import card_files, read_config
from .cost import cost_of
from .measured import calibrate_checkpoint, sole_file
from .report import REPORT_FILE, CompressionReport, MatrixReport, UntouchedTensor, read_report
from .reproduce import shell_command, texts_read, versions
from .run_key import run_key

_LOGGER = logging.getLogger(__name__)
# The calibration on a text, in the journal of a run.
CALIBRATION_FILE = "calibration.safetensors"
_PARTIAL_SUMS = "sums.safetensors"


def compress_checkpoint(
    source: StrPath,
    out: StrPath,
    config: ConfigOption | None = None,
    *,
    budget: Budget | None = None,
    calibration: Calibration | StrPath | None = None,
    text: TextOption | None = None,
    num_samples: int = 128,
    seq_len: int | None = None,
    engine: Engine = "auto",
    device: str = "cpu",
    save_calibration: StrPath | None = None,
    objective: Objective = "auto",
    matrices: Sequence[str] | None = None,
    max_macs: float | None = None,
    effort: Effort | None = None,
    seed: int | None = None,
    dtype: StoredDtype | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
    progress: ProgressOption = None,
) -> CompressionReport:
    """Compresses the checkpoint in `source` into the directory `out`.

    Every matrix `W` (in × out) that the config names, or that the budget is spent on, becomes a Kronecker sum
    `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, a low-rank product, or a sum of both. `out` gets the weights, `config.json`, the
    tokenizer and other files of the source, a model card with its figure, and `compression_report.json`. After
    `import tqcompressor`, transformers loads it. `out` is written completely or not at all. Equal inputs, efforts and
    seeds give equal bytes, for any number of threads. Nothing but calibrating on a `text` needs torch.

    Args:
        source: A directory with `config.json` and safetensors weights (float32, float16 or bfloat16, one file or
            shards), or the id of a model on the hub, fetched by huggingface_hub if that is installed.
        out: The directory to write. It may exist if it is empty.
        config: A recipe's name, the path of a JSON file, a dict or a `TQConfig`. Either this or `budget`.
        budget: In place of a config: the share of the model's parameters to keep, such as 0.65 or "65%", counted over
            all saved tensors; their number as an integer; a size such as "300MB"; or "lost_energy=0.1". See `plan`.
        calibration: A `Calibration` or its file. Errors are then weighted by the second moments of the layers' inputs
            and of the gradients at their outputs. Default: the Frobenius norm, which loses far more quality.
        text: In place of a calibration: the text to calibrate on, as for `calibrate_checkpoint`.
        num_samples, seq_len, engine, device: Of calibrating on `text`, as for `calibrate_checkpoint`.
        save_calibration: The file that the calibration on `text` is saved to before anything is compressed.
        objective: The norm of errors: "frobenius", "diagonal", "second_moment" or "sensitivity". "auto" uses all that
            the calibration has.
        matrices: Patterns of the matrices that a budget is spent on. Default: as for `plan`.
        max_macs: With a budget: a cap on the MACs of these matrices for one token, as a share of their MACs while
            dense; `math.inf` for none. Default: that of each matrix while dense. See `plan`.
        effort: "fast", "balanced" or "best". Default: the config's; with a budget "fast". See `plan`.
        seed: Of the search, and of the calibration on `text`. Default: the config's; with a budget 0.
        dtype: "float32", "float16" or "bfloat16" for every floating tensor, or "int8": the weights that matrix products
            read become eight-bit integers with scales, also those of the matrices that stay dense, and all other
            tensors keep their dtype. With "int8", neither `config` nor `budget` is needed: everything stays dense then.
            Default: the config's, or each tensor's own.
        overwrite: Replace a checkpoint in `out`, all of it, in one step. A folder that holds anything else is refused:
            files that no compression or distillation writes, or folders other than `stages`.
        resume: Go on where a run into `out` with the same arguments and source was killed; begin anew where there is
            none. What this run finishes is kept beside `out` until it succeeds, also if it is interrupted or fails.
        max_shard_size: The size limit of a weight file, in bytes or as in "500MB" or "2GiB".
        threads: Worker threads. Default: one per core.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`, called
            for each phase in turn: calibrate, plan, compress, write.

    Returns:
        The report, with for every matrix its shape, spec, parameters before and after, lost energy and seconds.

    Raises:
        ConfigError: Neither or both of `config` and `budget`; a pattern that matches nothing; a newer format; a budget
            that cannot be met; `resume` finds a run with other arguments or another source, which the message names.
        CheckpointError: The source is missing, truncated, pickled, compressed already, or of a family without a
            description (the message lists those that have one): compress a live model of such a family.
        TextError, MissingDependencyError: As `calibrate_checkpoint`.
        ShapeError: A block does not divide a matrix, or a rank is too large for it.
        DtypeError: A weight is not floating, `dtype` is not supported, or it cannot hold a value.
        NonFiniteError: A weight has NaN or an infinity.
        DestinationError: `out` exists and is not empty, is the source, or is written by another run; with `overwrite`,
            it holds a file that is none of a checkpoint. The message names the first.
        StorageError: The operating system reports an error: no permission, no space.

    Nothing is written if anything is raised, `KeyboardInterrupt` included, except for the finished work of a run with
    `resume`. A killed run leaves its work in `.OUT.tqcompressor-resume` beside `out`: a run with `resume` goes on with
    it, and one without removes it and warns.

    Cost: memory for one matrix a thread and its search; `inspect` and `estimate_cost` say how much. The source is
    memory-mapped. The disk holds the factors a second time, in float32, and the calibration on a `text`.

    Example:
        >>> report = compress_checkpoint("tests/data/tiny-gpt2", "tiny-gpt2-compressed", budget=0.65)
        >>> report.parameters_after / report.parameters_before
        0.649...
    """
    # The arguments as they were given, for the command in the card.
    given = dict(locals())
    threads = validate.threads(threads)
    stored = stored_dtype(dtype)
    check_options(config, budget, matrices, max_macs, calibration, text, stored)
    if save_calibration is not None and text is None:
        raise ConfigError("save_calibration: expected with a text to calibrate on")
    if save_calibration is not None and Path(out).resolve() in Path(save_calibration).resolve().parents:
        raise DestinationError(f"{save_calibration}: expected a file outside {out}, which is then written as a whole")
    most = byte_count("max_shard_size", max_shard_size)
    source = local_directory(source)
    checkpoint = _core.Checkpoint.open(source)
    known = load_calibration(calibration)
    # What would be refused is refused before the longest part of the work.
    resolved, spending = None, None
    if budget is None:
        plain = TQConfig({}, dtype=INT8) if config is None else config
        resolved = resolve_config(plain, effort=effort, seed=seed)
        seed, stored = resolved.seed, stored or resolved.dtype
        planned = checkpoint.plan(resolved).matrices
        if text is None:
            _moments(known, objective, planned)
    else:
        seed = DEFAULT_SEED if seed is None else seed
        effort = effort or DEFAULT_EFFORT
        spending = Spending(budget, known, objective, matrices, max_macs, effort, seed, stored)
        meaning(budget)
        checkpoint.list_matrices(matrix_patterns(matrices))
    checkpoint.check_destination(os.fspath(out), overwrite)
    sampling = {"num_samples": num_samples, "seq_len": seq_len, "engine": engine, "device": device}
    facts = {
        "config": None if resolved is None else resolved.to_dict(),
        "budget": None if budget is None else str(budget),
        "calibration": known,
        "text": text,
        **(sampling if text is not None else {}),
        "objective": objective,
        "matrices": matrix_patterns(matrices),
        "max_macs": max_macs,
        "effort": effort,
        "seed": seed,
        "dtype": stored,
        "max_shard_size": most,
    }
    key = run_key(checkpoint, source, facts)
    journaled = closing(checkpoint.journal(os.fspath(out), key, resume=resume, overwrite=overwrite))
    with sole_file(save_calibration), journaled as journal:
        if journal.replaced:
            warnings.warn(
                f"{os.fspath(out)}: an earlier run was killed, and its finished work is removed; resume would have "
                "gone on with it",
                stacklevel=2,
            )
        cost = cost_of(
            checkpoint,
            resolved,
            budget,
            calibrated=known is not None,
            tokens=0 if text is None else num_samples * (seq_len or CALIBRATION_SEQ_LEN),
            matrices=matrices,
            effort=effort,
            threads=threads,
        )
        announce(progress, f"compressing takes {cost}", _LOGGER)
        if text is not None:
            known = kept_calibration(
                Path(journal.directory, CALIBRATION_FILE),
                source,
                text,
                seed=seed,
                threads=threads,
                progress=progress,
                **sampling,
            )
            if save_calibration is not None:
                known.save(save_calibration)
        spent = None
        if spending is not None:
            spending = replace(spending, calibration=known)
            request, spent = spend(checkpoint, spending, journal, threads=threads, progress=progress)
            resolved = request.plan(spent.choices).config
            moments = list(zip(request.names, request.moments, strict=True))
        else:
            moments = _moments(known, objective, planned)
        # Either the config of the caller or that of the plan.
        assert resolved is not None
        unused = {"source", "out", "overwrite", "resume", "threads", "progress", "save_calibration"}
        report = write(
            checkpoint,
            source,
            journal,
            resolved,
            moments,
            spent,
            known,
            given={name: value for name, value in given.items() if name not in unused},
            native=is_native(engine, {}),
            dtype=stored,
            overwrite=overwrite,
            max_shard_bytes=most,
            threads=threads,
            progress=progress,
        )
    _LOGGER.info("written to %s", os.fspath(out))
    return report


def write(
    checkpoint: _core.Checkpoint,
    source: str,
    journal: _core.Journal,
    config: TQConfig,
    moments: Sequence[tuple[str, Moments]],
    spent: SpentBudget | None,
    calibration: Calibration | None,
    *,
    given: Mapping[str, Any],
    native: bool,
    progress: ProgressOption,
    **options: Any,
) -> CompressionReport:
    """Writes a compressed checkpoint, with its card, into the destination of a journal: completely or not at all.

    `given` are the arguments of the call, for the command in the card, and `native` says by which engine its text is
    read; the options are those of the boundary.
    """
    objective, text = given.get("objective"), given.get("text")
    if text is not None and calibration is not None:
        # A resumed run may read the text from other files than the run that measured it did.
        given = {**given, "text": texts_read(text, calibration)}
    facts = {
        "budget": given.get("budget"),
        "objective": None if objective == "auto" else objective,
        "command": shell_command(_core.source_name(source), compress_checkpoint, given),
        "versions": versions(*(() if text is None or native else ("torch", "transformers"))),
    }
    known = {name: value for name, value in facts.items() if value is not None}
    with phase_reporter(progress) as report_progress:
        written = checkpoint.compress(
            journal,
            config,
            [name for name, _ in moments],
            [pair for _, pair in moments],
            spent=spent,
            # Numbers of numpy and the like become text.
            facts=json.dumps(known, default=str),
            measured=calibration,
            progress=report_progress,
            **options,
        )
    with closing(written):
        report = CompressionReport.from_dict(json.loads(written.report))
        for name, text in card_files(report, read_config(Path(source)), os.path.realpath(source)).items():
            written.add(name, text.encode("utf-8", "replace"))
        written.commit()
    return report


def kept_calibration(path: Path, source: str, text: TextOption, **options: Any) -> Calibration:
    """The calibration of a run on its text, kept at `path`, where it is if the run was stopped after it.

    If the run was stopped while it was measured, the sums so far are beside it.
    """
    if not path.exists():
        # The native engine keeps none.
        partial = None if is_native(options["engine"], {}) else path.with_name(_PARTIAL_SUMS)
        calibrate_checkpoint(source, text, partial=partial, **options).save(path)
    # Mapped from the file, it takes no memory while it is not used.
    return Calibration.load(path)


def _moments(
    known: Calibration | None, objective: Objective, planned: Sequence[_core.MatrixInfo]
) -> list[tuple[str, Moments]]:
    """The moments for the matrices of a config; none where errors are in the Frobenius norm."""
    if (known is None and objective not in ("auto", "frobenius")) or calibrated(known, objective):
        return moments_of(known, objective, planned)
    return []


def expand_checkpoint(
    source: StrPath,
    out: StrPath,
    *,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
    progress: ProgressOption = None,
) -> None:
    """Writes the compressed checkpoint in `source` as a stock one, without torch: the factors are multiplied out.

    The result has the size of the original and computes what the compressed model does. Any program that reads the
    original reads it: converters to GGUF and ONNX, other runtimes. It is `model.dequantize()` on disk. The tokenizer
    and other files are copied, the model card and the report of the compression are not.

    Args:
        source: A compressed checkpoint: a directory, or its id on the hub.
        out: The directory to write. It may exist if it is empty.
        dtype: "float32", "float16" or "bfloat16" for every floating tensor. Default: that of the factors.
        overwrite: Replace a checkpoint in `out`, all of it, in one step.
        max_shard_size: The size limit of a weight file, in bytes or as in "500MB" or "2GiB".
        threads: Worker threads. Default: one per core.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Raises:
        CheckpointError: The source is dense, damaged, or of a family without a description: load such a model and call
            `model.dequantize()`.
        DtypeError: `dtype` is not supported, or it cannot hold a value.
        NonFiniteError: A factor has NaN or an infinity.
        DestinationError: `out` exists and is not empty, or is the source.
        StorageError: The operating system reports an error: no permission, no space.

    Nothing is written if anything is raised, `KeyboardInterrupt` included.

    Cost: memory for one dense matrix and its factors per thread.

    Example:
        >>> report = compress_checkpoint("tests/data/tiny-gpt2", "compressed", budget=0.65)
        >>> expand_checkpoint("compressed", "dense")
        >>> inspect("dense").parameters_before
        5289472
    """
    threads = validate.threads(threads)
    stored = dtype_name(dtype)
    most = byte_count("max_shard_size", max_shard_size)
    with reporter(progress, "expand") as report_progress:
        _core.expand_checkpoint(
            local_directory(source),
            os.fspath(out),
            dtype=stored,
            overwrite=overwrite,
            max_shard_bytes=most,
            threads=threads,
            progress=report_progress,
        )
    _LOGGER.info("written to %s", os.fspath(out))


def plan_checkpoint(
    source: StrPath,
    spending: Spending,
    *,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> BudgetPlan:
    """`plan` for the checkpoint in `source`, without torch."""
    checkpoint = _core.Checkpoint.open(local_directory(source))
    request, spent = spend(checkpoint, spending, None, threads=threads, progress=progress)
    return request.plan(spent.choices)


def spend(
    checkpoint: _core.Checkpoint,
    spending: Spending,
    journal: _core.Journal | None,
    *,
    spectra: _core.SpectrumStore | None = None,
    threads: int | None,
    progress: ProgressOption,
) -> tuple[BudgetRequest, SpentBudget]:
    """Spends a budget on a checkpoint; with a journal, what was spent can be fitted and written.

    Several budgets may share `spectra`, with one calibration and objective.
    """
    request = budget_request(checkpoint, spending)
    with reporter(progress, "plan") as report_progress:
        spent = checkpoint.spend_budget(
            request.names,
            request.moments,
            **request.limits,
            journal=journal,
            spectra=spectra,
            threads=threads,
            progress=report_progress,
        )
    return request, spent


def budget_request(checkpoint: _core.Checkpoint, spending: Spending) -> BudgetRequest:
    """The request for a budget on a checkpoint; raises `ConfigError` where it cannot be met."""
    listed = checkpoint.list_matrices(matrix_patterns(spending.matrices))
    before = checkpoint.parameters
    sizes = stored_sizes(checkpoint.list_matrices(None), before, checkpoint.bytes / max(before, 1), spending.dtype)
    return BudgetRequest.of(listed, sizes, spending)


def inspect(source: StrPath, config: ConfigOption | None = None) -> CompressionReport:
    """What `config` would do to the checkpoint in `source`, without reading its weights.

    `source`, `config` and errors are those of `compress_checkpoint`, as far as names and shapes show them. The report
    has neither lost energies nor seconds. Without a config, the report of a compressed checkpoint is that of its
    compression, and the report of a dense one lists the matrices that patterns can match.

    Example:
        >>> report = inspect("tests/data/tiny-gpt2", "tq-81m")
        >>> report.parameters_before, report.parameters_after
        (5289472, 3192452)
        >>> [matrix.name for matrix in inspect("tests/data/tiny-gpt2").matrices][:3]
        ['wte', 'wpe', 'h.0.attn.c_attn.q']
    """
    directory = local_directory(source)
    if config is not None:
        plan = _core.Checkpoint.open(directory, weights=False).plan(resolve_config(config))
        return CompressionReport.from_dict(json.loads(plan.report))
    if not _is_compressed(directory):
        return _listing(_core.Checkpoint.open(directory, weights=False), directory)
    path = Path(directory, REPORT_FILE)
    try:
        return read_report(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; the checkpoint is compressed already") from None


def _listing(checkpoint: _core.Checkpoint, directory: str) -> CompressionReport:
    """The matrices of a dense checkpoint, nothing planned for them."""
    matrices = checkpoint.list_matrices(None)
    own = {matrix.tensor for matrix in matrices}
    return CompressionReport(
        version=_core.__version__,
        format_version=FORMAT_VERSION,
        source=directory,
        effort=None,
        seed=None,
        dtype=None,
        matrices=tuple(MatrixReport.of(matrix) for matrix in matrices),
        untouched=tuple(
            UntouchedTensor(name, tuple(shape), parameters)
            for name, shape, parameters in checkpoint.tensors
            if name not in own
        ),
        parameters_before=checkpoint.parameters,
        parameters_after=checkpoint.parameters,
        bytes_before=checkpoint.bytes,
        bytes_after=checkpoint.bytes,
    )


def _is_compressed(directory: str) -> bool:
    try:
        config = read_json(Path(directory, "config.json"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        # Let the reader report malformed configs.
        return False
