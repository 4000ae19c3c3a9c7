"""The parser of the command line: each command with its options."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from .._core import __version__
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, DTYPES, EFFORTS, ENGINES, OBJECTIVES, STORED_DTYPES
from ..config.recipes import RECIPES
from ..distillation.config import DistillConfig, HiddenKind, TrainingConfig
from ..distillation.stages import DEFAULT_BUDGET, STAGED_RECIPES


def parser() -> argparse.ArgumentParser:
    """The parser; its result has the name of the command as `command`."""
    program = argparse.ArgumentParser(
        prog="tqcompressor",
        description="Compress models of transformers, by one budget for the whole model or by a recipe.",
    )
    program.add_argument("--version", action="version", version=f"tqcompressor {__version__}")
    commands = program.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    compress = commands.add_parser("compress", parents=[common], help="compress a checkpoint into a new directory")
    compress.add_argument("source", metavar="SRC", help="a checkpoint directory with safetensors files, or a hub id")
    _add_config(compress)
    _add_calibration(compress)
    group = compress.add_argument_group("calibrating on a text, in place of --calibration")
    group.add_argument("--text", metavar="FILE", nargs="+", help="UTF-8 files or globs to calibrate on; see calibrate")
    _add_sequences(group)
    group.add_argument("--save-calibration", metavar="FILE", help="keep the calibration in a safetensors file")
    _add_device(group)
    _add_engine(group)
    compress.add_argument(
        "--heal-tokens",
        type=_count,
        metavar="N",
        help="train the result on so many tokens of --text, such as 2M; see distill, which has more options",
    )
    compress.add_argument(
        "--refine", action="store_true", help="with --heal-tokens: train the factors before, blocks in pairs"
    )
    compress.add_argument("--out", metavar="DST", required=True, help="the directory to write")
    compress.add_argument(
        "--resume",
        action="store_true",
        help="go on where a killed run with the same options was, and keep what this one finishes if it is stopped",
    )
    searched = "(default: the config's; with --budget"
    compress.add_argument("--effort", choices=EFFORTS, help=f"effort of the search {searched} {DEFAULT_EFFORT})")
    compress.add_argument("--seed", type=int, help=f"seed of the search {searched} {DEFAULT_SEED})")
    _add_threads(compress)
    compress.add_argument(
        "--dtype",
        choices=STORED_DTYPES,
        help="dtype of the result; int8 is for weights, and needs neither config nor budget (default: that of each "
        "source tensor)",
    )
    _add_files(compress)

    expand = commands.add_parser(
        "expand",
        parents=[common],
        help="write a compressed checkpoint as a stock one",
        description="Multiply the factors of a compressed checkpoint out into a stock checkpoint, which any program "
        "reads that reads the original: converters to GGUF and ONNX, other runtimes. Needs no torch.",
    )
    expand.add_argument("source", metavar="DIR", help="a compressed checkpoint directory, or a hub id")
    expand.add_argument("--out", metavar="DST", required=True, help="the directory to write")
    expand.add_argument("--dtype", choices=DTYPES, help="dtype of the result (default: that of the factors)")
    _add_files(expand)
    _add_threads(expand)

    convert = commands.add_parser(
        "convert",
        parents=[common],
        help="turn a checkpoint of torch.save into a safetensors one: TQCompressedGPT-2, Krony-PT, nanoGPT, GPT-2",
        description="Convert a file of torch.save, with Kronecker factors or dense, into a checkpoint that this "
        "package and transformers load, with equal logits. No code in the file is run. Needs torch.",
    )
    convert.add_argument(
        "source", metavar="FILE", help="a file *.bin, *.pt or *.pth, an index of shards, their folder, or a hub id"
    )
    convert.add_argument("--out", metavar="DIR", required=True, help="the directory to write")
    convert.add_argument(
        "--config",
        metavar="CONFIG",
        help="the config.json of the model (default: that beside FILE; without one, heads are 64 wide)",
    )
    convert.add_argument("--dtype", choices=DTYPES, help="dtype of the result (default: that of each tensor)")
    _add_files(convert)

    _add_distill(commands, common)

    inspect = commands.add_parser(
        "inspect",
        parents=[common],
        help="list the matrices of a checkpoint, show the plan of a recipe or a budget, or the report of a compression",
    )
    inspect.add_argument("source", metavar="SRC", help="a checkpoint directory, dense or compressed, or a hub id")
    _add_config(inspect)
    _add_calibration(inspect)
    group = inspect.add_argument_group("options of --budget, which reads the weights")
    group.add_argument("--effort", choices=EFFORTS, default=DEFAULT_EFFORT, help="of the search (default: %(default)s)")
    group.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of the search (default: %(default)s)")
    group.add_argument(
        "--dtype", choices=STORED_DTYPES, help="of the result, for a budget in bytes (default: as stored)"
    )
    _add_threads(group)

    _add_calibrate(commands, common)

    _add_evaluate(commands, common)
    _add_sweep(commands, common)
    _add_report(commands, common)
    _add_verify(commands, common)
    _add_generate(commands, common)
    return program


def _add_distill(commands: Any, common: argparse.ArgumentParser) -> None:
    training, losses = TrainingConfig(), DistillConfig()
    distill = commands.add_parser(
        "distill",
        parents=[common],
        help="compress a checkpoint and train it to imitate the original",
        description="Compress a checkpoint, by a budget or in the stages of a recipe, and train it to imitate the "
        "teacher, the checkpoint as it was; or train a student that is compressed already. A killed run resumes with "
        "--resume. For several processes: "
        "torchrun -m tqcompressor.cli distill ...",
    )
    names = ", ".join((*RECIPES, *STAGED_RECIPES))
    distill.add_argument("--teacher", metavar="DIR", required=True, help="a dense checkpoint directory, or a hub id")
    choice = distill.add_mutually_exclusive_group()
    choice.add_argument("--recipe", metavar="NAME", help=f"{names}, or a JSON file, such as one of several budgets")
    choice.add_argument(
        "--budget",
        metavar="B",
        help=f"the size to keep, as for compress, calibrated on the text (default: {DEFAULT_BUDGET})",
    )
    choice.add_argument("--student", metavar="DIR", help="a student to train as it is, such as a compressed checkpoint")
    distill.add_argument("--text", metavar="FILE", nargs="+", required=True, help="UTF-8 files or globs to train on")
    distill.add_argument("--out", metavar="DIR", required=True, help="the directory to write")
    distill.add_argument("--resume", action="store_true", help="resume a killed run that had the same options")
    distill.add_argument(
        "--tokens",
        type=_count,
        metavar="N",
        help="to train on in all, such as 2M, drawn from every part of the text (default: all of it)",
    )
    distill.add_argument("--heldout", metavar="FILE", help="text to score on (default: the end of --text)")
    group = distill.add_argument_group("training")
    group.add_argument("--seq-len", type=_positive, metavar="N", help="tokens of a sample (default: the context)")
    group.add_argument(
        "--batch-size", type=_positive, metavar="N", help="samples of a batch (default: by the tokens, at most 16)"
    )
    group.add_argument(
        "--gradient-accumulation-steps",
        type=_positive,
        metavar="N",
        default=training.gradient_accumulation_steps,
        help="batches per optimiser step",
    )
    group.add_argument(
        "--learning-rate", type=float, metavar="X", help="after the warm-up (default: 3e-4 · 256 / the model's width)"
    )
    group.add_argument(
        "--warmup-ratio", type=float, metavar="X", default=training.warmup_ratio, help="share of the steps"
    )
    group.add_argument("--weight-decay", type=float, metavar="X", default=training.weight_decay)
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="bfloat16 in the forward pass (default: float32)")
    precision.add_argument("--fp16", action="store_true", help="float16 in the forward pass (default: float32)")
    group.add_argument(
        "--save-steps",
        type=_number,
        metavar="N",
        default=training.save_steps,
        help="steps between checkpoints, or below 1 a share of a stage's steps (default: %(default)s)",
    )
    group.add_argument("--device", choices=("cpu",), help="train on the CPU even if there is a GPU")
    group.add_argument(
        "--data-seed",
        type=int,
        metavar="N",
        default=training.seed,
        help="of the order of the samples and of dropout (default: %(default)s)",
    )
    group = distill.add_argument_group("loss: alpha·T²·KL(teacher‖student at T) + (1 − alpha)·CE + hidden_weight·H")
    group.add_argument("--temperature", type=float, metavar="T", default=losses.temperature)
    group.add_argument("--alpha", type=float, metavar="X", default=losses.alpha)
    group.add_argument("--hidden-weight", type=float, metavar="X", help="(default: 1)")
    group.add_argument("--hidden-kind", choices=get_args(HiddenKind), default=losses.hidden_kind)
    group.add_argument("--dropout", action="store_true", help="keep the dropout of the student's config")
    group = distill.add_argument_group("compression")
    group.add_argument("--calibration", metavar="FILE", help="for --budget (default: measured on --text)")
    group.add_argument(
        "--num-samples",
        type=_positive,
        metavar="N",
        default=128,
        help="sequences of a calibration (default: %(default)s)",
    )
    group.add_argument(
        "--refine", action="store_true", help="train the factors of a budget on these sequences before, blocks in pairs"
    )
    group.add_argument("--effort", choices=EFFORTS, help="effort of the search (default: the recipe's)")
    group.add_argument("--seed", type=int, metavar="N", help="of search and calibration (default: the recipe's)")
    _add_threads(group)
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the result (default: float32)")


def _add_calibrate(commands: Any, common: argparse.ArgumentParser) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        parents=[common],
        help="measure second moments on a text, for --calibration",
        description="Measure the second moments of a model's activations, and of its gradients, on a text.",
    )
    calibrate.add_argument("source", metavar="DIR", help="a checkpoint, compressed or not, or a hub id")
    calibrate.add_argument(
        "--text",
        metavar="FILE",
        nargs="+",
        required=True,
        help="UTF-8 files or globs; each gives as many sequences, whatever its length, twice as many if named twice",
    )
    calibrate.add_argument("--out", metavar="FILE", required=True, help="the safetensors file to write")
    _add_sequences(calibrate)
    calibrate.add_argument(
        "--sensitivity",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure gradients too, which --objective sensitivity needs: twice the time; --engine native cannot",
    )
    calibrate.add_argument(
        "--samples",
        type=_positive,
        metavar="N",
        help="gradients drawn a text (default: 1 of logits, 8 of embeddings)",
    )
    calibrate.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of sequences and gradients (default: 0)")
    calibrate.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in (default: float32)")
    _add_device(calibrate)
    calibrate.add_argument(
        "--partial", metavar="FILE", help="keep the sums so far in FILE, where a run that was stopped goes on"
    )
    _add_engine(calibrate)
    _add_threads(calibrate)


def _add_sequences(parser: Any) -> None:
    parser.add_argument(
        "--num-samples", type=_positive, metavar="N", default=128, help="sequences drawn (default: 128)"
    )
    parser.add_argument(
        "--seq-len",
        type=_positive,
        metavar="N",
        help="tokens of a sequence (default: 128, or the context if shorter)",
    )


def _add_evaluate(commands: Any, common: argparse.ArgumentParser) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        parents=[common],
        help="measure perplexity, of a teacher too if given; of encoders, the cosine of embeddings",
        description="Measure the perplexity of a causal language model, and of its teacher if given. Any other model "
        "of text has none: its embeddings of the lines of the text are compared with the teacher's.",
    )
    evaluate.add_argument("model", metavar="DIR", help="a checkpoint, compressed or not")
    evaluate.add_argument("--teacher", metavar="DIR", help="the checkpoint that DIR was made from")
    evaluate.add_argument("--text", metavar="FILE", required=True, help="raw UTF-8 text")
    evaluate.add_argument("--passages", metavar="FILE", help='passages, one a line, or .jsonl with "text"')
    _add_windows(evaluate)
    evaluate.add_argument(
        "--record",
        action="store_true",
        help="keep the perplexities in DIR, and in its model card (compressed checkpoints)",
    )
    _add_engine(evaluate)
    _add_threads(evaluate)
    group = evaluate.add_argument_group("engine torch")
    group.add_argument("--batch-size", type=_positive, metavar="N", help="windows at a time")
    group.add_argument(
        "--dtype", choices=DTYPES, help="dtype to compute in (default: float32 on the CPU, else the checkpoint's)"
    )
    _add_device(group)


def _add_sweep(commands: Any, common: argparse.ArgumentParser) -> None:
    sweep = commands.add_parser(
        "sweep",
        parents=[common],
        help="measure quality, bytes and tokens per second of several budgets on a text",
        description="Compress a checkpoint to each of several budgets, with one calibration, and measure each on a "
        "held-out text. A stopped sweep goes on with --resume, also with other budgets.",
    )
    sweep.add_argument("source", metavar="SRC", help="a checkpoint directory with safetensors files, or a hub id")
    sweep.add_argument(
        "--budgets", metavar="B", nargs="+", required=True, help="the sizes to keep, each as --budget of compress"
    )
    sweep.add_argument("--out", metavar="DIR", required=True, help="the directory of the table and the figures")
    sweep.add_argument("--heldout", metavar="FILE", required=True, help="raw UTF-8 text to measure quality on")
    sweep.add_argument("--text", metavar="FILE", nargs="+", help="UTF-8 files or globs to calibrate on; see calibrate")
    _add_sequences(sweep)
    _add_calibration(sweep)
    _add_windows(sweep)
    sweep.add_argument("--effort", choices=EFFORTS, default=DEFAULT_EFFORT, help="of the search (default: %(default)s)")
    sweep.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of search and calibration (default: 0)")
    sweep.add_argument("--dtype", choices=STORED_DTYPES, help="of the results (default: that of each source tensor)")
    sweep.add_argument("--keep", metavar="DIR", help="keep every compressed model in DIR")
    sweep.add_argument("--resume", action="store_true", help="go on with the stopped sweep in the directory of --out")
    _add_device(sweep)
    _add_engine(sweep)
    _add_threads(sweep)


def _add_report(commands: Any, common: argparse.ArgumentParser) -> None:
    report = commands.add_parser(
        "report",
        parents=[common],
        help="write one HTML page about a compressed checkpoint, or about a sweep",
        description="Write one HTML page that loads nothing: the plan layer by layer, sizes and perplexities before "
        "and after, and the budgets of a sweep.",
    )
    report.add_argument("source", metavar="DIR", help="a compressed checkpoint directory, or one of a sweep")
    report.add_argument("--html", metavar="FILE", required=True, help="the page to write")
    report.add_argument("--sweep", metavar="FILE", help="the sweep.json of its source (default: that in DIR)")
    report.add_argument(
        "--evaluation",
        metavar="FILE",
        help="what `evaluate --json` printed (default: what `evaluate --record` kept in DIR)",
    )


def _add_verify(commands: Any, common: argparse.ArgumentParser) -> None:
    verify = commands.add_parser(
        "verify",
        parents=[common],
        help="check a checkpoint before it is shipped",
        description="Check that a checkpoint is whole and finite, that a fresh process loads it, that its size is as "
        "reported, that the native runtime and generation with a cache compute the same, that saving changes no bit, "
        "and that its quality is within a bound of the teacher's. The exit status is 1 if a check fails. As pytest "
        "tests: pytest --pyargs tqcompressor.verify --tq-model DIR ...",
    )
    verify.add_argument("source", metavar="DIR", help="a checkpoint, compressed or not, or a hub id")
    verify.add_argument("--teacher", metavar="DIR", help="the checkpoint that DIR was made from")
    verify.add_argument("--text", metavar="FILE", help="raw UTF-8 text to measure quality on")
    verify.add_argument(
        "--max-perplexity-ratio",
        type=float,
        metavar="X",
        default=1.1,
        help="largest perplexity of a language model, as a multiple of the teacher's (default: %(default)s)",
    )
    verify.add_argument(
        "--min-cosine",
        type=float,
        metavar="X",
        default=0.9,
        help="smallest mean cosine of an encoder's embeddings with the teacher's (default: %(default)s)",
    )
    _add_windows(verify)
    verify.add_argument("--batch-size", type=_positive, metavar="N", help="windows or texts at a time")
    verify.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in (default: float32)")
    _add_device(verify)


def _add_windows(parser: Any) -> None:
    parser.add_argument("--context", type=_positive, metavar="N", help="window in tokens (default: the model's)")
    parser.add_argument("--stride", type=_positive, metavar="N", help="window step (default: half of the context)")


def _add_device(parser: Any) -> None:
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def _add_engine(parser: Any) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="native runs GPT-2, Llama, Mistral and Qwen2 on the CPU in float32, without torch (default: torch if it "
        "is installed)",
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint in DST, if it holds nothing else"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help='like "500MB" (default: 5GB)')


def _add_threads(parser: Any) -> None:
    parser.add_argument("--threads", type=_positive, metavar="N", help="worker threads (default: all cores)")


def _add_generate(commands: Any, common: argparse.ArgumentParser) -> None:
    generate = commands.add_parser(
        "generate",
        parents=[common],
        help="continue a text; needs no torch",
        description="Continue a text with a GPT-2, Llama, Mistral or Qwen2, dense or compressed, printed as it is "
        "generated. Needs no torch.",
    )
    generate.add_argument("model", metavar="DIR", help="a checkpoint, compressed or not, or a hub id")
    generate.add_argument("--dtype", choices=["int8"], help="quantize the weights on loading (default: as stored)")
    generate.add_argument(
        "--kv-dtype", choices=DTYPES, default="float32", help="dtype of cached keys and values (default: float32)"
    )
    generate.add_argument("--prompt", metavar="TEXT", required=True, help="the text to continue")
    generate.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", help="(default: 128, or fewer if the context is full)"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        default=0.0,
        help="divisor of the logits before a token is drawn (default: 0, which takes the most probable token)",
    )
    generate.add_argument(
        "--top-k", type=_positive, metavar="K", default=0, help="draw from the K most probable tokens (default: all)"
    )
    generate.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=1.0,
        help="draw from the most probable tokens with a total probability of P (default: 1)",
    )
    generate.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of the draws (default: 0)")
    _add_threads(generate)


def _add_config(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--recipe", metavar="NAME", help=f"a named recipe: {', '.join(RECIPES)}")
    choice.add_argument("--config", metavar="FILE", help="a TQConfig as JSON")
    choice.add_argument(
        "--budget",
        metavar="B",
        help='the size to keep: a share of all parameters (0.65 or "65%%"), their number, '
        'the size of the weights ("300MB"), or "lost_energy=0.1"',
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration", metavar="FILE", help="a file of `tqcompressor calibrate`")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="auto",
        help="the norm of errors (default: by all moments of --calibration)",
    )
    parser.add_argument(
        "--matrices", metavar="PATTERN", nargs="+", help="patterns of the matrices that --budget is spent on"
    )
    parser.add_argument(
        "--max-macs",
        type=float,
        metavar="X",
        help="with --budget: a cap on the MACs of these matrices for one token, as a share of their MACs while dense; "
        "inf for none (default: each matrix takes no more than while dense)",
    )


def _count(text: str) -> int:
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    number = round(float(text[:-1] if scale > 1 else text) * scale)
    if number < 1:
        raise ValueError
    return number


# The name of the type in argparse's error.
_count.__name__ = "number of tokens"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


# The name of the type in argparse's error: "invalid positive integer value: '0'".
_positive.__name__ = "positive integer"


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


_number.__name__ = "number"
