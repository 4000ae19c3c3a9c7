"""The top-k distillation loss as a torch operator, beside those of `torch_losses`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import _core
from .errors import DtypeError, ShapeError
from .torch_arrays import (
    array,
    check_rows,
    check_shape,
    fake_loss,
    flat,
    flat_labels,
    for_rust,
    tensor_like,
    thread_count,
)
from .torch_formulas import (
    check_on_cpu,
    check_soft_labels,
    computed_dtype,
    counted_rows,
    row_chunks,
    topk_rows_in_torch,
)
from .torch_losses import returns_gradients

if TYPE_CHECKING:
    from .torch_losses import Objective


def topk_loss(
    student: torch.Tensor,
    tokens: torch.Tensor,
    probabilities: torch.Tensor,
    labels: torch.Tensor | None,
    objective: Objective,
    threads: int | None,
) -> torch.Tensor:
    """`tqcompressor.losses.topk_distillation_loss`, for tensors."""
    check_rows("student_logits", student)
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise DtypeError(f"teacher_tokens: expected integers, got {tokens.dtype}")
    width = student.shape[-1]
    if tokens.shape[:-1] != student.shape[:-1] or tokens.dim() != student.dim() or not 1 <= tokens.shape[-1] <= width:
        expected = f"({', '.join(map(str, (*student.shape[:-1], f'1 to {width}')))})"
        raise ShapeError(f"teacher_tokens: expected the shape {expected}, got {tuple(tokens.shape)}")
    check_rows("teacher_probabilities", probabilities)
    check_shape("teacher_probabilities", tokens.shape, probabilities.shape)
    if labels is not None:
        labels = flat_labels(labels, student.shape[:-1])
    wanted = torch.is_grad_enabled() and student.requires_grad
    kept = probabilities.detach().to(computed_dtype(student))
    temperature, divergence, cross_entropy, _, ignore_index = objective
    numbers = (temperature, divergence, cross_entropy, ignore_index, wanted, threads)
    loss: torch.Tensor = _topk_loss(flat(student), flat(tokens).long(), flat(kept), labels, *numbers)[0]
    return loss


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
        objective = (temperature, divergence, cross_entropy)
        value, written = _core.topk_distillation_loss(
            *array(student), *named, targets, *objective, ignore_index, gradient, thread_count(threads)
        )
        return student.new_tensor(value, dtype=torch.float32), tensor_like(written, student)
    counted = counted_rows(student, labels, ignore_index)
    check_soft_labels(student.shape[-1], tokens, probabilities, counted)
    check_on_cpu(student, None, labels, counted)
    by_logits = student.new_empty(student.shape if gradient else 0)
    scale = counted.sum().clamp(min=1).to(computed_dtype(student)).reciprocal()
    loss = student.new_zeros((), dtype=computed_dtype(student))
    weights = (temperature, divergence, cross_entropy, False, ignore_index)
    for rows in row_chunks(student.shape[0], student.shape[1]):
        targets_of_chunk = None if labels is None else labels[rows]
        chunk = (student[rows], tokens[rows], probabilities[rows], targets_of_chunk, counted[rows])
        value_of_chunk, gradient_of_chunk = topk_rows_in_torch(*chunk, weights, gradient)
        loss += value_of_chunk * scale
        if gradient_of_chunk is not None:
            by_logits[rows] = gradient_of_chunk.mul_(scale)
    return loss, by_logits


@_topk_loss.register_fake
def _(student: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return fake_loss(student), student.new_empty(student.shape if arguments[-2] else (0,))


returns_gradients(_topk_loss)
