"""The norm of the errors of an approximation, by the second moments of a layer."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config.choices import OBJECTIVES, Objective, one_of
from ..errors import ConfigError, DtypeError, ShapeError
from ..utils.torch_utils import as_array

Moments: TypeAlias = tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]


def moments_for(objective: Objective, input_moment: Any, output_moment: Any) -> Moments:
    """The moments `(C_in, C_out)` that an objective uses.

    The error of an approximation is `tr(C_in (W − Ŵ) C_out (W − Ŵ)ᵀ)`. "frobenius" uses neither moment, "diagonal" the
    diagonal of the inputs' second moment, "second_moment" all of it, "sensitivity" that and the second moment of the
    gradients at the outputs. "auto" uses all moments given. Raises `ConfigError` for another name, or for an objective
    without its moments.
    """
    one_of("objective", objective, OBJECTIVES)
    if objective == "frobenius":
        return None, None
    missing = {"diagonal": input_moment is None, "second_moment": input_moment is None}
    missing["sensitivity"] = input_moment is None or output_moment is None
    if missing.get(objective, False):
        needed = "input and output moments" if objective == "sensitivity" else "input moment"
        raise ConfigError(f"objective {objective!r} needs the {needed}: give a calibration that has them")
    if objective == "diagonal":
        return (input_moment if input_moment.ndim == 1 else np.ascontiguousarray(np.diagonal(input_moment))), None
    return input_moment, None if objective == "second_moment" else output_moment


def as_moment(moment: ArrayLike | None, side: int, which: str) -> NDArray[np.float32] | None:
    """A moment as the C-contiguous float32 array that the kernels read: `(side, side)`, or `(side,)` for a diagonal.

    Raises `ShapeError` or `DtypeError`.
    """
    if moment is None:
        return None
    array = as_array(moment, which)
    if array.shape not in ((side,), (side, side)):
        raise ShapeError(f"{which}: expected shape ({side}, {side}), or ({side},) for a diagonal, got {array.shape}")
    if array.dtype.kind != "f":
        raise DtypeError(f"{which}: expected float16, float32 or float64, got {array.dtype}")
    # Its scale does not matter, and squares of large or small activations may be beyond float32.
    largest = float(np.max(np.abs(array), initial=0.0))
    if array.dtype == np.float64 and np.isfinite(largest) and largest > 0 and not 1e-20 < largest < 1e20:
        array = array / largest
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)
