"""Compressing a GPT-2 checkpoint on disk, without torch, and showing beforehand what that would do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from .. import _core
from ..calibration.calibration import Calibration, load_calibration
from ..config.recipes import resolve_config
from ..config.specs import KroneckerSpec
from ..config.tq_config import QUANT_METHOD, TQConfig
from ..decomposition.norm import Moments
from ..errors import CheckpointError
from ..utils import validate
from ..utils.hub import StrPath, local_directory
from ..utils.progress import ProgressOption, reporter
from ..utils.sizes import byte_count
from .budget import Budget, Spending, calibrated, check_options, every_matrix, moments_of
from .budget_plan import BudgetPlan, Choice, plan_with
from .report import CompressionReport

ConfigOption: TypeAlias = StrPath | Mapping[str, Any] | TQConfig | None
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


def compress_checkpoint(
    source: StrPath,
    destination: StrPath,
    config: ConfigOption = None,
    *,
    budget: Budget | None = None,
    calibration: Calibration | StrPath | None = None,
    objective: str = "auto",
    matrices: Sequence[str] | None = None,
    max_multiplies: float | None = None,
    effort: str | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
    progress: ProgressOption = None,
) -> CompressionReport:
    """Compresses the checkpoint in `source` into the directory `destination`, without torch.

    Every matrix `W` (in × out) that `config` names becomes `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`. The result holds the weights,
    `config.json`, the tokenizer and other files of the source, a model card, and `compression_report.json`; after
    `import tqcompressor`, transformers loads it. `destination` appears whole or not at all. The same input, effort and
    seed give the same bytes, whatever the number of threads.

    Args:
        source: A directory with `config.json` and safetensors weights (float32, float16 or bfloat16, one file or
            shards), or the id of a model on the hub, fetched by huggingface_hub if that is installed.
        destination: The directory to be made. It may exist if it is empty.
        config: A recipe's name, the path of a JSON file, a dict or a `TQConfig`; by default the recipe "tq-81m".
        budget: In place of a config: a share of the model's parameters that is kept, 0.65 or "65%", all saved tensors
            counted; their number as an integer; a size such as "300MB"; or "lost_energy=0.1". See `plan`.
        calibration: What `calibrate` measured, or its file: errors then count by what the layers' inputs look like and
            how much the model minds them.
        objective: "frobenius", "diagonal", "second_moment" or "sensitivity"; "auto" is the richest that the calibration
            allows.
        matrices: Patterns of the matrices that a budget is spent on; by default all that are worth it.
        max_multiplies: Beside a budget: at most this share of the multiplications for one token that the matrices it is
            spent on take dense. See `plan`.
        effort: "fast", "balanced" or "best", in place of the config's; for a budget by default "fast", see `plan`.
        seed: In place of the config's.
        dtype: "float32", "float16" or "bfloat16" for every floating tensor; by default each keeps its own.
        overwrite: Whether a destination that holds a checkpoint is replaced, all of it, in one step.
        max_shard_size: The longest weight file, in bytes or as in "500MB" or "2GiB".
        threads: How many threads work; by default one per core.
        progress: True or False to show a progress bar or not, None to show it in a terminal or notebook, or a function
            that is called with `(done, total)`.

    Returns:
        The report, with for every matrix its shape, spec, parameters before and after, lost energy and seconds.

    Raises:
        CheckpointError: The source cannot be read: missing, truncated, pickled, compressed already, no GPT-2.
        ConfigError: The config does not fit the checkpoint: a pattern that matches nothing, a newer format.
        ShapeError: A block that does not divide a matrix, or a rank that is too large for it.
        DtypeError: A weight that is not floating, or values that `dtype` cannot hold.
        NonFiniteError: A weight that holds NaN or an infinity.
        DestinationError: The destination exists and is not empty, or is the source itself.
        StorageError: The operating system refused: no permission, no space.

    Whatever is raised, Ctrl-C included, nothing is written.

    Cost: memory for one matrix a thread and its search; the source is mapped, not loaded.

    Example:
        >>> report = compress_checkpoint("gpt2", "gpt2-tq", "tq-81m", effort="fast")  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    threads = validate.threads(threads)
    check_options(config, budget, matrices, max_multiplies)
    most = byte_count("max_shard_size", max_shard_size)
    # torch's dtypes are welcome, too: "torch.float16".
    stored = None if dtype is None else str(dtype).removeprefix("torch.")
    directory = local_directory(source)
    known = load_calibration(calibration)
    if budget is None:
        resolved = resolve_config(config, effort=effort, seed=seed)
    else:
        seed = 0 if seed is None else seed
        spending = Spending(budget, known, objective, matrices, max_multiplies, effort or "fast", seed)
        resolved = plan_checkpoint(directory, spending, threads=threads, progress=progress, dtype=stored).config
    moments = []
    if (known is None and objective not in ("auto", "frobenius")) or calibrated(known, objective):
        planned = json.loads(_core.plan_checkpoint(directory, resolved.to_json()))["matrices"]
        moments = moments_of(known, objective, planned)
    with reporter(progress, "compress") as report_progress:
        text = _core.compress_checkpoint(
            directory,
            os.fspath(destination),
            resolved.to_json(),
            moments,
            stored,
            overwrite,
            most,
            threads,
            report_progress,
        )
    return CompressionReport.from_dict(json.loads(text))


