"""Plan, inspect and compress a GPT-2 checkpoint on disk, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from .. import _core
from .._core import SpentBudget
from ..calibration.calibration import Calibration, load_calibration
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, Dtype, Effort, Objective, dtype_name
from ..config.recipes import ConfigOption, resolve_config
from ..config.tq_config import FORMAT_VERSION, QUANT_METHOD
from ..decomposition.norm import Moments
from ..errors import CheckpointError
from ..utils import validate
from ..utils.hub import StrPath, local_directory
from ..utils.progress import ProgressOption, reporter
from ..utils.sizes import byte_count
from ..utils.utf8 import read_json
from .budget import Budget, Spending, calibrated, check_options, matrix_patterns, moments_of
from .budget_plan import BudgetPlan, BudgetRequest
from .report import CompressionReport, MatrixReport, UntouchedTensor

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


def compress_checkpoint(
    source: StrPath,
    out: StrPath,
    config: ConfigOption | None = None,
    *,
    budget: Budget | None = None,
    calibration: Calibration | StrPath | None = None,
    objective: Objective = "auto",
    matrices: Sequence[str] | None = None,
    max_macs: float | None = None,
    effort: Effort | None = None,
    seed: int | None = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
    progress: ProgressOption = None,
) -> CompressionReport:
    """Compresses the checkpoint in `source` into the directory `out`, without torch.

    Every matrix `W` (in × out) that the config names, or that the budget is spent on, becomes a Kronecker sum
    `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, a low-rank product, or a sum of both. `out` gets the weights, `config.json`, the
    tokenizer and other files of the source, a model card, and `compression_report.json`. After `import tqcompressor`,
    transformers loads it. `out` is written completely or not at all. Equal inputs, efforts and seeds give equal bytes,
    for any number of threads.

    Args:
        source: A directory with `config.json` and safetensors weights (float32, float16 or bfloat16, one file or
            shards), or the id of a model on the hub, fetched by huggingface_hub if that is installed.
        out: The directory to write. It may exist if it is empty.
        config: A recipe's name, the path of a JSON file, a dict or a `TQConfig`. Either this or `budget`.
        budget: In place of a config: the share of the model's parameters to keep, such as 0.65 or "65%", counted over
            all saved tensors; their number as an integer; a size such as "300MB"; or "lost_energy=0.1". See `plan`.
        calibration: A `Calibration` or its file. Errors are then weighted by the second moments of the layers' inputs
            and of the gradients at their outputs. Default: the Frobenius norm.
        objective: The norm of errors: "frobenius", "diagonal", "second_moment" or "sensitivity". "auto" uses all that
            the calibration has.
        matrices: Patterns of the matrices that a budget is spent on. Default: as for `plan`.
        max_macs: With a budget: a cap on the MACs of these matrices for one token, as a share of their MACs while
            dense. See `plan`.
        effort: "fast", "balanced" or "best". Default: the config's; with a budget "fast". See `plan`.
        seed: Of the search. Default: the config's; with a budget 0.
        dtype: "float32", "float16" or "bfloat16" for every floating tensor. Default: each keeps its own.
        overwrite: Replace a checkpoint in `out`, all of it, in one step.
        max_shard_size: The size limit of a weight file, in bytes or as in "500MB" or "2GiB".
        threads: Worker threads. Default: one per core.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Returns:
        The report, with for every matrix its shape, spec, parameters before and after, lost energy and seconds.

    Raises:
        ConfigError: Neither or both of `config` and `budget`; a pattern that matches nothing; a newer format; a budget
            that cannot be met.
        CheckpointError: The source is missing, truncated, pickled, compressed already, or no GPT-2.
        ShapeError: A block does not divide a matrix, or a rank is too large for it.
        DtypeError: A weight is not floating, `dtype` is not supported, or it cannot hold a value.
        NonFiniteError: A weight has NaN or an infinity.
        DestinationError: `out` exists and is not empty, or is the source.
        StorageError: The operating system reports an error: no permission, no space.

    Nothing is written if anything is raised, `KeyboardInterrupt` included.

    Cost: memory for one matrix a thread and its search. The source is memory-mapped.

    Example:
        >>> report = compress_checkpoint("tests/data/tiny-gpt2", "tiny-gpt2-compressed", budget=0.65)
        >>> report.parameters_after / report.parameters_before
        0.649...
    """
    threads = validate.threads(threads)
    check_options(config, budget, matrices, max_macs)
    most = byte_count("max_shard_size", max_shard_size)
    stored = dtype_name(dtype)
    known = load_calibration(calibration)
    checkpoint = _core.Checkpoint.open(local_directory(source))
    moments: list[tuple[str, Moments]] = []
    spent = None
    if budget is None:
        resolved = resolve_config(config, effort=effort, seed=seed)
        if (known is None and objective not in ("auto", "frobenius")) or calibrated(known, objective):
            moments = moments_of(known, objective, checkpoint.plan(resolved).matrices)
    else:
        seed = DEFAULT_SEED if seed is None else seed
        spending = Spending(budget, known, objective, matrices, max_macs, effort or DEFAULT_EFFORT, seed)
        request, spent = _spend(checkpoint, spending, stored, keep=True, threads=threads, progress=progress)
        resolved = request.plan(spent.choices).config
        moments = list(zip(request.names, request.moments, strict=True))
    with reporter(progress, "compress") as report_progress:
        text = checkpoint.compress(
            os.fspath(out),
            resolved,
            [name for name, _ in moments],
            [pair for _, pair in moments],
            spent=spent,
            dtype=stored,
            overwrite=overwrite,
            max_shard_bytes=most,
            threads=threads,
            progress=report_progress,
        )
    return CompressionReport.from_dict(json.loads(text))


def plan_checkpoint(
    source: StrPath,
    spending: Spending,
    *,
    threads: int | None = None,
    progress: ProgressOption = None,
    dtype: Dtype | None = None,
) -> BudgetPlan:
    """`plan` for the checkpoint in `source`, without torch.

    A budget in bytes depends on the `dtype` of the result; None keeps each tensor's own.
    """
    checkpoint = _core.Checkpoint.open(local_directory(source))
    request, spent = _spend(checkpoint, spending, dtype, keep=False, threads=threads, progress=progress)
    return request.plan(spent.choices)


def _spend(
    checkpoint: _core.Checkpoint,
    spending: Spending,
    dtype: str | None,
    *,
    keep: bool,
    threads: int | None,
    progress: ProgressOption,
) -> tuple[BudgetRequest, SpentBudget]:
    """Spends a budget on a checkpoint; with `keep`, what was spent can be fitted and written."""
    listed = checkpoint.list_matrices(matrix_patterns(spending.matrices))
    before = checkpoint.parameters
    bytes_each = _BYTES.get(dtype or "", checkpoint.bytes / max(before, 1))
    request = BudgetRequest.of(listed, (before, bytes_each), spending)
    with reporter(progress, "plan") as report_progress:
        spent = checkpoint.spend_budget(
            request.names, request.moments, **request.limits, keep=keep, threads=threads, progress=report_progress
        )
    return request, spent


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
        plan = _core.Checkpoint.open(directory).plan(resolve_config(config))
        return CompressionReport.from_dict(json.loads(plan.report))
    if not _is_compressed(directory):
        return _listing(_core.Checkpoint.open(directory), directory)
    path = Path(directory, "compression_report.json")
    try:
        return CompressionReport.from_dict(read_json(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; the checkpoint is compressed already") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a compression report: {error}") from None


def check_files(source: StrPath) -> None:
    """Raises `CheckpointError` for faults of a dense GPT-2 in a directory that transformers misreads or does not name.

    transformers loads random weights for names that a wrapper has prefixed, for example. Other sources are left to it.
    """
    path = Path(source, "config.json")
    try:
        config = read_json(path)
    except OSError:
        return
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    weights = any(Path(source, name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))
    known = isinstance(config, dict) and config.get("model_type") in (None, "gpt2")
    if weights and known and not config.get("quantization_config"):
        _core.Checkpoint.open(os.fspath(source))


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
