"""Modules of a model that have moments, the names of the moments, and the sums that they are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import _core
from ..errors import NonFiniteError
from ..models.matrices import base_prefix, weight_owner
from ..models.ties import tied_parameters

# A layer with more outputs, such as a head, keeps only the diagonal of their moment: all of it takes 512 MB or more.
WIDEST_OUTPUT = 8192
# Rows summed in float32 before the sum is added to the float64 total. The error is below 1e-6 of the diagonal, and a
# product takes 0.6 of its time in float64 (measured: 2048 rows of 768 and 3072 features in 42 and 452 ms
# against 72 and 732).
_ROWS = 4096


@dataclass(frozen=True)
class Unit:
    """A linear layer or an embedding: a module whose moments are measured."""

    name: str
    """Without the base prefix."""
    module: nn.Module
    embedding: bool
    """Whether it is an embedding, whose input moment is the diagonal of token frequencies."""
    inputs: int
    """Inputs of the layer, or rows of the embedding."""
    outputs: tuple[tuple[str, int], ...]
    """The matrices that stand side by side in it, each with its number of outputs."""
    tied_to: str | None = None
    """The embedding whose weight a tied head shares."""
    twins: tuple[nn.Module, ...] = ()
    """Other embeddings that share its weight, such as those of an encoder and a decoder."""

    def is_diagonal(self, outputs: int) -> bool:
        """Whether only the diagonal is kept of a moment of `outputs` outputs."""
        return self.tied_to is not None or outputs > WIDEST_OUTPUT

    def bytes(self, sensitivity: bool) -> int:
        """Memory of its sums, in bytes."""
        elements = self.inputs if self.embedding else self.inputs**2
        if sensitivity:
            elements += sum(count if self.is_diagonal(count) else count**2 for _, count in self.outputs)
        # In float64, and once more in float32.
        return 12 * elements


def units(model: nn.Module) -> list[Unit]:
    """Every linear layer and embedding of a model, dense or compressed, in model order.

    Of nested modules only the outermost is listed: a fused module includes its parts. Of embeddings that share one
    weight only the one that owns it is listed.
    """
    prefix = base_prefix(model) if isinstance(model, PreTrainedModel) else ""
    owners = _owners(model)
    twins: dict[nn.Module, list[nn.Module]] = {}
    names = {module: name.removeprefix(prefix) for name, module in model.named_modules()}
    found: list[Unit] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        unit = _unit(name.removeprefix(prefix), module)
        if unit is None:
            continue
        inside.update(module.modules())
        owner = next((owners[id(each)] for each in module.parameters() if id(each) in owners), module)
        if owner is module:
            found.append(unit)
        elif unit.embedding:
            twins.setdefault(owner, []).append(module)
        else:
            found.append(replace(unit, tied_to=names[owner]))
    return [replace(unit, twins=tuple(twins[unit.module])) if unit.module in twins else unit for unit in found]


def _unit(name: str, module: Any) -> Unit | None:
    if isinstance(getattr(module, "num_embeddings", None), int):
        return Unit(name, module, True, module.num_embeddings, ((name, module.embedding_dim),))
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        if parts := _core.fused_parts(name, "conv1d", rows, columns):
            return Unit(name, module, False, rows, tuple((f"{name}.{part}", columns // len(parts)) for part in parts))
        return Unit(name, module, False, rows, ((name, columns),))
    if not all(isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features")):
        return None
    if isinstance(part_names := getattr(module, "part_names", None), tuple):
        fused = [(f"{name}.{part}", getattr(module, part).out_features) for part in part_names]
        return Unit(name, module, False, module.in_features, tuple(fused))
    return Unit(name, module, False, module.in_features, ((name, module.out_features),))


def _owners(model: nn.Module) -> dict[int, nn.Module]:
    """The embedding that owns a weight or factor, by the identity of the parameter."""
    tied = {weight_owner(name) for name in tied_parameters(model)} if isinstance(model, PreTrainedModel) else set()
    owners: dict[int, nn.Module] = {}
    embeddings: list[tuple[bool, nn.Module]] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside and isinstance(getattr(module, "num_embeddings", None), int):
            embeddings.append((name in tied, module))
            inside.update(module.modules())
    # First the sources of ties: another module may come before its source in the model's order.
    for _, module in sorted(embeddings, key=lambda pair: pair[0]):
        for parameter in module.parameters():
            owners.setdefault(id(parameter), module)
    return owners


class _Sum:
    """A float64 sum of float32 arrays, each the sum over some rows."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._recent = torch.zeros(shape, dtype=torch.float32, device=device)
        self._rows = 0

    def add(self, values: torch.Tensor, rows: int) -> None:
        if self._rows + rows > _ROWS:
            self.result()
        self._recent += values
        self._rows += rows

    def result(self) -> torch.Tensor:
        self._total += self._recent
        self._recent.zero_()
        self._rows = 0
        return self._total


