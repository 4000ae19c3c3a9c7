"""Quality at equal bytes: eight-bit factors against float16 factors and against eight-bit weights of the dense model.

A share is one of the bytes of the dense float16 weights; permutations and headers are beside it, as in any budget in
bytes. The text's first half calibrates (64 sequences of 128 tokens), and the perplexity is that of the second half, in
windows that do not overlap. By default the model and the text are those of this repository, which need no download.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measuring import ROOT
from tqcompressor import NativeModel, compress_checkpoint

TINY = ROOT / "tests" / "data" / "tiny-gpt2"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=TINY, help="a GPT-2, which the native runtime scores")
    parser.add_argument("--text", type=Path, default=TINY / "heldout.txt", metavar="FILE")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--num-samples", type=int, default=64)


def run(options: argparse.Namespace) -> Iterator[dict]:
    text = options.text.read_text(encoding="utf-8")
    # Between two lines.
    middle = text.index("\n", len(text) // 2)
    known, unseen = text[:middle], text[middle:]
    dense = NativeModel.from_pretrained(options.model)
    calibration = dense.calibrate(known, num_samples=options.num_samples, progress=False)
    full = 2 * dense.parameters

    def row(name: str, share: float | None, model: NativeModel) -> dict:
        found = model.perplexity(unseen, stride=model.context, progress=False).perplexity
        budget = "" if share is None else share
        return {"weights": name, "budget": budget, "of float16": model.bytes / full, "perplexity": found}

    yield row("dense", None, dense)
    yield row("dense int8", None, NativeModel.from_pretrained(options.model, dtype="int8"))
    with tempfile.TemporaryDirectory() as folder:
        for share in options.shares:
            for dtype in ("float16", "int8"):
                out = Path(folder, f"{dtype}-{share}")
                options_of = {"budget": f"{int(share * full)}B", "calibration": calibration, "dtype": dtype}
                compress_checkpoint(options.model, out, **options_of, progress=False)
                yield row(f"{dtype} factors", share, NativeModel.from_pretrained(out))
