"""The command line: `tqcompressor compress`, `expand`, `convert`, `calibrate`, `distill`, `inspect`, `evaluate`,
`sweep`, `report`, `verify` and `generate`.

Results go to standard output (as JSON with `--json`), progress and errors to standard error. The exit status is 0,
2 for wrong usage or invalid input, 130 after Ctrl-C, and 1 for any other failure, a check of `verify` included.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.recipes import recipe, resolve_config
from ..config.tq_config import TQConfig
from ..distillation.config import DistillConfig, TrainingConfig
from ..errors import ConfigError, ConvergenceError, MissingDependencyError, StorageError, TQError
from ..utils.engines import is_native
from ..utils.progress import announce
from ..utils.tables import format_table
from ..utils.torch_utils import silence_transformers
from .options import parser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..compression.budget_plan import BudgetPlan
    from ..compression.cost import CostEstimate
    from ..compression.report import CompressionReport
    from ..evaluate.results import ModelScore

_LOGGER = logging.getLogger(__name__)


def main(arguments: Sequence[str | os.PathLike[str]] | None = None) -> int:
    """Runs one command and returns the exit status."""
    commands: dict[str, Callable[[argparse.Namespace], int | None]] = {
        "compress": _compress,
        "expand": _expand,
        "convert": _convert,
        "calibrate": _calibrate,
        "distill": _distill,
        "inspect": _inspect,
        "evaluate": _evaluate,
        "sweep": _sweep,
        "report": _report,
        "verify": _verify,
        "generate": _generate,
    }
    options = parser().parse_args(None if arguments is None else [os.fspath(word) for word in arguments])
    try:
        status = commands[options.command](options)
        # Flush here: at interpreter exit, the error of a closed pipe could not be caught.
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("tqcompressor: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the pipe (`| head`) has exited. Prevent another flush at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.debug:
            raise
        print(f"tqcompressor: error: {_one_line(error)}", file=sys.stderr)
        return 2 if _is_bad_input(error) else 1
    return status or 0


def _config(options: argparse.Namespace) -> TQConfig | None:
    if options.config is not None:
        return resolve_config(Path(options.config))
    return None if options.recipe is None else recipe(options.recipe)


def _compress(options: argparse.Namespace) -> None:
    from ..compression.budget import meaning
    from ..compression.checkpoint import compress_checkpoint

    if options.heal_tokens is not None:
        _distill(_healing(options))
        return
    if options.refine:
        raise ConfigError("--refine: expected with --heal-tokens; compress(refine=True) refines a live model alone")
    if options.text is not None:
        _quiet_torch_engine(options)
    try:
        report = compress_checkpoint(
            options.source,
            options.out,
            _config(options),
            budget=options.budget,
            calibration=options.calibration,
            text=None if options.text is None else [Path(text) for text in options.text],
            num_samples=options.num_samples,
            seq_len=options.seq_len,
            engine=options.engine,
            device=options.device,
            save_calibration=options.save_calibration,
            objective=options.objective,
            matrices=options.matrices,
            max_macs=options.max_macs,
            effort=options.effort,
            seed=options.seed,
            dtype=options.dtype,
            overwrite=options.overwrite,
            resume=options.resume,
            threads=options.threads,
            max_shard_size=options.max_shard_size,
        )
    except KeyboardInterrupt:
        if options.resume:
            print(f"tqcompressor: the finished work for {options.out} is kept: go on with --resume", file=sys.stderr)
        raise
    if options.json:
        print(report.to_json())
        return
    print(report)
    if options.budget is not None:
        print(f"budget {options.budget}: {meaning(options.budget)}")
    print(f"written to {options.out}")


# Options of compress that its healing, a run of distill, has too.
_HEALED = (
    "text",
    "budget",
    "calibration",
    "num_samples",
    "refine",
    "out",
    "effort",
    "seed",
    "dtype",
    "threads",
    "resume",
    "json",
)


def _healing(options: argparse.Namespace) -> argparse.Namespace:
    """The options of the `distill` that compresses and heals as these options of `compress` say."""
    if options.text is None:
        raise ConfigError("--heal-tokens: expected with --text, which the result is trained on")
    plain = vars(parser().parse_args(["compress", "SRC", "--out", "DST"]))
    given = {name: value for name, value in vars(options).items() if value != plain[name]}
    for name in given.keys() - {*_HEALED, "heal_tokens", "source", "recipe", "config", "debug"}:
        option = name.replace("_", "-")
        raise ConfigError(f"--{option} cannot be combined with --heal-tokens: compress first, then distill --student")
    healing = parser().parse_args(["distill", "--teacher", "SRC", "--out", "DST", "--text", "FILE"])
    vars(healing).update({name: given[name] for name in _HEALED if name in given})
    healing.teacher, healing.tokens = options.source, options.heal_tokens
    healing.recipe = options.recipe or options.config
    return healing


def _expand(options: argparse.Namespace) -> None:
    from ..compression.checkpoint import expand_checkpoint

    expand_checkpoint(
        options.source,
        options.out,
        dtype=options.dtype,
        overwrite=options.overwrite,
        max_shard_size=options.max_shard_size,
        threads=options.threads,
    )
    print(json.dumps({"out": options.out}) if options.json else f"written to {options.out}")


def _convert(options: argparse.Namespace) -> None:
    from ..conversion.convert import convert_checkpoint

    report = convert_checkpoint(
        options.source,
        options.out,
        config=options.config,
        dtype=options.dtype,
        overwrite=options.overwrite,
        max_shard_size=options.max_shard_size,
    )
    print(report.to_json() if options.json else f"{report}\nwritten to {options.out}")


def _calibrate(options: argparse.Namespace) -> None:
    from ..compression.measured import measure_and_save

    _quiet_torch_engine(options)
    found = measure_and_save(
        options.source,
        [Path(text) for text in options.text],
        options.out,
        engine=options.engine,
        num_samples=options.num_samples,
        seq_len=options.seq_len,
        sensitivity=options.sensitivity,
        samples=options.samples,
        seed=options.seed,
        dtype=options.dtype,
        device=options.device,
        partial=options.partial,
        threads=options.threads,
    )
    if options.json:
        fields_of = {"tokens": found.tokens, "seed": found.seed, "sensitivity": found.sensitivity}
        shapes = {name: list(moment.shape) for name, moment in found.moments.items()}
        about = {"model_type": found.model_type, "texts": found.texts}
        print(json.dumps({**fields_of, **about, "moments": shapes}, indent=2))
    else:
        print(f"{found}\nwritten to {options.out}")


def _distill(options: argparse.Namespace) -> None:
    # Check before the import of torch, so that errors appear at once.
    values = {**vars(options), "seed": options.data_seed}
    training = TrainingConfig(**{field.name: values[field.name] for field in fields(TrainingConfig)})
    losses = DistillConfig(
        options.temperature,
        options.alpha,
        options.hidden_weight,
        options.hidden_kind,
        dropout=options.dropout,
    )
    try:
        from ..distillation.runner import distill
    except ImportError as error:
        raise MissingDependencyError(f'distill needs {error.name}: pip install "tqcompressor[hf]"') from error
    try:
        report = distill(
            options.teacher,
            options.recipe,
            budget=options.budget,
            student=options.student,
            calibration=options.calibration,
            num_samples=options.num_samples,
            refine=options.refine,
            text=[Path(name) for name in options.text],
            out=options.out,
            tokens=options.tokens,
            heldout=None if options.heldout is None else Path(options.heldout),
            losses=losses,
            training=training,
            effort=options.effort,
            seed=options.seed,
            device=options.device,
            dtype=options.dtype,
            resume=options.resume,
            threads=options.threads,
        )
    except KeyboardInterrupt:
        print(f"tqcompressor: {options.out} has the state of the run: resume it with --resume", file=sys.stderr)
        raise
    # Of several processes, only the first prints.
    if int(os.environ.get("RANK", "0")) == 0:
        print(report.to_json() if options.json else f"{report}\nwritten to {options.out}")


def _inspect(options: argparse.Namespace) -> None:
    from ..compression.checkpoint import inspect
    from ..compression.plan import plan

    only_plans = {
        "--calibration": options.calibration,
        "--matrices": options.matrices,
        "--max-macs": options.max_macs,
        "--dtype": options.dtype,
    }
    if options.budget is not None:
        estimate = _estimate(options)
        # Planning reads the weights, which may take as long as half of it.
        announce(None, f"compressing takes {estimate}", _LOGGER)
        found = plan(
            options.source,
            options.budget,
            calibration=options.calibration,
            objective=options.objective,
            matrices=options.matrices,
            max_macs=options.max_macs,
            effort=options.effort,
            seed=options.seed,
            dtype=options.dtype,
            threads=options.threads,
        )
        print(_with_estimate(found, estimate) if options.json else f"{found}\ncompressing takes {estimate}")
        return
    for name, value in only_plans.items():
        if value is not None:
            raise ConfigError(f"{name} needs --budget")
    config = _config(options)
    report = inspect(options.source, config)
    if config is None:
        says = "give --budget or --recipe, and inspect says about how long compressing takes, and how much memory"
        print(report.to_json() if options.json else f"{report}\n{says}")
        return
    estimate = _estimate(options, config)
    print(_with_estimate(report, estimate) if options.json else f"{report}\ncompressing takes {estimate}")


def _estimate(options: argparse.Namespace, config: TQConfig | None = None) -> CostEstimate:
    """About what `compress` takes with the options of `inspect`."""
    from ..compression.cost import estimate_cost

    return estimate_cost(
        options.source,
        config,
        budget=options.budget,
        calibrated=options.calibration is not None,
        matrices=options.matrices,
        effort=options.effort if options.budget is not None else None,
        threads=options.threads,
    )


def _with_estimate(found: BudgetPlan | CompressionReport, estimate: CostEstimate) -> str:
    """The JSON of a plan, with the estimate."""
    return json.dumps({**found.to_dict(), "estimate": estimate.to_dict()}, indent=2, ensure_ascii=False)


def _evaluate(options: argparse.Namespace) -> None:
    from ..compression.card import record_evaluation, report_in
    from ..data.text import check_text, read_passages
    from ..evaluate.results import Comparison

    limits = {
        "--device": (options.device, "cpu"),
        "--dtype": (options.dtype, "float32"),
        "--batch-size": (options.batch_size, None),
    }
    native = is_native(options.engine, limits)
    # Read the text before the models, which take seconds to load.
    text = Path(options.text)
    check_text(text)
    passages = None if options.passages is None else read_passages(options.passages)
    models = [name for name in (options.model, options.teacher) if name is not None]
    if not native and not _is_causal(options.model):
        _evaluate_embeddings(text, options)
        return
    # One model in memory at a time.
    score = _score_native if native else _score_in_torch
    if options.record:
        report_in(Path(options.model))
    table = Comparison(tuple(score(name, text, passages, options) for name in models))
    if options.record:
        record_evaluation(options.model, {**table.to_dict(), "text": text.name})
    print(table.to_json() if options.json else table)


def _score_native(name: str, text: Path, passages: list[str] | None, options: argparse.Namespace) -> ModelScore:
    from ..native.model import NativeModel

    model = NativeModel.from_pretrained(name, threads=options.threads)
    return model.score(text, name=name, passages=passages, context=options.context, stride=options.stride)


def _is_causal(source: str) -> bool:
    """Whether the model predicts the next token, so that it has a perplexity."""
    from ..compression.measured import check_files
    from ..verify.subject import predicts_next_token

    _require_torch()
    silence_transformers()
    check_files(source)
    return predicts_next_token(source)


def _evaluate_embeddings(text: Path, options: argparse.Namespace) -> None:
    """Prints how near the embeddings of an encoder are to its teacher's."""
    from transformers import AutoTokenizer

    from ..evaluate.comparison import model_size
    from ..evaluate.embeddings import embedding_cosine
    from ..verify.subject import load_whole

    only_perplexity = {
        "--passages": options.passages,
        "--context": options.context,
        "--stride": options.stride,
        "--record": options.record or None,
    }
    for name, value in only_perplexity.items():
        if value is not None:
            raise ConfigError(f"{name}: expected a causal language model, {options.model} is none")
    if options.teacher is None:
        raise ConfigError(
            f"{options.model} is no causal language model, so it has no perplexity: give --teacher, the checkpoint "
            "that it was made from, to compare their embeddings"
        )
    _set_threads(options.threads)
    student, teacher = (load_whole(name, "auto", "cpu") for name in (options.model, options.teacher))
    (parameters, size), (before, size_before) = model_size(student), model_size(teacher)
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    student, teacher = (_to_compute(model, options) for model in (student, teacher))
    found = embedding_cosine(student, teacher, tokenizer, text, batch_size=options.batch_size)
    if options.json:
        models = [
            {"name": options.model, "parameters": parameters, "bytes": size},
            {"name": options.teacher, "parameters": before, "bytes": size_before},
        ]
        print(json.dumps({"models": models, "embeddings": found.to_dict()}, indent=2, allow_nan=False))
        return
    quality = [f"{found.cosine:.4f}", f"{found.smallest:.4f}", str(found.texts), f"{found.seconds:.1f}"]
    rows = [
        ["model", "parameters", "bytes", "cosine", "the smallest", "texts", "seconds"],
        [options.model, f"{parameters:,}", f"{size:,}", *quality],
        [options.teacher, f"{before:,}", f"{size_before:,}", "", "", "", ""],
    ]
    print(format_table(rows))


