"""Losses of logits: cross-entropy, Kullback-Leibler divergence, and their weighted sum for distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..utils import validate
from ..utils.torch_utils import is_tensor
from ._arrays import (
    ArrayOptions,
    LossWeights,
    TensorOptions,
    check_place,
    check_shape,
    check_temperature,
    distillation_weights,
    float_matrix,
    gradient_like,
    gradient_place,
    label_rows,
    mask_rows,
)

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

ValueAndGradient: TypeAlias = tuple[float, NDArray[Any]]


@overload
def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    **options: Unpack[TensorOptions],
) -> torch.Tensor: ...


@overload
def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike | None = None,
    **options: Unpack[ArrayOptions],
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
    inplace: bool = False,
    out: Any = None,
) -> Any:
    """`alpha·T²·KL(teacher ‖ student at T) + (1 − alpha)·CE(labels)`, the mean over the rows that count.

    With `p` and `q` the softmax of the teacher's and the student's logits divided by the temperature `T`, a row's
    gradient by its logits is `alpha·T·(q − p) + (1 − alpha)·(softmax(student) − onehot(label))`.

    Logits have shape (..., vocabulary) and labels (...). For a causal model, shift the labels by one position first.
    Rows whose label is `ignore_index` do not count: they are not read, and their gradient is exactly zero. If no row
    counts, or there is none, the loss is 0. Without labels every row counts and the second term is left out.

    The gradient has the student's shape and dtype. float32, float16 and bfloat16 are computed in float32 with float64
    sums; numpy float64 is rounded to float32 first (torch float64 is not). float16 gradients below 6e-8
    underflow: scale the loss on float32 logits. The result does not depend on `threads` (None: all cores, or as many as
    torch may use). Torch: CPU tensors are computed by Rust, those of other devices (and float64) by the same formula in
    torch. Works under `torch.compile(fullgraph=True)`; not twice differentiable.

    The gradient needs as much memory as the logits, and to map it may take longer than the loss. Tensors: with
    `inplace=True` it is written over the student's logits where a gradient is wanted, for logits whose values are not
    needed again, such as the output of a linear layer. Read after that, they are the gradient; an operation that has
    kept them fails in its backward pass, with torch's error of a modified variable. Under `torch.compile`, whose graphs
    manage their memory, they keep their values. Arrays: `out`, an array of the gradient's shape and dtype, takes the
    gradient and is returned; it may be the student's logits. The gradient has the same bits wherever it is written.
    Logits that cannot be overwritten (strided, read-only, a leaf or a view of one, memory shared with another argument)
    and an `out` that does not fit are refused with nothing changed. After a `NonFiniteError` or an interruption,
    some rows hold their gradient already.

    Raises `ShapeError`, `DtypeError`, `LabelError`, `ConfigError` (temperature not in 1e-4 to 1e4, alpha not in 0 to 1)
    and `NonFiniteError`, naming row and column, for NaN or an infinity in a row that counts; tensors of other devices
    than the CPU are not searched for these, nor for wrong labels. Logits of ±1e4 are fine.

    Cost: one pass; two exponentials per logit at temperatures 1 and 2, else three. Memory beyond the gradient: a few
    rows per thread. The backward pass copies nothing, unless the graph is kept and the loss is scaled.
    Source: Hinton, Vinyals and Dean, arXiv 1503.02531.

    >>> import numpy as np
    >>> logits = np.random.default_rng(0).standard_normal((2, 4, 50)).astype(np.float32)
    >>> value, gradient = distillation_loss(logits, logits, temperature=3.0)
    >>> value == 0, gradient.shape, bool(abs(gradient).max() < 1e-7)
    (True, (2, 4, 50), True)
    >>> distillation_loss(logits, logits + 1, out=logits)[1] is logits
    True
    """
    weights = distillation_weights(temperature, alpha, labels, ignore_index)
    return _logit_loss(student_logits, teacher_logits, labels, weights, threads, inplace, out)


@overload
def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    threads: int | None = None,
    inplace: bool = False,
) -> torch.Tensor: ...


@overload
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    ignore_index: int = -100,
    threads: int | None = None,
    out: NDArray[Any] | None = None,
) -> ValueAndGradient: ...


def cross_entropy(
    logits: Any,
    labels: Any,
    *,
    ignore_index: int = -100,
    threads: int | None = None,
    inplace: bool = False,
    out: Any = None,
) -> Any:
    """`−ln softmax(logits)[label]`, the mean over the rows whose label is not `ignore_index`.

    Unlike torch's, the loss is 0 and not NaN if no row counts. Shapes, dtypes, errors, the place of the gradient and
    cost as for `distillation_loss`.

    >>> import numpy as np
    >>> round(cross_entropy(np.zeros((3, 8)), [1, 2, 3])[0], 4)  # ln 8
    2.0794
    """
    weights = LossWeights(1.0, 0.0, 1.0, ignore_index=ignore_index)
    return _logit_loss(logits, None, labels, weights, threads, inplace, out)


@overload
def kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    mask: torch.Tensor | None = None,
    threads: int | None = None,
    inplace: bool = False,
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
    out: NDArray[Any] | None = None,
) -> ValueAndGradient: ...


def kl_divergence(
    student_logits: Any,
    teacher_logits: Any,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    mask: Any = None,
    threads: int | None = None,
    inplace: bool = False,
    out: Any = None,
) -> Any:
    """`KL(p ‖ q)`, the mean over the rows where `mask` (...) is true; `KL(q ‖ p)` if `reverse`.

    `p` and `q` are the softmax of the teacher's and the student's logits divided by the temperature. There is no factor
    `T²` here. The reverse divergence asks the student to avoid what the teacher finds unlikely, rather than to cover
    what it finds likely. Shapes, dtypes, errors, the place of the gradient and cost as for `distillation_loss`.

    >>> import numpy as np
    >>> p = np.array([[0.5, 0.25, 0.25]])
    >>> round(kl_divergence(np.zeros((1, 3)), np.log(p))[0], 4)  # ln 3 minus the entropy of p
    0.0589
    """
    check_temperature(temperature)
    # A mask becomes labels for a cross-entropy of weight 0: 0 counts, -1 is ignored.
    labels = None
    if mask is not None:
        if is_tensor(student_logits):
            labels = mask.logical_not().long().neg()
        else:
            flags = mask_rows(mask, np.shape(student_logits)[:-1])
            labels = np.where(flags, 0, -1).reshape(np.shape(mask))
    weights = LossWeights(float(temperature), 1.0, 0.0, reverse, ignore_index=-1)
    return _logit_loss(student_logits, teacher_logits, labels, weights, threads, inplace, out)


def _logit_loss(
    student: Any, teacher: Any, labels: Any, weights: LossWeights, threads: int | None, inplace: bool, out: Any
) -> Any:
    threads = validate.threads(threads)
    check_place(is_tensor(student), inplace, out)
    if is_tensor(student):
        from ._torch_ops import logit_loss

        return logit_loss(student, teacher, labels, weights, threads, inplace)
    student_matrix, student_dtype = float_matrix(student, "student_logits")
    shape = np.shape(student)
    teacher_matrix, teacher_dtype = None, ""
    if teacher is not None:
        teacher_matrix, teacher_dtype = float_matrix(teacher, "teacher_logits")
        check_shape("teacher_logits", shape, np.shape(teacher))
    rows = None if labels is None else label_rows(labels, shape[:-1])
    student_matrix, gradient = gradient_place(out, student, student_matrix, teacher_matrix, rows)
    value = _core.distillation_loss(
        student_matrix, student_dtype, gradient, teacher_matrix, teacher_dtype, rows, *weights, None, threads
    )
    return value, gradient_like(gradient, student, out)
