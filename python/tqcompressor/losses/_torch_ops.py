"""The losses as torch operators: Rust for CPU tensors, the same formulas in torch for other devices and for float64.

An operator computes its gradient along with the value, and keeps it for the backward pass. The public functions, with
their documentation, are in `tqcompressor.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from .. import _core
from ..errors import DtypeError, ShapeError
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
    tensor_like,
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
    kept = probabilities.detach().to(computed_dtype(student))
    arguments = (flat(student), flat(tokens).long(), flat(kept), labels)
    numbers = (weights.temperature, weights.divergence, weights.cross_entropy, weights.ignore_index)
    loss: torch.Tensor = _topk_loss(*arguments, *numbers, wanted, threads)[0]
    return loss


def _check_rows(name: str, rows: torch.Tensor) -> None:
    check_rows(name, str(rows.dtype), rows.shape)


def _check_head(side: str, hidden: torch.Tensor, head: torch.Tensor) -> None:
    _check_rows(f"{side}_hidden", hidden)
    _check_rows(f"{side}_head", head)
    if head.dim() != 2 or head.shape[0] == 0 or head.shape[1] != hidden.shape[-1]:
        expected = f"(vocabulary, {hidden.shape[-1]})"
        raise ShapeError(f"{side}_head: expected the shape {expected}, got {tuple(head.shape)}")


def _mean_in_torch(
    student: torch.Tensor, counted: torch.Tensor, gradient: bool, of_rows: Callable[[slice], RowsLoss]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of a loss over the counted rows of `student (rows, vocabulary)`, and its gradient, a chunk at a time."""
    dtype = computed_dtype(student)
    scale = counted.sum().clamp(min=1).to(dtype).reciprocal()
    loss = student.new_zeros((), dtype=dtype)
    by_logits = student.new_empty(student.shape if gradient else 0)
    for rows in row_chunks(*student.shape):
        value, gradient_of_rows = of_rows(rows)
        loss += value * scale
        if gradient_of_rows is not None:
            by_logits[rows] = gradient_of_rows.mul_(scale)
    return loss, by_logits


# Operators. They return the value, in float32 (float64 for float64), then the gradients, empty unless `gradient`.


