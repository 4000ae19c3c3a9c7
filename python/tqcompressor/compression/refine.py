"""Trains the blocks of a compressed model, a few at a time, on what the original model computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration.batches import Batch, is_encoder_decoder, mask_of
from ..calibration.calibration import Calibration
from ..calibration.hooks import run
from ..calibration.units import units
from ..errors import ConfigError, NonFiniteError
from ..losses import kl_divergence
from ..models.balancing import balanced
from ..models.blocks import Call, input_of, passing, recorded_calls, transformer_blocks
from ..models.matrices import bare_name
from ..modules.dense_weight import CompressedBase
from ..utils.progress import Report
from ..utils.torch_utils import evaluating, frozen, replace_modules

EPOCHS = 4
# Blocks that are trained together: each makes up for the ones before it, and has a second turn with the one behind it.
_WINDOW = 2
# At most so many blocks at the end learn the predictions, together; of a shallow model, a quarter of all.
_LAST = 4
# The next one is for blocks that got worse with the one before. A third of the first is no better where little is lost,
# and worse where much is; tests/benchmarks/README.md has figures.
_LEARNING_RATES = (3e-4, 3e-5, 3e-6)
_WARMUP = 0.05
# The share of the batches that decides whether blocks keep what they learned.
_HELDOUT = 8


def refine(
    model: PreTrainedModel,
    dense: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    calibration: Calibration | None,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    report: Report | None = None,
) -> None:
    """Trains the factors and the vectors of the blocks of `model` to give what the dense model gives.

    Two neighbouring blocks at a time learn to give the outputs that the dense blocks have, on the inputs that they get
    in the compressed model, so that they also make up for what the blocks before them lost. With the original's outputs
    `y` of the second for a token, and the moment `G` of the gradients at them, which is the identity without a
    calibration, the loss is `(ŷ − y) G (ŷ − y)ᵀ / ‖y‖²`, the mean over the tokens. The next two begin with the second
    of these. In a model that predicts tokens, the last quarter of the blocks, at most four, learns together, by the
    Kullback-Leibler divergence of the predictions from the dense model's.

    An eighth of the batches is held out: blocks that got worse on it are put back, and trained with a tenth of the
    learning rate, twice at most. Vectors are the blocks' biases and the gains of their norms, unless other modules
    share them; nothing else changes. If anything is raised, vectors have the values from before.

    `dense` are the modules that the compressed ones replaced, by full name. Blocks compute in float32.

    Raises `ConfigError` for a model whose blocks do not feed one another, `NonFiniteError` for NaN or an infinity.

    Cost: two forward passes of the model, `6·epochs` of its blocks and `3·epochs` of its head; the hidden states of all
    tokens, twice, and the logits of a batch, three times.
    """
    blocks = transformer_blocks(model)
    vectors = _vectors(model, blocks.values())
    with (
        evaluating(model),
        frozen(model),
        _kept_unless_done([each for own in vectors for each in own]),
        ExitStack() as widened,
    ):
        work = _Work(model, blocks, vectors, dense, batches, calibration, widened)
        windows = _windows(len(blocks), work.predicts)
        for number, window in enumerate(windows):
            work.train(window, epochs, seed)
            if report is not None:
                report(number + 1, len(windows))


def _windows(blocks: int, predicts: bool) -> list[range]:
    """The blocks that are trained together, window by window."""
    size = min(_WINDOW, blocks)
    last = max(min(_LAST, blocks // 4), 1) if predicts else size
    return [*(range(first, min(first + size, blocks)) for first in range(blocks - last)), range(blocks - last, blocks)]


class _Work:
    """The blocks of a model and the hidden states that reach them, in the dense model and in the compressed one."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Mapping[str, nn.Module],
        vectors: Sequence[Sequence[nn.Parameter]],
        dense: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        calibration: Calibration | None,
        widened: ExitStack,
    ) -> None:
        self.model, self.dense, self.batches, self.calibration = model, dense, batches, calibration
        self.names, self.blocks, self.vectors = list(blocks), list(blocks.values()), vectors
        inside = tuple(f"{name}." for name in blocks)
        self.dense_outside = {full: module for full, module in dense.items() if not full.startswith(inside)}
        # Blocks are in float32 from the window in which they are trained first to that in which they are last.
        self.widened = widened
        self.in_float32: dict[int, ExitStack] = {}
        self.behind, self.before = 0, 0
        """How many blocks `wanted` has passed in the dense model, and `inputs` in the compressed one."""
        self.wanted, self.inputs, self.calls, self.predicts = _read(model, self.blocks, dense, batches)
        self.masks = [mask_of(batch).bool().to(self.wanted[0].device) for batch in batches]

    def train(self, window: range, epochs: int, seed: int) -> None:
        """Trains the blocks of a window together, and keeps them where they got better."""
        self._move_to(window)
        names = tuple(f"{self.names[index]}." for index in window)
        if not any(full.startswith(names) for full in self.dense):
            return
        predicts = self.predicts and window.stop == len(self.blocks)
        with _in_float32(self._outside()) if predicts else nullcontext():
            loss = self._divergence(window) if predicts else self._distance(window)
            self._learn(window, names, loss, epochs, seed)

    @torch.no_grad()
    def _move_to(self, window: range) -> None:
        """Leaves the blocks before a window, and lets the dense ones of the window compute what is wanted."""
        for index in range(self.before, window.start):
            self.inputs = [
                of[index].of(self.blocks[index], each) for of, each in zip(self.calls, self.inputs, strict=True)
            ]
            self.in_float32.pop(index).close()
        for index in range(self.behind, window.stop):
            block, name = self.blocks[index], f"{self.names[index]}."
            self.in_float32[index] = self.widened.enter_context(ExitStack())
            self.in_float32[index].enter_context(_in_float32(_tensors(block)))
            own = {full: module for full, module in self.dense.items() if full.startswith(name)}
            with _placed(self.model, own), _in_float32(_tensors(block)):
                self.wanted = [of[index].of(block, each) for of, each in zip(self.calls, self.wanted, strict=True)]
        self.before, self.behind = window.start, window.stop

    def _hidden(self, window: range, number: int) -> Iterator[torch.Tensor]:
        """What the blocks of a window make of a batch, one after the other."""
        hidden = self.inputs[number]
        for index in window:
            hidden = self.calls[number][index].of(self.blocks[index], hidden)
            yield hidden

    def _distance(self, window: range) -> Callable[[int], torch.Tensor]:
        """Of a batch: `(ŷ − y) G (ŷ − y)ᵀ / ‖y‖²` behind a window, the mean over the tokens."""
        gradients = _gradients(self.model, self.names[window[-1]], self.calibration, self.wanted[0])

        def distance(number: int) -> torch.Tensor:
            *_, hidden = self._hidden(window, number)
            tokens = self.masks[number]
            wanted = self.wanted[number][tokens]
            difference = hidden[tokens] - wanted
            if gradients is None:
                weighted = difference
            else:
                weighted = difference * gradients if gradients.ndim == 1 else difference @ gradients
            # Norms take sizes away, and a text's first token may be a hundred times as long as the others: unweighted,
            # it is all that blocks learn. No token counts more than a hundred times as much as the median one.
            sizes = wanted.square().sum(-1)
            least = (sizes.median() / 100).clamp_min(torch.finfo(sizes.dtype).tiny)
            return ((weighted * difference).sum(-1) / sizes.clamp_min(least)).mean()

        return distance

    def _divergence(self, window: range) -> Callable[[int], torch.Tensor]:
        """Of a batch: the Kullback-Leibler divergence of the predictions, the mean over the tokens."""

        def logits(hidden: torch.Tensor, number: int) -> torch.Tensor:
            with passing(self.blocks, self.calls[number], hidden):
                found: torch.Tensor = run(self.model, self.batches[number]).logits
                return found

        def divergence(number: int) -> torch.Tensor:
            with torch.no_grad(), _placed(self.model, self.dense_outside):
                wanted = logits(self.wanted[number], number)
            *_, hidden = self._hidden(window, number)
            try:
                return kl_divergence(logits(hidden, number), wanted, mask=self.masks[number])
            except NonFiniteError:
                # After steps that were too long; what was learned is judged, as that of the other windows.
                return hidden.sum() * torch.nan

        return divergence

    def _outside(self) -> list[torch.Tensor]:
        """Parameters and buffers beside the blocks, in both models."""
        inside = {id(tensor) for block in self.blocks for tensor in _tensors(block)}
        modules = (self.model, *self.dense_outside.values())
        every = {id(tensor): tensor for module in modules for tensor in _tensors(module)}
        return [tensor for key, tensor in every.items() if key not in inside]

    def _learn(
        self, window: range, names: tuple[str, ...], loss: Callable[[int], torch.Tensor], epochs: int, seed: int
    ) -> None:
        blocks = [self.blocks[index] for index in window]
        vectors = [vector for index in window for vector in self.vectors[index]]
        batches = len(self.batches)
        heldout = max(batches // _HELDOUT, 1) if batches > 1 else 0
        split = batches - heldout
        judged = range(split, batches) if heldout else range(split)

        def error() -> float:
            with torch.no_grad():
                return float(torch.stack([loss(number) for number in judged]).double().mean())

        def factors() -> list[nn.Parameter]:
            modules = (module for block in blocks for module in block.modules())
            return _factors(module for module in modules if isinstance(module, CompressedBase))

        def moments(matrix: str) -> tuple[Any, Any]:
            known = self.calibration
            return (None, None) if known is None else (known.input(matrix), known.output(matrix))

        before = error()
        if not np.isfinite(before):
            raise NonFiniteError(f"refine: {self._not_finite(window)} computes NaN or an infinity")
        if before == 0:
            return
        saved = [(parameter, parameter.detach().clone()) for parameter in (*factors(), *vectors)]
        for rate in _LEARNING_RATES:
            with balanced(self.model, moments, within=names):
                trained = [*factors(), *vectors]
                for parameter in trained:
                    parameter.requires_grad_(True)
                _descend(trained, loss, split, before, rate, epochs, seed)
                for parameter in trained:
                    parameter.requires_grad_(False)
            if error() < before:
                return
            with torch.no_grad():
                for parameter, old in saved:
                    parameter.copy_(old)

    @torch.no_grad()
    def _not_finite(self, window: range) -> str:
        """The first block of a window whose outputs are not finite; the last one if all are."""
        chains = [self._hidden(window, number) for number in range(len(self.batches))]
        for index in window:
            if not all(bool(next(chain).isfinite().all()) for chain in chains):
                return self.names[index]
        return self.names[window[-1]]


def _read(
    model: PreTrainedModel, blocks: list[nn.Module], dense: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[list[Call]], bool]:
    """The hidden states before the first block in the original and the compressed model, and all calls of blocks.

    Last, whether the model predicts tokens from nothing but the hidden states behind the last block.
    """
    states: list[torch.Tensor] = []
    calls: list[list[Call]] = []
    with torch.no_grad(), _placed(model, dense):
        for batch in batches:
            # How blocks are called does not depend on what they compute, unless they return more than hidden states.
            known = bool(calls) and not any(call.behind for call in calls[0])
            with recorded_calls(blocks) as found, passing(blocks, calls[0]) if known else nullcontext():
                outputs = run(model, batch)
            behind = [after[0] for _, _, after in found]
            chained = len(found) == len(blocks) and all(
                before is after or torch.equal(before, after)
                for (before, _, _), after in zip(found[1:], behind, strict=False)
            )
            if not chained:
                raise ConfigError(
                    f"refine: the blocks of {type(model).__name__} do not each read the output of the one before, so "
                    "that they cannot be refined one by one: leave refine out, or use distill"
                )
            states.append(_widened(found[0][0]))
            calls.append([call for _, call, _ in found])
            if len(calls) == 1:
                predicts = _predicts(model, blocks, calls[0], batch, behind[-1], getattr(outputs, "logits", None))
    with torch.no_grad():
        shifted = [_widened(input_of(blocks[0], partial(run, model, batch))) for batch in batches]
    return states, shifted, calls, predicts


def _widened(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def _predicts(
    model: PreTrainedModel, blocks: list[nn.Module], calls: list[Call], batch: Batch, hidden: torch.Tensor, logits: Any
) -> bool:
    """Whether these logits are of every token, and come from these hidden states behind the last block alone."""
    if is_encoder_decoder(model) or not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        return False
    if logits.shape[:2] != hidden.shape[:2] or logits.shape[2] < 2:
        return False
    with passing(blocks, calls, hidden):
        return torch.equal(run(model, batch).logits, logits)


def _descend(
    parameters: Sequence[nn.Parameter],
    distance: Callable[[int], torch.Tensor],
    batches: int,
    scale: float,
    rate: float,
    epochs: int,
    seed: int,
) -> None:
    """AdamW over the batches in random order: a short warm-up, then a cosine decay to zero."""
    steps = max(epochs * batches, 2)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=_WARMUP)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            for number in torch.randperm(batches, generator=generator).tolist():
                optimizer.zero_grad()
                loss: Any = distance(number) / scale
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
    optimizer.zero_grad()


def _factors(modules: Any) -> list[nn.Parameter]:
    """The parameters of compressed modules, each once, without biases."""
    found = {
        id(parameter): parameter
        for module in modules
        for name, parameter in module.named_parameters()
        if name.rpartition(".")[2] != "bias"
    }
    return list(found.values())


def _vectors(model: PreTrainedModel, blocks: Iterable[nn.Module]) -> list[list[nn.Parameter]]:
    """The float vectors of each block that no other module has, factors apart."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    factors = {id(each) for each in _factors(each for each in model.modules() if isinstance(each, CompressedBase))}
    return [
        [
            parameter
            for parameter in block.parameters()
            if parameter.ndim == 1
            and parameter.is_floating_point()
            and owners[id(parameter)] == 1
            and id(parameter) not in factors
        ]
        for block in blocks
    ]


@contextmanager
def _kept_unless_done(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients are those from before the block afterwards; values too, if it raises."""
    kept = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in parameters]
    try:
        yield
    except BaseException:
        for parameter, value, _ in kept:
            parameter.data.copy_(value)
        raise
    finally:
        for parameter, _, gradient in kept:
            parameter.grad = gradient


def _gradients(
    model: PreTrainedModel, block: str, calibration: Calibration | None, outputs: torch.Tensor
) -> torch.Tensor | None:
    """The moment of the gradients at the last linear layer of a block that has these outputs, of trace 1."""
    if calibration is None:
        return None
    inside = bare_name(model, f"{block}.")
    for unit in reversed(units(model)):
        if unit.name.startswith(inside) and [columns for _, columns in unit.outputs] == [outputs.shape[-1]]:
            moment = calibration.output(unit.name)
            if moment is not None and (total := float(moment.sum() if moment.ndim == 1 else moment.trace())) > 0:
                return torch.from_numpy(np.array(moment, np.float32) / total).to(outputs)
    return None


@contextmanager
def _placed(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block, these modules stand in the places of those with the same full names."""
    old = replace_modules(model, modules)
    try:
        yield
    finally:
        replace_modules(model, old)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def _in_float32(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within the block, those of half precision are float32; they are rounded at the end."""
    halves = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]
    for tensor, _ in halves:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)
