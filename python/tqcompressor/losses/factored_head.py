"""Factored heads as narrower dense heads of transformed hidden states.

Let `W[p][:, q] = Σ_k A_k ⊗ B_k` for a head `W (vocabulary, width)` and blocks of one row. Then `h Wᵀ` is the product of
the hidden states, gathered by `q` and contracted with every `B_k`, and of the `A_k` side by side: a dense head of width
`rank · width / n2`. For blocks of several rows `W` is formed. A head of rank k becomes a dense one of width k. A sum of
terms becomes one whose width is the sum of the terms' widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, ShapeError
from ._arrays import single_matrix

if TYPE_CHECKING:
    import torch

# (gradient by the hidden states, (gradient by A, gradient by B))
FactorGradients: TypeAlias = tuple[NDArray[np.float32], tuple[NDArray[np.float32], NDArray[np.float32]]]


def is_factored(head: Any) -> bool:
    """Whether this is a factored head or embedding, a Kronecker decomposition, or a tuple (A, B, p, q)."""
    if isinstance(head, tuple):
        # A tuple of four may also be a dense head of four rows; only A has three dimensions.
        return len(head) == 4 and np.ndim(head[0]) == 3
    return any(hasattr(head, name) for name in ("row_permutation", "A", "left", "terms"))


def dense_head(hidden: torch.Tensor, head: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and a dense head with the same logits, differentiable by the hidden states and the factors.

    Raises `ConfigError` for a head with a bias.
    """
    if getattr(head, "bias", None) is not None:
        raise ConfigError("student_head: expected a head without a bias")
    if hasattr(head, "terms"):
        import torch

        pairs = [dense_head(hidden, term) for term in head.terms]
        return torch.cat([states for states, _ in pairs], dim=-1), torch.cat([weight for _, weight in pairs], dim=1)
    if hasattr(head, "groups"):
        weight = head.dense_weight()
        weight = weight if hasattr(head, "num_embeddings") else weight.transpose(0, 1)
        _check_width(hidden.shape, weight.shape[1])
        return hidden, weight
    if hasattr(head, "num_embeddings"):
        columns, rows = head.output_permutation, head.input_permutation
        columns = None if columns is None else columns.argsort()
    else:
        columns, rows = head.input_permutation, head.output_permutation
    if hasattr(head, "left"):
        return _dense_low_rank_head(hidden, head.left, head.right, columns, rows)
    a, b = head.A, head.B
    (rank, m1, n1), (_, m2, n2) = a.shape, b.shape
    _check_width(hidden.shape, n1 * n2)
    if columns is not None:
        hidden = hidden.index_select(-1, columns)
    if m2 == 1:
        blocks = hidden.reshape(*hidden.shape[:-1], n1, n2)
        hidden = (blocks @ b[:, 0].T).transpose(-1, -2).reshape(*hidden.shape[:-1], rank * n1)
        weight = a.transpose(0, 1).reshape(m1, rank * n1)
    else:
        # One matrix product over the rank.
        products = a.reshape(rank, -1).T @ b.reshape(rank, -1)
        weight = products.reshape(m1, n1, m2, n2).transpose(1, 2).reshape(m1 * m2, n1 * n2)
    return hidden, weight if rows is None else weight.index_select(0, rows)


def _dense_low_rank_head(
    hidden: torch.Tensor, left: torch.Tensor, right: torch.Tensor, columns: Any, rows: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dense_head` of `W[:, columns] = left [I right]`, or where `rows` are given of `W = ([I; left] right)[rows]`."""
    import torch

    rank = left.shape[1]
    if columns is None:
        _check_width(hidden.shape, right.shape[1])
        identity = torch.eye(rank, dtype=left.dtype, device=left.device)
        return hidden @ right.T, torch.cat([identity, left]).index_select(0, rows)
    _check_width(hidden.shape, rank + right.shape[1])
    hidden = hidden.index_select(-1, columns)
    return hidden[..., :rank] + hidden[..., rank:] @ right.T, left


def dense_head_of_arrays(
    hidden: ArrayLike, head: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32], Callable[[tuple[Any, Any]], FactorGradients]]:
    """`dense_head` for arrays, and a function from its gradients to those by the hidden states, `A` and `B`."""
    if not isinstance(head, tuple):
        head = (head.a, head.b, head.row_permutation, head.column_permutation)
    a, b = (np.asarray(factor, dtype=np.float32) for factor in head[:2])
    p, q = (np.asarray(order) for order in head[2:])
    (rank, m1, n1), (_, m2, n2) = a.shape, b.shape
    shape = np.shape(hidden)
    _check_width(shape, n1 * n2)
    blocks = single_matrix(hidden, "student_hidden")[:, q].reshape(-1, n1, n2)
    if m2 == 1:
        states = np.ascontiguousarray((blocks @ b[:, 0].T).transpose(0, 2, 1)).reshape(-1, rank * n1)
        weight = a.transpose(1, 0, 2).reshape(m1, rank * n1)
    else:
        states = blocks.reshape(-1, n1 * n2)
        products = a.reshape(rank, -1).T @ b.reshape(rank, -1)
        weight = products.reshape(m1, n1, m2, n2).transpose(0, 2, 1, 3).reshape(m1 * m2, n1 * n2)

    def gradients(by_dense: tuple[NDArray[np.float32], NDArray[np.float32]]) -> FactorGradients:
        by_states, by_weight = by_dense[0].reshape(states.shape), by_dense[1][p]
        if m2 == 1:
            by_parts = by_states.reshape(-1, rank, n1)
            by_blocks = by_parts.transpose(0, 2, 1) @ b[:, 0]
            by_a = by_weight.reshape(m1, rank, n1).transpose(1, 0, 2)
            by_b = np.tensordot(by_parts, blocks, axes=((0, 2), (0, 1)))[:, None]
        else:
            by_blocks = by_states
            by_products = by_weight.reshape(m1, m2, n1, n2).transpose(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
            by_a = (by_products @ b.reshape(rank, -1).T).T.reshape(a.shape)
            by_b = (a.reshape(rank, -1) @ by_products).reshape(b.shape)
        by_hidden = np.empty((len(blocks), n1 * n2), np.float32)
        by_hidden[:, q] = by_blocks.reshape(len(blocks), -1)
        return by_hidden.reshape(shape), (np.ascontiguousarray(by_a), by_b)

    return states.reshape(*shape[:-1], -1), weight[np.argsort(p)], gradients


def _check_width(shape: tuple[int, ...], width: int) -> None:
    if not shape or shape[-1] != width:
        raise ShapeError(f"student_hidden: expected the shape (..., {width}), as wide as the head, got {tuple(shape)}")
