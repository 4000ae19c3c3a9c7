"""Low-rank modules of a live model as balanced products, for the time of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from ..modules.balanced import (
    BalancedEmbedding,
    BalancedGroups,
    BalancedHead,
    BalancedLinear,
    BalancedTiedEmbedding,
    Moment,
)
from ..modules.base import Tied
from ..modules.dense_weight import Lookup
from ..modules.fused import FusedLinear
from ..modules.grouped import GroupedEmbedding
from ..modules.low_rank import LowRankEmbedding, LowRankLinear
from ..utils.torch_utils import each_alone, replace_modules, take_modes
from .matrices import bare_name, compressed_modules
from .ties import ties

# The moments of a matrix's input and of the gradient at its output, by its name.
MomentsOf: TypeAlias = Callable[[str], tuple[Moment, Moment]]
_KINDS = {LowRankLinear: BalancedLinear, LowRankEmbedding: BalancedEmbedding, GroupedEmbedding: BalancedGroups}


@contextmanager
def balanced(model: PreTrainedModel, moments: MomentsOf, *, within: tuple[str, ...] = ("",)) -> Iterator[None]:
    """Within the block, every low-rank module is its `BalancedFactors`; afterwards it has what these have learned.

    `within` limits this to the modules whose full names begin with one of these.
    If the block raises, the modules have the values from before it. Low-rank terms of mixed sums stay as they are.
    """
    tied, found = ties(model), dict(compressed_modules(model))
    owners = [
        (name, module, moments(bare_name(model, name))) for name, module in _low_rank(model) if name.startswith(within)
    ]
    size = max((_needed(module, own) for _, module, own in owners), default=0)
    modules = each_alone(lambda owner: _balanced(*owner[1:]), owners, size)
    new: dict[str, Any] = {name: module for (name, *_), module in zip(owners, modules, strict=True)}
    for name, source in tied.items():
        if name in found and source in new:
            kind = BalancedTiedEmbedding if isinstance(found[name], Lookup) else BalancedHead
            new[name] = kind(found[name], new[source])
    old = replace_modules(model, new)
    try:
        take_modes(new, old)
        yield
        each_alone(lambda module: module.restore(), modules, size)
    finally:
        take_modes(old, new)
        replace_modules(model, old)


def has_low_rank(model: PreTrainedModel) -> bool:
    """Whether `balanced` has something to do."""
    return any(True for _ in _low_rank(model))


def low_rank_sizes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrix of every low-rank module that owns its factors, by its name in configs."""
    return {
        bare_name(model, name): (module.num_embeddings, module.embedding_dim)
        if isinstance(module, Lookup)
        else (module.in_features, module.out_features)
        for name, module in _low_rank(model)
    }


def _low_rank(model: PreTrainedModel) -> Iterator[tuple[str, LowRankLinear | LowRankEmbedding | GroupedEmbedding]]:
    """`(full name, module)` of every low-rank module that owns its factors, those within fused ones too."""
    for name, module in compressed_modules(model):
        parts = module.named_children() if isinstance(module, FusedLinear) else [("", module)]
        for part, inner in parts:
            if isinstance(inner, LowRankLinear | LowRankEmbedding | GroupedEmbedding) and not isinstance(inner, Tied):
                yield f"{name}.{part}".rstrip("."), inner


def _balanced(module: nn.Module, moments: tuple[Moment, Moment]) -> Any:
    kind: Any = next(balanced for replaced, balanced in _KINDS.items() if isinstance(module, replaced))
    return kind(module, *moments)


def _needed(module: LowRankLinear | LowRankEmbedding | GroupedEmbedding, moments: tuple[Moment, Moment]) -> int:
    """Bytes of memory to balance a module: float64 copies of its moments and its factors."""
    values = sum(parameter.numel() for parameter in module.parameters())
    return 48 * values + sum(8 * moment.nbytes for moment in moments if moment is not None)