def _require_torch() -> None:
    for name in ("torch", "transformers"):
        if find_spec(name) is None:
            raise MissingDependencyError(f'engine torch needs {name}: pip install "tqcompressor[hf]"')


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _score_in_torch(name: str, text: Path, passages: list[str] | None, options: argparse.Namespace) -> ModelScore:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..compression.measured import check_files
    from ..evaluate.comparison import model_size, score

    _set_threads(options.threads)
    check_files(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    _, size = model_size(model)
    row = score(
        _to_compute(model, options),
        tokenizer,
        text,
        name=name,
        passages=passages,
        context=options.context,
        stride=options.stride,
        batch_size=options.batch_size,
    )
    return replace(row, bytes=size)


def _to_compute(model: PreTrainedModel, options: argparse.Namespace) -> PreTrainedModel:
    """A loaded model where and as it computes: by default in float32 on the CPU, which is slow in half precision."""
    import torch

    dtype = options.dtype or ("float32" if torch.device(options.device).type == "cpu" else None)
    moved: PreTrainedModel = model.to(options.device, None if dtype is None else getattr(torch, dtype))
    return moved


def _sweep(options: argparse.Namespace) -> None:
    from ..frontier.sweep import sweep

    _quiet_torch_engine(options)
    try:
        result = sweep(
            options.source,
            options.budgets,
            options.out,
            heldout=Path(options.heldout),
            text=None if options.text is None else [Path(text) for text in options.text],
            calibration=options.calibration,
            num_samples=options.num_samples,
            seq_len=options.seq_len,
            engine=options.engine,
            device=options.device,
            objective=options.objective,
            matrices=options.matrices,
            max_macs=options.max_macs,
            effort=options.effort,
            seed=options.seed,
            dtype=options.dtype,
            context=options.context,
            stride=options.stride,
            keep=options.keep,
            resume=options.resume,
            threads=options.threads,
        )
    except KeyboardInterrupt:
        if Path(options.out).is_dir():
            print(f"tqcompressor: {options.out} has what is finished: go on with --resume", file=sys.stderr)
        raise
    print(result.to_json() if options.json else f"{result}\nwritten to {options.out}")


def _report(options: argparse.Namespace) -> None:
    from ..pages.page import html_report

    html_report(options.source, options.html, sweep=options.sweep, evaluation=options.evaluation)
    print(json.dumps({"html": options.html}) if options.json else f"written to {options.html}")


def _verify(options: argparse.Namespace) -> int:
    from ..verify.runner import verify_checkpoint

    report = verify_checkpoint(
        options.source,
        teacher=options.teacher,
        text=None if options.text is None else Path(options.text),
        max_perplexity_ratio=options.max_perplexity_ratio,
        min_cosine=options.min_cosine,
        context=options.context,
        stride=options.stride,
        batch_size=options.batch_size,
        dtype=options.dtype,
        device=options.device,
    )
    print(report.to_json() if options.json else report)
    return 0 if report.passed else 1


def _generate(options: argparse.Namespace) -> None:
    from ..native.model import NativeModel

    def show(prompt: int, text: str) -> None:
        print(text, end="", flush=True)

    model = NativeModel.from_pretrained(
        options.model, dtype=options.dtype, kv_dtype=options.kv_dtype, threads=options.threads
    )
    text = model.generate(
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        streamer=None if options.json else show,
    )
    print(json.dumps({"prompt": options.prompt, "text": text}, indent=2) if options.json else "")


def _quiet_torch_engine(options: argparse.Namespace) -> None:
    """Quiets transformers where the torch engine may run; the native one does without the import."""
    if options.engine != "native" and find_spec("transformers") is not None:
        silence_transformers()


def _is_bad_input(error: Exception) -> bool:
    if isinstance(error, StorageError) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return True
    if isinstance(error, StorageError | ConvergenceError | MissingDependencyError):
        return False
    # transformers raises a plain OSError for a directory without a model.
    return isinstance(error, TQError | OSError)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
