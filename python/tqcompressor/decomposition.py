"""One matrix: its nearest Kronecker sum, the search for permutations, and the two together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .errors import DtypeError, ShapeError
from .progress import ProgressOption, reporter
from .specs import KroneckerSpec


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerDecomposition:
    """`W[p][:, q] ≈ Σ_k A_k ⊗ B_k`: what `decompose` returns.

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
    lost_energy: float
    """`‖W − Ŵ‖² / ‖W‖²`, between 0 and 1; 0 for a zero matrix."""

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
            f"{self.parameters} parameters, lost energy {self.lost_energy:.4f})"
        )

    def reconstruct(self) -> NDArray[np.float32]:
        """The dense matrix Ŵ of shape (m, n), permutations undone. Cost: `rank·m·n` multiplies."""
        return _core.reconstruct(self.a, self.b, self.row_permutation, self.column_permutation)

    def apply(self, x: ArrayLike) -> NDArray[np.float32]:
        """`x @ Ŵ` for `x` of shape (..., m), without forming Ŵ.

        Gathers `x[..., p]`, contracts it with the factors in the cheaper order, and scatters by `q`. Raises
        `ShapeError` if the last dimension is not m. Cost for each row:
        `rank·min(m1·n1·m2 + n1·m2·n2, m1·m2·n2 + m1·n1·n2)` multiplies.
        """
        values = np.ascontiguousarray(x, dtype=np.float32)
        rows, columns = self.shape
        if values.ndim == 0 or values.shape[-1] != rows:
            raise ShapeError(f"apply: expected x of shape (..., {rows}), got {values.shape}")
        batch = values.reshape(-1, rows)
        y = _core.apply(batch, self.a, self.b, self.row_permutation, self.column_permutation)
        return y.reshape(*values.shape[:-1], columns)


def decompose(
    w: ArrayLike,
    spec: KroneckerSpec,
    *,
    effort: str = "balanced",
    seed: int = 0,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> KroneckerDecomposition:
    """Decomposes a matrix: searches permutations, then takes the nearest Kronecker sum under them.

    Minimises `‖W[p][:, q] − Σ_k A_k ⊗ B_k‖_F` over the permutations that `spec.permute` allows and over the factors
    (TQCompressor, arXiv 2401.16367; Van Loan and Pitsianis, 1993). Never loses more energy than no permutation.

    `w` has shape (m, n), held in × out (the transpose of an `nn.Linear` weight); float16, float32 or float64, computed
    in float32 with float64 sums. `effort` is "fast" (norm sort and assignment: some tenths of a second for 768 × 768),
    "balanced" (then annealing: a second or two) or "best" (longer, restarted: tens of seconds). The result depends on
    `w`, `spec`, `effort` and `seed` only, not on `threads` (None: all cores). `progress` is True, False, None (a bar
    where somebody may be watching) or a callable that takes (done, total).

    Raises `ShapeError`, `DtypeError`, `NonFiniteError`, `ConfigError` (effort) and, on Ctrl-C, `KeyboardInterrupt`.

    >>> import numpy as np
    >>> w = np.random.default_rng(0).standard_normal((64, 96), dtype=np.float32)
    >>> d = decompose(w, KroneckerSpec(block=(2, 4), rank=2), effort="fast")
    >>> d.a.shape, d.b.shape, d.parameters
    ((2, 32, 24), (2, 2, 4), 1552)
    >>> np.allclose(d.apply(np.eye(64)), d.reconstruct(), atol=1e-5)
    True
    """
    matrix = _as_matrix(w)
    with reporter(progress, "decompose") as callback:
        ((a, b, p, q, lost_energy, _),) = _core.decompose_many(
            [matrix], ["w"], [spec.block], [spec.rank], [spec.permute], effort, seed, threads, callback
        )
    return KroneckerDecomposition(spec, a, b, p, q, lost_energy)


def nearest_kronecker_sum(w: ArrayLike, spec: KroneckerSpec) -> KroneckerDecomposition:
    """The Kronecker sum of the given block and rank that is nearest to `w` as it stands, without any permutation.

    The truncated singular value decomposition of the rearranged matrix, which holds one block of `w` per row (Van Loan
    and Pitsianis, 1993). `block = (1, n)` gives the truncated singular value decomposition of `w` itself. Arguments and
    errors as for `decompose`; `spec.permute` is ignored.

    >>> import numpy as np
    >>> w = np.kron(np.arange(6.0).reshape(2, 3), np.ones((2, 2)))
    >>> nearest_kronecker_sum(w, KroneckerSpec(block=(2, 2), rank=1)).lost_energy < 1e-12
    True
    """
    matrix = _as_matrix(w)
    a, b, lost_energy = _core.nearest_kronecker_sum(matrix, spec.block, spec.rank)
    p, q = (np.arange(length, dtype=np.int64) for length in matrix.shape)
    return KroneckerDecomposition(spec, a, b, p, q, lost_energy)


def find_permutation(
    w: ArrayLike,
    spec: KroneckerSpec,
    *,
    effort: str = "balanced",
    seed: int = 0,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """`(p, q, lost_energy)`: gather indices under which `w[p][:, q]` is near to a Kronecker sum of this spec.

    The search of `decompose` without its factors; arguments, errors and cost are the same.

    >>> import numpy as np
    >>> w = np.random.default_rng(0).standard_normal((8, 8))
    >>> p, q, lost_energy = find_permutation(w, KroneckerSpec(block=(2, 2), rank=1))
    >>> sorted(p.tolist()) == list(range(8)), 0 < lost_energy < 1
    (True, True)
    """
    matrix = _as_matrix(w)
    with reporter(progress, "find_permutation") as callback:
        return _core.find_permutation(matrix, spec.block, spec.rank, spec.permute, effort, seed, threads, callback)


def _as_matrix(w: ArrayLike) -> NDArray[np.float32]:
    """`w` as the C-contiguous float32 matrix that the kernels read."""
    array = np.asarray(w)
    if array.ndim != 2:
        raise ShapeError(f"w: expected a matrix, got {array.ndim} dimensions, shape {array.shape}")
    if array.dtype.kind != "f":
        raise DtypeError(f"w: expected float16, float32 or float64, got {array.dtype}")
    # A float64 beyond float32's range becomes an infinity, which the kernels refuse by name and place.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)
