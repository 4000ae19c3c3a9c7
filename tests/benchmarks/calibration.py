"""Calibrating beside a plain forward and backward pass over the same text: seconds, their ratio, peak memory.

Both take turns in one process. `plain` is the pass of a training step, with the gradients of all weights; `inputs` is
the same pass without them, as calibrating makes it. The peak is what the process takes beyond the loaded model.

GPT-2 small has random weights and reads random tokens, whose times are those of text. `--model DIR` reads a checkpoint
and a text.

`--tokens N …` measures quality instead: the perplexity of tiny-gpt2 after calibrating on so many tokens of books, and
after shrinking its moments by more than the package's own hundredth towards the mean of their diagonals; and without
gradients.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import ROOT, resident, restart_peak
from quality_data import DATA, tiny_gpt2

TEXTS = [ROOT / "tests" / "data" / "tiny-gpt2" / name for name in ("calibration.txt", "heldout.txt")]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, nargs="*", default=[], metavar="DIR", help="checkpoints to calibrate, too"
    )
    parser.add_argument("--gpt2", action=argparse.BooleanOptionalAction, default=True, help="GPT-2 small's shape")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS, help="what the checkpoints read")
    parser.add_argument("--num-samples", type=int, default=256, help="sequences of 128 tokens")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-memory", type=float, default=2, metavar="GB", help="of the sums (default: 2)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[], metavar="N", help="quality by number of tokens")
    parser.add_argument("--shrinkages", type=float, nargs="+", default=[0, 0.03, 0.1], help="beyond the package's own")
    parser.add_argument("--books", type=Path, default=DATA / "books" / "train.txt", metavar="FILE", help="for --tokens")
    parser.add_argument("--quick", action="store_true", help="a small model and few tokens, to see that it runs")


def run(options: argparse.Namespace) -> Iterator[dict]:
    import torch

    if options.tokens:
        yield from qualities(options)
        return
    if options.quick:
        options.num_samples = 8
    if options.gpt2:
        yield measured("GPT-2 small, random", *gpt2(options), options)
    for folder in options.model:
        yield measured(folder.name, *checkpoint(folder, options), options)
    yield {"threads": torch.get_num_threads()}


def gpt2(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=96, n_layer=2, vocab_size=512) if options.quick else GPT2Config()
    # As many to a batch as `calibrate` takes of a text.
    ids = torch.randint(config.vocab_size, (options.num_samples, 128)).split(5)
    return GPT2LMHeadModel(config), [{"input_ids": rows} for rows in ids]


def checkpoint(folder: Path, options: argparse.Namespace) -> tuple[Any, list[Any]]:
    from tqcompressor.calibration.batches import batches_of
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, batches_of(model, tokenizer, options.text, num_samples=options.num_samples, seq_len=128, seed=0)


def qualities(options: argparse.Namespace) -> Iterator[dict]:
    """Perplexities of budgets of the whole model, at the effort fast."""
    import tqcompressor

    for tokens in options.tokens:
        subject = tiny_gpt2(options.books, tokens // 128)
        calibration = tqcompressor.calibrate(subject.model, subject.calibration(0), progress=False)
        whole = [("auto", shrunk(calibration, share), share) for share in options.shrinkages]
        for objective, moments, share in (*whole, ("second_moment", calibration, 0.0)):
            row: dict[str, object] = {"tokens": tokens, "objective": objective, "shrinkage": share}
            for budget in (0.65, 0.5):
                model = subject.copy()
                kept: dict[str, Any] = {"calibration": moments, "objective": objective, "effort": "fast"}
                tqcompressor.compress(model, budget=budget, **kept, progress=False)
                row[f"perplexity at {budget}"] = subject.score(model)["perplexity"]
            yield row


def shrunk(calibration: Any, share: float) -> Any:
    """A calibration whose moments have moved by `share` towards the mean of their diagonals."""
    moments = {}
    for name, moment in calibration.moments.items():
        mean = (
            moment.mean()
            if moment.ndim == 1
            else np.eye(len(moment), dtype=np.float32) * np.trace(moment) / len(moment)
        )
        moments[name] = (1 - share) * moment + share * mean
    return type(calibration)(moments, calibration.tokens, calibration.seed, calibration.sensitivity)


def measured(name: str, model: Any, batches: list[Any], options: argparse.Namespace) -> dict:
    import tqcompressor

    model.eval()
    for batch in batches[:1]:
        # Touches all weights, which are mapped from their file.
        plain(model, [batch], True)
    rest = int(options.max_memory * 2**30)
    passes: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, batches, True),
        "inputs": lambda: plain(model, batches, False),
        "calibrate": lambda: tqcompressor.calibrate(model, batches, max_memory=rest, progress=False),
    }
    seconds: dict[str, list[float]] = {each: [] for each in passes}
    processor: dict[str, list[float]] = {each: [] for each in passes}
    peaks = dict.fromkeys(passes, 0.0)
    for _ in range(options.repeats):
        for each, work in passes.items():
            before, start, used = restart_peak(), time.perf_counter(), processor_seconds()
            work()
            seconds[each].append(time.perf_counter() - start)
            processor[each].append(processor_seconds() - used)
            peaks[each] = max(peaks[each], resident("VmHWM") - before)
    row: dict[str, object] = {"model": name, "tokens": sum(batch["input_ids"].numel() for batch in batches)}
    row |= {f"{each} s": statistics.median(times) for each, times in seconds.items()}
    for each in ("plain", "inputs"):
        row[f"calibrate / {each}"] = row["calibrate s"] / row[f"{each} s"]  # type: ignore[operator]
        used = [statistics.median(processor[one]) for one in ("calibrate", each)]
        row[f"the same in processor time, / {each}"] = used[0] / used[1]
    return row | {f"peak of {each}, MB": peak for each, peak in peaks.items()}


def plain(model: Any, batches: list[Any], weights: bool) -> None:
    """Forward and backward passes of the loss, with the gradients of the weights or of the embedded tokens alone."""
    for parameter in model.parameters():
        parameter.requires_grad_(weights)
    embed = model.get_input_embeddings()
    for batch in batches:
        ids = batch["input_ids"]
        # A leaf with a gradient makes the backward pass reach the first layer.
        inputs = {"input_ids": ids} if weights else {"inputs_embeds": embed(ids).requires_grad_()}
        model(**inputs, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
    model.requires_grad_(True)


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
