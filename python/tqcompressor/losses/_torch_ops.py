"""The losses as torch operators: Rust for CPU tensors, the same formulas in torch for other devices and for float64.

An operator computes its gradient along with the value, and keeps it for the backward pass. The public functions, with
their documentation, are in `tqcompressor.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from .. import _core
from ..errors import ConfigError, DtypeError, ShapeError
from ..utils.operators import operator
from ..utils.torch_utils import contiguous_array
from ._arrays import LossWeights, check_rows, check_shape, check_tokens_shape
from ._torch_reference import (
    array,
    check_integers,
    check_on_cpu,
    check_soft_labels,
    computed_dtype,
    counted_rows,
    fake_loss,
    flat,
    flat_labels,
    for_rust,
    row_chunks,
    rows_in_torch,
    thread_count,
    topk_rows_in_torch,
)

if TYPE_CHECKING:
    Context: TypeAlias = Any

# The sum of a loss over some rows, and its gradient by their logits where it is wanted.
RowsLoss: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]

# Logits of student and teacher held at a time. Larger chunks need fewer passes over the gradient by the head.
_LOGITS_BYTES = 40 << 20
_WEIGHTS = "float temperature, float divergence, float cross_entropy, bool reverse, int ignore_index"


def logit_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    weights: LossWeights,
    threads: int | None,
    inplace: bool,
) -> torch.Tensor:
    """`distillation_loss`, `cross_entropy` and `kl_divergence` of `tqcompressor.losses`, for tensors."""
    _check_rows("student_logits", student)
    if teacher is not None:
        _check_rows("teacher_logits", teacher)
        check_shape("teacher_logits", student.shape, teacher.shape)
        teacher = flat(teacher.detach())
    if labels is not None:
        labels = flat_labels(labels, student.shape[:-1])
    wanted = torch.is_grad_enabled() and student.requires_grad
    if inplace and wanted and not torch.compiler.is_compiling():
        return _over_logits(
            student, (teacher, labels), lambda rows: _logits(rows, rows, teacher, labels, weights, threads)
        )
    loss: torch.Tensor = _distillation_loss(flat(student), teacher, labels, *weights, wanted, threads)[0]
    return loss


def hidden_state_loss(
    student: torch.Tensor, teacher: torch.Tensor, kind: str, mask: torch.Tensor | None, threads: int | None
) -> torch.Tensor:
    """`tqcompressor.losses.hidden_state_loss`, for tensors."""
    _check_rows("student_hidden", student)
    _check_rows("teacher_hidden", teacher)
    check_shape("teacher_hidden", student.shape, teacher.shape)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise DtypeError(f"mask: expected booleans, got {mask.dtype}")
        check_shape("mask", student.shape[:-1], mask.shape)
        mask = mask.reshape(-1)
    wanted = torch.is_grad_enabled() and student.requires_grad
    loss: torch.Tensor = _hidden_state_loss(flat(student), flat(teacher.detach()), mask, kind, wanted, threads)[0]
    return loss


def head_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    labels: torch.Tensor | None,
    weights: LossWeights,
    threads: int | None,
) -> torch.Tensor:
    """`tqcompressor.losses.head_distillation_loss`, for tensors."""
    _check_head("student", student_hidden, student_head)
    if teacher_hidden is not None and teacher_head is not None:
        _check_head("teacher", teacher_hidden, teacher_head)
        check_shape("rows of teacher_hidden", student_hidden.shape[:-1], teacher_hidden.shape[:-1])
        check_shape("vocabulary of teacher_head", student_head.shape[:1], teacher_head.shape[:1])
        teacher_hidden, teacher_head = flat(teacher_hidden.detach()), teacher_head.detach()
    if labels is not None:
        labels = flat_labels(labels, student_hidden.shape[:-1])
    wanted = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    arguments = (flat(student_hidden), student_head, teacher_hidden, teacher_head, labels)
    loss: torch.Tensor = _head_loss(*arguments, *weights, wanted, threads)[0]
    return loss


def topk_loss(
    student: torch.Tensor,
    tokens: torch.Tensor,
    probabilities: torch.Tensor,
    labels: torch.Tensor | None,
    weights: LossWeights,
    threads: int | None,
    inplace: bool,
) -> torch.Tensor:
    """`tqcompressor.losses.topk_distillation_loss`, for tensors."""
    _check_rows("student_logits", student)
    check_integers("teacher_tokens", tokens)
    check_tokens_shape(student.shape, tokens.shape)
    _check_rows("teacher_probabilities", probabilities)
    check_shape("teacher_probabilities", tokens.shape, probabilities.shape)
    if labels is not None:
        labels = flat_labels(labels, student.shape[:-1])
    wanted = torch.is_grad_enabled() and student.requires_grad
    named = (flat(tokens).long(), flat(probabilities.detach().to(computed_dtype(student))))
    if inplace and wanted and not torch.compiler.is_compiling():
        return _over_logits(student, (*named, labels), lambda rows: _topk(rows, rows, *named, labels, weights, threads))
    numbers = (weights.temperature, weights.divergence, weights.cross_entropy, weights.ignore_index)
    loss: torch.Tensor = _topk_loss(flat(student), *named, labels, *numbers, wanted, threads)[0]
    return loss


def _check_rows(name: str, rows: torch.Tensor) -> None:
    check_rows(name, str(rows.dtype), rows.shape)


def _check_head(side: str, hidden: torch.Tensor, head: torch.Tensor) -> None:
    _check_rows(f"{side}_hidden", hidden)
    _check_rows(f"{side}_head", head)
    if head.dim() != 2 or head.shape[0] == 0 or head.shape[1] != hidden.shape[-1]:
        expected = f"(vocabulary, {hidden.shape[-1]})"
        raise ShapeError(f"{side}_head: expected the shape {expected}, got {tuple(head.shape)}")


def _over_logits(
    student: torch.Tensor, others: tuple[torch.Tensor | None, ...], loss: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """A loss that writes its gradient over the rows of the student's logits, once nothing speaks against that."""
    expected = "inplace: expected student_logits that may be overwritten, got"
    if not student.is_contiguous():
        raise ConfigError(
            f"{expected} strides {student.stride()} for the shape {tuple(student.shape)}: call .contiguous() first, or "
            "leave inplace out"
        )
    owner = student if student._base is None else student._base
    if owner.is_leaf and owner.requires_grad:
        raise ConfigError(f"{expected} a leaf that requires a gradient, or a view of one: leave inplace out")
    for other in others:
        if other is not None and _overlap(student, other):
            raise ConfigError(f"{expected} memory that they share with another argument: leave inplace out")
    found: torch.Tensor = _OverLogits.apply(student, loss)
    return found


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the memory between the first and the last value of each has a byte in common."""
    if one.device != other.device or one.numel() == 0 or other.numel() == 0:
        return False
    begins, ends = [], []
    for tensor in (one, other):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begins.append(tensor.data_ptr())
        ends.append(tensor.data_ptr() + (last + 1) * tensor.element_size())
    return max(begins) < min(ends)


class _OverLogits(torch.autograd.Function):
    """A loss whose gradient is in the memory of the logits."""

    @staticmethod
    def forward(ctx: Context, student: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        values = student.detach()
        try:
            value = loss(flat(values))
        finally:
            # Whatever keeps the logits for its own backward pass fails there, rather than compute with the gradient.
            torch.autograd.graph.increment_version(student)
        ctx.set_materialize_grads(False)
        # Of the logits themselves, torch would build the graph anew if they are a view.
        ctx.save_for_backward(values)
        ctx.given = False
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, by_value: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        return None if by_value is None else _scale(ctx, ctx.saved_tensors[0], by_value), None


def _mean_in_torch(
    student: torch.Tensor, counted: torch.Tensor, out: torch.Tensor | None, of_rows: Callable[[slice], RowsLoss]
) -> torch.Tensor:
    """The mean of a loss over the counted rows of `student (rows, vocabulary)`, a chunk at a time.

    The gradient is written to `out`, which may be `student`.
    """
    dtype = computed_dtype(student)
    scale = counted.sum().clamp(min=1).to(dtype).reciprocal()
    loss = student.new_zeros((), dtype=dtype)
    for rows in row_chunks(*student.shape):
        value, gradient_of_rows = of_rows(rows)
        loss += value * scale
        if out is not None and gradient_of_rows is not None:
            out[rows] = gradient_of_rows.mul_(scale)
    return loss


# Losses of rows. They return the value, in float32 (float64 for float64), and write the gradient to `out`, which may be
# the student's rows themselves; None where it is not wanted.


def _logits(
    out: torch.Tensor | None,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    weights: LossWeights,
    threads: int | None,
) -> torch.Tensor:
    if for_rust(student, teacher):
        values, dtype, place = _student_arrays(out, student)
        compared = (None, "") if teacher is None else array(teacher)
        targets = contiguous_array(labels)
        arguments = (values, dtype, place, *compared, targets, *weights, None, thread_count(threads))
        return student.new_tensor(_core.distillation_loss(*arguments), dtype=torch.float32)
    counted = counted_rows(student, labels, weights.ignore_index)
    check_on_cpu(student, teacher, labels, counted)

    def of_rows(rows: slice) -> RowsLoss:
        chunk = (student[rows], None if teacher is None else teacher[rows], None if labels is None else labels[rows])
        return rows_in_torch(*chunk, counted[rows], weights, out is not None)

    return _mean_in_torch(student, counted, out, of_rows)


def _topk(
    out: torch.Tensor | None,
    student: torch.Tensor,
    tokens: torch.Tensor,
    probabilities: torch.Tensor,
    labels: torch.Tensor | None,
    weights: LossWeights,
    threads: int | None,
) -> torch.Tensor:
    if for_rust(student, probabilities):
        values, dtype, place = _student_arrays(out, student)
        named = [contiguous_array(tensor) for tensor in (tokens, probabilities, labels)]
        numbers = (weights.temperature, weights.divergence, weights.cross_entropy, weights.ignore_index)
        arguments = (values, dtype, place, *named, *numbers, thread_count(threads))
        return student.new_tensor(_core.topk_distillation_loss(*arguments), dtype=torch.float32)
    counted = counted_rows(student, labels, weights.ignore_index)
    check_soft_labels(student.shape[-1], tokens, probabilities, counted)
    check_on_cpu(student, None, labels, counted)

    def of_rows(rows: slice) -> RowsLoss:
        targets = None if labels is None else labels[rows]
        chunk = (student[rows], tokens[rows], probabilities[rows], targets, counted[rows])
        return topk_rows_in_torch(*chunk, weights, out is not None)

    return _mean_in_torch(student, counted, out, of_rows)


def _student_arrays(out: torch.Tensor | None, student: torch.Tensor) -> tuple[Any, str, Any]:
    """The student's array with its dtype, and that of the gradient: the same one if `out` is the student."""
    values, dtype = array(student)
    if out is None or out is student:
        return values, dtype, None if out is None else values
    return values, dtype, array(out)[0]


