"""The results of `decompose`: a matrix as a Kronecker sum, of low rank, or as a sum of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..config.specs import GroupedSpec, KroneckerSpec, LowRankSpec, MixedSpec
from ..errors import DtypeError, ShapeError
from ..utils.torch_utils import as_array


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerDecomposition:
    """A Kronecker sum with permutations: `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`.

    With `(A ⊗ B)[i1·m2 + i2, j1·n2 + j2] = A[i1, j1]·B[i2, j2]`. Terms come in descending order of norm, balanced
    (`‖A_k‖ = ‖B_k‖`), the entry of `B_k` of largest magnitude positive.
    """

    spec: KroneckerSpec
    a: NDArray[np.float32]
    """A, shape (rank, m1, n1)."""
    b: NDArray[np.float32]
    """B, shape (rank, m2, n2)."""
    row_permutation: NDArray[np.int64]
    """p, gather indices of the rows; the identity where rows were not permuted."""
    column_permutation: NDArray[np.int64]
    """q, gather indices of the columns; the identity where columns were not permuted."""
    lost_energy: float | None
    """`‖W − Ŵ‖² / ‖W‖²` in the norm of the objective, from 0 to 1; 0 for a zero matrix, None for a term of a sum."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the sum: this one."""
        return (self,)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(m, n)` of the matrix."""
        return len(self.row_permutation), len(self.column_permutation)

    @property
    def parameters(self) -> int:
        """Stored numbers, `rank·(m1·n1 + m2·n2)`; permutations are integer buffers and do not count."""
        return self.a.size + self.b.size

    def __repr__(self) -> str:
        (m, n), (m2, n2) = self.shape, self.spec.block
        return (
            f"KroneckerDecomposition({m} × {n}, block {m2} × {n2}, rank {self.spec.rank}, "
            f"{self.parameters} parameters{_losing(self.lost_energy)})"
        )

    def reconstruct(self) -> NDArray[np.float32]:
        """The dense matrix Ŵ of shape (m, n), permutations undone. Cost: `rank·m·n` MACs."""
        return _core.reconstruct(self.a, self.b, self.row_permutation, self.column_permutation)

    def apply(self, x: ArrayLike) -> NDArray[np.float32]:
        """`x @ Ŵ` for `x` of shape (..., m), without forming Ŵ.

        Gathers `x[..., p]`, contracts it with the factors in the cheaper order, and scatters by `q`. Raises
        `ShapeError` if the last dimension is not m. Cost for each row:
        `rank·min(m1·n1·m2 + n1·m2·n2, m1·m2·n2 + m1·n1·n2)` MACs.
        """
        rows, columns = self.shape
        values = _inputs(x, rows)
        batch = values.reshape(-1, rows)
        y = _core.apply(batch, self.a, self.b, self.row_permutation, self.column_permutation)
        return y.reshape(*values.shape[:-1], columns)


@dataclass(frozen=True, eq=False, repr=False)
class LowRankDecomposition:
    """A matrix of rank `k` in interpolative form: `k` of its rows, and the coefficients of the others in them.

    `Ŵ[order] = [I; left] right` where W (m, n) has m ≤ n. Otherwise columns are picked: `Ŵ[:, order] = left [I right]`.
    The identity is not stored, so there are `k·(m + n − k)` numbers in place of the `k·(m + n)` of two plain factors
    (Cheng, Gimbutas, Martinsson and Rokhlin, "On the compression of low rank matrices", 2005).
    """

    spec: LowRankSpec
    left: NDArray[np.float32]
    """Shape (m − k, k), or (m, k) where columns are picked."""
    right: NDArray[np.float32]
    """Shape (k, n), or (k, n − k) where columns are picked."""
    order: NDArray[np.int64]
    """Gather indices of the rows, or of the columns, the picked ones first."""
    lost_energy: float | None
    """`‖W − Ŵ‖² / ‖W‖²` in the norm of the objective, from 0 to 1; 0 for a zero matrix, None for a term of a sum."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the sum: this one."""
        return (self,)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(m, n)` of the matrix."""
        picked_rows = len(self.order) == len(self.left) + self.spec.rank
        rows, columns = len(self.left), self.right.shape[1]
        return (len(self.order), columns) if picked_rows else (rows, len(self.order))

    @property
    def parameters(self) -> int:
        """Stored numbers, `k·(m + n − k)`; the order is an integer buffer and does not count."""
        return self.left.size + self.right.size

    def __repr__(self) -> str:
        m, n = self.shape
        return (
            f"LowRankDecomposition({m} × {n}, rank {self.spec.rank}, {self.parameters} parameters"
            f"{_losing(self.lost_energy)})"
        )

    def _picks_rows(self) -> bool:
        rows, columns = self.shape
        return rows <= columns

    def reconstruct(self) -> NDArray[np.float32]:
        """The dense matrix Ŵ of shape (m, n). Cost: `k·(s − k)·l` MACs for its sides `s ≤ l`."""
        dense = np.empty(self.shape, np.float32)
        if self._picks_rows():
            dense[self.order] = np.concatenate([self.right, self.left @ self.right])
        else:
            dense[:, self.order] = np.concatenate([self.left, self.left @ self.right], axis=1)
        return dense

    def apply(self, x: ArrayLike) -> NDArray[np.float32]:
        """`x @ Ŵ` for `x` of shape (..., m): `k·(m + n − k)` MACs for each row.

        Raises `ShapeError` if the last dimension is not m.
        """
        rows, columns = self.shape
        values = _inputs(x, rows)
        rank = self.spec.rank
        if self._picks_rows():
            ordered = values[..., self.order]
            return (ordered[..., :rank] + ordered[..., rank:] @ self.left) @ self.right
        picked = values @ self.left
        y = np.empty((*values.shape[:-1], columns), np.float32)
        y[..., self.order] = np.concatenate([picked, picked @ self.right], axis=-1)
        return y


@dataclass(frozen=True, eq=False, repr=False)
class GroupedDecomposition:
    """A table in groups of rows, each of low rank: `Ŵ[row_order]` is the groups one above the other."""

    spec: GroupedSpec
    groups: tuple[LowRankDecomposition, ...]
    """The groups, the most important rows first."""
    row_order: NDArray[np.int64]
    """Gather indices of the rows."""
    lost_energy: float
    """`‖W − Ŵ‖² / ‖W‖²` in the norm of the objective, between 0 and 1; 0 for a zero matrix."""

    @property
    def terms(self) -> tuple[GroupedDecomposition, ...]:
        """The terms of the sum: this one."""
        return (self,)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(m, n)` of the matrix."""
        return len(self.row_order), self.groups[0].shape[1]

    @property
    def parameters(self) -> int:
        """Stored numbers of all groups."""
        return sum(group.parameters for group in self.groups)

    def __repr__(self) -> str:
        m, n = self.shape
        ranks = "/".join(str(rank) for _, rank in self.spec.groups)
        return f"GroupedDecomposition({m} × {n}, rank {ranks}, {self.parameters} parameters{_losing(self.lost_energy)})"

    def reconstruct(self) -> NDArray[np.float32]:
        """The dense matrix Ŵ of shape (m, n)."""
        dense = np.empty(self.shape, np.float32)
        dense[self.row_order] = np.concatenate([group.reconstruct() for group in self.groups])
        return dense

    def apply(self, x: ArrayLike) -> NDArray[np.float32]:
        """`x @ Ŵ` for `x` of shape (..., m), group by group. Raises `ShapeError` if the last dimension is not m."""
        rows, columns = self.shape
        values = _inputs(x, rows)[..., self.row_order]
        y = np.zeros((*values.shape[:-1], columns), np.float32)
        first = 0
        for group in self.groups:
            y += group.apply(values[..., first : first + group.shape[0]])
            first += group.shape[0]
        return y


