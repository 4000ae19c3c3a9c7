"""Factored layers for a few rows, as in decoding: gathers, products and bias as one operator in Rust.

The operator reads every factor once, on the calling thread and faster than the matrix products of torch do. torch's
threads spin after each of its operations: helpers of our own would share the cores with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .. import _core
from ..utils.operators import operator
from ..utils.torch_utils import contiguous_array

# The most vectors that share one pass over the larger factor. With 16, products of torch are as fast.
FEW = 8
# bfloat16 is left to torch, whose products are as fast where the processor multiplies bfloat16.
_DTYPES = {torch.float32: "float32", torch.float16: "float16"}
# Measured on one and two. With more threads, products of torch may read faster than one core does.
_MOST_THREADS = 2
_PLAIN = {torch.Tensor, nn.Parameter}
_SIDES = "Tensor? input, Tensor? output, Tensor? bias, bool transposed"


def times_low_rank(
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor | None:
    """`functional.low_rank_matmul` of a few rows with the bias added; None where torch must or should compute it."""
    if _is_one_graph() or not _is_for_rust(_rows(x), x, left, right, bias):
        return None
    left, right, transposed = _as_stored(left, right)
    if not (left.is_contiguous() and right.is_contiguous()):
        return None
    y: torch.Tensor = _low_rank_rows(x, left, right, input_permutation, output_permutation, bias, transposed)
    return y


def times_kronecker(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor | None:
    """The layer of `A` and `B` on a few rows; None where torch must or should compute it.

    `y = flat[..., output_permutation] + bias` with `flat = x[..., input_permutation] @ Σ_k A_k ⊗ B_k`. Shapes as of
    `functional.kronecker_matmul`.
    """
    if _is_one_graph():
        return None
    small = a if a[0].numel() < b[0].numel() else b
    if not _is_for_rust(_rows(x) * min(small.shape[1:]), x, a, b, bias):
        return None
    a, b, transposed = _as_stored(a, b)
    if not (a.is_contiguous() and b.is_contiguous()):
        return None
    y: torch.Tensor = _kronecker_rows(x, a, b, input_permutation, output_permutation, bias, transposed)
    return y


def _as_stored(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Factors that are transposed views, as in a tied head, are turned back; whether they were."""
    return (first, second, False) if first.is_contiguous() else (first.mT, second.mT, True)


def _rows(x: torch.Tensor) -> int:
    width = x.shape[-1]
    return x.numel() // width if width else 0


def _is_one_graph() -> bool:
    """Whether the operations are recorded, which then have to suit any number of rows."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _is_for_rust(vectors: int, x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether so many vectors are few, no gradient is wanted, and nothing records or changes operations of torch."""
    if not 0 < vectors <= FEW or x.dtype not in _DTYPES or torch.get_num_threads() > _MOST_THREADS:
        return False
    wanted = torch.is_grad_enabled()
    for tensor in (x, *others):
        if tensor is not None:
            plain = type(tensor) in _PLAIN and tensor.is_cpu and tensor.dtype == x.dtype and not tensor.is_neg()
            if not plain or (wanted and tensor.requires_grad):
                return False
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
        or torch.autograd.forward_ad._current_level >= 0
    )


def _fake(x: torch.Tensor, width: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], width))


def _low_rank_width(left: torch.Tensor, right: torch.Tensor, on_rows: bool, transposed: bool) -> Any:
    beyond = right.shape[0 if transposed else 1]
    return beyond if on_rows else beyond + right.shape[1 if transposed else 0]


@operator(
    f"low_rank_rows(Tensor x, Tensor left, Tensor right, {_SIDES}) -> Tensor",
    lambda x, left, right, input, output, bias, transposed: _fake(
        x, _low_rank_width(left, right, input is not None, transposed)
    ),
)
def _low_rank_rows(
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    input: torch.Tensor | None,
    output: torch.Tensor | None,
    bias: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    return _run(_core.times_low_rank, x, (left, right), (input, output), bias, transposed)


@operator(
    f"kronecker_rows(Tensor x, Tensor a, Tensor b, {_SIDES}) -> Tensor",
    lambda x, a, b, input, output, bias, transposed: _fake(
        x, a.shape[1] * b.shape[1] if transposed else a.shape[2] * b.shape[2]
    ),
)
def _kronecker_rows(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    input: torch.Tensor | None,
    output: torch.Tensor | None,
    bias: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    return _run(_core.times_kronecker, x, (a, b), (input, output), bias, transposed)


def _run(
    kernel: Any,
    x: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    permutations: tuple[torch.Tensor | None, torch.Tensor | None],
    bias: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    arrays = (_bits(x.reshape(-1, x.shape[-1])), *map(_bits, factors), *map(contiguous_array, permutations))
    made = kernel(*arrays, None if bias is None else _bits(bias), _DTYPES[x.dtype], transposed)
    y = torch.from_numpy(made)
    return (y if x.dtype == torch.float32 else y.view(x.dtype)).view(*x.shape[:-1], y.shape[1])


def _bits(tensor: torch.Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """The values of float32, or the bits of float16; they share the tensor's memory if it is contiguous."""
    array: NDArray[Any] = contiguous_array(tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16))
    return array
