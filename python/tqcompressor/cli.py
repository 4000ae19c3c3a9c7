"""The command line: `tqcompressor compress`, `distill`, `inspect` and `evaluate`.

Results go to standard output (as JSON with `--json`), progress and errors to standard error. The exit status is 0,
2 for wrong usage or input that cannot be followed, 130 after Ctrl-C, and 1 for any other failure.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._core import __version__
from .config import EFFORTS, RECIPES, TQConfig, resolve_config
from .errors import ConvergenceError, MissingDependencyError, StorageError, TQError
from .stages import STAGED_RECIPES
from .training_config import PRECISIONS, DistillConfig, TrainingConfig

if TYPE_CHECKING:
    from .evaluate import ModelScore

DTYPES = ("float32", "float16", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        # Here and not at interpreter exit, where a closed pipe could no longer be caught.
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("tqcompressor: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has had enough. The interpreter must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.debug:
            raise
        print(f"tqcompressor: error: {_one_line(error)}", file=sys.stderr)
        return 2 if _is_bad_input(error) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tqcompressor",
        description="Compress GPT-2 checkpoints by Kronecker decomposition improved by permutations.",
    )
    parser.add_argument("--version", action="version", version=f"tqcompressor {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    compress = commands.add_parser("compress", parents=[common], help="compress a checkpoint into a new directory")
    compress.add_argument("source", metavar="SRC", help="a checkpoint directory with safetensors files, or a hub id")
    _add_config(compress, required=True)
    compress.add_argument("--out", metavar="DST", required=True, help="the directory to write")
    compress.add_argument(
        "--effort", choices=EFFORTS, help="how hard permutations are searched (default: the config's)"
    )
    compress.add_argument("--seed", type=int, help="seed of the search (default: the config's)")
    compress.add_argument("--dtype", choices=DTYPES, help="dtype of the result (default: that of each source tensor)")
    compress.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    compress.add_argument("--threads", type=_positive, metavar="N", help="worker threads (default: all cores)")
    compress.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help='like "500MB" (default: 5GB)')
    compress.set_defaults(run=_compress)

    _add_distill(commands, common)

    inspect = commands.add_parser(
        "inspect",
        parents=[common],
        help="show what a recipe would do to a checkpoint, or what was done to a compressed one",
    )
    inspect.add_argument("source", metavar="SRC", help="a checkpoint directory, dense or compressed, or a hub id")
    _add_config(inspect, required=False)
    inspect.set_defaults(run=_inspect)

    evaluate = commands.add_parser(
        "evaluate", parents=[common], help="measure perplexity, beside the teacher's if given"
    )
    evaluate.add_argument("model", metavar="DIR", help="a checkpoint, compressed or not")
    evaluate.add_argument("--teacher", metavar="DIR", help="the checkpoint that DIR was made from")
    evaluate.add_argument("--text", metavar="FILE", required=True, help="raw UTF-8 text")
    evaluate.add_argument("--lambada", metavar="FILE", help='passages, one a line, or .jsonl with "text"')
    evaluate.add_argument("--context", type=_positive, metavar="N", help="window in tokens (default: the model's)")
    evaluate.add_argument("--stride", type=_positive, metavar="N", help="window step (default: half of the context)")
    evaluate.add_argument("--batch-size", type=_positive, metavar="N", help="windows at a time")
    evaluate.add_argument("--dtype", choices=DTYPES, help="dtype to compute in (default: that of the checkpoint)")
    evaluate.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    evaluate.set_defaults(run=_evaluate)
    return parser


def _add_distill(commands: Any, common: argparse.ArgumentParser) -> None:
    training, losses = TrainingConfig(), DistillConfig()
    distill = commands.add_parser(
        "distill",
        parents=[common],
        help="compress a checkpoint stage by stage, and let it learn from its teacher after each",
        description="Compress a checkpoint stage by stage, and let it learn from its teacher after each stage. "
        "A run that was killed goes on with --resume. Several processes: torchrun -m tqcompressor.cli distill ...",
    )
    names = ", ".join((*STAGED_RECIPES, *RECIPES))
    distill.add_argument("--teacher", metavar="DIR", required=True, help="a dense checkpoint directory, or a hub id")
    distill.add_argument("--recipe", metavar="NAME", default="tq-81m-staged", help=f"{names}, or a JSON file")
    distill.add_argument("--text", metavar="FILE", nargs="+", required=True, help="UTF-8 files or globs to learn from")
    distill.add_argument("--out", metavar="DIR", required=True, help="the directory to write")
    distill.add_argument("--resume", action="store_true", help="go on where a run with the same options was killed")
    distill.add_argument("--tokens", type=_positive, metavar="N", help="to train on in all (default: all of the text)")
    distill.add_argument("--heldout", metavar="FILE", help="measures perplexity (default: the end of the text)")
    group = distill.add_argument_group("training")
    group.add_argument("--block-size", type=_positive, metavar="N", help="tokens of a block (default: the context)")
    group.add_argument("--batch-size", type=_positive, metavar="N", default=training.batch_size, help="blocks per step")
    group.add_argument(
        "--gradient-accumulation-steps",
        type=_positive,
        metavar="N",
        default=training.gradient_accumulation_steps,
        help="batches per step",
    )
    group.add_argument("--learning-rate", type=float, metavar="X", default=training.learning_rate)
    group.add_argument("--warmup", type=float, metavar="X", default=training.warmup, help="share of the steps")
    group.add_argument("--weight-decay", type=float, metavar="X", default=training.weight_decay)
    group.add_argument("--precision", choices=PRECISIONS, default=training.precision, help="of the forward pass")
    group.add_argument(
        "--checkpoints", type=_positive, metavar="N", default=training.checkpoints, help="of a stage, to resume from"
    )
    group.add_argument("--device", choices=("cpu",), help="train on the CPU though there is a GPU")
    group.add_argument("--seed", type=int, default=training.seed, help="of the search and of the order of the text")
    group = distill.add_argument_group("loss: alpha·T²·KL(teacher‖student at T) + (1 − alpha)·CE + hidden_weight·H")
    group.add_argument("--temperature", type=float, metavar="T", default=losses.temperature)
    group.add_argument("--alpha", type=float, metavar="X", default=losses.alpha)
    group.add_argument("--hidden-weight", type=float, metavar="X", default=losses.hidden_weight)
    group.add_argument("--hidden-kind", choices=("mse", "cosine"), default=losses.hidden_kind)
    group = distill.add_argument_group("compression")
    group.add_argument("--effort", choices=EFFORTS, help="how hard permutations are searched (default: the recipe's)")
    group.add_argument("--threads", type=_positive, metavar="N", help="worker threads (default: all cores)")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the result (default: float32)")
    distill.set_defaults(run=_distill)


def _add_config(parser: argparse.ArgumentParser, required: bool) -> None:
    choice = parser.add_mutually_exclusive_group(required=required)
    choice.add_argument("--recipe", metavar="NAME", help=f"a named recipe: {', '.join(RECIPES)}")
    choice.add_argument("--config", metavar="FILE", help="a TQConfig as JSON")


def _config(options: argparse.Namespace) -> TQConfig | None:
    if options.config is not None:
        return resolve_config(Path(options.config))
    return None if options.recipe is None else TQConfig.from_recipe(options.recipe)


def _compress(options: argparse.Namespace) -> None:
    from .checkpoint import compress_checkpoint

    report = compress_checkpoint(
        options.source,
        options.out,
        _config(options),
        effort=options.effort,
        seed=options.seed,
        dtype=options.dtype,
        overwrite=options.overwrite,
        threads=options.threads,
        max_shard_size=options.max_shard_size,
    )
    print(report.to_json() if options.json else f"{report}\nwritten to {options.out}")


def _distill(options: argparse.Namespace) -> None:
    # What is wrong with them is said before torch is imported.
    training = TrainingConfig(**{field.name: getattr(options, field.name) for field in fields(TrainingConfig)})
    losses = DistillConfig(options.temperature, options.alpha, options.hidden_weight, options.hidden_kind)
    try:
        from .staged_distillation import distill
    except ImportError as error:
        raise MissingDependencyError(f'distill needs {error.name}: pip install "tqcompressor[hf]"') from error
    try:
        report = distill(
            options.teacher,
            options.recipe,
            texts=options.text,
            out=options.out,
            tokens=options.tokens,
            heldout=options.heldout,
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
        print(f"tqcompressor: {options.out} holds what is done: go on with --resume", file=sys.stderr)
        raise
    # One of several processes speaks for all.
    if int(os.environ.get("RANK", "0")) == 0:
        print(report.to_json() if options.json else f"{report}\nwritten to {options.out}")


def _inspect(options: argparse.Namespace) -> None:
    from .checkpoint import inspect

    report = inspect(options.source, _config(options))
    print(report.to_json() if options.json else report)


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluate import Comparison, read_passages, read_text

    # Before the models, which take seconds to load.
    text = read_text(options.text)
    passages = None if options.lambada is None else read_passages(options.lambada)
    models = [name for name in (options.teacher, options.model) if name is not None]
    # One at a time, so that memory holds one model.
    table = Comparison(tuple(_score(name, text, passages, options) for name in models))
    print(table.to_json() if options.json else table)


def _score(name: str, text: str, passages: list[str] | None, options: argparse.Namespace) -> ModelScore:
    from .evaluate import score

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError('evaluate needs transformers: pip install "tqcompressor[hf]"') from error
    # Its notes and bars would stand between the user and the table.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=options.dtype or "auto").to(options.device)
    return score(
        model,
        tokenizer,
        text,
        name=name,
        passages=passages,
        context=options.context,
        stride=options.stride,
        batch_size=options.batch_size,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


# What argparse calls the type in "invalid positive integer value: '0'".
_positive.__name__ = "positive integer"


def _is_bad_input(error: Exception) -> bool:
    if isinstance(error, StorageError | ConvergenceError | MissingDependencyError):
        return False
    # transformers reports a directory that holds no model as a plain OSError.
    return isinstance(error, TQError | OSError)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