@torch.library.custom_op(
    "tqcompressor::distillation_loss",
    mutates_args=(),
    schema=f"(Tensor student, Tensor? teacher, Tensor? labels, {_WEIGHTS}, bool gradient, int? threads)"
    " -> (Tensor, Tensor)",
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
    if for_rust(student, teacher):
        student_array, student_dtype = array(student)
        teacher_array, teacher_dtype = (None, "") if teacher is None else array(teacher)
        targets = None if labels is None else labels.contiguous().numpy()
        arguments = (student_array, student_dtype, teacher_array, teacher_dtype, targets)
        value, written = _core.distillation_loss(*arguments, *weights, gradient, thread_count(threads))
        return student.new_tensor(value, dtype=torch.float32), tensor_like(written, student)
    counted = counted_rows(student, labels, ignore_index)
    check_on_cpu(student, teacher, labels, counted)

    def of_rows(rows: slice) -> RowsLoss:
        chunk = (student[rows], None if teacher is None else teacher[rows], None if labels is None else labels[rows])
        return rows_in_torch(*chunk, counted[rows], weights, gradient)

    return _mean_in_torch(student, counted, gradient, of_rows)


@torch.library.custom_op(
    "tqcompressor::hidden_state_loss",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor? mask, str kind, bool gradient, int? threads) -> (Tensor, Tensor)",
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
        flags = None if mask is None else mask.contiguous().numpy()
        value, written = _core.hidden_state_loss(
            *array(student), *array(teacher), flags, kind, gradient, thread_count(threads)
        )
        return student.new_tensor(value, dtype=torch.float32), tensor_like(written, student)
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


@torch.library.custom_op(
    "tqcompressor::head_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor head, Tensor? teacher_hidden, Tensor? teacher_head, Tensor? labels, "
    f"{_WEIGHTS}, bool gradient, int? threads) -> (Tensor, Tensor, Tensor)",
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
        targets = None if labels is None else labels[chunk].contiguous().numpy()
        total += _core.distillation_loss_in_place(
            logits.numpy(), teacher_logits, targets, *weights, first, 1 / max(counted, 1), gradient, threads
        )
        if gradient:
            torch.mm(logits, weight, out=by_hidden[chunk])
            by_head.addmm_(logits.T, states[chunk])
    return hidden.new_tensor(total, dtype=torch.float32), by_hidden.to(hidden.dtype), by_head.to(head.dtype)


@torch.library.custom_op(
    "tqcompressor::topk_distillation_loss",
    mutates_args=(),
    schema="(Tensor student, Tensor tokens, Tensor probabilities, Tensor? labels, float temperature, float divergence, "
    "float cross_entropy, int ignore_index, bool gradient, int? threads) -> (Tensor, Tensor)",
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
    if for_rust(student, probabilities):
        targets = None if labels is None else labels.contiguous().numpy()
        named = (tokens.contiguous().numpy(), probabilities.contiguous().numpy())
        numbers = (temperature, divergence, cross_entropy)
        value, written = _core.topk_distillation_loss(
            *array(student), *named, targets, *numbers, ignore_index, gradient, thread_count(threads)
        )
        return student.new_tensor(value, dtype=torch.float32), tensor_like(written, student)
    counted = counted_rows(student, labels, ignore_index)
    check_soft_labels(student.shape[-1], tokens, probabilities, counted)
    check_on_cpu(student, None, labels, counted)
    weights = LossWeights(temperature, divergence, cross_entropy, ignore_index=ignore_index)

    def of_rows(rows: slice) -> RowsLoss:
        targets = None if labels is None else labels[rows]
        chunk = (student[rows], tokens[rows], probabilities[rows], targets, counted[rows])
        return topk_rows_in_torch(*chunk, weights, gradient)

    return _mean_in_torch(student, counted, gradient, of_rows)


@torch.library.custom_op(
    "tqcompressor::scaled_gradient", mutates_args=(), schema="(Tensor gradient, Tensor by) -> Tensor"
)
def _scaled_gradient(gradient: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return (gradient * by.to(gradient.device)).to(gradient.dtype)


# Shapes for tracing, and backward passes.


@_distillation_loss.register_fake
def _(student: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return fake_loss(student), student.new_empty(student.shape if arguments[-2] else (0,))


@_hidden_state_loss.register_fake
def _(student: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return fake_loss(student), student.new_empty(student.shape if arguments[-2] else (0,))


@_head_loss.register_fake
def _(hidden: torch.Tensor, head: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wanted = arguments[-2]
    by_hidden = hidden.new_empty(hidden.shape if wanted else (0,))
    return fake_loss(hidden), by_hidden, head.new_empty(head.shape if wanted else (0,))


@_topk_loss.register_fake
def _(student: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return fake_loss(student), student.new_empty(student.shape if arguments[-2] else (0,))


@_scaled_gradient.register_fake
def _(gradient: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gradient)


def _keep_gradients(ctx: Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    # Else torch allocates zeros for the gradients of the gradients, as large as the gradients.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.unused = len(inputs) - len(output) + 1


def _return_gradients(ctx: Context, by_value: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    gradients = [None if by_value is None else _scale(gradient, by_value) for gradient in ctx.saved_tensors]
    return *gradients, *([None] * ctx.unused)


def _scale(gradient: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    # Usually the loss itself is differentiated: `by` is 1, and the product would only allocate a second gradient.
    # Traced tensors have no value, and reading one from another device would synchronise with it.
    at_hand = type(gradient) is torch.Tensor and type(by) is torch.Tensor and by.device.type == "cpu"
    if at_hand and not torch.is_grad_enabled() and by.item() == 1:
        # The gradient is an output of the operator: detached, it does not keep the graph alive.
        return gradient.detach()
    scaled: torch.Tensor = _scaled_gradient(gradient, by)
    return scaled


def _refuse(ctx: Context, by_gradient: torch.Tensor) -> None:
    raise RuntimeError("the losses of tqcompressor are not twice differentiable")


for _operator in (_distillation_loss, _hidden_state_loss, _head_loss, _topk_loss):
    _operator.register_autograd(_return_gradients, setup_context=_keep_gradients)
_scaled_gradient.register_autograd(_refuse)