@dataclass(frozen=True, eq=False, repr=False)
class MixedDecomposition:
    """`W ≈ Σ_t Ŵ_t`: a sum of Kronecker sums of different blocks and of low-rank matrices."""

    spec: MixedSpec
    terms: tuple[Term, ...]
    """The terms, in the order of the spec's."""
    lost_energy: float
    """`‖W − Σ_t Ŵ_t‖² / ‖W‖²` in the norm of the objective, between 0 and 1; 0 for a zero matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(m, n)` of the matrix."""
        return self.terms[0].shape

    @property
    def parameters(self) -> int:
        """Stored numbers of all terms."""
        return sum(term.parameters for term in self.terms)

    def __repr__(self) -> str:
        m, n = self.shape
        kinds = " + ".join(
            f"rank {term.spec.rank}" + (f" of block {term.spec.block}" if isinstance(term.spec, KroneckerSpec) else "")
            for term in self.terms
        )
        return (
            f"MixedDecomposition({m} × {n}, {kinds}, {self.parameters} parameters, lost energy {self.lost_energy:.4f})"
        )

    def reconstruct(self) -> NDArray[np.float32]:
        """The dense matrix, the sum of the terms'."""
        dense: NDArray[np.float32] = np.sum([term.reconstruct() for term in self.terms], axis=0, dtype=np.float32)
        return dense

    def apply(self, x: ArrayLike) -> NDArray[np.float32]:
        """`x @ Ŵ` for `x` of shape (..., m), term by term. Raises `ShapeError` if the last dimension is not m."""
        y: NDArray[np.float32] = np.sum([term.apply(x) for term in self.terms], axis=0, dtype=np.float32)
        return y


