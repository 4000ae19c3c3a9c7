"""The losses in torch, for devices and dtypes that Rust does not serve, and tensors as every loss takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import DtypeError, LabelError, NonFiniteError, ShapeError

_IN_RUST = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def flat(rows: torch.Tensor) -> torch.Tensor:
    """Rows, whatever the shape before the last dimension."""
    return rows.reshape(-1, rows.shape[-1])


def flat_labels(labels: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One label per row of `shape`; raises `DtypeError` and `ShapeError`."""
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise DtypeError(f"labels: expected integers, got {labels.dtype}")
    check_shape("labels", shape, labels.shape)
    return labels.reshape(-1).long()


def check_shape(name: str, expected: torch.Size, got: torch.Size) -> None:
    """Raises `ShapeError` unless the two are equal."""
    if expected != got:
        raise ShapeError(f"{name}: expected the shape {tuple(expected)}, got {tuple(got)}")


def check_rows(name: str, rows: torch.Tensor) -> None:
    """Raises unless these are rows of floats that are not empty."""
    if rows.dtype not in _IN_RUST and rows.dtype != torch.float64:
        raise DtypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {rows.dtype}")
    if rows.dim() == 0 or rows.shape[-1] == 0:
        raise ShapeError(f"{name}: expected the shape (..., at least one), got {tuple(rows.shape)}")


def fake_loss(values: torch.Tensor) -> torch.Tensor:
    """A scalar of the dtype that a loss of these values has."""
    return values.new_empty((), dtype=computed_dtype(values))


def for_rust(*tensors: torch.Tensor | None) -> bool:
    """Whether Rust computes on these."""
    return all(tensor is None or (tensor.device.type == "cpu" and tensor.dtype in _IN_RUST) for tensor in tensors)


def thread_count(threads: int | None) -> int:
    """As many as torch may use, unless said otherwise."""
    return torch.get_num_threads() if threads is None else threads


def array(tensor: torch.Tensor) -> tuple[Any, str]:
    """The tensor's memory as float32 or as bits, and the name of its dtype."""
    tensor = tensor.detach().contiguous()
    bits = tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)
    return bits.numpy(), _IN_RUST[tensor.dtype]


def tensor_like(gradient: Any, like: torch.Tensor) -> torch.Tensor:
    """A gradient from Rust in the dtype of `like`; an empty tensor for none."""
    if gradient is None:
        return like.new_empty(0)
    tensor = torch.from_numpy(gradient)
    return tensor if like.dtype == torch.float32 else tensor.view(like.dtype)


# Logits worked on at a time.
_CHUNK = 1 << 24


