"""The distillation loss against the k most probable tokens of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike

from .. import _core
from ..errors import DtypeError
from ..utils import validate
from ..utils.torch_utils import is_tensor
from ._arrays import (
    ArrayOptions,
    TensorOptions,
    check_place,
    check_shape,
    check_tokens_shape,
    distillation_weights,
    float_matrix,
    gradient_like,
    gradient_place,
    label_rows,
    single_matrix,
)
from .logits import ValueAndGradient

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack


@overload
def topk_distillation_loss(
    student_logits: torch.Tensor,
    teacher_tokens: torch.Tensor,
    teacher_probabilities: torch.Tensor,
    labels: torch.Tensor | None = None,
    **options: Unpack[TensorOptions],
) -> torch.Tensor: ...


@overload
def topk_distillation_loss(
    student_logits: ArrayLike,
    teacher_tokens: ArrayLike,
    teacher_probabilities: ArrayLike,
    labels: ArrayLike | None = None,
    **options: Unpack[ArrayOptions],
) -> ValueAndGradient: ...


def topk_distillation_loss(
    student_logits: Any,
    teacher_tokens: Any,
    teacher_probabilities: Any,
    labels: Any = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    threads: int | None = None,
    inplace: bool = False,
    out: Any = None,
) -> Any:
    """`distillation_loss` against k tokens of the teacher per row; all other tokens count as one, the tail.

    `alpha·T²·(Σ p·ln(p/q) + p_tail·ln(p_tail/q_tail)) + (1 − alpha)·CE`, the mean over the rows that count, where `p`
    is the teacher's softmax at the temperature on its k tokens, `q` the student's on the same tokens, and the tails are
    `1 − Σ p` and `1 − Σ q`. The gradient of the first term by the logits is `alpha·T·(q − p)` on the k tokens and
    `alpha·T·q·(1 − p_tail/q_tail)` on the others. With all tokens of the vocabulary this is `distillation_loss`.

    `teacher_tokens` (..., k) are integers, distinct within a row. `teacher_probabilities` (..., k) are floats, taken as
    float32, made at the same temperature. A row whose sum is above 1, as in half precision, is normalised; a sum above
    1.001 is an error. Other shapes, dtypes, errors and the place of the gradient are those of `distillation_loss`.
    `LabelError` also for tokens outside the vocabulary, for duplicate tokens, and for probabilities that are negative,
    NaN or of a wrong sum (for the whole vocabulary, below 0.999 too), in rows that count. Tensors of other devices are
    not searched for these.

    Cost: that of `cross_entropy` at a temperature, one pass, and two float64 exponentials per teacher token.

    >>> import numpy as np
    >>> tokens, probabilities = np.array([[3, 1]]), np.array([[0.6, 0.2]])
    >>> student = np.log(np.array([[0.1, 0.2, 0.1, 0.6]]))
    >>> value, gradient = topk_distillation_loss(student, tokens, probabilities, temperature=1.0, alpha=1.0)
    >>> round(value, 6), gradient.shape, bool(abs(gradient).max() < 1e-6)
    (0.0, (1, 4), True)
    """
    threads = validate.threads(threads)
    weights = distillation_weights(temperature, alpha, labels, ignore_index)
    check_place(is_tensor(student_logits), inplace, out)
    if is_tensor(student_logits):
        from ._torch_ops import topk_loss

        return topk_loss(student_logits, teacher_tokens, teacher_probabilities, labels, weights, threads, inplace)
    student, dtype = float_matrix(student_logits, "student_logits")
    shape = np.shape(student_logits)
    tokens = validate.array("teacher_tokens", teacher_tokens)
    if tokens.dtype.kind not in "iu":
        raise DtypeError(f"teacher_tokens: expected integers, got {tokens.dtype}")
    check_tokens_shape(shape, tokens.shape)
    probabilities = single_matrix(teacher_probabilities, "teacher_probabilities")
    check_shape("teacher_probabilities", tokens.shape, np.shape(teacher_probabilities))
    rows = None if labels is None else label_rows(labels, shape[:-1])
    tokens = np.ascontiguousarray(tokens, dtype=np.int64).reshape(-1, tokens.shape[-1])
    student, gradient = gradient_place(out, student_logits, student, tokens, probabilities, rows)
    value = _core.topk_distillation_loss(
        student,
        dtype,
        gradient,
        tokens,
        probabilities,
        rows,
        weights.temperature,
        weights.divergence,
        weights.cross_entropy,
        weights.ignore_index,
        threads,
    )
    return value, gradient_like(gradient, student_logits, out)