Term: TypeAlias = KroneckerDecomposition | LowRankDecomposition
Decomposition: TypeAlias = KroneckerDecomposition | LowRankDecomposition | GroupedDecomposition | MixedDecomposition

# A term as the boundary gives it.
_FittedTerm: TypeAlias = _core.KroneckerTerm | _core.LowRankTerm | _core.GroupedTerm


def from_fit(fitted: _core.Fitted) -> Decomposition:
    """The decomposition that the boundary's result stands for."""
    spec, terms, lost_energy = fitted.spec, fitted.terms, fitted.lost_energy
    if isinstance(spec, MixedSpec):
        parts = [_term(part, term, None) for part, term in zip(spec.terms, terms, strict=True)]
        return MixedDecomposition(spec, tuple(parts), lost_energy)
    if isinstance(spec, GroupedSpec):
        return _grouped(spec, terms[0], lost_energy)
    return _term(spec, terms[0], lost_energy)


def _grouped(spec: GroupedSpec, term: _FittedTerm, lost_energy: float) -> GroupedDecomposition:
    assert isinstance(term, _core.GroupedTerm)
    columns = len(term.column_order) // len(spec.groups)
    groups, left, right = [], term.left, term.right
    for number, (rows, rank) in enumerate(spec.groups):
        own_left, left = np.split(left, [rows * rank])
        own_right, right = np.split(right, [rank * (columns - rank)])
        order = term.column_order[number * columns : (number + 1) * columns] - number * columns
        factors = (own_left.reshape(rows, rank), own_right.reshape(rank, columns - rank))
        groups.append(LowRankDecomposition(LowRankSpec(rank), *factors, order, None))
    return GroupedDecomposition(spec, tuple(groups), term.row_order, lost_energy)


def _term(spec: KroneckerSpec | LowRankSpec, term: _FittedTerm, lost_energy: float | None) -> Term:
    if isinstance(term, _core.KroneckerTerm):
        assert isinstance(spec, KroneckerSpec)
        return KroneckerDecomposition(spec, term.a, term.b, term.row_permutation, term.column_permutation, lost_energy)
    assert isinstance(spec, LowRankSpec) and isinstance(term, _core.LowRankTerm)
    return LowRankDecomposition(spec, term.left, term.right, term.order, lost_energy)


def _losing(lost_energy: float | None) -> str:
    return "" if lost_energy is None else f", lost energy {lost_energy:.4f}"


def _inputs(x: ArrayLike, rows: int) -> NDArray[np.float32]:
    values = as_array(x, "apply: x")
    if values.size and values.dtype.kind not in "biuf":
        raise DtypeError(f"apply: expected numbers, got {values.dtype}")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim == 0 or values.shape[-1] != rows:
        raise ShapeError(f"apply: expected x of shape (..., {rows}), got {values.shape}")
    return values
