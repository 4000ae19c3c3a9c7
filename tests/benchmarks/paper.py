"""The published table of TQCompressedGPT-2: perplexity of WikiText-103, WikiText-2 and LAMBADA, with our models beside.

The protocol is that of the published figures: the test sets that are not raw (`<unk>` stays), the texts of a set joined
by two newlines, windows of 1024 tokens that do not overlap, the mean of the windows' means, and LAMBADA as whole
passages (not their last words). A set is a file as the hub has it (.parquet), .jsonl with "text", or plain text:
WikiText's lines, or a passage of LAMBADA a line.

Models: GPT-2 (`--gpt2`), DistilGPT-2, the authors' TQCompressedGPT-2 and Krony-PT where their files are given, and ours
at the size of the recipe tq-81m (81,336,388 parameters of GPT-2): by that recipe, and by a budget of as many parameters
that is calibrated on `--text`; without training, and healed on `--text`. The published sizes leave out a head that is
not tied.

Without `--gpt2` it is the small GPT-2 of this repository; `--random-gpt2` makes one of GPT-2's shape with random
weights, whose perplexities mean nothing. Both show that the run works where the weights are not.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from measuring import ROOT, fresh_process
from tqcompressor import (
    TrainingConfig,
    calibrate_checkpoint,
    compress_checkpoint,
    distill,
    inspect,
)
from tqcompressor.evaluate import mean_window_perplexity, model_size, read_text
from tqcompressor.utils.torch_utils import quiet_transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_checkpoint import MAKE

TINY = ROOT / "tests" / "data" / "tiny-gpt2"
RECIPE = "tq-81m"
CONTEXT = 1024
SETS = {"wikitext103": "WikiText-103", "wikitext2": "WikiText-2", "lambada": "LAMBADA"}
# Parameters without an untied head, and the perplexities in the order of SETS, as the papers print them.
PUBLISHED = {
    "GPT-2": (124_439_808, (29.16, 24.67, 45.28)),
    "DistilGPT-2": ("82 M", (44.53, 36.48, 76.00)),
    "TQCompressedGPT-2": (81_336_388, (40.28, 32.25, 64.72)),
    "Krony-PT": ("81 M", (41.98, 34.99, 64.92)),
    "KnGPT-2": ("83 M", (40.97, 32.81, 67.62)),
}
NONE = "–"


def add_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--gpt2", type=Path, default=TINY, metavar="DIR", help="default: the GPT-2 of this repository")
    model.add_argument("--random-gpt2", action="store_true", help="in its place one of GPT-2's shape, random weights")
    parser.add_argument("--distilgpt2", type=Path, metavar="DIR")
    parser.add_argument("--tq", type=Path, metavar="FILE", help="pytorch_model.bin of TQCompressedGPT-2")
    parser.add_argument("--krony", type=Path, metavar="FILE", help="a checkpoint of Krony-PT")
    for name, title in SETS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"the test set of {title}")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="text to calibrate on and to heal on")
    parser.add_argument("--no-healing", action="store_true", help="leave out what is trained")
    parser.add_argument("--tokens", type=int, metavar="N", help="to heal on (default: all of the text)")
    parser.add_argument("--num-samples", type=int, default=128, help="sequences to calibrate on")
    parser.add_argument("--seq-len", type=int, help="tokens of these (default: that of calibrate)")
    parser.add_argument("--effort", default="balanced", help="of the recipe's search")
    parser.add_argument(
        "--batch-size", type=int, default=TrainingConfig().batch_size, help="samples of a training batch"
    )
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--device", default="cpu", help="to calibrate and to evaluate on; training takes a GPU if any")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep our models there (default: a temporary folder)")


def run(options: argparse.Namespace) -> Iterator[dict]:
    sets = {title: getattr(options, name) for name, title in SETS.items() if getattr(options, name) is not None}
    if not sets:
        raise SystemExit(f"expected a test set: {', '.join(f'--{name} FILE' for name in SETS)}")
    texts = {title: text_of(path, title) for title, path in sets.items()}
    with tempfile.TemporaryDirectory() as temporary, quiet_transformers():
        folder = options.out or Path(temporary)
        gpt2 = random_gpt2(Path(temporary)) if options.random_gpt2 else options.gpt2
        tokenizer = AutoTokenizer.from_pretrained(gpt2)
        measured = set()
        for name, source in models(gpt2, folder, options):
            measured.add(name)
            yield {"model": name, **scored(source, tokenizer, texts, options.device), **published(name, texts)}
    for name, (parameters, _) in PUBLISHED.items():
        if name not in measured:
            yield {"model": name, "parameters": parameters, **dict.fromkeys(texts, NONE), **published(name, texts)}


def models(gpt2: Path, folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """The models of the table, each made when its turn comes."""
    yield "GPT-2", gpt2
    if options.distilgpt2 is not None:
        yield "DistilGPT-2", options.distilgpt2
    for name, file in (("TQCompressedGPT-2", options.tq), ("Krony-PT", options.krony)):
        if file is not None:
            yield name, imported(file, gpt2, folder / name)
    calibration = None
    if options.text is not None:
        calibration = calibrate_checkpoint(
            gpt2, options.text, num_samples=options.num_samples, seq_len=options.seq_len, device=options.device
        )
    size = inspect(gpt2, RECIPE).parameters_after
    ways: list[tuple[str, dict[str, Any]]] = [("recipe", {"config": RECIPE, "effort": options.effort})]
    if calibration is not None:
        ways.append(("recipe, calibrated", {"config": RECIPE, "effort": options.effort, "calibration": calibration}))
        ways.append(("budget, calibrated", {"budget": size, "calibration": calibration}))
    for name, how in ways:
        out = folder / name.replace(", ", "-")
        compress_checkpoint(gpt2, out, **how, overwrite=True)
        yield f"ours, {name}", out
    if options.text is not None and not options.no_healing:
        # What `distill` is called with, for each student that is healed.
        students: dict[str, dict[str, Any]] = {
            "recipe": {"recipe": RECIPE, "effort": options.effort},
            "budget": {"budget": size, "calibration": calibration},
        }
        for name, student in students.items():
            yield f"ours, {name}, healed", healed(gpt2, folder / f"{name}-healed", student, options)


def healed(gpt2: Path, out: Path, student: Mapping[str, Any], options: argparse.Namespace) -> Path:
    """The folder of a student that was trained on the text to imitate GPT-2; a killed run goes on."""
    training = TrainingConfig(batch_size=options.batch_size, bf16=options.bf16)
    device = "cpu" if options.device == "cpu" else None
    distill(
        gpt2,
        **student,
        text=options.text,
        out=out,
        tokens=options.tokens,
        training=training,
        device=device,
        resume=True,
    )
    return out


def imported(file: Path, gpt2: Path, out: Path) -> Path:
    """A published checkpoint in our format; what is in no tensor is GPT-2's."""
    from tqcompressor import convert_checkpoint

    convert_checkpoint(file, out, config=gpt2 / "config.json", overwrite=True)
    return out


