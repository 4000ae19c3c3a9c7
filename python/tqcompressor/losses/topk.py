"""The distillation loss against a teacher of whom only the likeliest tokens were kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..errors import ConfigError, DtypeError, ShapeError
from ..utils import validate
from ._arrays import check_shapes, checked_objective, float_matrix, gradient_like, is_tensor, label_rows, single_matrix

if TYPE_CHECKING:
    import torch


@overload
def topk_distillation_loss(
    student_logits: torch.Tensor,
    teacher_tokens: torch.Tensor,
    teacher_probabilities: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    threads: int | None = None,
) -> torch.Tensor: ...


@overload
def topk_distillation_loss(
    student_logits: ArrayLike,
    teacher_tokens: ArrayLike,
    teacher_probabilities: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    threads: int | None = None,
) -> tuple[float, NDArray[Any]]: ...


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
) -> Any:
    """`distillation_loss` against a teacher of whom k tokens per row were kept, all others taken as one.

    `alpha·T²·(Σ p·ln(p/q) + p_tail·ln(p_tail/q_tail)) + (1 − alpha)·CE`, the mean over the rows that count, where `p`
    is the teacher's softmax at the temperature on its k tokens, `q` the student's there, and the tails are what both
    lack to 1. The gradient of the first term by the logits is `alpha·T·(q − p)` on the k tokens and
    `alpha·T·q·(1 − p_tail/q_tail)` on the others. With all tokens of the vocabulary this is `distillation_loss`.

    `teacher_tokens` (..., k) are integers, distinct within a row, `teacher_probabilities` (..., k) floats, taken as
    float32; the temperature must be that at which they were made. A sum above 1, as of probabilities kept in half
    precision, is divided away; above 1.001 it is an error. Other shapes, dtypes and errors as for `distillation_loss`;
    moreover `LabelError` for tokens that are not in the vocabulary or come twice, and for probabilities that are
    negative, NaN, or sum to too much (of the whole vocabulary also to too little), in a row that counts. Tensors of
    other devices than the CPU are not searched for these.

    Cost: that of `cross_entropy` at a temperature, one pass, and two float64 exponentials per token of the teacher.

    >>> import numpy as np
    >>> tokens, probabilities = np.array([[3, 1]]), np.array([[0.6, 0.2]])
    >>> student = np.log(np.array([[0.1, 0.2, 0.1, 0.6]]))
    >>> value, gradient = topk_distillation_loss(student, tokens, probabilities, temperature=1.0, alpha=1.0)
    >>> round(value, 6), gradient.shape, bool(abs(gradient).max() < 1e-6)
    (0.0, (1, 4), True)
    """
    threads = validate.threads(threads)
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: expected a number from 0 to 1, got {alpha}")
    hard = 0.0 if labels is None else 1 - alpha
    objective = checked_objective(temperature, alpha * temperature**2, hard, False, ignore_index)
    if is_tensor(student_logits):
        from ._torch_ops import topk_loss

        return topk_loss(student_logits, teacher_tokens, teacher_probabilities, labels, objective, threads)
    student, dtype = float_matrix(student_logits, "student_logits")
    shape = np.shape(student_logits)
    tokens = np.asarray(teacher_tokens)
    if tokens.dtype.kind not in "iu":
        raise DtypeError(f"teacher_tokens: expected integers, got {tokens.dtype}")
    if tokens.shape[:-1] != shape[:-1] or tokens.ndim != len(shape) or not 1 <= tokens.shape[-1] <= shape[-1]:
        expected = f"({', '.join(map(str, (*shape[:-1], f'1 to {shape[-1]}')))})"
        raise ShapeError(f"teacher_tokens: expected the shape {expected}, got {tokens.shape}")
    probabilities = single_matrix(teacher_probabilities, "teacher_probabilities")
    check_shapes("teacher_probabilities", tokens.shape, np.shape(teacher_probabilities))
    rows = None if labels is None else label_rows(labels, shape[:-1])
    tokens = np.ascontiguousarray(tokens, dtype=np.int64).reshape(-1, tokens.shape[-1])
    value, gradient = _core.topk_distillation_loss(
        student,
        dtype,
        tokens,
        probabilities,
        rows,
        objective.temperature,
        objective.divergence,
        objective.cross_entropy,
        ignore_index,
        True,
        threads,
    )
    return value, gradient_like(gradient, student_logits)
