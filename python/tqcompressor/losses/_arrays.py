"""Arguments of the losses, checked: rows of float32 or the bits of a half precision, labels, and the objective."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, DtypeError, ShapeError

# Beyond these, nothing is left of the logits, or nothing but their largest. As in src/loss/distillation.rs.
_TEMPERATURES = (1e-4, 1e4)


class Objective(NamedTuple):
    """`divergence · KL_T + cross_entropy · CE`, checked."""

    temperature: float
    divergence: float
    cross_entropy: float
    reverse: bool
    ignore_index: int


def checked_objective(
    temperature: float, divergence: float, cross_entropy: float, reverse: bool, ignore_index: int
) -> Objective:
    """The objective; raises `ConfigError` for a temperature out of range."""
    check_temperature(temperature)
    return Objective(float(temperature), float(divergence), float(cross_entropy), reverse, ignore_index)


def check_temperature(temperature: float) -> None:
    """Raises `ConfigError` for a temperature out of range."""
    low, high = _TEMPERATURES
    if not low <= temperature <= high:
        raise ConfigError(f"temperature: expected a number from {low:g} to {high:g}, got {temperature}")


def is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor, found out without importing torch."""
    return hasattr(value, "requires_grad")


def check_shapes(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    """Raises `ShapeError` unless the two are equal."""
    if tuple(expected) != tuple(got):
        raise ShapeError(f"{name}: expected the shape {tuple(expected)}, got {tuple(got)}")


def check_rows(name: str, shape: tuple[int, ...]) -> None:
    """Raises `ShapeError` unless this is a shape of rows that are not empty."""
    if len(shape) == 0 or shape[-1] == 0:
        raise ShapeError(f"{name}: expected the shape (..., at least one), got {tuple(shape)}")


def float_matrix(value: ArrayLike, name: str) -> tuple[NDArray[Any], str]:
    """Rows of float32, or the bits of a half precision, and the name of the dtype that they are in."""
    array = np.asarray(value)
    dtype = array.dtype.name
    # numpy has no bfloat16 of its own; that of ml_dtypes calls itself so.
    if dtype not in ("float16", "float32", "float64", "bfloat16"):
        raise DtypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {array.dtype}")
    check_rows(name, array.shape)
    array = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
    if dtype == "float64":
        # What is beyond float32's range becomes an infinity, which the kernels refuse by name and place.
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if dtype in ("float32", "float64"):
        return array, "float32"
    return array.view(np.uint16), dtype


def single_matrix(value: ArrayLike, name: str) -> NDArray[np.float32]:
    """Rows rounded or widened to float32."""
    array = np.asarray(value)
    if array.dtype.name not in ("float16", "float32", "float64", "bfloat16"):
        raise DtypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {array.dtype}")
    check_rows(name, array.shape)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32).reshape(-1, array.shape[-1])


def label_rows(labels: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """One label per row of `shape`."""
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" and array.size:
        raise DtypeError(f"labels: expected integers, got {array.dtype}")
    check_shapes("labels", shape, array.shape)
    return np.ascontiguousarray(array, dtype=np.int64).reshape(-1)


def mask_rows(mask: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """One boolean per row of `shape`."""
    array = np.asarray(mask)
    if array.dtype != np.bool_:
        raise DtypeError(f"mask: expected booleans, got {array.dtype}")
    check_shapes("mask", shape, array.shape)
    return np.ascontiguousarray(array).reshape(-1)


def gradient_like(gradient: NDArray[Any] | None, value: ArrayLike) -> NDArray[Any]:
    """The gradient in the shape of `value`, and in its dtype if that is a half precision."""
    assert gradient is not None
    array = np.asarray(value)
    return (gradient.view(array.dtype) if gradient.dtype == np.uint16 else gradient).reshape(array.shape)
