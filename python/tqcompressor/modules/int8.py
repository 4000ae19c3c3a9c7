"""Eight-bit integers with a scale for each row or column, in place of floating weights: `value ≈ code · scale`.

The codes and the bfloat16 scales are buffers: nothing trains them, and `.to(dtype)` and `.half()` leave both as they
are. Values are formed where they are used, in the dtype of the computation, and not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .. import _core

# The end of the name of the scales of a tensor.
SCALE = "_scale"


class Weights(NamedTuple):
    """A matrix or several: floating values without a scale, or codes with a scale that broadcasts against them."""

    values: torch.Tensor
    scale: torch.Tensor | None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """All values; those of codes in `dtype`."""
        return self.values if self.scale is None else _scaled(self.values, self.scale, dtype)

    def rows(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of one matrix; those of codes, whose rows have a scale each, in `dtype`."""
        found = nn.functional.embedding(indices, self.values)
        return found if self.scale is None else _scaled(found, nn.functional.embedding(indices, self.scale), dtype)

    def matrix(self, index: int) -> Weights:
        """One of several matrices."""
        return Weights(self.values[index], None if self.scale is None else self.scale[index])


def _scaled(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # In float32: a small scale is no normal float16.
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scale.to(wide)).to(dtype)


def quantized(values: torch.Tensor, by_rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of matrices, on the device of `values`; on the meta device their shapes alone.

    Raises `NonFiniteError` for NaN or an infinity.
    """
    *_, rows, columns = values.shape
    shape = (*values.shape[:-1], 1) if by_rows else (*values.shape[:-2], 1, columns)
    if values.is_meta:
        return (
            torch.empty(values.shape, dtype=torch.int8, device="meta"),
            torch.empty(shape, dtype=torch.bfloat16, device="meta"),
        )
    plain = values.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1)
    codes, bits = _core.quantize(plain, rows, columns, by_rows)
    scale = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(codes).view(values.shape).to(values.device), scale.view(shape).to(values.device)


class MayBeInt8(nn.Module):
    """A module whose weights may be eight-bit integers: `NAME` holds the codes then, and `NAME_scale` the scales."""

    # Without elements: its dtype and device are those in which the module computes.
    _like: torch.Tensor

    @property
    def is_int8(self) -> bool:
        """Whether the weights are eight-bit integers."""
        return "_like" in self._buffers

    def _set_int8(self, name: str, codes: torch.Tensor, scale: torch.Tensor) -> None:
        """Puts codes and scales in the place of a parameter or of other codes."""
        self._parameters.pop(name, None)
        for own, values in ((name, codes), (name + SCALE, scale)):
            self.register_buffer(own, values)

    def _computes_in(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = {name: scale for name, scale in self._buffers.items() if name.endswith(SCALE) and scale is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != scale.dtype:
                self._buffers[name] = scale.to(after.device)
        return self
