"""The options that take one of a few names, their types and their check: signatures and the command line share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

from ..errors import ConfigError, DtypeError, TQError

Effort: TypeAlias = Literal["fast", "balanced", "best"]
"""How long permutations and factors are searched."""
Objective: TypeAlias = Literal["auto", "frobenius", "diagonal", "second_moment", "sensitivity"]
"""The norm that errors are measured in."""
Permute: TypeAlias = Literal["none", "rows", "columns", "both"]
"""The sides of a matrix that are searched for a permutation."""
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
"""A floating dtype of stored tensors."""
StoredDtype: TypeAlias = Literal["float32", "float16", "bfloat16", "int8"]
"""A dtype of compressed checkpoints: "int8" is eight-bit weights with scales, all other tensors as they are."""
Engine: TypeAlias = Literal["auto", "torch", "native"]
"""What computes a forward pass."""

EFFORTS: tuple[Effort, ...] = get_args(Effort)
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
PERMUTES: tuple[Permute, ...] = get_args(Permute)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
STORED_DTYPES: tuple[StoredDtype, ...] = get_args(StoredDtype)
ENGINES: tuple[Engine, ...] = get_args(Engine)

DEFAULT_EFFORT: Effort = "fast"
DEFAULT_SEED = 0


def dtype_name(dtype: Any) -> Dtype | None:
    """A dtype, of torch too, by its name; None stays None. Raises `DtypeError` for another.

    >>> dtype_name("torch.float16")
    'float16'
    """
    found: Dtype | None = _name_of(dtype, DTYPES)
    return found


def stored_dtype(dtype: Any) -> StoredDtype | None:
    """As `dtype_name`, for the dtypes of compressed checkpoints.

    >>> stored_dtype("int8")
    'int8'
    """
    found: StoredDtype | None = _name_of(dtype, STORED_DTYPES)
    return found


def _name_of(dtype: Any, choices: Sequence[str]) -> Any:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    one_of("dtype", name, choices, DtypeError)
    return name


def one_of(name: str, value: Any, choices: Sequence[str], error: type[TQError] = ConfigError) -> None:
    """Raises `error` unless `value` is one of `choices`.

    >>> one_of("effort", "heroic", EFFORTS)
    Traceback (most recent call last):
    tqcompressor.errors.ConfigError: effort: expected "fast", "balanced" or "best", got 'heroic'
    """
    if not isinstance(value, str) or value not in choices:
        *first, last = (f'"{choice}"' for choice in choices)
        raise error(f"{name}: expected {', '.join(first)} or {last}, got {value!r}")
