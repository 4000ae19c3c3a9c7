"""Modules for sums of several terms.

The terms are submodules under `terms`, without a bias: "terms.0.A", "terms.1.left".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import ShapeError
from .base import Term, Tied, add_bias, new_bias
from .dense_weight import CompressedBase, Lookup
from .grouped import GroupedEmbedding, GroupedHead, TiedGroupedEmbedding
from .int8_dense import Int8Embedding, Int8Head, Int8Linear, TiedInt8Embedding
from .kronecker import KroneckerEmbedding, KroneckerHead, KroneckerLinear, TiedKroneckerEmbedding
from .low_rank import LowRankEmbedding, LowRankHead, LowRankLinear, TiedLowRankEmbedding


class _Terms(CompressedBase):
    """The base of the modules: the sum of the terms."""

    def __init__(self, terms: Sequence[nn.Module], inputs: str, outputs: str) -> None:
        super().__init__()
        sizes = {(getattr(term, inputs), getattr(term, outputs)) for term in terms}
        if len(sizes) != 1:
            raise ShapeError(f"the terms of a sum must have one shape, got {sorted(sizes)}")
        if any(getattr(term, "bias", None) is not None for term in terms):
            raise ShapeError("the terms of a sum have no bias of their own")
        self.terms = nn.ModuleList(terms)

    def set_terms(
        self, terms: Sequence[Term], dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        """Copies the terms of a decomposition, one for each submodule, in order.

        Raises `ShapeError` unless the number, kinds and shapes of the terms are the module's.
        """
        if len(terms) != len(self.terms):
            raise ShapeError(f"expected {len(self.terms)} terms, got {len(terms)}")
        module: Any
        for module, term in zip(self.terms, terms, strict=True):
            module.set_terms([term], dtype=dtype, device=device)

    def _a_factor(self) -> torch.Tensor:
        first: Any = self.terms[0]
        factor: torch.Tensor = first._a_factor()
        return factor

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = self.terms
        total: torch.Tensor = first(x)
        for term in others:
            total = total + term(x)
        return total

    def dense_weight(self) -> torch.Tensor:
        """The dense matrix, in the dtype of the factors; the terms are added in at least single precision."""
        terms: list[Any] = list(self.terms)
        dense = [term.dense_weight() for term in terms]
        wide = torch.promote_types(dense[0].dtype, torch.float32)
        return torch.stack([weight.to(wide) for weight in dense]).sum(0).to(dense[0].dtype)


class MixedLinear(_Terms):
    """`y = x (W_0 + W_1 + …) + bias`, each `W_t` a `KroneckerLinear` or `LowRankLinear` of the same size without bias.

    Shapes: `x (..., in_features)`, `y (..., out_features)`, `bias (out_features,)`. A row costs as much as its terms.

    Raises `ShapeError` for terms that differ in size or have a bias of their own, and for a bias of another size.
    """

    bias: nn.Parameter | None

    def __init__(self, terms: Sequence[KroneckerLinear | LowRankLinear], bias: bool | torch.Tensor = True) -> None:
        super().__init__(terms, "in_features", "out_features")
        self.in_features = terms[0].in_features
        self.out_features = terms[0].out_features
        self.register_parameter("bias", new_bias(bias, self.out_features, terms[0]._a_factor()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return add_bias(self._sum(x), self.bias)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class MixedEmbedding(Lookup, _Terms):
    """Rows of `W_0 + W_1 + …`, each `W_t` a `KroneckerEmbedding` or `LowRankEmbedding` of the same size.

    Shapes: ids `(...)` to `(..., embedding_dim)`. Raises `ShapeError` for terms that differ in size.
    """

    def __init__(self, terms: Sequence[KroneckerEmbedding | LowRankEmbedding]) -> None:
        super().__init__(terms, "num_embeddings", "embedding_dim")
        self.num_embeddings = terms[0].num_embeddings
        self.embedding_dim = terms[0].embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` token ids to `(..., embedding_dim)`."""
        return self._sum(ids)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class _TiedTerms(Tied, _Terms):
    """The base of modules whose terms are tied to those of a `MixedEmbedding`."""

    def tie(self, embedding: MixedEmbedding) -> None:
        """Ties every term to the term of the embedding."""
        own: Any
        self._owner = (embedding,)
        for own, term in zip(self.terms, embedding.terms, strict=True):
            own.tie(term)


class TiedMixedEmbedding(_TiedTerms, MixedEmbedding):
    """A second embedding with the factors of a `MixedEmbedding`, such as that of a decoder."""

    def __init__(self, embedding: MixedEmbedding) -> None:
        MixedEmbedding.__init__(self, [tied_embedding(term) for term in embedding.terms])
        self._owner = (embedding,)


class MixedHead(_TiedTerms):
    """The output layer tied to a `MixedEmbedding`: `logits = h (W_0 + W_1 + …)ᵀ + bias`.

    Each term is tied to the same term of the embedding. Shapes: `h (..., embedding_dim)` to `(..., num_embeddings)`.
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: MixedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__([tied_head(term) for term in embedding.terms], "in_features", "out_features")
        self._owner = (embedding,)
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings
        self.register_parameter("bias", bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., embedding_dim)` hidden states to `(..., num_embeddings)` logits."""
        return add_bias(self._sum(hidden), self.bias)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


FactoredLinear: TypeAlias = KroneckerLinear | LowRankLinear | MixedLinear | Int8Linear
FactoredEmbedding: TypeAlias = KroneckerEmbedding | LowRankEmbedding | GroupedEmbedding | MixedEmbedding | Int8Embedding
FactoredHead: TypeAlias = KroneckerHead | LowRankHead | GroupedHead | MixedHead | Int8Head


def tied_embedding(embedding: Any) -> Any:
    """A second embedding of the kind of `embedding`, with its factors."""
    if isinstance(embedding, MixedEmbedding):
        return TiedMixedEmbedding(embedding)
    if isinstance(embedding, LowRankEmbedding):
        return TiedLowRankEmbedding(embedding)
    if isinstance(embedding, GroupedEmbedding):
        return TiedGroupedEmbedding(embedding)
    if isinstance(embedding, Int8Embedding):
        return TiedInt8Embedding(embedding)
    return TiedKroneckerEmbedding(embedding)


def tied_head(embedding: Any, bias: nn.Parameter | None = None) -> FactoredHead:
    """The output layer of the kind of the embedding, with its factors and the given bias."""
    if isinstance(embedding, MixedEmbedding):
        return MixedHead(embedding, bias)
    if isinstance(embedding, LowRankEmbedding):
        return LowRankHead(embedding, bias)
    if isinstance(embedding, GroupedEmbedding):
        return GroupedHead(embedding, bias)
    if isinstance(embedding, Int8Embedding):
        return Int8Head(embedding, bias)
    return KroneckerHead(embedding, bias)
