"""Modules of a model that have moments, and the names of the moments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import _core
from ..models.matrices import base_prefix, weight_owner
from ..models.ties import tied_parameters

# A layer with more outputs, such as a head, keeps only the diagonal of their moment: all of it takes 512 MB or more.
WIDEST_OUTPUT = 8192


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
