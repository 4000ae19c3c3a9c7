"""Measures layer by layer: each layer's moments are those of the model with all earlier layers compressed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config.choices import DEFAULT_SEED
from ..data.text import TextOption
from ..data.token_blocks import TokenBlocks
from ..errors import ConfigError
from ..models.matrices import require_transformers_model
from ..utils import validate
from ..utils.progress import ProgressOption, Report, reporter
from ..utils.torch_utils import evaluating
from .batches import Batch, batches_of
from .calibrate import Moments, calibration_of, measure
from .calibration import Calibration
from .hooks import run
from .units import Unit, units

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LayerGroup:
    """Matrices that are measured and compressed together: of one transformer block, or before or after all blocks."""

    matrices: tuple[str, ...]
    """Named as in configs, in model order; a tied head is its embedding."""
    block: str | None = None
    """The full name of the block after which a forward pass may end, if it runs once in every pass."""


def calibrate_layers(
    model: PreTrainedModel,
    tokenizer_or_batches: PreTrainedTokenizerBase | TokenBlocks | Iterable[Any],
    text: TextOption | None = None,
    *,
    original: Calibration | None = None,
    matrices: Container[str] | None = None,
    num_samples: int = 128,
    seq_len: int | None = None,
    sensitivity: bool = True,
    seed: int = DEFAULT_SEED,
    max_memory: int = 2 << 30,
    progress: ProgressOption = None,
) -> Iterator[tuple[LayerGroup, Calibration]]:
    """Yields the groups of a model's layers in order, each with its moments in the current state of the model.

    The caller compresses a group in place before it asks for the next. The inputs of the next group then include the
    errors made so far, and a fit to them compensates for these errors. No hooks remain on the model between yields.

    With `original`, the calibration of the dense model, only the inputs of linear layers are measured anew,
    and the moments of gradients and of embeddings are those of `original`. Without it, everything is measured anew for
    every group; with `sensitivity` that is a whole forward and backward pass each. Without gradients a pass ends
    after the group's block, so that a group costs about half a forward pass on average.

    Args:
        model: A model of transformers.
        tokenizer_or_batches, text, num_samples, seq_len, seed, max_memory: As for `calibrate`; every group reads the
            same text.
        original: The moments of the model before any compression.
        matrices: The names of the matrices to measure. None stands for all.
        sensitivity: Whether gradients are measured; ignored with `original`.
        progress: As for `calibrate`, in batches; every group counts the same number.

    Raises:
        ConfigError, TextError: As `calibrate`, before the first group is measured.
        ShapeError: `original` is of another model.
        NonFiniteError: As `calibrate`.

    Example:
        >>> for group, moments in calibrate_layers(model, tokenizer, text, original=original):  # doctest: +SKIP
        ...     compress_some(model, group.matrices, moments)

    Source: fitting each layer to the outputs of the compressed ones before it is the order of Frantar et al., *GPTQ*,
    arXiv 2210.17323.
    """
    require_transformers_model(model)
    seed = validate.seed(seed)
    batches = batches_of(model, tokenizer_or_batches, text, num_samples=num_samples, seq_len=seq_len, seed=seed)
    if original is not None:
        for unit in units(model):
            for matrix, columns in unit.outputs if unit.tied_to is None else ():
                original.check(matrix, unit.inputs, columns)
    groups = layer_groups(model, batches[0])
    if matrices is not None:
        named = (
            replace(group, matrices=tuple(name for name in group.matrices if name in matrices)) for group in groups
        )
        groups = [group for group in named if group.matrices]
    return _measured(model, batches, groups, original, sensitivity, seed, max_memory, progress)


def _measured(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[LayerGroup],
    original: Calibration | None,
    sensitivity: bool,
    seed: int,
    max_memory: int,
    progress: ProgressOption,
) -> Iterator[tuple[LayerGroup, Calibration]]:
    with reporter(progress, "calibrate layers") as report:
        for index, group in enumerate(groups):
            # Listed again: the caller has replaced modules.
            wanted = [unit for unit in units(model) if _is_part(unit, group)]
            moments = {} if original is None else _kept(original, wanted)
            if original is not None:
                sensitivity = False
                wanted = [unit for unit in wanted if not unit.embedding and unit.tied_to is None]
            if wanted:
                moments |= measure(
                    model,
                    batches,
                    wanted,
                    sensitivity=sensitivity,
                    seed=seed,
                    max_memory=max_memory,
                    report=_share(report, index, len(groups), len(batches)),
                    stop_behind=None if group.block is None else model.get_submodule(group.block),
                )
            elif report is not None:
                report((index + 1) * len(batches), len(groups) * len(batches))
            has_gradients = sensitivity if original is None else original.sensitivity
            yield group, calibration_of(model, moments, batches, sensitivity=has_gradients, seed=seed)


def _is_part(unit: Unit, group: LayerGroup) -> bool:
    return any(matrix in group.matrices for matrix, _ in unit.outputs) or unit.tied_to in group.matrices


def _kept(original: Calibration, wanted: Sequence[Unit]) -> Moments:
    """The moments of some units in the dense model."""
    names = {f"input.{unit.name}" for unit in wanted}
    names |= {f"output.{matrix}" for unit in wanted for matrix, _ in unit.outputs}
    return {name: moment for name, moment in original.moments.items() if name in names}


def _share(report: Report | None, index: int, groups: int, batches: int) -> Report | None:
    if report is None:
        return None
    return lambda done, total: report(index * batches + done * batches // total, groups * batches)


def layer_groups(model: nn.Module, batch: Batch) -> list[LayerGroup]:
    """The groups of a model's matrices, in the order in which the model computes them.

    The blocks are the entries of the longest `nn.ModuleList` that is not inside another. Modules that run before the
    first block are a group, and all others are one after the last. `batch` is any input of the model.

    Raises `ConfigError` for a model without any matrix.
    """
    found = [unit for unit in units(model) if unit.tied_to is None]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no linear layer and no embedding")
    blocks = _blocks(model)
    users = {unit.name: {unit.module, *unit.twins} for unit in found}
    calls = _calls(model, batch, [*blocks.values(), *(module for unit in found for module in users[unit.name])])
    first_block = next((calls.index(block) for block in blocks.values() if block in calls), len(calls))
    of_block = {module: name for name, block in blocks.items() for module in block.modules()}
    groups: dict[str, list[Unit]] = {"before": [], **{name: [] for name in blocks}, "behind": []}
    for unit in found:
        place = of_block.get(unit.module)
        if place is None:
            place = "before" if users[unit.name].intersection(calls[:first_block]) else "behind"
        groups[place].append(unit)
    return [
        LayerGroup(
            tuple(matrix for unit in members for matrix, _ in unit.outputs),
            place if place in blocks and calls.count(blocks[place]) == 1 else None,
        )
        for place, members in groups.items()
        if members
    ]


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks by their full names."""
    best: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside.update(module.modules())
            if len(module) > len(best):
                best = {f"{name}.{index}": block for index, block in enumerate(module)}
    return best


def _calls(model: nn.Module, batch: Batch, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The calls of `modules` in a forward pass of one row, in order."""
    calls: list[nn.Module] = []

    def keep(module: nn.Module, _args: object) -> None:
        calls.append(module)

    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            stack.callback(module.register_forward_pre_hook(keep).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        rows = len(batch["input_ids"])
        run(model, {name: value[:1] if len(value) == rows else value for name, value in batch.items()})
    return calls