def _place(student: torch.Tensor, gradient: bool) -> torch.Tensor | None:
    return student.new_empty(student.shape) if gradient else None


def _or_empty(out: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if out is None else out


# Operators. They return the value, then the gradients, empty unless `gradient`.


def _fake_of_rows(student: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return fake_loss(student), student.new_empty(student.shape if arguments[-2] else (0,))


def _fake_of_head(
    hidden: torch.Tensor, head: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    by_hidden = hidden.new_empty(hidden.shape if arguments[-2] else (0,))
    return fake_loss(hidden), by_hidden, head.new_empty(head.shape if arguments[-2] else (0,))


def _keep_gradients(ctx: Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    # Else torch allocates zeros for the gradients of the gradients, as large as the gradients.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.unused = len(inputs) - len(output) + 1
    ctx.given = False


def _return_gradients(ctx: Context, by_value: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    gradients = [None if by_value is None else _scale(ctx, gradient, by_value) for gradient in ctx.saved_tensors]
    return *gradients, *([None] * ctx.unused)


def _scale(ctx: Context, gradient: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """A kept gradient times the gradient `by` the loss, without a second one in memory where that is possible."""
    # Traced tensors have no value and no backward pass of their own.
    at_hand = type(gradient) is torch.Tensor and type(by) is torch.Tensor and not torch.is_grad_enabled()
    # Usually the loss itself is differentiated. Reading a value from another device would synchronise with it.
    if at_hand and by.device.type == "cpu" and by.item() == 1:
        # An earlier backward pass has returned the same memory.
        ctx.given = True
        # The gradient is an output of the operator: detached, it does not keep the graph alive.
        return gradient.detach()
    if at_hand and not ctx.given and not _graph_is_kept():
        return gradient.detach().mul_(by.to(gradient.device))
    scaled: torch.Tensor = _scaled_gradient(gradient, by)
    return scaled


def _graph_is_kept() -> bool:
    """Whether another backward pass may follow the one that runs. torch has no public name for it."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def _refuse(ctx: Context, by_gradient: torch.Tensor) -> None:
    raise RuntimeError("the losses of tqcompressor are not twice differentiable")


@operator(
    f"distillation_loss(Tensor student, Tensor? teacher, Tensor? labels, {_WEIGHTS}, bool gradient, int? threads)"
    " -> (Tensor, Tensor)",
    _fake_of_rows,
    _return_gradients,
    _keep_gradients,
)
def _distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    temperature: float,
    divergence: float,
    cross_entropy: float,
    reverse: bool,
    ignore_index: int,
    gradient: bool,
    threads: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = LossWeights(temperature, divergence, cross_entropy, reverse, ignore_index)
    out = _place(student, gradient)
    return _logits(out, student, teacher, labels, weights, threads), _or_empty(out, student)


@operator(
    "hidden_state_loss(Tensor student, Tensor teacher, Tensor? mask, str kind, bool gradient, int? threads)"
    " -> (Tensor, Tensor)",
    _fake_of_rows,
    _return_gradients,
    _keep_gradients,
)
def _hidden_state_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    kind: str,
    gradient: bool,
    threads: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if for_rust(student, teacher):
        out = _place(student, gradient)
        values, dtype, place = _student_arrays(out, student)
        arguments = (values, dtype, place, *array(teacher), contiguous_array(mask), kind, thread_count(threads))
        value = _core.hidden_state_loss(*arguments)
        return student.new_tensor(value, dtype=torch.float32), _or_empty(out, student)
    counted = torch.ones_like(student[:, 0], dtype=torch.bool) if mask is None else mask
    check_on_cpu(student, teacher, None, counted, ("student_hidden", "teacher_hidden"))
    s, t = student.to(computed_dtype(student)), teacher.to(computed_dtype(student))
    if kind == "mse":
        losses = (s - t).square().mean(-1)
        by_states = 2 * (s - t) / s.shape[1]
    else:
        inner, squares = (s * t).sum(-1, keepdim=True), s.square().sum(-1, keepdim=True)
        norms = squares.sqrt() * t.square().sum(-1, keepdim=True).sqrt()
        cosine = torch.where(norms > 0, inner / norms, 0.0)
        losses = (1 - cosine).squeeze(-1)
        by_states = torch.where(norms > 0, cosine * s / squares - t / norms, 0.0)
    count = counted.sum().clamp(min=1)
    loss = torch.where(counted, losses, 0.0).sum() / count
    if not gradient:
        return loss, student.new_empty(0)
    return loss, (torch.where(counted[:, None], by_states, 0.0) / count).to(student.dtype)


@operator(
    "head_loss(Tensor hidden, Tensor head, Tensor? teacher_hidden, Tensor? teacher_head, Tensor? labels, "
    f"{_WEIGHTS}, bool gradient, int? threads) -> (Tensor, Tensor, Tensor)",
    _fake_of_head,
    _return_gradients,
    _keep_gradients,
)
def _head_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    labels: torch.Tensor | None,
    temperature: float,
    divergence: float,
    cross_entropy: float,
    reverse: bool,
    ignore_index: int,
    gradient: bool,
    threads: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = LossWeights(temperature, divergence, cross_entropy, reverse, ignore_index)
    if for_rust(hidden, head):
        teacher = (teacher_hidden, teacher_head)
        return _head_loss_on_cpu(hidden, head, *teacher, labels, weights, gradient, thread_count(threads))
    counted = counted_rows(hidden, labels, ignore_index)
    dtype = computed_dtype(hidden)
    scale = counted.sum().clamp(min=1).to(dtype).reciprocal()
    loss = hidden.new_zeros((), dtype=dtype)
    by_hidden = hidden.new_empty(hidden.shape if gradient else 0)
    sums = head.new_zeros(head.shape if gradient else 0, dtype=dtype)
    for rows_of_chunk in row_chunks(hidden.shape[0], head.shape[0]):
        states, targets = hidden[rows_of_chunk], None if labels is None else labels[rows_of_chunk]
        logits, teacher_logits = (states @ head.to(hidden.dtype).T).to(dtype), None
        if teacher_hidden is not None and teacher_head is not None:
            teacher_logits = teacher_hidden[rows_of_chunk] @ teacher_head.to(teacher_hidden.dtype).T
        check_on_cpu(logits, teacher_logits, targets, counted[rows_of_chunk], first=rows_of_chunk.start)
        value_of_chunk, by_logits = rows_in_torch(
            logits, teacher_logits, targets, counted[rows_of_chunk], weights, gradient
        )
        loss += value_of_chunk * scale
        if by_logits is not None:
            by_logits.mul_(scale)
            by_hidden[rows_of_chunk] = (by_logits @ head.to(dtype)).to(hidden.dtype)
            sums += by_logits.T @ states.to(dtype)
    return loss, by_hidden, sums.to(head.dtype)


def _head_loss_on_cpu(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    labels: torch.Tensor | None,
    weights: LossWeights,
    gradient: bool,
    threads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The matrix products by torch's BLAS, and the loss by Rust, a chunk of rows at a time."""
    states, weight = hidden.detach().float(), head.detach().float()
    teacher_parts = None
    if teacher_hidden is not None and teacher_head is not None and weights.divergence > 0:
        teacher_parts = teacher_hidden.float(), teacher_head.float()
    rows, vocabulary = states.shape[0], weight.shape[0]
    counted = rows if labels is None else int((labels != weights.ignore_index).sum())
    models = 1 if teacher_parts is None else 2
    size = max(1, min(rows, _LOGITS_BYTES // (4 * models * vocabulary)))
    buffers = [states.new_empty(size, vocabulary) for _ in range(models)]
    by_hidden = states.new_empty(states.shape if gradient else 0)
    by_head = weight.new_zeros(weight.shape if gradient else 0)
    total = 0.0
    for first in range(0, rows, size):
        chunk = slice(first, min(first + size, rows))
        logits = torch.mm(states[chunk], weight.T, out=buffers[0][: chunk.stop - first])
        teacher_logits = None
        if teacher_parts is not None:
            teacher_logits = torch.mm(
                teacher_parts[0][chunk], teacher_parts[1].T, out=buffers[1][: chunk.stop - first]
            ).numpy()
        targets = None if labels is None else contiguous_array(labels[chunk])
        part = (first, 1 / max(counted, 1))
        values = logits.numpy()
        place = values if gradient else None
        arguments = (values, "float32", place, teacher_logits, "float32", targets, *weights, part, threads)
        total += _core.distillation_loss(*arguments)
        if gradient:
            torch.mm(logits, weight, out=by_hidden[chunk])
            by_head.addmm_(logits.T, states[chunk])
    return hidden.new_tensor(total, dtype=torch.float32), by_hidden.to(hidden.dtype), by_head.to(head.dtype)


@operator(
    "topk_distillation_loss(Tensor student, Tensor tokens, Tensor probabilities, Tensor? labels, float temperature, "
    "float divergence, float cross_entropy, int ignore_index, bool gradient, int? threads) -> (Tensor, Tensor)",
    _fake_of_rows,
    _return_gradients,
    _keep_gradients,
)
def _topk_loss(
    student: torch.Tensor,
    tokens: torch.Tensor,
    probabilities: torch.Tensor,
    labels: torch.Tensor | None,
    temperature: float,
    divergence: float,
    cross_entropy: float,
    ignore_index: int,
    gradient: bool,
    threads: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = LossWeights(temperature, divergence, cross_entropy, ignore_index=ignore_index)
    out = _place(student, gradient)
    return _topk(out, student, tokens, probabilities, labels, weights, threads), _or_empty(out, student)


@operator(
    "scaled_gradient(Tensor gradient, Tensor by) -> Tensor", lambda gradient, by: torch.empty_like(gradient), _refuse
)
def _scaled_gradient(gradient: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return (gradient * by.to(gradient.device)).to(gradient.dtype)
