"""The token embedding held as Kronecker factors, and the output layer that is tied to it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .contraction import kronecker_matmul
from .factors import TiedFactors, add_bias, inverse
from .modules import KroneckerFactors


class KroneckerEmbedding(KroneckerFactors):
    """Rows of `W` for `W[p][:, q] = Σ_k A_k ⊗ B_k`, each made when it is looked up.

    Shapes: ids `(...)` to `(..., embedding_dim)`; `A (rank, num_embeddings / m2, embedding_dim / n2)`,
    `B (rank, m2, n2)`. `input_permutation` is the inverse of `p` (token `i` is row `inverse(p)[i]` of the sum) and
    `output_permutation` the inverse of `q`. A row costs `rank · embedding_dim` multiplications.

    Raises `ShapeError` when the block does not divide the matrix, or when the rank is too large for it.
    """

    # Read by code that expects an nn.Embedding.
    padding_idx = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        block: tuple[int, int],
        rank: int,
        input_permutation: bool = False,
        output_permutation: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            block,
            rank,
            num_embeddings if input_permutation else None,
            embedding_dim if output_permutation else None,
            device,
            dtype,
        )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.reset_parameters()

    @classmethod
    def from_factors(
        cls,
        a: NDArray[np.float32],
        b: NDArray[np.float32],
        p: NDArray[np.int64],
        q: NDArray[np.int64],
        permute: str = "both",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KroneckerEmbedding:
        """The module for `W[p][:, q] ≈ Σ_k A_k ⊗ B_k` with the given, copied, factors.

        A permutation of a side that `permute` leaves out is not kept. Raises `ShapeError` for shapes that disagree.
        """
        module: KroneckerEmbedding = cls._from_factors(a, b, p, q, permute, dtype, device)
        return module

    def _input_indices(self, p: NDArray[np.int64]) -> NDArray[np.int64]:
        # Token `i` is looked up where row `i` went.
        return np.argsort(p)

    def reset_parameters(self, variance: float = 1.0) -> None:
        """Initialises like `nn.Embedding`: entries of variance 1."""
        super().reset_parameters(variance)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` token ids to `(..., embedding_dim)`."""
        rows = ids.reshape(-1)
        if self.input_permutation is not None:
            # index_select refuses negative ids, as nn.Embedding does; indexing would wrap them round.
            rows = self.input_permutation.index_select(0, rows)
        table = self._rows(rows, 0)
        for k in range(1, self.rank):
            table = table + self._rows(rows, k)
        out = table.reshape(*ids.shape, self.embedding_dim)
        return out if self.output_permutation is None else out.index_select(-1, self.output_permutation)

    def _rows(self, rows: torch.Tensor, k: int) -> torch.Tensor:
        """Rows of `A_k ⊗ B_k`, `(T, n1, n2)`: row `i` is row `i div m2` of A_k times row `i mod m2` of B_k."""
        m2, _ = self.block
        if m2 == 1:
            a, b = nn.functional.embedding(rows, self.A[k]), self.B[k]
        else:
            a = nn.functional.embedding(rows.div(m2, rounding_mode="floor"), self.A[k])
            b = nn.functional.embedding(rows.remainder(m2), self.B[k])
        # Not a matrix product, which autocast would round where nn.Embedding does not.
        return a.unsqueeze(-1) * b.unsqueeze(-2)

    def dense_weight(self) -> torch.Tensor:
        """The matrix `W (num_embeddings, embedding_dim)` that the factors stand for, in the dtype of the factors."""
        return self._matrix(self.input_permutation, self.output_permutation)

    def extra_repr(self) -> str:
        """The arguments of the constructor, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}"


class KroneckerHead(TiedFactors, KroneckerFactors):
    """The output layer tied to a `KroneckerEmbedding`: `logits = h Wᵀ` from the embedding's very own A and B.

    Shapes: `h (..., embedding_dim)` to `(..., num_embeddings)`. With `W[p][:, q] = Σ_k A_k ⊗ B_k`, h is gathered by
    `q`, contracted with the transposed factors and gathered by the inverse of `p`. With block (1, 4) and rank 1 the
    logits take a quarter of the dense multiplications. `bias (num_embeddings,)` is the replaced output layer's own.

    Transformers ties parameters by name, so the head has `A` and `B` of its own that are the same tensors. Its
    permutations follow from the embedding's: they are not saved, and are derived again when the embedding's change.
    """

    def __init__(self, embedding: KroneckerEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding, bias)
        self.block = embedding.block

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., embedding_dim)` hidden states to `(..., num_embeddings)` logits."""
        if self.input_permutation is not None:
            hidden = hidden.index_select(-1, self.input_permutation)
        logits = kronecker_matmul(hidden, self.A.transpose(1, 2), self.B.transpose(1, 2))
        if self.output_permutation is not None:
            logits = logits.index_select(-1, self.output_permutation)
        return add_bias(logits, self.bias)

    def dense_weight(self) -> torch.Tensor:
        """The matrix `(embedding_dim, num_embeddings)`, in × out, in the dtype of the factors."""
        return self._matrix(self.output_permutation, inverse(self.input_permutation)).transpose(0, 1)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {super().extra_repr()}"
