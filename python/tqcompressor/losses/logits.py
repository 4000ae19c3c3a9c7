"""Losses of distillation, computed in Rust together with their gradients: for numpy arrays and for torch tensors.

Given numpy arrays, a function returns `(value, gradient)`; given torch tensors, a differentiable scalar. The teacher's
side gets no gradient. Logits are computed in one fused pass: softmax, loss and gradient of a row while it is in cache.

>>> import numpy as np
>>> student = np.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=np.float32)
>>> value, gradient = cross_entropy(student, np.array([0, -100]))
>>> round(value, 4), gradient.shape, gradient[1].any()
(0.1698, (2, 3), np.False_)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..errors import ConfigError
from ..utils import validate
from ._arrays import (
    Objective,
    check_shapes,
    checked_objective,
    float_matrix,
    gradient_like,
    is_tensor,
    label_rows,
    mask_rows,
)

if TYPE_CHECKING:
    import torch


ValueAndGradient: TypeAlias = tuple[float, NDArray[Any]]


@overload
def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    threads: int | None = None,
) -> torch.Tensor: ...


@overload
def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    threads: int | None = None,
) -> ValueAndGradient: ...


def distillation_loss(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    threads: int | None = None,
) -> Any:
    """`alpha·T²·KL(teacher ‖ student at T) + (1 − alpha)·CE(labels)`, the mean over the rows that count.

    With `p` and `q` the softmax of the teacher's and the student's logits divided by the temperature `T`, a row's
    gradient by its logits is `alpha·T·(q − p) + (1 − alpha)·(softmax(student) − onehot(label))`.

    Logits have shape (..., vocabulary), labels (...); shift them against each other beforehand, as a causal model asks.
    Rows whose label is `ignore_index` do not count: they are not read, and their gradient is exactly zero. If no row
    counts, or there is none, the loss is 0. Without labels every row counts and the second term is left out.

    The gradient has the student's shape and dtype. float32, float16 and bfloat16 are computed in float32 with float64
    sums; numpy float64 is rounded to float32 first (torch float64 is not). In float16 gradients below 6e-8 vanish: give
    float32 logits where the loss is scaled. The result does not depend on `threads` (None: all cores, or as many as
    torch may use). Torch: CPU tensors are computed by Rust, those of other devices (and float64) by the same formula in
    torch. Works under `torch.compile(fullgraph=True)`; not twice differentiable.

    Raises `ShapeError`, `DtypeError`, `LabelError`, `ConfigError` (temperature not in 1e-4 to 1e4, alpha not in 0 to 1)
    and `NonFiniteError`, naming row and column, for NaN or an infinity in a row that counts; tensors of other devices
    than the CPU are not searched for these, nor for wrong labels. Logits of ±1e4 are fine.

    Cost: one pass; two exponentials per logit at temperatures 1 and 2, else three. Memory beyond the gradient: a few
    rows per thread. Source: Hinton, Vinyals and Dean, arXiv 1503.02531.

    >>> import numpy as np
    >>> logits = np.random.default_rng(0).standard_normal((2, 4, 50)).astype(np.float32)
    >>> value, gradient = distillation_loss(logits, logits, temperature=3.0)
    >>> value == 0, gradient.shape, bool(abs(gradient).max() < 1e-7)
    (True, (2, 4, 50), True)
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: expected a number from 0 to 1, got {alpha}")
    hard = 0.0 if labels is None else 1 - alpha
    objective = checked_objective(temperature, alpha * temperature**2, hard, False, ignore_index)
    return _logit_loss(student_logits, teacher_logits, labels, objective, threads)


@overload
def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100, threads: int | None = None
) -> torch.Tensor: ...


@overload
def cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, ignore_index: int = -100, threads: int | None = None
) -> ValueAndGradient: ...


def cross_entropy(logits: Any, labels: Any, *, ignore_index: int = -100, threads: int | None = None) -> Any:
    """`−ln softmax(logits)[label]`, the mean over the rows whose label is not `ignore_index`.

    Unlike torch's, the loss is 0 and not NaN if no row counts. Shapes, dtypes, errors and cost as for
    `distillation_loss`.

    >>> import numpy as np
    >>> round(cross_entropy(np.zeros((3, 8)), [1, 2, 3])[0], 4)  # ln 8
    2.0794
    """
    return _logit_loss(logits, None, labels, checked_objective(1.0, 0.0, 1.0, False, ignore_index), threads)


@overload
def kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    mask: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor: ...


@overload
def kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    mask: ArrayLike | None = None,
    threads: int | None = None,
) -> ValueAndGradient: ...


def kl_divergence(
    student_logits: Any,
    teacher_logits: Any,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    mask: Any = None,
    threads: int | None = None,
) -> Any:
    """`KL(p ‖ q)`, the mean over the rows where `mask` (...) is true; `KL(q ‖ p)` if `reverse`.

    `p` and `q` are the softmax of the teacher's and the student's logits divided by the temperature. There is no factor
    `T²` here. The reverse divergence asks the student to avoid what the teacher finds unlikely, rather than to cover
    what it finds likely. Shapes, dtypes, errors and cost as for `distillation_loss`.

    >>> import numpy as np
    >>> p = np.array([[0.5, 0.25, 0.25]])
    >>> round(kl_divergence(np.zeros((1, 3)), np.log(p))[0], 4)  # ln 3 minus the entropy of p
    0.0589
    """
    # A mask is a row of labels that no cross-entropy looks at.
    labels = None
    if mask is not None:
        if is_tensor(student_logits):
            labels = mask.logical_not().long().neg()
        else:
            flags = mask_rows(mask, np.shape(student_logits)[:-1])
            labels = np.where(flags, 0, -1).reshape(np.shape(mask))
    return _logit_loss(
        student_logits, teacher_logits, labels, checked_objective(temperature, 1.0, 0.0, reverse, -1), threads
    )


def _logit_loss(student: Any, teacher: Any, labels: Any, objective: Objective, threads: int | None) -> Any:
    threads = validate.threads(threads)
    if is_tensor(student):
        from ._torch_ops import logit_loss

        return logit_loss(student, teacher, labels, objective, threads)
    student_matrix, student_dtype = float_matrix(student, "student_logits")
    shape = np.shape(student)
    teacher_matrix, teacher_dtype = None, ""
    if teacher is not None:
        teacher_matrix, teacher_dtype = float_matrix(teacher, "teacher_logits")
        check_shapes("teacher_logits", shape, np.shape(teacher))
    rows = None if labels is None else label_rows(labels, shape[:-1])
    value, gradient = _core.distillation_loss(
        student_matrix, student_dtype, teacher_matrix, teacher_dtype, rows, *objective, True, threads
    )
    return value, gradient_like(gradient, student)