def scored(source: Path, tokenizer: Any, texts: Mapping[str, str], device: str) -> dict[str, Any]:
    """The size of a model and its perplexity on each set."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32").to(device)
    context = min(CONTEXT, model.config.max_position_embeddings)
    found = {
        title: mean_window_perplexity(model, tokenizer, text, context=context).perplexity
        for title, text in texts.items()
    }
    return {"parameters": model_size(model)[0], **found}


def published(name: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """The published figures of a model for the sets in `texts`."""
    _, figures = PUBLISHED.get(name, (None, (NONE,) * len(SETS)))
    known = dict(zip(SETS.values(), figures, strict=True))
    return {f"{title}, published": known[title] for title in texts}


def text_of(path: Path, title: str) -> str:
    """The texts of a set as the `datasets` library has them, joined by two newlines."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table

        rows = read_table(path, columns=["text"])["text"].to_pylist()
    else:
        lines = read_text(path).removesuffix("\n").split("\n")
        if path.suffix == ".jsonl":
            rows = [json.loads(line)["text"] for line in lines if line.strip()]
        elif title == SETS["lambada"]:
            rows = [line for line in lines if line.strip()]
        else:
            # A line of WikiText keeps its end, a blank one is an empty text.
            rows = [f"{line}\n" if line.strip() else "" for line in lines]
    return "\n\n".join(rows)


def random_gpt2(folder: Path) -> Path:
    """A checkpoint of GPT-2's shape with random weights, and the tokenizer of the small GPT-2."""
    gpt2 = folder / "random-gpt2"
    fresh_process(["-c", MAKE, str(gpt2), "768", "12", "50257"])
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(gpt2)
    return gpt2
