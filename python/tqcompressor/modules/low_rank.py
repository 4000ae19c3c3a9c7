"""Low-rank modules in interpolative form: some rows, or columns, of the matrix span the others.

A permutation puts these rows or columns first. A matrix `W (m, n)` of rank k is then `W[p] = [I; left] right` or
`W[:, q] = left [I right]`, with `k · (m + n − k)` parameters. As in `modules`, buffers hold the gather indices of the
forward pass, here only for the side with the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .._core import LowRankTerm
from ..config.specs import LowRankSpec
from ..utils.torch_utils import without_autocast
from .base import (
    EmbeddingFactors,
    Factors,
    LinearFactors,
    Term,
    TiedFactors,
    TiedHeadFactors,
    gathered,
    the_one_term,
)
from .functional import expand, low_rank_matmul


class LowRankFactors(Factors):
    """The base of the modules: the factors and the permutation of a `(rows, columns)` matrix.

    The identity and the permutation are on the shorter side, and on the rows of a square matrix.
    """

    factors = ("left", "right")
    left: torch.Tensor
    right: torch.Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        rank: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        spec = LowRankSpec(rank)
        self._new_factors(spec.factor_shapes(rows, columns), device, dtype)
        self.rank = spec.rank
        order = torch.arange(min(rows, columns), device=device)
        self.register_buffer("input_permutation", order if rows <= columns else None)
        self.register_buffer("output_permutation", None if rows <= columns else order)

    def _draw_factors(self, variance: float) -> None:
        """Draws factors such that all entries of the matrix have the given variance."""
        # `mixing` is the factor beside the identity. It multiplies `weights`, whose entries are entries of the matrix.
        weights, mixing = (self.right, self.left) if self.input_permutation is not None else (self.left, self.right)
        for factor, of_entries in ((weights, variance), (mixing, 1 / self.rank)):
            bound = math.sqrt(3 * of_entries)
            nn.init.uniform_(factor, -bound, bound)

    @classmethod
    def _from_factors(
        cls,
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        order: NDArray[np.int64],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        **options: Any,
    ) -> Any:
        (height, rank), (_, width) = left.shape, right.shape
        # The identity is on the columns only if there are more rows than columns.
        on_rows = height + rank <= width
        rows, columns = (height + rank, width) if on_rows else (height, width + rank)
        # The constructors of all subclasses take rows, columns and rank first.
        module: Any = cls(rows, columns, rank, device="meta", **options)
        module.set_factors(left, right, order, dtype, device)
        return module

    def set_terms(
        self, terms: Sequence[Term], dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        """`set_factors` with the terms of a decomposition, which must be one low-rank term."""
        term = the_one_term(terms, LowRankTerm)
        self.set_factors(term.left, term.right, term.order, dtype, device)

    def set_factors(
        self,
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        order: NDArray[np.int64],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Copies the factors of `W[p]`, or of `W[:, q]` where there are more rows than columns.

        `order` is `p` or `q`, gather indices. Raises `ShapeError` for other shapes than the module's.
        """
        # The module has one permutation, that of the side with the identity.
        permutations = {"input_permutation": self._input_indices(order), "output_permutation": np.argsort(order)}
        self._copy({"left": left, "right": right, **permutations}, dtype, device)

    def _matrix(self, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
        """The matrix with its sides gathered, in the dtype of the factors; the identity is on the side with indices."""
        left, right = self.factor("left"), self.factor("right")
        return gathered(expand(left, right, rows is not None), rows, columns).to(left.dtype)


class LowRankLinear(LinearFactors, LowRankFactors):
    """`y = x W + bias` for a matrix of rank k: `W[p] = [I; left] right`, or `W[:, q] = left [I right]`.

    Shapes: `x (..., in_features)`, `y (..., out_features)`, `bias (out_features,)`. With `in_features ≤ out_features`,
    `left (in_features − k, k)`, `right (k, out_features)` and `input_permutation` is `p`; otherwise
    `left (in_features, k)`, `right (k, out_features − k)` and `output_permutation` is the inverse of `q`. A row costs
    `k · (in_features + out_features − k)` MACs, which is less than the dense product at any rank.

    Raises `ShapeError` unless the rank is smaller than both sides.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, device, dtype)
        self._set_sizes(in_features, out_features, bias)

    @classmethod
    def from_factors(
        cls,
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        order: NDArray[np.int64],
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LowRankLinear:
        """The module with copies of the factors; raises `ShapeError` for shapes that do not fit one another."""
        module: LowRankLinear = cls._from_factors(left, right, order, dtype, device, bias=bias is not None)
        module._copy_bias(bias, dtype, device)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        left, right = self.factor("left", x), self.factor("right", x)
        return low_rank_matmul(x, left, right, self.input_permutation, self.output_permutation, self.bias)

    def extra_repr(self) -> str:
        """The arguments of the constructor, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankEmbedding(EmbeddingFactors, LowRankFactors):
    """Rows of a matrix of rank k: `W[:, q] = left [I right]`, or `W[p] = [I; left] right`, computed at lookup.

    Shapes: ids `(...)` to `(..., embedding_dim)`. With `num_embeddings > embedding_dim`, `left (num_embeddings, k)`,
    `right (k, embedding_dim − k)` and `output_permutation` is the inverse of `q`; otherwise
    `left (num_embeddings − k, k)`, `right (k, embedding_dim)` and `input_permutation` is the inverse of `p` (where the
    row of token `i` is). A row costs at most `k · embedding_dim` MACs.

    Raises `ShapeError` unless the rank is smaller than both sides.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, rank, device, dtype)
        self._set_sizes(num_embeddings, embedding_dim)

    @classmethod
    def from_factors(
        cls,
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        order: NDArray[np.int64],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LowRankEmbedding:
        """The module with copies of the factors; raises `ShapeError` for shapes that do not fit one another."""
        module: LowRankEmbedding = cls._from_factors(left, right, order, dtype, device)
        return module

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` token ids to `(..., embedding_dim)`."""
        rows = self._permuted(ids.reshape(-1))
        # Autocast would round where nn.Embedding does not.
        like = self._a_factor()
        with without_autocast(like):
            right = self.factor("right")
            if self.input_permutation is not None:
                identity = torch.eye(self.rank, dtype=like.dtype, device=like.device)
                table = nn.functional.embedding(rows, torch.cat([identity, self.factor("left")])) @ right
            else:
                known = self.weights("left").rows(rows, like.dtype)
                table = torch.cat([known, known @ right], dim=1)
        if self.output_permutation is not None:
            table = table.index_select(1, self.output_permutation)
        return table.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """The arguments of the constructor, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class TiedLowRankEmbedding(TiedFactors, LowRankEmbedding):
    """A second embedding with the factors of a `LowRankEmbedding`, such as that of a decoder."""


class LowRankHead(TiedHeadFactors, LowRankFactors):
    """The output layer tied to a `LowRankEmbedding`: `logits = h Wᵀ + bias` from the embedding's factors.

    Shapes: `h (..., embedding_dim)` to `(..., num_embeddings)`. The transpose of a matrix in interpolative form is in
    interpolative form: `Wᵀ[q] = [I; rightᵀ] leftᵀ`, or `Wᵀ[:, p] = rightᵀ [I leftᵀ]`.

    As in `KroneckerHead`, the embedding's parameters are registered in the head too. The permutations are derived from
    the embedding's and not saved.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., embedding_dim)` hidden states to `(..., num_embeddings)` logits."""
        left, right = (self.factor(name, hidden).transpose(0, 1) for name in ("right", "left"))
        return low_rank_matmul(hidden, left, right, self.input_permutation, self.output_permutation, self.bias)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"
