"""A linear layer whose output is several factored projections side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ShapeError
from .base import add_bias, new_bias
from .dense_weight import CompressedBase


class FusedLinear(CompressedBase):
    """Several factored linear modules side by side on one input, with one bias: GPT-2's `c_attn` as its q, k and v.

    `y = concatenate(part(x) for part in parts) + bias`. GPT-2 splits the output itself. The parts are
    named submodules of any kind (`KroneckerLinear`, `LowRankLinear`, `MixedLinear`) without a bias.
    """

    bias: nn.Parameter | None

    def __init__(self, parts: Mapping[str, Any], bias: bool | torch.Tensor = True) -> None:
        super().__init__()
        first = next(iter(parts.values()))
        for name, part in parts.items():
            if part.in_features != first.in_features or part.bias is not None:
                raise ShapeError(f"part {name} must have {first.in_features} inputs and no bias")
            self.add_module(name, part)
        self.part_names = tuple(parts)
        self.in_features = first.in_features
        self.out_features = sum(part.out_features for part in parts.values())
        self.register_parameter("bias", new_bias(bias, self.out_features, first._a_factor()))

    @property
    def parts(self) -> list[Any]:
        """The parts in the order of their outputs."""
        return [getattr(self, name) for name in self.part_names]

    def _a_factor(self) -> torch.Tensor:
        factor: torch.Tensor = self.parts[0]._a_factor()
        return factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return add_bias(torch.cat([part(x) for part in self.parts], dim=-1), self.bias)

    def dense_weight(self) -> torch.Tensor:
        """The matrix `(in_features, out_features)` of all parts, in the dtype of the factors."""
        return torch.cat([part.dense_weight() for part in self.parts], dim=1)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
