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
from .matrices import bare_name, compressed_modules
from .ties import ties

# The moments of a matrix's input and of the gradient at its output, by its name.
MomentsOf: TypeAlias = Callable[[str], tuple[Moment, Moment]]
_KINDS = {LowRankLinear: BalancedLinear, LowRankEmbedding: BalancedEmbedding, GroupedEmbedding: BalancedGroups}


@contextmanager
def balanced(model: PreTrainedModel, moments: MomentsOf, *, within: str = "") -> Iterator[None]:
    """Within the block, every low-rank module is its `BalancedFactors`; afterwards it has what these have learned.

    `within` limits this to the modules whose full names begin with it.
    If the block raises, the modules have the values from before it. Low-rank terms of mixed sums stay as they are.
    """
    tied, found = ties(model), dict(compressed_modules(model))
    new: dict[str, Any] = {}
    for name, module in _low_rank(model):
        if not name.startswith(within):
            continue
        kind: Any = next(balanced for replaced, balanced in _KINDS.items() if isinstance(module, replaced))
        new[name] = kind(module, *moments(bare_name(model, name)))
    for name, source in tied.items():
        if name in found and source in new:
            kind = BalancedTiedEmbedding if isinstance(found[name], Lookup) else BalancedHead
            new[name] = kind(found[name], new[source])
    try:
        _put(model, new)
        yield
        for module in new.values():
            if not isinstance(module, BalancedHead | BalancedTiedEmbedding):
                module.restore()
    finally:
        _put(model, {name: module.replaced for name, module in new.items()})


def has_low_rank(model: PreTrainedModel) -> bool:
    """Whether `balanced` has something to do."""
    return any(True for _ in _low_rank(model))


def _low_rank(model: PreTrainedModel) -> Iterator[tuple[str, LowRankLinear | LowRankEmbedding | GroupedEmbedding]]:
    """`(full name, module)` of every low-rank module that owns its factors, those within fused ones too."""
    for name, module in compressed_modules(model):
        parts = module.named_children() if isinstance(module, FusedLinear) else [("", module)]
        for part, inner in parts:
            if isinstance(inner, LowRankLinear | LowRankEmbedding | GroupedEmbedding) and not isinstance(inner, Tied):
                yield f"{name}.{part}".rstrip("."), inner


def _put(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        owner: Any = model.get_submodule(parent)
        module.train(getattr(owner, child).training)
        setattr(owner, child, module)