class Sums:
    """The sums over tokens of one unit's outer products."""

    def __init__(self, unit: Unit, device: torch.device, sensitivity: bool) -> None:
        self.unit = unit
        self._input = _Sum((unit.inputs,) if unit.embedding else (unit.inputs, unit.inputs), device)
        shapes = [(count,) if unit.is_diagonal(count) else (count, count) for _, count in unit.outputs]
        self._outputs = [_Sum(shape, device) for shape in shapes] if sensitivity else []
        self._calls = self._gradients = 0

    def add_inputs(self, products: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Adds the result of `outer_products` or `token_counts` for some rows of the input."""
        for product, rows in products:
            self._input.add(product, rows)
        self._calls += 1

    def add_gradient(self, gradient: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds rows of the gradient at the output; `weights` is the number of tokens that each row represents."""
        rows = _counted(gradient, weights)
        first = 0
        for (_, count), total in zip(self.unit.outputs, self._outputs, strict=True):
            part = rows[:, first : first + count]
            first += count
            if self.unit.is_diagonal(count):
                total.add(part.square().sum(0), len(part))
            else:
                for product, length in _outer_products(part):
                    total.add(product, length)
        self._gradients += int(weights.sum())

    def moments(self, tokens: int, scale: float) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The means as float32: of inputs over all `tokens` of the text, of gradients over the rows with one.

        With these denominators the product of both is right for a layer that sees only some tokens, such as a pooler.
        The gradients were computed `scale` times larger. A unit that was never called has no moments.

        Raises `NonFiniteError`, which names the moment.
        """
        if self._calls:
            yield f"input.{self.unit.name}", _mean(f"input.{self.unit.name}", self._input.result(), tokens)
        if self._gradients:
            for (name, _), total in zip(self.unit.outputs, self._outputs, strict=True):
                yield f"output.{name}", _mean(f"output.{name}", total.result(), self._gradients * scale**2)


def outer_products(x: torch.Tensor, weights: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """`Σ xᵀx` over the rows of `x` with nonzero weight: float32 parts, each with its number of rows."""
    return list(_outer_products(_counted(x, weights)))


def token_counts(ids: torch.Tensor, weights: torch.Tensor, vocabulary: int) -> list[tuple[torch.Tensor, int]]:
    """How often each token occurs in `ids`, in the form of `outer_products`."""
    # Counts are integers, hence exact.
    return [(torch.bincount(ids.reshape(-1), weights.double(), minlength=vocabulary).float(), ids.numel())]


def _outer_products(rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    for first in range(0, len(rows), _ROWS):
        part = rows[first : first + _ROWS]
        yield part.t() @ part, len(part)


def _counted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The rows of `x` with nonzero weight, in float32."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    return rows if bool(weights.all()) else rows[weights > 0]


def _mean(name: str, total: torch.Tensor, count: float) -> NDArray[np.float32]:
    mean = (total / count).float()
    # A row with a non-finite entry has a non-finite diagonal entry.
    if not bool((mean if mean.ndim == 1 else mean.diagonal()).isfinite().all()):
        raise NonFiniteError(f"{name}: the model computes NaN or an infinity, or one in float32")
    # Products of rounded sums need not be exactly symmetric on every device.
    mean = mean if mean.ndim == 1 else (mean + mean.t()) / 2
    found: NDArray[np.float32] = mean.cpu().numpy()
    return found
