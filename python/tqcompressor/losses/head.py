"""The distillation loss fused with the output head: the logits of all rows are never in memory at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..errors import ConfigError
from ..utils import validate
from ..utils.torch_utils import is_tensor
from ._arrays import (
    DistillationOptions,
    HeadOptions,
    check_alpha,
    distillation_weights,
    gradient_place,
    label_rows,
    single_matrix,
)
from .factored_head import dense_head, dense_head_of_arrays, is_factored

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

ValueAndHeadGradients: TypeAlias = tuple[float, tuple[NDArray[np.float32], NDArray[np.float32]]]


@overload
def head_distillation_loss(
    student_hidden: torch.Tensor,
    student_head: Any,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    **options: Unpack[DistillationOptions],
) -> torch.Tensor: ...


@overload
def head_distillation_loss(
    student_hidden: ArrayLike,
    student_head: Any,
    teacher_hidden: ArrayLike | None = None,
    teacher_head: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    **options: Unpack[HeadOptions],
) -> ValueAndHeadGradients: ...


def head_distillation_loss(
    student_hidden: Any,
    student_head: Any,
    teacher_hidden: Any = None,
    teacher_head: Any = None,
    labels: Any = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    threads: int | None = None,
    out: Any = None,
) -> Any:
    """`distillation_loss` of the logits `hidden @ head.T` of student and teacher, computed a chunk of rows at a time.

    Hidden states have shape (..., width), heads (vocabulary, width) as `lm_head.weight`; the teacher's width may
    differ. Without a teacher the loss is the cross-entropy alone, whatever `alpha`. numpy arrays give
    `(value, (gradient by the hidden states, gradient by the head))`, both float32.

    `student_head` may also be a factored head or embedding of any kind; its factors get the gradients. For numpy it may
    be a `KroneckerDecomposition` of the (vocabulary, width) matrix or a tuple (A, B, p, q), and the gradients are
    `(by the hidden states, (by A, by B))`. Blocks of one row take `rank / n2` of a dense head's MACs; for other blocks
    the dense head is formed. For a dense head of arrays, the pair `out` of float32 arrays takes the gradients, whatever
    it holds; neither may share memory with an argument.

    Computed in float32 on the CPU, whatever the dtype. Errors as for `distillation_loss`; a `NonFiniteError` names
    row and column of the logits. Cost: one matrix product for each of student, teacher and gradient, by torch for
    tensors, and for arrays by faer, whose bytes do not depend on the number of threads. Memory beyond the gradients:
    40 MiB of logits at a time, 28 MiB for arrays.

    >>> import numpy as np
    >>> hidden, head = np.ones((4, 2), np.float32), np.zeros((8, 2), np.float32)
    >>> value, (by_hidden, by_head) = head_distillation_loss(hidden, head, labels=[0, 1, 2, 3])
    >>> round(value, 4), by_hidden.shape, by_head.shape
    (2.0794, (4, 2), (8, 2))
    """
    threads = validate.threads(threads)
    check_alpha(alpha)
    if (teacher_hidden is None) != (teacher_head is None):
        raise ConfigError("teacher_hidden and teacher_head: expected both or neither")
    if teacher_hidden is None:
        alpha = 0.0
        if labels is None:
            raise ConfigError("labels: expected them where there is no teacher")
    weights = distillation_weights(temperature, alpha, labels, ignore_index)
    if out is not None and (is_tensor(student_hidden) or is_factored(student_head) or len(out) != 2):
        raise ConfigError("out: expected a pair of arrays, for a dense head of arrays; leave it out for any other")
    if is_tensor(student_hidden):
        from ._torch_ops import head_loss

        if is_factored(student_head):
            student_hidden, student_head = dense_head(student_hidden, student_head)
        return head_loss(student_hidden, student_head, teacher_hidden, teacher_head, labels, weights, threads)
    by_factors = None
    if is_factored(student_head):
        student_hidden, student_head, by_factors = dense_head_of_arrays(student_hidden, student_head)
    shape = np.shape(student_hidden)
    student = (single_matrix(student_hidden, "student_hidden"), single_matrix(student_head, "student_head"))
    teacher = None
    if teacher_hidden is not None:
        teacher = (single_matrix(teacher_hidden, "teacher_hidden"), single_matrix(teacher_head, "teacher_head"))
    rows = None if labels is None else label_rows(labels, shape[:-1])
    read = (*student, *(teacher or ()), rows)
    places = (None, None) if out is None else out
    gradients = (
        gradient_place(places[0], student_hidden, student[0], *read, places[1], name="out[0]")[1],
        gradient_place(places[1], student_head, student[1], *read, name="out[1]")[1],
    )
    value = _core.head_loss(student, teacher, rows, *weights, gradients, threads)
    if out is not None:
        return value, tuple(out)
    return value, (gradients[0].reshape(shape), gradients[1]) if by_factors is None else by_factors(gradients)
