"""The losses by the same formulas in torch, for devices and dtypes that Rust does not compute; checks of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import DtypeError, LabelError, NonFiniteError
from ._arrays import LossWeights, check_shape

_IN_RUST = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def flat(rows: torch.Tensor) -> torch.Tensor:
    """`(..., width)` as a matrix of rows."""
    return rows.reshape(-1, rows.shape[-1])


def flat_labels(labels: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One label per row of `shape`; raises `DtypeError` and `ShapeError`."""
    check_integers("labels", labels)
    check_shape("labels", shape, labels.shape)
    return labels.reshape(-1).long()


def check_integers(name: str, values: torch.Tensor) -> None:
    """Raises `DtypeError` unless these are integers."""
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise DtypeError(f"{name}: expected integers, got {values.dtype}")


def fake_loss(values: torch.Tensor) -> torch.Tensor:
    """A scalar without a value, in the dtype of the loss of these values."""
    return values.new_empty((), dtype=computed_dtype(values))


def for_rust(*tensors: torch.Tensor | None) -> bool:
    """Whether Rust computes these: CPU tensors of float32 or a half precision."""
    return all(tensor is None or (tensor.device.type == "cpu" and tensor.dtype in _IN_RUST) for tensor in tensors)


def thread_count(threads: int | None) -> int:
    """`threads`, by default as many as torch uses."""
    return torch.get_num_threads() if threads is None else threads


def array(tensor: torch.Tensor) -> tuple[Any, str]:
    """The tensor's memory as float32, or as the bits of a half precision, and the name of its dtype."""
    tensor = tensor.detach().contiguous()
    bits = tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)
    return bits.numpy(), _IN_RUST[tensor.dtype]


# Logits computed at a time: bounds the memory of the intermediate tensors.
_CHUNK = 1 << 24


def computed_dtype(values: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` values, at most `_CHUNK` values each."""
    step = max(1, _CHUNK // width)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def counted_rows(rows: torch.Tensor, labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """True for every row that counts."""
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
    """Raises as Rust does for wrong labels and values that are not finite.

    Tensors of other devices are not searched, since reading a value would synchronise with the device. `first` is the
    number of the first row in the whole batch, for the error message.
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
    weights: LossWeights,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum of the rows' losses, and its gradient by the logits."""
    temperature, divergence, reverse = weights.temperature, weights.divergence, weights.reverse
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
    return _with_cross_entropy(z, losses, by_logits, labels, counted, weights.cross_entropy)


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
        # The entries of a row sum to zero. At the largest logit, minus the sum of the others is more exact than a
        # difference of two numbers near 1.
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
    weights: LossWeights,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `rows_in_torch`, against the teacher's k most probable `tokens`; all others count as one token."""
    temperature, divergence = weights.temperature, weights.divergence
    z = student.to(computed_dtype(student))
    losses, by_logits = z.new_zeros(z.shape[0]), torch.zeros_like(z) if gradient else None
    if divergence > 0:
        # Rows that do not count may hold invalid tokens.
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
    return _with_cross_entropy(z, losses, by_logits, labels, counted, weights.cross_entropy)


def check_soft_labels(width: int, tokens: torch.Tensor, probabilities: torch.Tensor, counted: torch.Tensor) -> None:
    """Raises as Rust does for a teacher's tokens and probabilities; on the CPU only, as `check_on_cpu`."""
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
