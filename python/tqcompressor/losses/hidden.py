"""The distance between hidden states of student and teacher."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..errors import ConfigError
from ..utils import validate
from ..utils.torch_utils import is_tensor
from ._arrays import check_place, check_shape, float_matrix, gradient_like, gradient_place, mask_rows
from .logits import ValueAndGradient

if TYPE_CHECKING:
    import torch

HiddenKind: TypeAlias = Literal["relative_mse", "mse", "cosine"]


def check_hidden_kind(name: str, kind: str) -> None:
    """Raises `ConfigError` unless `kind` is one of `HiddenKind`."""
    if kind not in get_args(HiddenKind):
        *first, last = (f'"{known}"' for known in get_args(HiddenKind))
        raise ConfigError(f"{name}: expected {', '.join(first)} or {last}, got {kind!r}")


@overload
def hidden_state_loss(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    *,
    kind: HiddenKind = "mse",
    mask: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor: ...


@overload
def hidden_state_loss(
    student_hidden: ArrayLike,
    teacher_hidden: ArrayLike,
    *,
    kind: HiddenKind = "mse",
    mask: ArrayLike | None = None,
    threads: int | None = None,
    out: NDArray[Any] | None = None,
) -> ValueAndGradient: ...


def hidden_state_loss(
    student_hidden: Any,
    teacher_hidden: Any,
    *,
    kind: HiddenKind = "mse",
    mask: Any = None,
    threads: int | None = None,
    out: Any = None,
) -> Any:
    """The mean distance of hidden states (..., width) over the rows where `mask` (...) is true.

    `kind` is "mse", `‖s − t‖² / width`; "relative_mse", the same divided by the mean of `t²` over the counted rows,
    so that states of any scale weigh alike; or "cosine", `1 − s·t / (‖s‖‖t‖)`. The cosine distance of a zero state is
    1, and its gradient zero. If no row counts, the loss is 0. Dtypes, errors, torch and `out` as for
    `distillation_loss`; there is no `inplace`, since the layers that follow need the states in their backward pass.

    >>> import numpy as np
    >>> hidden_state_loss(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]]))[0]
    2.5
    >>> hidden_state_loss(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]]), kind="relative_mse")[0]
    1.25
    >>> hidden_state_loss(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]]), kind="cosine")[0]
    1.0
    """
    threads = validate.threads(threads)
    check_hidden_kind("kind", kind)
    core_kind: HiddenKind = "cosine" if kind == "cosine" else "mse"
    check_place(is_tensor(student_hidden), False, out)
    if is_tensor(student_hidden):
        from ._torch_ops import hidden_state_loss

        loss = hidden_state_loss(student_hidden, teacher_hidden, core_kind, mask, threads)
        return loss / _mean_square(teacher_hidden.detach().double(), mask) if kind == "relative_mse" else loss
    student, student_dtype = float_matrix(student_hidden, "student_hidden")
    teacher, teacher_dtype = float_matrix(teacher_hidden, "teacher_hidden")
    shape = np.shape(student_hidden)
    check_shape("teacher_hidden", shape, np.shape(teacher_hidden))
    flags = None if mask is None else mask_rows(mask, shape[:-1])
    student, gradient = gradient_place(out, student_hidden, student, teacher, flags)
    value = _core.hidden_state_loss(student, student_dtype, gradient, teacher, teacher_dtype, flags, core_kind, threads)
    like = gradient_like(gradient, student_hidden, out)
    if kind != "relative_mse":
        return value, like
    scale = _mean_square(np.asarray(teacher_hidden, np.float64), None if mask is None else np.asarray(mask))
    return value / scale, np.divide(like, scale, out=like, casting="unsafe")


def _mean_square(states: Any, mask: Any) -> Any:
    """The mean of the squares of the rows that count, at least the smallest positive number: states may be zero."""
    counted = states if mask is None else states[mask]
    square = (counted * counted).mean() if math.prod(counted.shape) else 0.0
    return max(float(square), float(np.finfo(np.float32).tiny))
