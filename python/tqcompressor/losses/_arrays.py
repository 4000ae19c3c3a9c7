"""Arguments of the losses, checked: rows of floats, labels, masks, and the weights of the two terms."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, DtypeError, ShapeError
from ..utils import validate

FLOATS = ("float16", "bfloat16", "float32", "float64")
# Lower temperatures leave only the largest logit, higher ones a uniform distribution. As in src/loss/distillation.rs.
_TEMPERATURES = (1e-4, 1e4)


class DistillationOptions(TypedDict, total=False):
    """The keywords that the distillation losses share; their defaults are in the functions."""

    temperature: float
    alpha: float
    ignore_index: int
    threads: int | None


class TensorOptions(DistillationOptions, total=False):
    """Those of losses of logits that are tensors."""

    inplace: bool


class ArrayOptions(DistillationOptions, total=False):
    """Those of losses of arrays."""

    out: NDArray[Any] | None


class HeadOptions(DistillationOptions, total=False):
    """Those of the loss of a head of arrays."""

    out: tuple[NDArray[np.float32], NDArray[np.float32]] | None


class LossWeights(NamedTuple):
    """`divergence · KL at the temperature + cross_entropy · CE`, in the order that the kernels take."""

    temperature: float
    divergence: float
    cross_entropy: float
    reverse: bool = False
    """`KL(student ‖ teacher)` in place of `KL(teacher ‖ student)`."""
    ignore_index: int = -100
    """The label of rows that do not count."""


def distillation_weights(temperature: float, alpha: float, labels: Any, ignore_index: int) -> LossWeights:
    """The weights of `alpha·T²·KL + (1 − alpha)·CE`; without labels those of the first term alone.

    Raises `ConfigError` for a temperature or an alpha out of range.
    """
    check_temperature(temperature)
    check_alpha(alpha)
    cross_entropy = 0.0 if labels is None else 1.0 - alpha
    return LossWeights(float(temperature), float(alpha * temperature**2), cross_entropy, False, ignore_index)


def check_temperature(temperature: float) -> None:
    """Raises `ConfigError` for a temperature out of range."""
    low, high = _TEMPERATURES
    if not low <= temperature <= high:
        raise ConfigError(f"temperature: expected a number from {low:g} to {high:g}, got {temperature}")


def check_alpha(alpha: float) -> None:
    """Raises `ConfigError` unless `alpha` is a share."""
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: expected a number from 0 to 1, got {alpha}")


def check_shape(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    """Raises `ShapeError` unless the two shapes are equal."""
    if tuple(expected) != tuple(got):
        raise ShapeError(f"{name}: expected the shape {tuple(expected)}, got {tuple(got)}")


def check_rows(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Raises `DtypeError` unless `dtype` is one of `FLOATS`, and `ShapeError` unless the rows have values."""
    if dtype.removeprefix("torch.") not in FLOATS:
        raise DtypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {dtype}")
    if len(shape) == 0 or shape[-1] == 0:
        raise ShapeError(f"{name}: expected the shape (..., at least one), got {tuple(shape)}")


def check_tokens_shape(student: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """Raises `ShapeError` unless `teacher_tokens` has as many rows as the logits, and 1 to vocabulary columns."""
    *rows, vocabulary = student
    if len(tokens) != len(student) or list(tokens[:-1]) != rows or not 1 <= tokens[-1] <= vocabulary:
        expected = ", ".join(map(str, (*rows, f"1 to {vocabulary}")))
        raise ShapeError(f"teacher_tokens: expected the shape ({expected}), got {tuple(tokens)}")


def float_matrix(value: ArrayLike, name: str) -> tuple[NDArray[Any], str]:
    """Rows of float32, or the bits of a half precision as uint16, and the name of the dtype that they stand for."""
    array = validate.array(name, value)
    # numpy has no bfloat16; that of ml_dtypes has this name.
    dtype = array.dtype.name
    check_rows(name, dtype, array.shape)
    if dtype in ("float32", "float64"):
        return single_matrix(array, name), "float32"
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(native).reshape(-1, array.shape[-1]).view(np.uint16), dtype


def single_matrix(value: ArrayLike, name: str) -> NDArray[np.float32]:
    """Rows rounded or widened to float32."""
    array = validate.array(name, value)
    check_rows(name, array.dtype.name, array.shape)
    # A float64 beyond float32's range becomes an infinity, which the kernels refuse with its row and column.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32).reshape(-1, array.shape[-1])


def label_rows(labels: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """One label per row of `shape`."""
    array = validate.array("labels", labels)
    if array.dtype.kind not in "iu" and array.size:
        raise DtypeError(f"labels: expected integers, got {array.dtype}")
    check_shape("labels", shape, array.shape)
    return np.ascontiguousarray(array, dtype=np.int64).reshape(-1)


def mask_rows(mask: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """One boolean per row of `shape`."""
    array = validate.array("mask", mask)
    if array.dtype != np.bool_:
        raise DtypeError(f"mask: expected booleans, got {array.dtype}")
    check_shape("mask", shape, array.shape)
    return np.ascontiguousarray(array).reshape(-1)


def check_place(tensor: bool, inplace: bool, out: object) -> None:
    """Raises `ConfigError` for `inplace` with arrays and for `out` with tensors."""
    if tensor and out is not None:
        raise ConfigError("out: expected it with numpy arrays only; for tensors there is inplace=True")
    if inplace and not tensor:
        raise ConfigError("inplace: expected it with torch tensors only; for arrays there is out=student_logits")


def gradient_place(
    out: NDArray[Any] | None, value: ArrayLike, rows: NDArray[Any], *others: NDArray[Any] | None, name: str = "out"
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The rows of the values, and those that their gradient is written to: new ones, or those of `out`.

    `rows` are those of `value`, and `others` what else is read. Where `out` is the memory of the rows, both results are
    the same array. Raises `ConfigError`, `DtypeError` and `ShapeError` for an `out` that cannot take the gradient.
    """
    if out is None:
        return rows, np.empty_like(rows)
    if not isinstance(out, np.ndarray):
        raise ConfigError(f"{name}: expected a numpy array, got {type(out).__name__}")
    like = np.asarray(value)
    dtype = like.dtype.newbyteorder("=") if rows.dtype == np.uint16 else rows.dtype
    if out.dtype != dtype:
        raise DtypeError(f"{name}: expected the gradient's dtype {dtype}, got {out.dtype}")
    check_shape(name, like.shape, out.shape)
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise ConfigError(f"{name}: expected a C-contiguous array that may be written, got another")
    place = out.reshape(rows.shape).view(rows.dtype)
    same = place.ctypes.data == rows.ctypes.data
    if any(read is not None and np.may_share_memory(place, read) for read in ((None if same else rows), *others)):
        raise ConfigError(f"{name}: expected memory of its own or exactly that of the logits, got an overlap")
    return (place, place) if same else (rows, place)


def gradient_like(rows: NDArray[Any], value: ArrayLike, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """`out`, or rows of a gradient in the shape of `value`; bits of a half precision become values of its dtype."""
    if out is not None:
        return out
    array = np.asarray(value)
    return (rows.view(array.dtype.newbyteorder("=")) if rows.dtype == np.uint16 else rows).reshape(array.shape)
