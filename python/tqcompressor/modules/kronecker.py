"""The torch modules that hold Kronecker factors and permutations in place of a dense linear one's weight.

Parameters `A (rank, m1, n1)` and `B (rank, m2, n2)`, persistent integer buffers `input_permutation` and
`output_permutation` (gather indices used in the forward pass; None where a side is not permuted).
`dense_weight()` is the matrix, computed on request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .._core import KroneckerTerm
from ..config.choices import Permute
from ..config.specs import KroneckerSpec
from .base import EmbeddingFactors, Factors, LinearFactors, Term, TiedFactors, TiedHeadFactors, add_bias, the_one_term
from .functional import kronecker_layer, kronecker_matrix, prefers_dense


class KroneckerFactors(Factors):
    """The base of the modules: the factors and permutations of a `(rows, columns)` matrix."""

    factors = ("A", "B")
    _sizes = ("block", "rank")
    A: torch.Tensor
    B: torch.Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        block: tuple[int, int],
        rank: int,
        input_size: int | None,
        output_size: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        spec = KroneckerSpec(block, rank)
        self._new_factors(spec.factor_shapes(rows, columns), device, dtype)
        self.block = spec.block
        self.rank = spec.rank
        for name, size in (("input_permutation", input_size), ("output_permutation", output_size)):
            self.register_buffer(name, None if size is None else torch.arange(size, device=device))

    def _draw_factors(self, variance: float) -> None:
        """Draws factors whose Kronecker sum has entries of the given variance."""
        bound = math.sqrt(3 * math.sqrt(variance / self.rank))
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.uniform_(self.B, -bound, bound)

    @classmethod
    def _from_factors(
        cls,
        a: NDArray[np.float32],
        b: NDArray[np.float32],
        p: NDArray[np.int64],
        q: NDArray[np.int64],
        permute: Permute,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        **options: Any,
    ) -> Any:
        """A module of this class for `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`; `options` are its constructor's own."""
        (rank, m1, n1), (_, m2, n2) = a.shape, b.shape
        spec = KroneckerSpec((m2, n2), rank, permute)
        sides: dict[str, Any] = {
            "input_permutation": spec.permutes_rows,
            "output_permutation": spec.permutes_columns,
        }
        # The constructors of all subclasses take rows, columns, block and rank first.
        module: Any = cls(m1 * m2, n1 * n2, spec.block, rank, device="meta", **sides, **options)
        module.set_factors(a, b, p, q, dtype, device)
        return module

    def set_terms(
        self, terms: Sequence[Term], dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        """`set_factors` with the terms of a decomposition, which must be one Kronecker term."""
        term = the_one_term(terms, KroneckerTerm)
        self.set_factors(term.a, term.b, term.row_permutation, term.column_permutation, dtype, device)

    def set_factors(
        self,
        a: NDArray[np.float32],
        b: NDArray[np.float32],
        p: NDArray[np.int64],
        q: NDArray[np.int64],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Copies the factors of `W[p][:, q]`; a permutation of a side that is not permuted is ignored.

        Raises `ShapeError` for shapes that are not the module's.
        """
        permutations = {"input_permutation": self._input_indices(p), "output_permutation": np.argsort(q)}
        self._copy({"A": a, "B": b, **permutations}, dtype, device)

    def _matrix(self, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
        """The Kronecker sum as a matrix, its sides gathered, in the dtype of the factors."""
        a, b = self.factor("A"), self.factor("B")
        return kronecker_matrix(a, b, rows, columns).to(a.dtype)

    def _int8_factors(self) -> tuple[str, ...]:
        """The larger factor: the other one has few entries, which many others are multiplied by."""
        return ("A",) if self.A[0].numel() >= self.B[0].numel() else ("B",)

    def extra_repr(self) -> str:
        """The arguments of the constructor, for `print(model)`."""
        sides = [name for name in ("input_permutation", "output_permutation") if getattr(self, name) is not None]
        return f"block={self.block}, rank={self.rank}" + "".join(f", {side}=True" for side in sides)


class KroneckerLinear(LinearFactors, KroneckerFactors):
    """`y = x W + bias` for `W[p][:, q] = Σ_k A_k ⊗ B_k`.

    Shapes: `x (..., in_features)`, `y (..., out_features)`, `A (rank, in_features / m2, out_features / n2)`,
    `B (rank, m2, n2)` with `block = (m2, n2)`, `bias (out_features,)`. `input_permutation` is `p` and
    `output_permutation` is the inverse of `q`: `x[..., p]` goes in, `flat[..., inverse(q)]` comes out.

    The cost of a row is the smaller of `rank · (m1·n1·m2 + n1·m2·n2)` and `rank · (m1·m2·n2 + m1·n1·n2)`
    MACs. If that saves nothing against the dense product and there are hundreds of rows, as in training, `W` is
    formed for the duration of the call. The module replaces both `nn.Linear` and transformers' `Conv1D`.

    Raises `ShapeError` when the block does not divide the matrix, or when the rank is too large for it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: tuple[int, int],
        rank: int,
        bias: bool = True,
        input_permutation: bool = True,
        output_permutation: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            block,
            rank,
            in_features if input_permutation else None,
            out_features if output_permutation else None,
            device,
            dtype,
        )
        self._set_sizes(in_features, out_features, bias)

    @classmethod
    def from_factors(
        cls,
        a: NDArray[np.float32],
        b: NDArray[np.float32],
        p: NDArray[np.int64],
        q: NDArray[np.int64],
        permute: Permute = "both",
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KroneckerLinear:
        """The module for `W[p][:, q] ≈ Σ_k A_k ⊗ B_k` with copies of the factors.

        A permutation of a side that `permute` leaves out is not kept. Raises `ShapeError` for shapes that disagree.
        """
        module: KroneckerLinear = cls._from_factors(a, b, p, q, permute, dtype, device, bias=bias is not None)
        module._copy_bias(bias, dtype, device)
        return module

    @classmethod
    def from_decomposition(
        cls,
        decomposition: Any,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KroneckerLinear:
        """The module of a result of `tqcompressor.decompose` for the matrix `W` (in × out)."""
        d = decomposition
        return cls.from_factors(d.a, d.b, d.row_permutation, d.column_permutation, d.spec.permute, bias, dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        tokens = x.numel() // self.in_features
        if prefers_dense(tokens, self.block, self.rank, self.in_features, self.out_features):
            return add_bias(torch.matmul(x, self.dense_weight()), self.bias)
        a, b = self.factor("A", x), self.factor("B", x)
        return kronecker_layer(x, a, b, self.input_permutation, self.output_permutation, self.bias)

    def extra_repr(self) -> str:
        """The arguments of the constructor, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {super().extra_repr()}, bias={self.bias is not None}"


class KroneckerEmbedding(EmbeddingFactors, KroneckerFactors):
    """Rows of `W` for `W[p][:, q] = Σ_k A_k ⊗ B_k`, computed at lookup.

    Shapes: ids `(...)` to `(..., embedding_dim)`; `A (rank, num_embeddings / m2, embedding_dim / n2)`,
    `B (rank, m2, n2)`. `input_permutation` is the inverse of `p` (token `i` is row `inverse(p)[i]` of the sum) and
    `output_permutation` the inverse of `q`. A row costs `rank · embedding_dim` MACs.

    Raises `ShapeError` when the block does not divide the matrix, or when the rank is too large for it.
    """

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
        self._set_sizes(num_embeddings, embedding_dim)

    @classmethod
    def from_factors(
        cls,
        a: NDArray[np.float32],
        b: NDArray[np.float32],
        p: NDArray[np.int64],
        q: NDArray[np.int64],
        permute: Permute = "both",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KroneckerEmbedding:
        """The module for `W[p][:, q] ≈ Σ_k A_k ⊗ B_k` with copies of the factors.

        A permutation of a side that `permute` leaves out is not kept. Raises `ShapeError` for shapes that disagree.
        """
        module: KroneckerEmbedding = cls._from_factors(a, b, p, q, permute, dtype, device)
        return module

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` token ids to `(..., embedding_dim)`."""
        rows = self._permuted(ids.reshape(-1))
        table = self._rows(rows, 0)
        for k in range(1, self.rank):
            table = table + self._rows(rows, k)
        out = table.reshape(*ids.shape, self.embedding_dim)
        return out if self.output_permutation is None else out.index_select(-1, self.output_permutation)

    def _rows(self, rows: torch.Tensor, k: int) -> torch.Tensor:
        """Rows of `A_k ⊗ B_k`, `(T, n1, n2)`: row `i` is row `i div m2` of A_k times row `i mod m2` of B_k."""
        dtype = self._a_factor().dtype
        m2, _ = self.block
        if m2 == 1:
            a, b = self.weights("A").matrix(k).rows(rows, dtype), self.weights("B").matrix(k).dense(dtype)
        else:
            a = self.weights("A").matrix(k).rows(rows.div(m2, rounding_mode="floor"), dtype)
            b = self.weights("B").matrix(k).rows(rows.remainder(m2), dtype)
        # Autocast would round a matrix product here, but nn.Embedding does not round.
        return a.unsqueeze(-1) * b.unsqueeze(-2)

    def extra_repr(self) -> str:
        """The arguments of the constructor, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}"


class TiedKroneckerEmbedding(TiedFactors, KroneckerEmbedding):
    """A second embedding with the factors of a `KroneckerEmbedding`, such as that of a decoder."""


class KroneckerHead(TiedHeadFactors, KroneckerFactors):
    """The output layer tied to a `KroneckerEmbedding`: `logits = h Wᵀ` from the embedding's A and B.

    Shapes: `h (..., embedding_dim)` to `(..., num_embeddings)`. With `W[p][:, q] = Σ_k A_k ⊗ B_k`, h is gathered by
    `q`, contracted with the transposed factors and gathered by the inverse of `p`. With block (1, 4) and rank 1 the
    logits take a quarter of the dense MACs. `bias (num_embeddings,)` is the replaced output layer's own.

    Transformers ties parameters by name, so the head registers the same tensors `A` and `B`. Its permutations are
    derived from the embedding's: they are not saved, and are derived again when the embedding's change.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., embedding_dim)` hidden states to `(..., num_embeddings)` logits."""
        a, b = (self.factor(name, hidden).transpose(1, 2) for name in ("A", "B"))
        return kronecker_layer(hidden, a, b, self.input_permutation, self.output_permutation, self.bias)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {super().extra_repr()}"
