"""Trains the blocks of a compressed model, one after the other, on the outputs of the original blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration.batches import Batch, mask_of
from ..calibration.calibration import Calibration
from ..calibration.hooks import run
from ..calibration.units import units
from ..errors import ConfigError, NonFiniteError
from ..models.balancing import balanced
from ..models.blocks import Call, input_of, recorded_calls, transformer_blocks
from ..models.matrices import bare_name
from ..modules.dense_weight import CompressedBase
from ..utils.progress import Report
from ..utils.torch_utils import evaluating, frozen, replace_modules

EPOCHS = 4
# The next one is for a block that got worse with the one before: small losses and few steps need small rates.
_LEARNING_RATES = (3e-4, 3e-5, 3e-6)
_WARMUP = 0.05
# The share of the batches that decides whether a block keeps what it learned.
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
    """Trains the factors and the vectors of every block of `model` to give the outputs that the dense block has.

    A block's inputs are those that it gets in the compressed model, so that it also makes up for what the blocks before
    it lost. With the original's outputs `Y`, on its own inputs, and the moment `G` of the gradients at the outputs,
    which is the identity without a calibration, the loss is `tr((Ŷ − Y) G (Ŷ − Y)ᵀ)` over the tokens. An eighth of the
    batches is held out: a block that got worse on it is put back, and trained with a tenth of the learning rate, twice
    at most. Vectors are the block's biases and the gains of its norms, unless other modules share them; nothing else
    changes. If anything is raised, vectors have the values from before.

    `dense` are the modules that the compressed ones replaced, by full name. Every block computes in float32.

    Raises `ConfigError` for a model whose blocks do not feed one another, `NonFiniteError` for NaN or an infinity.

    Cost: two forward passes of the model and `3·epochs` of its blocks, and the hidden states of all tokens, twice.
    """
    blocks = transformer_blocks(model)
    vectors = _vectors(model, blocks.values())
    with evaluating(model), frozen(model), _kept_unless_done([each for own in vectors for each in own]):
        states, shifted, calls = _read(model, list(blocks.values()), dense, batches)
        masks = [mask_of(batch).to(states[0].device) for batch in batches]
        for index, (name, block) in enumerate(blocks.items()):
            own = {full: module for full, module in dense.items() if full.startswith(f"{name}.")}
            called = [of_batch[index] for of_batch in calls]
            with _in_float32(block):
                with torch.no_grad(), _placed(model, own), _in_float32(block):
                    states = [call.of(block, each) for call, each in zip(called, states, strict=True)]
                if own:
                    _train(model, name, vectors[index], calibration, called, shifted, states, masks, epochs, seed)
                with torch.no_grad():
                    shifted = [call.of(block, each) for call, each in zip(called, shifted, strict=True)]
            if report is not None:
                report(index + 1, len(blocks))


def _read(
    model: PreTrainedModel, blocks: list[nn.Module], dense: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[list[Call]]]:
    """The hidden states before the first block in the original and the compressed model, and all calls of blocks."""
    states, calls = [], []
    with torch.no_grad(), _placed(model, dense):
        for batch in batches:
            with recorded_calls(blocks) as found:
                run(model, batch)
            behind = [after[0] for _, _, after in found]
            chained = len(found) == len(blocks) and all(
                torch.equal(before, after) for (before, _, _), after in zip(found[1:], behind, strict=False)
            )
            if not chained:
                raise ConfigError(
                    f"refine: the blocks of {type(model).__name__} do not each read the output of the one before, so "
                    "that they cannot be refined one by one: leave refine out, or use distill"
                )
            states.append(found[0][0].float())
            calls.append([call for _, call, _ in found])
    with torch.no_grad():
        shifted = [input_of(blocks[0], partial(run, model, batch)).float() for batch in batches]
    return states, shifted, calls


def _train(
    model: PreTrainedModel,
    name: str,
    vectors: Sequence[nn.Parameter],
    calibration: Calibration | None,
    calls: Sequence[Call],
    inputs: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    epochs: int,
    seed: int,
) -> None:
    """Trains the factors and vectors of one block, and keeps them where they got better."""
    block = model.get_submodule(name)
    gradients = _gradients(model, name, calibration, wanted[0].shape[-1])

    def distance(number: int) -> torch.Tensor:
        difference = calls[number].of(block, inputs[number]) - wanted[number]
        if gradients is None:
            weighted = difference
        else:
            weighted = difference * gradients if gradients.ndim == 1 else difference @ gradients
        mask = masks[number]
        return ((weighted * difference).sum(-1) * mask).sum() / mask.sum()

    def error(numbers: Sequence[int]) -> float:
        with torch.no_grad():
            return float(torch.stack([distance(number) for number in numbers]).double().mean())

    heldout = max(len(calls) // _HELDOUT, 1) if len(calls) > 1 else 0
    split = len(calls) - heldout
    judged = range(split, len(calls)) if heldout else range(split)

    def moments(matrix: str) -> tuple[Any, Any]:
        return (None, None) if calibration is None else (calibration.input(matrix), calibration.output(matrix))

    before = error(judged)
    if not np.isfinite(before):
        raise NonFiniteError(f"refine: {name} computes NaN or an infinity")
    if before == 0:
        return
    factors = [module for module in block.modules() if isinstance(module, CompressedBase)]
    saved = [(parameter, parameter.detach().clone()) for parameter in (*_factors(factors), *vectors)]
    for rate in _LEARNING_RATES:
        with balanced(model, moments, within=f"{name}."):
            trained = [
                *_factors(module for module in block.modules() if isinstance(module, CompressedBase)),
                *vectors,
            ]
            for parameter in trained:
                parameter.requires_grad_(True)
            _descend(trained, distance, split, before, rate, epochs, seed)
        if error(judged) < before:
            return
        with torch.no_grad():
            for parameter, old in saved:
                parameter.copy_(old)


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


def _gradients(model: PreTrainedModel, block: str, calibration: Calibration | None, width: int) -> torch.Tensor | None:
    """The moment of the gradients at the last linear layer of a block that has `width` outputs, of trace 1."""
    if calibration is None:
        return None
    inside = bare_name(model, f"{block}.")
    for unit in reversed(units(model)):
        if unit.name.startswith(inside) and [columns for _, columns in unit.outputs] == [width]:
            moment = calibration.output(unit.name)
            if moment is not None and (total := float(moment.sum() if moment.ndim == 1 else moment.trace())) > 0:
                found: torch.Tensor = torch.from_numpy(np.array(moment, np.float32) / total)
                return found.to(model.device)
    return None


@contextmanager
def _placed(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block, these modules stand in the places of those with the same full names."""
    old = replace_modules(model, modules)
    try:
        yield
    finally:
        replace_modules(model, old)


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """Within the block, parameters and buffers of half precision are float32; they are rounded at the end."""
    tensors = [
        (tensor, tensor.dtype)
        for tensor in (*block.parameters(), *block.buffers())
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    for tensor, _ in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in tensors:
            tensor.data = tensor.data.to(dtype)