def computed_dtype(values: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows of so many values, such that what is computed from each takes little memory."""
    step = max(1, _CHUNK // width)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def counted_rows(rows: torch.Tensor, labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """Which rows count, as booleans."""
    if labels is None:
        return torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    return labels != ignore_index


def check_on_cpu(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    counted: torch.Tensor,
    names: tuple[str, str] = ("student_logits", "teacher_logits"),
    first: int = 0,
) -> None:
    """Refuses what Rust refuses; elsewhere than on the CPU, looking would mean waiting for the device.

    `first` is the number of the first of these rows in the whole batch, which errors name.
    """
    if student.device.type != "cpu":
        return
    width = student.shape[-1]
    if labels is not None and (wrong := counted & ((labels < 0) | (labels >= width))).any():
        row = int(wrong.nonzero()[0])
        raise LabelError(
            f"labels: expected 0 to {width - 1}, or the ignored index, got {int(labels[row])} at row {first + row}"
        )
    for name, values in zip(names, (student, teacher), strict=True):
        if values is not None and (bad := counted[:, None] & ~values.isfinite()).any():
            row, column = bad.nonzero()[0].tolist()
            value = values[row, column].item()
            raise NonFiniteError(f"{name}: expected finite values, got {value} at row {first + row}, column {column}")


def rows_in_torch(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    counted: torch.Tensor,
    objective: tuple[float, float, float, bool, int],
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum of the rows' losses, and its gradient by the logits.

    `objective` is (temperature, weight of the divergence, weight of the cross-entropy, reverse, ignored index).
    """
    temperature, divergence, cross_entropy, reverse, _ = objective
    z = student.to(computed_dtype(student))
    losses, by_logits = z.new_zeros(z.shape[0]), torch.zeros_like(z) if gradient else None
    if teacher is not None and divergence > 0:
        log_q = (z / temperature).log_softmax(-1)
        log_p = (teacher.to(z.dtype) / temperature).log_softmax(-1)
        difference = log_q - log_p if reverse else log_p - log_q
        q, first = log_q.exp(), log_q.exp() if reverse else log_p.exp()
        divergences = (first * difference).sum(-1, keepdim=True).clamp(min=0)
        losses += divergence * divergences.squeeze(-1)
        if by_logits is not None:
            by_divergence = q * (difference - divergences) if reverse else q - first
            by_logits += (divergence / temperature) * by_divergence
    return _with_cross_entropy(z, losses, by_logits, labels, counted, cross_entropy)


def _with_cross_entropy(
    z: torch.Tensor,
    losses: torch.Tensor,
    by_logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    counted: torch.Tensor,
    cross_entropy: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if labels is not None and cross_entropy > 0:
        log_s = z.log_softmax(-1)
        targets = torch.where(counted, labels, 0)[:, None]
        losses -= cross_entropy * log_s.gather(-1, targets).squeeze(-1)
        if by_logits is not None:
            by_logits += cross_entropy * log_s.exp()
            by_logits.scatter_add_(-1, targets, torch.full_like(targets, -cross_entropy, dtype=z.dtype))
    if by_logits is not None:
        # The entries sum to zero, and at the largest logit that is more exact than a difference of two near 1.
        largest = z.argmax(-1, keepdim=True)
        by_logits.scatter_(-1, largest, 0.0)
        by_logits.scatter_(-1, largest, -by_logits.sum(-1, keepdim=True))
        by_logits = torch.where(counted[:, None], by_logits, 0.0)
    return torch.where(counted, losses, 0.0).sum(), by_logits


def topk_rows_in_torch(
    student: torch.Tensor,
    tokens: torch.Tensor,
    probabilities: torch.Tensor,
    labels: torch.Tensor | None,
    counted: torch.Tensor,
    objective: tuple[float, float, float, bool, int],
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same against the `tokens` that a teacher finds likeliest, all others taken as one."""
    temperature, divergence, cross_entropy, _, _ = objective
    z = student.to(computed_dtype(student))
    losses, by_logits = z.new_zeros(z.shape[0]), torch.zeros_like(z) if gradient else None
    if divergence > 0:
        # Rows that do not count may name anything.
        tokens = torch.where(counted[:, None], tokens, 0)
        p = probabilities.to(z.dtype)
        sums = p.sum(-1, keepdim=True)
        whole = tokens.shape[1] == z.shape[1]
        p = p / (sums if whole else sums.clamp(min=1))
        p_tail = torch.zeros_like(sums) if whole else (1 - sums).clamp(min=0)
        log_q = (z / temperature).log_softmax(-1)
        others = log_q.scatter(-1, tokens, -torch.inf)
        log_q_tail = others.logsumexp(-1, keepdim=True)
        terms = torch.xlogy(p, p) - p * log_q.gather(-1, tokens)
        tail = torch.where(p_tail > 0, torch.xlogy(p_tail, p_tail) - p_tail * log_q_tail, 0.0)
        losses += divergence * (terms.sum(-1) + tail.squeeze(-1)).clamp(min=0)
        if by_logits is not None:
            in_tail = torch.where(others == -torch.inf, 0.0, (others - log_q_tail).exp() * (log_q_tail.exp() - p_tail))
            by_divergence = in_tail.scatter(-1, tokens, log_q.gather(-1, tokens).exp() - p)
            by_logits += (divergence / temperature) * by_divergence
    return _with_cross_entropy(z, losses, by_logits, labels, counted, cross_entropy)


def check_soft_labels(width: int, tokens: torch.Tensor, probabilities: torch.Tensor, counted: torch.Tensor) -> None:
    """Refuses what Rust refuses of a teacher's tokens and probabilities; on the CPU only, as `check_on_cpu`."""
    if tokens.device.type != "cpu" or tokens.shape[0] == 0:
        return
    order = tokens.sort(-1).values
    sums = probabilities.double().sum(-1)
    whole = tokens.shape[-1] == width
    problems = {
        f"teacher_tokens: expected 0 to {width - 1}, got another": ((tokens < 0) | (tokens >= width)).any(-1),
        "teacher_tokens: expected distinct tokens, got one twice": (order[:, 1:] == order[:, :-1]).any(-1),
        "teacher_probabilities: expected numbers from 0 to 1, got another": ~(probabilities >= 0).all(-1),
        "teacher_probabilities: expected a sum of at most 1, got more": sums > 1.001,
        "teacher_probabilities of the whole vocabulary: expected a sum of 1, got less": (sums < 0.999) & whole,
    }
    for problem, rows in problems.items():
        if (rows & counted).any():
            raise LabelError(f"{problem} at row {int((rows & counted).nonzero()[0])}")
