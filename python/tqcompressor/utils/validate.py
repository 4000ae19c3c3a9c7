"""Checks of what callers pass: counts, seeds, threads, arrays. Each returns the checked value."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, ShapeError

# Random generators in Rust and numpy take an unsigned 64-bit seed.
LARGEST_SEED = (1 << 64) - 1
_MOST_THREADS = (1 << 16) - 1


def integer(name: str, value: Any, smallest: int, largest: int | None = None) -> int:
    """`value` as an `int` from `smallest` to `largest`; numpy's integers are accepted.

    Raises:
        ConfigError: `value` is out of range, or no integer. The message gives `name`, the range and the value.

    >>> integer("rank", 4, 1)
    4
    >>> integer("rank", 0, 1)
    Traceback (most recent call last):
    tqcompressor.errors.ConfigError: rank: expected an integer from 1 up, got 0
    """
    try:
        # Reject bools and floats: `True` would count as 1.
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < smallest or (largest is not None and number > largest):
        limits = f"from {smallest} up" if largest is None else f"from {smallest} to {largest}"
        raise ConfigError(f"{name}: expected an integer {limits}, got {value!r}")
    return number


def seed(value: Any) -> int:
    """A seed, from 0 to 2⁶⁴ − 1. Raises `ConfigError` as `integer` does."""
    return integer("seed", value, 0, LARGEST_SEED)


def threads(value: Any) -> int | None:
    """A number of threads from 1 up; None stands for one per core. Raises `ConfigError` as `integer` does."""
    return None if value is None else integer("threads", value, 1, _MOST_THREADS)


def max_macs(value: Any) -> float | None:
    """A cap on MACs as a share of those while dense; None stands for the default and infinity, or "inf", for no cap.

    Raises `ConfigError` unless it is a positive number.

    >>> max_macs(0.7), max_macs("inf")
    (0.7, inf)
    """
    if value is None:
        return None
    number = isinstance(value, Real) and not isinstance(value, bool)
    share = float(value) if number or value == "inf" else 0.0
    if not share > 0:
        raise ConfigError(
            "max_macs must be a positive share of the macs of the dense matrices such as 0.7, or infinity, "
            f"got {value!r}"
        )
    return share


def array(name: str, values: ArrayLike) -> NDArray[Any]:
    """`values` as an array of any dtype.

    Raises:
        ShapeError: They are ragged: nested sequences of different lengths.

    >>> array("tokens", [[1, 2], [3]])
    Traceback (most recent call last):
    tqcompressor.errors.ShapeError: tokens: expected rows of one length, got sequences of different lengths
    """
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ShapeError(f"{name}: expected rows of one length, got sequences of different lengths") from error
