"""Dense matrices of eight-bit integers in place of `nn.Linear`, transformers' `Conv1D` and `nn.Embedding`."""

from __future__ import annotations

import torch
from torch import nn

from .base import EmbeddingFactors, Factors, LinearFactors, TiedFactors, TiedHeadFactors, add_bias, gathered
from .int8 import Weights, quantized

# Values that are formed at a time: the dense matrix is never there as a whole in a forward pass.
_PIECE = 1 << 22


class Int8Factors(Factors):
    """The base of the modules: `codes`, laid out as the replaced weight is, and `codes_scale` for each output."""

    factors = ("codes",)
    _sizes = ("is_transposed",)
    codes: torch.Tensor
    # Whether the codes are those of the transposed matrix, as in nn.Linear.
    is_transposed: bool

    def _new_codes(self, rows: int, columns: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Registers the matrix, as floating values until `make_int8`."""
        self._new_factors([(columns, rows) if self.is_transposed else (rows, columns)], device, dtype)
        for side in ("input_permutation", "output_permutation"):
            self.register_buffer(side, None)

    def _draw_factors(self, variance: float) -> None:
        """Draws entries of the given variance."""
        nn.init.normal_(self.codes, std=variance**0.5)

    def _quantized(self, name: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantized(values, self._by_rows or self.is_transposed)

    def set_weight(self, weight: torch.Tensor) -> None:
        """Codes and scales of the weight of the replaced module, whose dtype and device the module takes.

        Raises `NonFiniteError` for NaN or an infinity.
        """
        self._set_int8("codes", *self._quantized("codes", weight))
        self._computes_in(weight.dtype, weight.device)

    def _matrix(self, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
        """The matrix, in the dtype of the module."""
        dense = self.factor("codes")
        return gathered(dense.t() if self.is_transposed else dense, rows, columns)

    def _product(self, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        """`x` times the stored matrix, or its transpose, whose outputs are formed some at a time."""
        values, scale = self.weights("codes")
        axis = 0 if transposed else 1
        step = max(1, _PIECE // values.shape[1 - axis])
        outputs = []
        for first in range(0, values.shape[axis], step):
            count = min(step, values.shape[axis] - first)
            own = None if scale is None else scale.narrow(axis, first, count)
            piece = Weights(values.narrow(axis, first, count), own).dense(x.dtype)
            outputs.append(torch.matmul(x, piece.t() if transposed else piece))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class Int8Linear(LinearFactors, Int8Factors):
    """`y = x W + bias` for a dense `W` of eight-bit integers with a scale for each output.

    Shapes: `x (..., in_features)`, `y (..., out_features)`; `codes (out_features, in_features)` and `codes_scale
    (out_features, 1)` in place of an nn.Linear (`is_transposed`), the transposes in place of a Conv1D.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        is_transposed: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.is_transposed = self.weight_is_transposed = is_transposed
        self._new_codes(in_features, out_features, device, dtype)
        self._set_sizes(in_features, out_features, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return add_bias(self._product(x, self.is_transposed), self.bias)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Embedding(EmbeddingFactors, Int8Factors):
    """A table of eight-bit integers with a scale for each row.

    Shapes: ids `(...)` to `(..., embedding_dim)`; `codes (num_embeddings, embedding_dim)`, `codes_scale
    (num_embeddings, 1)`.
    """

    is_transposed = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._new_codes(num_embeddings, embedding_dim, device, dtype)
        self._set_sizes(num_embeddings, embedding_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` token ids to `(..., embedding_dim)`."""
        return self.weights("codes").rows(ids, self._a_factor().dtype)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class TiedInt8Embedding(TiedFactors, Int8Embedding):
    """A second embedding with the codes of an `Int8Embedding`, such as that of a decoder."""


class Int8Head(TiedHeadFactors, Int8Factors):
    """The output layer tied to an `Int8Embedding`: `logits = h Wᵀ + bias` from the embedding's codes."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., embedding_dim)` hidden states to `(..., num_embeddings)` logits."""
        return add_bias(self._product(hidden, transposed=True), self.bias)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
