"""What each way of spending more time gains on SmolLM2-135M, without training on labels: perplexity on two domains.

Every row is the effort "fast" with one thing changed, at budgets of the blocks' linear layers and of the whole model:

- more tokens, more random gradients a token;
- gradients of the text's own next tokens, or of labels drawn from the model's 50 likeliest, in place of labels drawn
  from all of its distribution;
- progressive: the model is calibrated again as it is at each larger budget, the dense weights are then fitted anew;
- allocation by trials: the loss that the plan adds up is corrected by measured ones. "alone" compresses one block at a
  time and leaves the others dense, "restored" makes one block at a time dense again in the compressed model; each
  block's gradients are scaled by what was measured over what was added up;
- refined: `compress(refine=…)` on the calibration's sequences; "trials, refined" with the allocation of "restored"; and
  what its parts gain: each block trained alone, in pairs, the last one or four on the model's predictions;
  `--learning-rate` is that of all of these.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import tqcompressor
from quality import sizes
from quality_data import DATA, Batch, Subject, matrix, on, set_matrix, smollm2
from torch import nn
from tqcompressor.calibration import hooks
from tqcompressor.calibration.calibration import Calibration
from tqcompressor.compression import refine as refining
from transformers import PreTrainedModel

LIKELIEST = 50
# Budgets at which a progressive run calibrates again.
STEPS = (0.9, 0.8, 0.65, 0.5)
TRIAL_BATCHES = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smollm2", type=Path, required=True, metavar="DIR", help="a checkpoint of SmolLM2-135M")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--scopes", nargs="+", choices=["blocks", "whole"], default=["blocks", "whole"])
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences of 512 tokens")
    parser.add_argument("--reads", choices=["WikiText-2", "books", "both"], default="both", help="what they are of")
    parser.add_argument("--epochs", type=int, default=4, help="of the refinement over the calibration's sequences")
    parser.add_argument("--learning-rate", type=float, help="of the refinement at first, in place of the package's")
    parser.add_argument("--wikitext", type=Path, default=DATA / "wikitext-2", metavar="FOLDER")
    parser.add_argument("--books", type=Path, default=DATA / "books" / "train.txt", metavar="FILE")
    parser.add_argument("--device", default="cpu", help="on which models run; what compresses them runs on the CPU")
    parser.add_argument("--seed", type=int, default=0)


class Work:
    """The subject, its calibration, and how a model is compressed and scored."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.subject = self.of_samples(options.samples)
        self.dense = self.subject.score(self.subject.model)
        self.batches = self.read(self.subject)
        self.calibration = self.calibrate(self.subject.model)

    def of_samples(self, samples: int) -> Subject:
        options = self.options
        subject = smollm2(options.smollm2, options.wikitext, options.books, samples, options.reads)
        subject.model.to(options.device)
        return subject

    def read(self, subject: Subject) -> list[Batch]:
        return [on(subject.model.device, batch) for batch in subject.calibration(self.options.seed)]

    def calibrate(self, model: PreTrainedModel, samples: int = 1) -> Calibration:
        return tqcompressor.calibrate(model, self.batches, samples=samples, seed=self.options.seed, progress=False)

    def compressed(self, calibration: Calibration, budget: float, scope: str, **options: object) -> PreTrainedModel:
        sized = sizes(self.subject)
        # The package counts a budget over the whole model.
        allowed = int(sized["whole"] - (1 - budget) * sized[scope])
        model = self.subject.copy()
        chosen = self.subject.layers if scope == "blocks" else None
        options |= {"matrices": chosen, "effort": "fast", "seed": self.options.seed, "progress": False}
        tqcompressor.compress(model, budget=allowed, calibration=calibration, **options)
        return model

    def refining(self) -> dict[str, object]:
        return {"refine": self.batches, "refine_epochs": self.options.epochs}


Found = Iterator[tuple[float, str, PreTrainedModel]]
"""Budgets, what was done, and the models."""


def run(options: argparse.Namespace) -> Iterator[dict]:
    rate = options.learning_rate
    rates = refining._LEARNING_RATES if rate is None else (rate, rate / 10, rate / 100)
    with patch.object(refining, "_LEARNING_RATES", rates):
        yield from levers(options)


def levers(options: argparse.Namespace) -> Iterator[dict]:
    work = Work(options)
    yield {"dense": work.subject.name, **work.dense}
    for scope in options.scopes:
        for lever in options.levers:
            start = time.perf_counter()
            for budget, name, model in LEVERS[lever](work, scope):
                row: dict[str, object] = {"lever": name, "of": scope, "budget": budget}
                for text, found in work.subject.score(model).items():
                    row |= {text: found, f"{text} / dense": found / work.dense[text]}
                yield row | {"seconds": time.perf_counter() - start}
                start = time.perf_counter()


def calibrated(name: str, calibration: Callable[[Work], Calibration]) -> Callable:
    def lever(work: Work, scope: str) -> Found:
        moments = calibration(work)
        for budget in work.options.budgets:
            yield budget, name.format(work.calibration.tokens), work.compressed(moments, budget, scope)

    return lever


def of_twice_the_text(work: Work) -> Calibration:
    subject = work.of_samples(2 * work.options.samples)
    return tqcompressor.calibrate(subject.model, work.read(subject), seed=work.options.seed, progress=False)


