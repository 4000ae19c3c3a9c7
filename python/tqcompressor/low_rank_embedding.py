"""The token embedding of low rank, and the output layer that is tied to it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .contraction import without_autocast
from .factors import TiedFactors, add_bias, gathered, inverse
from .low_rank import LowRankFactors, expand, low_rank_matmul


class LowRankEmbedding(LowRankFactors):
    """Rows of a matrix of rank k: `W[:, q] = left [I right]`, or `W[p] = [I; left] right`, each made when looked up.

    Shapes: ids `(...)` to `(..., embedding_dim)`. With `num_embeddings > embedding_dim`, `left (num_embeddings, k)`,
    `right (k, embedding_dim − k)` and `output_permutation` is the inverse of `q`; otherwise
    `left (num_embeddings − k, k)`, `right (k, embedding_dim)` and `input_permutation` is the inverse of `p` (where the
    row of token `i` is). A row costs at most `k · embedding_dim` multiplications.

    Raises `ShapeError` unless the rank is smaller than both sides.
    """

    # Read by code that expects an nn.Embedding.
    padding_idx = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, rank, device, dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.reset_parameters()

    @classmethod
    def from_factors(
        cls,
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        order: NDArray[np.int64],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LowRankEmbedding:
        """The module for the given, copied, factors; raises `ShapeError` for shapes that disagree."""
        module: LowRankEmbedding = cls._from_factors(left, right, order, dtype, device)
        return module

    def _input_indices(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        # Token `i` is looked up where row `i` went.
        return np.argsort(order)

    def reset_parameters(self, variance: float = 1.0) -> None:
        """Initialises like `nn.Embedding`: entries of variance 1."""
        super().reset_parameters(variance)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` token ids to `(..., embedding_dim)`."""
        rows = ids.reshape(-1)
        # Autocast would round where nn.Embedding does not.
        with without_autocast(self.left):
            if self.input_permutation is not None:
                identity = torch.eye(self.rank, dtype=self.left.dtype, device=self.left.device)
                # index_select refuses negative ids, as nn.Embedding does; indexing would wrap them round.
                rows = self.input_permutation.index_select(0, rows)
                table = nn.functional.embedding(rows, torch.cat([identity, self.left])) @ self.right
            else:
                known = nn.functional.embedding(rows, self.left)
                table = torch.cat([known, known @ self.right], dim=1)
        if self.output_permutation is not None:
            table = table.index_select(1, self.output_permutation)
        return table.reshape(*ids.shape, self.embedding_dim)

    def dense_weight(self) -> torch.Tensor:
        """The matrix `W (num_embeddings, embedding_dim)` that the factors stand for, in their dtype."""
        weight = expand(self.left, self.right, self.input_permutation is not None)
        return gathered(weight, self.input_permutation, self.output_permutation).to(self.left.dtype)

    def extra_repr(self) -> str:
        """The arguments of the constructor, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class LowRankHead(TiedFactors, LowRankFactors):
    """The output layer tied to a `LowRankEmbedding`: `logits = h Wᵀ + bias` from the embedding's very own factors.

    Shapes: `h (..., embedding_dim)` to `(..., num_embeddings)`. The transpose of a matrix in interpolative form is in
    interpolative form: `Wᵀ[q] = [I; rightᵀ] leftᵀ`, or `Wᵀ[:, p] = rightᵀ [I leftᵀ]`.

    As in `KroneckerHead`, the parameters are the embedding's under names of its own, and the permutations, which are
    not saved, follow from the embedding's.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., embedding_dim)` hidden states to `(..., num_embeddings)` logits."""
        left, right = self.right.transpose(0, 1), self.left.transpose(0, 1)
        return add_bias(
            low_rank_matmul(hidden, left, right, self.input_permutation, self.output_permutation), self.bias
        )

    def dense_weight(self) -> torch.Tensor:
        """The matrix `(embedding_dim, num_embeddings)`, in × out, in the dtype of the factors."""
        # The rows of the embedding's matrix are this module's outputs.
        weight = expand(self.left, self.right, self.output_permutation is not None)
        weight = gathered(weight, self.output_permutation, inverse(self.input_permutation))
        return weight.to(self.left.dtype).transpose(0, 1)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"
