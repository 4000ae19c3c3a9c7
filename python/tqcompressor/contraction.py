"""Multiplying by a Kronecker sum without forming it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(like: torch.Tensor) -> AbstractContextManager[object]:
    """A region in which autocast rounds nothing on the device of `like`; the meta device has no autocast."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def multiplies(block: tuple[int, int], rank: int, rows: int, columns: int) -> tuple[int, int]:
    """Multiplications for one input row, contracting with A first and with B first.

    For `A_k (m1, n1)` and `B_k (m2, n2)`: `rank · (m1·n1·m2 + n1·m2·n2)` and `rank · (m1·m2·n2 + m1·n1·n2)`.
    """
    m2, n2 = block
    m1, n1 = rows // m2, columns // n2
    return rank * n1 * m2 * (m1 + n2), rank * m1 * n2 * (m2 + n1)


def prefers_dense(tokens: int, block: tuple[int, int], rank: int, rows: int, columns: int) -> bool:
    """Whether many rows at a time are multiplied faster by the matrix, made once, than by its factors.

    Making it costs as much as multiplying some 240 rows by it; the factored products move so much data between them
    that one of their multiplications takes as long as 1.4 of a dense product. Measured on two cores, 768 × 3072, block
    (2, 4), rank 4: 256 rows take 4.0 ms dense, 5.0 ms by the factors and 6.6 ms by the matrix, 1024 rows 14.5, 20.5 and
    18.9 ms; 2048 rows forward and backward 90, 225 and 98 ms.
    """
    dense = rows * columns
    factored = min(multiplies(block, rank, rows, columns))
    return tokens * (1.4 * factored - dense) > 240 * dense


def kronecker_matmul(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`x @ Σ_k A_k ⊗ B_k`, by whichever order of contraction takes fewer multiplications.

    With a row of `x` as the matrix `X (m1, m2)`, the result is `Y = Σ_k A_kᵀ X B_k`, flattened.

    Shapes: `x (..., m1·m2)`, `a (rank, m1, n1)`, `b (rank, m2, n2)`; the result is `(..., n1·n2)`. Any floating dtype,
    the same for all three; autocast applies as it does to `torch.matmul`. `a` and `b` may be transposed views.
    """
    rank, m1, n1 = a.shape
    _, m2, n2 = b.shape
    # A plain product of low rank: as batched products of matrices with vectors it would take several times as long.
    if m2 == n1 == 1:
        return torch.matmul(torch.matmul(x, a.squeeze(-1).transpose(0, 1)), b.squeeze(1))
    if m1 == n2 == 1:
        return torch.matmul(torch.matmul(x, b.squeeze(-1).transpose(0, 1)), a.squeeze(1))
    a_first, b_first = multiplies((m2, n2), rank, m1 * m2, n1 * n2)
    rows = x.reshape(-1, m1, m2)
    y = _contract_a_first(rows, a, b) if a_first <= b_first else _contract_b_first(rows, a, b)
    return y.reshape(*x.shape[:-1], n1 * n2)


# Both orders take (T, m1, m2) and give (T, n1, n2), and lay the rows out so that the large factor A is the right-hand
# side of a matrix product as it lies in memory, that no product between is copied, and that the sum over the rank is
# part of a matrix product. Copying A (as einsum, or one product with the ranks side by side, would) costs more than
# everything else when a single token is decoded. Measured, 768 × 3072, block (2, 4), rank 4, one token on two cores:
# 0.10 ms against 0.37 ms with the copy, 0.58 ms by einsum and 0.15 ms dense; 512 tokens on one core: 17.6 ms against
# 20.3 ms with a copy between the products and 15.2 ms dense (this spec saves no multiplications, rank 1 takes 5.6 ms).


def _contract_a_first(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rank, m1, n1 = a.shape
    _, m2, n2 = b.shape
    inner = torch.matmul(x.permute(2, 0, 1).reshape(1, -1, m1), a)  # (rank, m2·T, n1)
    y = torch.matmul(b.reshape(rank * m2, n2).transpose(0, 1), inner.reshape(rank * m2, -1))  # (n2, T·n1)
    return y.reshape(n2, len(x), n1).permute(1, 2, 0)


def _contract_b_first(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rank, m1, n1 = a.shape
    _, m2, n2 = b.shape
    inner = torch.matmul(b.permute(2, 0, 1).reshape(n2 * rank, m2), x.transpose(1, 2))  # (T, n2·rank, m1)
    if rank == 1 or a.is_contiguous():
        y = torch.matmul(inner.reshape(-1, rank * m1), a.reshape(rank * m1, n1))
    else:
        # A transposed A (the tied head's) cannot take the sum over the rank without a copy of all of it.
        parts = inner.reshape(-1, rank, m1)
        y = torch.matmul(parts[:, 0], a[0])
        for k in range(1, rank):
            y = torch.addmm(y, parts[:, k], a[k])
    return y.reshape(len(x), n2, n1).transpose(1, 2)