def of_labels(work: Work, likeliest: int | None) -> Calibration:
    """Gradients of the text's next tokens, or of labels drawn from the `likeliest`."""
    read: list[torch.Tensor] = []
    run_model, sampled = hooks.run, hooks._sampled_gradient

    def run_and_keep(model: nn.Module, batch: Batch) -> object:
        read[:] = [batch["input_ids"]]
        return run_model(model, batch)

    def of_text(logits: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
        gradient = logits.float().softmax(-1)
        gradient[:, -1] = 0
        labels = read[0][:, 1:, None]
        gradient[:, :-1].scatter_add_(2, labels, torch.full(labels.shape, -1.0, device=labels.device))
        return gradient

    def of_likeliest(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        least = logits.topk(likeliest, dim=-1).values[..., -1:]
        return sampled(logits.masked_fill(logits < least, -torch.inf), generator)

    chosen = of_text if likeliest is None else of_likeliest
    with patch.object(hooks, "run", run_and_keep), patch.object(hooks, "_sampled_gradient", chosen):
        return work.calibrate(work.subject.model)


def progressive(work: Work, scope: str) -> Found:
    calibration = work.calibration
    for budget in sorted({*STEPS, *work.options.budgets}, reverse=True):
        if budget < min(work.options.budgets):
            return
        model = work.compressed(calibration, budget, scope)
        if budget in work.options.budgets:
            yield budget, f"progressive, {len([step for step in STEPS if step >= budget])} steps", model
        calibration = work.calibrate(model)


def by_trials(work: Work, scope: str, kinds: Sequence[str], refine: bool) -> Found:
    batches = work.batches[:: max(1, len(work.batches) // TRIAL_BATCHES)]
    wanted = [log_softmax(work.subject.model, batch) for batch in batches]
    for budget in work.options.budgets:
        first = work.compressed(work.calibration, budget, scope)
        # Dense modules, so that a block's weights can be exchanged.
        dequantized, dense = copy.deepcopy(first).dequantize(), work.subject.copy()
        whole = loss(first, batches, wanted)
        exchanged = {"alone": (dense, dequantized), "restored": (dequantized, work.subject.model)}
        for name in kinds:
            model, other = exchanged[name]
            factors = []
            for block in work.subject.blocks:
                kept: dict[str, np.ndarray] = {}
                added = 0.0
                for layer in block.layers:
                    old, new = matrix(model, layer).copy(), matrix(other, layer)
                    added += lost(work, layer, new - old)
                    set_matrix(model, layer, new)
                    kept[layer] = old
                measured = loss(model, batches, wanted)
                factors.append((measured if name == "alone" else whole - measured) / added)
                for layer in block.layers:
                    set_matrix(model, layer, kept[layer])
            # Measured on few tokens: no block counts for more than four times the middle one, or less than a quarter.
            middle = float(np.median(factors))
            scaled = [min(max(factor, middle / 4), 4 * middle) / middle for factor in factors]
            options = work.refining() if refine else {}
            found = work.compressed(with_factors(work, scaled), budget, scope, **options)
            yield budget, f"allocated by trials, {name}{', refined' * refine}", found


def lost(work: Work, name: str, difference: np.ndarray) -> float:
    """The loss that the plan adds up for a layer."""
    bare = work.subject.bare(name)
    inputs, outputs = work.calibration.input(bare), work.calibration.output(bare)
    return float(np.vdot(difference, inputs @ difference @ outputs))


def with_factors(work: Work, factors: Sequence[float]) -> Calibration:
    """The calibration whose gradients of each block are scaled, in energy, by its factor."""
    old, moments = work.calibration, dict(work.calibration.moments)
    for block, factor in zip(work.subject.blocks, factors, strict=True):
        for layer in block.layers:
            name = f"output.{work.subject.bare(layer)}"
            moments[name] = (moments[name] * factor).astype(np.float32)
    return Calibration(moments, old.tokens, old.seed, old.sensitivity)


@torch.no_grad()
def log_softmax(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model(**batch, use_cache=False).logits.float().log_softmax(-1)


def loss(model: PreTrainedModel, batches: Sequence[Batch], wanted: Sequence[torch.Tensor]) -> float:
    """The mean divergence of the next token's distribution from the dense model's."""
    parts = zip(batches, wanted, strict=True)
    found = [float((w.exp() * (w - log_softmax(model, batch))).sum(-1).mean()) for batch, w in parts]
    return float(np.mean(found))


def refined(work: Work, scope: str, together: int = 2, last: int = 4) -> Found:
    """`together` blocks at a time; the `last` ones, or none, on the predictions."""
    read = f"{work.calibration.tokens:,} tokens, {work.options.epochs} epochs, rate {refining._LEARNING_RATES[0]:g}"
    predicts = {} if last else {"_predicts": lambda *_: False}
    for budget in work.options.budgets:
        with patch.multiple(refining, _WINDOW=together, _LAST=last, **predicts):
            model = work.compressed(work.calibration, budget, scope, **work.refining())
        yield budget, f"refined, {read}, {together} together, {last} by predictions", model


LEVERS: dict[str, Callable] = {
    "none": calibrated("none, {:,} tokens", lambda work: work.calibration),
    "tokens": calibrated("twice the tokens", of_twice_the_text),
    "samples": calibrated("four gradients a token", lambda work: work.calibrate(work.subject.model, samples=4)),
    "text labels": calibrated("gradients of the text's tokens", partial(of_labels, likeliest=None)),
    "likeliest labels": calibrated(f"labels of the {LIKELIEST} likeliest", partial(of_labels, likeliest=LIKELIEST)),
    "progressive": progressive,
    "trials": partial(by_trials, kinds=("alone", "restored"), refine=False),
    "refined": refined,
    "refined alone": partial(refined, together=1, last=0),
    "refined in pairs": partial(refined, together=2, last=0),
    "refined alone, last one": partial(refined, together=1, last=1),
    "refined alone, last four": partial(refined, together=1, last=4),
    "trials, refined": partial(by_trials, kinds=("restored",), refine=True),
}
