"""Products with factors, and the dense matrices of factors, as functions of tensors."""

from __future__ import annotations

from typing import Any

import torch

from .. import _core
from ..utils.operators import operator
from ..utils.torch_utils import contiguous_array, without_autocast
from . import few_rows
from .base import add_bias, gathered, inverse


def macs(block: tuple[int, int], rank: int, rows: int, columns: int) -> tuple[int, int]:
    """Multiplications for one input row, contracting with A first and with B first.

    For `A_k (m1, n1)` and `B_k (m2, n2)`: `rank · (m1·n1·m2 + n1·m2·n2)` and `rank · (m1·m2·n2 + m1·n1·n2)`.
    """
    m2, n2 = block
    m1, n1 = rows // m2, columns // n2
    return rank * n1 * m2 * (m1 + n2), rank * m1 * n2 * (m2 + n1)


def prefers_dense(tokens: int, block: tuple[int, int], rank: int, rows: int, columns: int) -> bool:
    """Whether multiplying many rows at a time by the dense matrix is faster than by its factors.

    Forming the dense matrix costs as much as multiplying some 240 rows by it. The factored products move more data, so
    that one of their MACs takes as long as 1.4 of a dense product. Measured on two cores, 768 × 3072, block
    (2, 4), rank 4: 256 rows take 4.0 ms dense, 5.0 ms by the factors and 6.6 ms by the matrix, 1024 rows 14.5, 20.5 and
    18.9 ms; 2048 rows forward and backward 90, 225 and 98 ms.

    An exported or traced program has one graph for any number of rows, and multiplies by the factors.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    dense = rows * columns
    factored = min(macs(block, rank, rows, columns))
    return tokens * (1.4 * factored - dense) > 240 * dense


def kronecker_layer(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`flat[..., output_permutation] + bias` for `flat = x[..., input_permutation] @ Σ_k A_k ⊗ B_k`.

    Shapes, dtypes and cost as of `kronecker_matmul`.
    """
    found = few_rows.times_kronecker(x, a, b, input_permutation, output_permutation, bias)
    if found is not None:
        return found
    if input_permutation is not None:
        x = x.index_select(-1, input_permutation)
    y = kronecker_matmul(x, a, b)
    if output_permutation is not None:
        y = y.index_select(-1, output_permutation)
    return add_bias(y, bias)


