"""Embeddings whose rows are in groups of different ranks, and the output layers that are tied to them.

A rank is worth most for frequent tokens. The rows are sorted by importance and cut into groups; group `g` of `n_g` rows
is `W_g[:, q_g] = left_g [I right_g]`, with `k_g · (n_g + d − k_g)` parameters. The factors of all groups are stored one
after the other, so that the tensors are as few as those of one low rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .._core import GroupedTerm
from ..config.specs import GroupedSpec
from ..utils.torch_utils import without_autocast
from .base import EmbeddingFactors, Factors, Term, TiedFactors, TiedHeadFactors, add_bias, gathered, the_one_term
from .functional import expand, low_rank_matmul
from .int8 import Weights, quantized
from .low_rank import LowRankEmbedding

# A row of the sorted table for the position of each token within one group.
Rows = Callable[[torch.Tensor], torch.Tensor]


def rows_in_groups(places: torch.Tensor, sizes: Sequence[int], rows: Sequence[Rows]) -> torch.Tensor:
    """The rows `(tokens, d)` of tokens at `places` of a table; `rows[g]` makes those of places in group `g`."""
    found: torch.Tensor | None = None
    first = 0
    for size, of_group in zip(sizes, rows, strict=True):
        # Every group makes a row for every token: which tokens are whose is known only from their values.
        table = of_group((places - first).clamp(0, size - 1))
        found = table if found is None else torch.where((places >= first)[:, None], table, found)
        first += size
    assert found is not None
    return found


class GroupedFactors(Factors):
    """The base of the modules: the factors of all groups and the order of the rows of a `(rows, columns)` table."""

    factors = ("left", "right")
    _sizes = ("groups",)
    groups: tuple[tuple[int, int], ...]
    left: torch.Tensor
    right: torch.Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        groups: Sequence[tuple[int, int]],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        spec = GroupedSpec(tuple(groups))
        self._new_factors(spec.factor_shapes(rows, columns), device, dtype)
        self.groups = spec.groups
        self.register_buffer("input_permutation", torch.arange(rows, device=device))
        self.register_buffer("output_permutation", torch.arange(len(spec.groups) * columns, device=device))

    def _draw_factors(self, variance: float) -> None:
        """Draws factors such that all entries of the matrix have the given variance."""
        bound = math.sqrt(3 * variance)
        nn.init.uniform_(self.left, -bound, bound)
        # A slice of a leaf cannot be drawn in place.
        for _, (right, _), _ in self._each():
            right = right.data
            nn.init.uniform_(right, -math.sqrt(3 / len(right)), math.sqrt(3 / len(right)))

    def set_terms(
        self, terms: Sequence[Term], dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        """Copies the factors of a decomposition, which must be one term of the module's groups."""
        term = the_one_term(terms, GroupedTerm)
        self.set_factors(term.left, term.right, term.row_order, term.column_order, dtype, device)

    def set_factors(
        self,
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        row_order: NDArray[np.int64],
        column_order: NDArray[np.int64],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Copies the factors of all groups, and the orders of the rows and of the groups' columns, gather indices.

        Raises `ShapeError` for other shapes than the module's.
        """
        permutations = {
            "input_permutation": self._input_indices(row_order),
            "output_permutation": np.argsort(column_order),
        }
        self._copy({"left": left, "right": right, **permutations}, dtype, device)

    def _each(self, orders: torch.Tensor | None = None) -> list[tuple[Weights, Weights, torch.Tensor]]:
        """`left_g (n_g, k_g)`, `right_g (k_g, d − k_g)` and the indices of the columns, for each group."""
        orders = self.output_permutation if orders is None else orders
        assert orders is not None
        columns = len(orders) // len(self.groups)
        own = orders.view(len(self.groups), columns) % columns
        shapes = self._shapes(columns)
        left, right = (_pieces(self.weights(name), shapes[name]) for name in ("left", "right"))
        # A list: torch.compile cannot trace a generator.
        return list(zip(left, right, own, strict=True))

    def _shapes(self, columns: int) -> dict[str, list[tuple[int, int]]]:
        """The shapes of all groups' factors."""
        return {
            "left": [(rows, rank) for rows, rank in self.groups],
            "right": [(rank, columns - rank) for _, rank in self.groups],
        }

    def _quantized(self, name: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of one factor of all groups, a scale for each row."""
        assert self.output_permutation is not None
        shapes = self._shapes(len(self.output_permutation) // len(self.groups))[name]
        pieces = _pieces(Weights(values, None), shapes)
        codes, scales = zip(*(quantized(piece, by_rows=True) for piece, _ in pieces), strict=True)
        return torch.cat([each.flatten() for each in codes]), torch.cat([each.flatten() for each in scales])

    def _matrix(self, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
        """The groups one above the other, with their columns and all rows gathered, in the dtype of the factors."""
        dtype = self._a_factor().dtype
        groups = [
            expand(left.dense(dtype), right.dense(dtype), False)[:, order] for left, right, order in self._each(columns)
        ]
        return gathered(torch.cat(groups), rows, None).to(dtype)


def _pieces(weights: Weights, shapes: Sequence[tuple[int, int]]) -> list[Weights]:
    """The matrices of all groups from their values one after the other, and from the scales of their rows."""
    values = torch.split(weights.values, [math.prod(shape) for shape in shapes])
    if weights.scale is None:
        scales: Sequence[torch.Tensor | None] = [None] * len(shapes)
    else:
        scales = [scale[:, None] for scale in torch.split(weights.scale, [rows for rows, _ in shapes])]
    return [Weights(own.view(shape), scale) for own, shape, scale in zip(values, shapes, scales, strict=True)]


class GroupedEmbedding(EmbeddingFactors, GroupedFactors):
    """Rows of a table in groups of different ranks, computed at lookup.

    Shapes: ids `(...)` to `(..., embedding_dim)`. `groups` are pairs of a number of rows and their rank, the most
    important rows first. `left (Σ n_g · k_g,)` and `right (Σ k_g · (d − k_g),)` hold the factors of all groups;
    `input_permutation` is the place of each token's row, `output_permutation` the inverse orders of the groups'
    columns, that of group `g` from `g · d` up.

    A row costs at most `k_g · d` MACs, in each of the groups, since the code has no branches.

    Raises `ShapeError` unless the groups have all rows together, and each has more rows than there are columns and a
    rank below that.

    >>> GroupedEmbedding(100, 8, [(20, 6), (80, 2)])
    GroupedEmbedding(100, 8, groups=[(20, 6), (80, 2)])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        groups: Sequence[tuple[int, int]],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, groups, device, dtype)
        self._set_sizes(num_embeddings, embedding_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` token ids to `(..., embedding_dim)`."""

        like = self._a_factor()

        def rows(left: Weights, right: Weights, order: torch.Tensor) -> Rows:
            def at(places: torch.Tensor) -> torch.Tensor:
                known = left.rows(places, like.dtype)
                return torch.cat([known, known @ right.dense(like.dtype)], dim=1).index_select(1, order)

            return at

        # Autocast would round where nn.Embedding does not.
        with without_autocast(like):
            groups = [rows(*each) for each in self._each()]
            table = rows_in_groups(self._permuted(ids.reshape(-1)), [size for size, _ in self.groups], groups)
        return table.reshape(*ids.shape, self.embedding_dim)

    def split(self) -> list[LowRankEmbedding]:
        """A `LowRankEmbedding` with a copy of the factors of each group."""
        parts = []
        for (left, _), (right, _), order in self._each():
            part = LowRankEmbedding(len(left), self.embedding_dim, left.shape[1], device="meta")
            part.left, part.right = (
                nn.Parameter(factor.detach().clone(), self.left.requires_grad) for factor in (left, right)
            )
            part.output_permutation = order.clone()
            parts.append(part)
        return parts

    def join(self, parts: Sequence[LowRankEmbedding]) -> None:
        """Copies the factors of modules that `split` made."""
        with torch.no_grad():
            for ((left, _), (right, _), _), part in zip(self._each(), parts, strict=True):
                left.copy_(part.left)
                right.copy_(part.right)

    def extra_repr(self) -> str:
        """The arguments of the constructor, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, groups={list(self.groups)}"


class TiedGroupedEmbedding(TiedFactors, GroupedEmbedding):
    """A second embedding with the factors of a `GroupedEmbedding`, such as that of a decoder."""


class GroupedHead(TiedHeadFactors, GroupedFactors):
    """The output layer tied to a `GroupedEmbedding`: `logits = h Wᵀ + bias` from the embedding's factors.

    Shapes: `h (..., embedding_dim)` to `(..., num_embeddings)`. A row costs `Σ k_g · (n_g + d − k_g)` MACs. The
    permutations are derived from the embedding's and not saved.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., embedding_dim)` hidden states to `(..., num_embeddings)` logits."""
        assert self.output_permutation is not None
        logits = [
            low_rank_matmul(
                hidden,
                right.dense(hidden.dtype).transpose(0, 1),
                left.dense(hidden.dtype).transpose(0, 1),
                columns,
                None,
            )
            for left, right, columns in self._each(self.input_permutation)
        ]
        return add_bias(torch.cat(logits, dim=-1).index_select(-1, self.output_permutation), self.bias)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, groups={list(self.groups)}, bias={self.bias is not None}"
