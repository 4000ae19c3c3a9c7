"""Tensors as the losses take them: checked rows, and the memory that Rust reads."""

from __future__ import annotations

from typing import Any

import torch

from .errors import DtypeError, ShapeError
from .torch_formulas import computed_dtype

_IN_RUST = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def flat(rows: torch.Tensor) -> torch.Tensor:
    """Rows, whatever the shape before the last dimension."""
    return rows.reshape(-1, rows.shape[-1])


def flat_labels(labels: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One label per row of `shape`; raises `DtypeError` and `ShapeError`."""
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise DtypeError(f"labels: expected integers, got {labels.dtype}")
    check_shape("labels", shape, labels.shape)
    return labels.reshape(-1).long()


def check_shape(name: str, expected: torch.Size, got: torch.Size) -> None:
    """Raises `ShapeError` unless the two are equal."""
    if expected != got:
        raise ShapeError(f"{name}: expected the shape {tuple(expected)}, got {tuple(got)}")


def check_rows(name: str, rows: torch.Tensor) -> None:
    """Raises unless these are rows of floats that are not empty."""
    if rows.dtype not in _IN_RUST and rows.dtype != torch.float64:
        raise DtypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {rows.dtype}")
    if rows.dim() == 0 or rows.shape[-1] == 0:
        raise ShapeError(f"{name}: expected the shape (..., at least one), got {tuple(rows.shape)}")


def fake_loss(values: torch.Tensor) -> torch.Tensor:
    """A scalar of the dtype that a loss of these values has."""
    return values.new_empty((), dtype=computed_dtype(values))


def for_rust(*tensors: torch.Tensor | None) -> bool:
    """Whether Rust computes on these."""
    return all(tensor is None or (tensor.device.type == "cpu" and tensor.dtype in _IN_RUST) for tensor in tensors)


def thread_count(threads: int | None) -> int:
    """As many as torch may use, unless said otherwise."""
    return torch.get_num_threads() if threads is None else threads


def array(tensor: torch.Tensor) -> tuple[Any, str]:
    """The tensor's memory as float32 or as bits, and the name of its dtype."""
    tensor = tensor.detach().contiguous()
    bits = tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)
    return bits.numpy(), _IN_RUST[tensor.dtype]


def tensor_like(gradient: Any, like: torch.Tensor) -> torch.Tensor:
    """A gradient from Rust in the dtype of `like`; an empty tensor for none."""
    if gradient is None:
        return like.new_empty(0)
    tensor = torch.from_numpy(gradient)
    return tensor if like.dtype == torch.float32 else tensor.view(like.dtype)