def plan_checkpoint(
    source: StrPath,
    spending: Spending,
    *,
    threads: int | None = None,
    progress: ProgressOption = None,
    dtype: str | None = None,
) -> BudgetPlan:
    """How a budget is best spent on the checkpoint in `source`, without torch: `plan` for checkpoints.

    `dtype` is that of the result, which a budget in bytes depends on; None keeps each tensor's own.
    """
    directory = local_directory(source)

    def choose(
        entries: Sequence[Mapping[str, Any]],
        moments: Mapping[str, Moments],
        target: tuple[str, float],
        cap: float | None,
    ) -> list[Choice]:
        specs = {name: KroneckerSpec((1, 1), 1, "none") for name in moments}
        with reporter(progress, "plan") as report_progress:
            choices = _core.choose_specs_of_checkpoint(
                directory,
                TQConfig(specs, effort=spending.effort, seed=spending.seed).to_json(),
                list(moments.items()),
                target,
                cap,
                threads,
                report_progress,
            )
        found = dict(choices)
        return [found[entry["name"]] for entry in entries]

    listed = json.loads(_core.plan_checkpoint(directory, every_matrix(spending.matrices)))
    before = listed["parameters_before"]
    # An unknown dtype is refused by name when it is written.
    bytes_each = _BYTES.get(dtype or "", listed["bytes_before"] / max(before, 1))
    return plan_with(choose, listed["matrices"], (before, bytes_each), spending)


def inspect(source: StrPath, config: ConfigOption = None) -> CompressionReport:
    """What `config` would do to the checkpoint in `source`, without reading its weights.

    Takes `source` and `config` as `compress_checkpoint` does, and raises as it does for what can be told from names and
    shapes. The report has neither lost energy nor seconds. For a compressed checkpoint and no `config`, it is the
    report of its compression.

    Example:
        >>> print(inspect("gpt2", "tq-81m"))  # doctest: +SKIP
    """
    directory = local_directory(source)
    if config is None and _is_compressed(directory):
        path = Path(directory, "compression_report.json")
        try:
            return CompressionReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; the checkpoint is compressed already") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a compression report: {error}") from None
    text = _core.plan_checkpoint(directory, resolve_config(config).to_json())
    return CompressionReport.from_dict(json.loads(text))


def _is_compressed(directory: str) -> bool:
    try:
        config = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        # Whatever is wrong with it, the reader says it better.
        return False
