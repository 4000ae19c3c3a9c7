"""Empty modules by spec, whose factors have shapes but no values yet."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

from ..config.specs import GroupedSpec, KroneckerSpec, LowRankSpec, MatrixSpec
from ..errors import ShapeError
from .base import Factors, Tied
from .fused import FusedLinear
from .grouped import GroupedEmbedding
from .kronecker import KroneckerEmbedding, KroneckerLinear
from .low_rank import LowRankEmbedding, LowRankLinear
from .mixed import FactoredEmbedding, FactoredHead, FactoredLinear, MixedEmbedding, MixedLinear

CompressedModule: TypeAlias = FactoredLinear | FusedLinear | FactoredEmbedding | FactoredHead


def empty_linear(
    rows: int, columns: int, spec: MatrixSpec, bias: bool = True, dtype: torch.dtype | None = None
) -> FactoredLinear:
    """The empty module, on the meta device, of a linear map `(rows, columns)`, in × out, by `spec`.

    Raises `ShapeError` for a spec that does not fit.
    """
    spec.check(rows, columns)
    if isinstance(spec, KroneckerSpec):
        sides = (spec.permutes_rows, spec.permutes_columns)
        return KroneckerLinear(rows, columns, spec.block, spec.rank, bias, *sides, device="meta", dtype=dtype)
    if isinstance(spec, LowRankSpec):
        return LowRankLinear(rows, columns, spec.rank, bias, device="meta", dtype=dtype)
    if isinstance(spec, GroupedSpec):
        raise ShapeError("a linear layer cannot be in groups of rows: only an embedding can")
    terms: list[Any] = [empty_linear(rows, columns, term, False, dtype) for term in spec.terms]
    return MixedLinear(terms, bias)


def make_int8(module: CompressedModule) -> None:
    """Makes the factors of a module and of the modules within it eight-bit integers."""
    for part in module.modules():
        if isinstance(part, Factors) and not isinstance(part, Tied):
            part.make_int8()


def is_int8(module: nn.Module) -> bool:
    """Whether a module, or one within it, has factors of eight-bit integers."""
    return any(isinstance(part, Factors) and part.is_int8 for part in module.modules())


def empty_embedding(rows: int, columns: int, spec: MatrixSpec, dtype: torch.dtype | None = None) -> FactoredEmbedding:
    """The same for an embedding `(rows, columns)`, vocabulary × dimension."""
    spec.check(rows, columns)
    if isinstance(spec, KroneckerSpec):
        sides = (spec.permutes_rows, spec.permutes_columns)
        return KroneckerEmbedding(rows, columns, spec.block, spec.rank, *sides, device="meta", dtype=dtype)
    if isinstance(spec, LowRankSpec):
        return LowRankEmbedding(rows, columns, spec.rank, device="meta", dtype=dtype)
    if isinstance(spec, GroupedSpec):
        return GroupedEmbedding(rows, columns, spec.groups, device="meta", dtype=dtype)
    terms: list[Any] = [empty_embedding(rows, columns, term, dtype) for term in spec.terms]
    return MixedEmbedding(terms)