def kronecker_matmul(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`x @ Σ_k A_k ⊗ B_k`, in the order of contraction that takes fewer MACs.

    With a row of `x` as the matrix `X (m1, m2)`, the result is `Y = Σ_k A_kᵀ X B_k`, flattened.

    Shapes: `x (..., m1·m2)`, `a (rank, m1, n1)`, `b (rank, m2, n2)`; the result is `(..., n1·n2)`. Any floating dtype,
    the same for all three; autocast applies as it does to `torch.matmul`. `a` and `b` may be transposed views.
    """
    rank, m1, n1 = a.shape
    _, m2, n2 = b.shape
    # A plain low-rank product. Batched products of matrices with vectors would take several times as long.
    if m2 == n1 == 1:
        return torch.matmul(torch.matmul(x, a.squeeze(-1).transpose(0, 1)), b.squeeze(1))
    if m1 == n2 == 1:
        return torch.matmul(torch.matmul(x, b.squeeze(-1).transpose(0, 1)), a.squeeze(1))
    a_first, b_first = macs((m2, n2), rank, m1 * m2, n1 * n2)
    rows = x.reshape(-1, m1, m2)
    y = _contract_a_first(rows, a, b) if a_first <= b_first else _contract_b_first(rows, a, b)
    return y.reshape(*x.shape[:-1], n1 * n2)


# Both orders map (T, m1, m2) to (T, n1, n2). The rows are laid out so that the large factor A is the right-hand side of
# a matrix product without a copy, that no intermediate product is copied, and that the sum over the rank is part of a
# matrix product. Einsum, or one product with the ranks side by side, would copy A, which costs more than everything
# else when a single token is decoded. Measured, 768 × 3072, block (2, 4), rank 4, one token on two cores:
# 0.10 ms against 0.37 ms with the copy, 0.58 ms by einsum and 0.15 ms dense; 512 tokens on one core: 17.6 ms against
# 20.3 ms with a copy between the products and 15.2 ms dense (this spec saves no MACs, rank 1 takes 5.6 ms).


def _contract_a_first(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rank, m1, n1 = a.shape
    _, m2, n2 = b.shape
    inner = torch.matmul(x.permute(2, 0, 1).reshape(1, -1, m1), a)  # (rank, m2·T, n1)
    y = torch.matmul(b.reshape(rank * m2, n2).transpose(0, 1), inner.reshape(rank * m2, -1))  # (n2, T·n1)
    return y.reshape(n2, x.shape[0], n1).permute(1, 2, 0)


def _contract_b_first(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rank, m1, n1 = a.shape
    _, m2, n2 = b.shape
    inner = torch.matmul(b.permute(2, 0, 1).reshape(n2 * rank, m2), x.transpose(1, 2))  # (T, n2·rank, m1)
    if rank == 1 or a.is_contiguous():
        y = torch.matmul(inner.reshape(-1, rank * m1), a.reshape(rank * m1, n1))
    else:
        # With a transposed A (in the tied head), the sum over the rank inside the product would copy all of A.
        parts = inner.reshape(-1, rank, m1)
        y = torch.matmul(parts[:, 0], a[0])
        for k in range(1, rank):
            y = torch.addmm(y, parts[:, k], a[k])
    return y.reshape(x.shape[0], n2, n1).transpose(1, 2)


def kronecker_matrix(
    a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None
) -> torch.Tensor:
    """`K[rows][:, columns]` for `K = Σ_k A_k ⊗ B_k`, in at least single precision.

    Shapes: `a (rank, m1, n1)`, `b (rank, m2, n2)`, `rows (m1·m2,)` and `columns (n1·n2,)` permutations, None for the
    identity; the result is `(m1·m2, n1·n2)`. Gradients flow to both factors.

    Cost: `rank` MACs an entry, and twice as many for the gradients. 768 × 3072, rank 4, both sides permuted: 2.7 ms on
    one core, and 5.1 ms for the gradients (73.6 ms by the same formulas in torch).
    """
    if _rust_makes_it(a, b):
        matrix: torch.Tensor = _in_rust(a, b, rows, columns)
        return matrix
    wide = torch.promote_types(a.dtype, torch.float32)
    # The sum over the rank as one matrix product, which autocast would round.
    with without_autocast(a):
        blocks = a.to(wide).flatten(1).t() @ b.to(wide).flatten(1)
    (m1, n1), (m2, n2) = a.shape[1:], b.shape[1:]
    return gathered(blocks.view(m1, n1, m2, n2).transpose(1, 2).reshape(m1 * m2, n1 * n2), rows, columns)


def _rust_makes_it(a: torch.Tensor, b: torch.Tensor) -> bool:
    # The transforms of torch.func do not support operators with a custom backward pass.
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and not transformed


def _keep_factors(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    a, b, rows, columns = ctx.saved_tensors
    # Rust's gradients have no derivatives of their own.
    make = _gradients_in_torch if torch.is_grad_enabled() else _gradients_in_rust
    by_a, by_b = make(gradient, a, b, rows, columns)
    return by_a if ctx.needs_input_grad[0] else None, by_b if ctx.needs_input_grad[1] else None, None, None


def _gradients_in_torch(
    gradient: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    (m1, n1), (m2, n2) = a.shape[1:], b.shape[1:]
    ordered = gathered(gradient, inverse(rows), inverse(columns))
    blocks = ordered.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)
    with without_autocast(a):
        return (b.flatten(1) @ blocks.t()).view_as(a), (a.flatten(1) @ blocks).view_as(b)


@operator(
    "kronecker_matrix_gradients(Tensor gradient, Tensor a, Tensor b, Tensor? rows, Tensor? columns)"
    " -> (Tensor, Tensor)",
    lambda gradient, a, b, rows, columns: (a.new_empty(a.shape), b.new_empty(b.shape)),
)
def _gradients_in_rust(
    gradient: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (*(contiguous_array(tensor) for tensor in (gradient, a, b, rows, columns)), torch.get_num_threads())
    by_a, by_b = _core.expand_gradients(*arguments)
    return torch.from_numpy(by_a), torch.from_numpy(by_b)


def _fake_matrix(
    a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None
) -> torch.Tensor:
    return a.new_empty(a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])


@operator(
    "kronecker_matrix(Tensor a, Tensor b, Tensor? rows, Tensor? columns) -> Tensor",
    _fake_matrix,
    _backward,
    _keep_factors,
)
def _in_rust(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
    arguments = (*(contiguous_array(tensor) for tensor in (a, b, rows, columns)), torch.get_num_threads())
    return torch.from_numpy(_core.expand(*arguments))


def low_rank_matmul(
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x W + bias` for a matrix `W (m, n)` in interpolative form, without forming it.

    With `input_permutation (m,)`, which is `p`: `W[p] = [I; left] right`, `left (m − k, k)`, `right (k, n)`. Without:
    `W[:, q] = left [I right]`, `left (m, k)`, `right (k, n − k)`, and `output_permutation (n,)` is the inverse of `q`.

    Shapes: `x (..., m)`, `bias (n,)`, the result `(..., n)`. Any floating dtype, the same for all; autocast applies as
    it does to `torch.matmul`. The factors may be transposed views. Cost of a row: `k · (m + n − k)` MACs.
    """
    found = few_rows.times_low_rank(x, left, right, input_permutation, output_permutation, bias)
    if found is not None:
        return found
    rows = x.reshape(-1, x.shape[-1])
    if input_permutation is not None:
        rank = left.shape[1]
        rows = rows.index_select(1, input_permutation)
        y = torch.addmm(rows[:, :rank], rows[:, rank:], left) @ right
    else:
        inner = rows @ left
        y = torch.cat([inner, inner @ right], dim=1)
        if output_permutation is not None:
            y = y.index_select(1, output_permutation)
    return add_bias(y.reshape(*x.shape[:-1], y.shape[1]), bias)


def expand(left: torch.Tensor, right: torch.Tensor, on_rows: bool) -> torch.Tensor:
    """`[I; left] right` or `left [I right]`, in at least single precision."""
    wide = torch.promote_types(left.dtype, torch.float32)
    with without_autocast(left):
        left, right = left.to(wide), right.to(wide)
        return torch.cat([right, left @ right]) if on_rows else torch.cat([left, left @ right], dim=1)
