"""One matrix: what approximates it best, its nearest Kronecker sum, and the search for permutations."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, EFFORTS, Effort, Objective, one_of
from ..config.specs import KroneckerSpec, MatrixSpec
from ..errors import ConfigError, DtypeError, ShapeError
from ..utils import validate
from ..utils.progress import ProgressOption, reporter
from .norm import as_moment, moments_for
from .results import Decomposition, KroneckerDecomposition, from_fit

MomentOption: TypeAlias = ArrayLike | tuple[ArrayLike | None, ArrayLike | None] | None


@overload
def decompose(
    w: ArrayLike,
    spec: KroneckerSpec,
    *,
    moment: MomentOption = None,
    objective: Objective = "auto",
    effort: Effort = DEFAULT_EFFORT,
    seed: int = DEFAULT_SEED,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> KroneckerDecomposition: ...


@overload
def decompose(
    w: ArrayLike,
    spec: MatrixSpec | None = None,
    *,
    budget: float | int | None = None,
    moment: MomentOption = None,
    objective: Objective = "auto",
    effort: Effort = DEFAULT_EFFORT,
    seed: int = DEFAULT_SEED,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> Decomposition: ...


def decompose(
    w: ArrayLike,
    spec: MatrixSpec | None = None,
    *,
    budget: float | int | None = None,
    moment: MomentOption = None,
    objective: Objective = "auto",
    effort: Effort = DEFAULT_EFFORT,
    seed: int = DEFAULT_SEED,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> Decomposition:
    """Decomposes a matrix as its spec says, or as well as a budget of parameters allows.

    Minimises `tr(C_in (W − Ŵ) C_out (W − Ŵ)ᵀ)`, which without moments is the Frobenius norm. A Kronecker sum is
    searched over the permutations that `spec.permute` allows and over the factors (TQCompressor, arXiv 2401.16367;
    Van Loan and Pitsianis, 1993), and never loses more energy than without a permutation. Low rank is the whitened
    truncated singular value decomposition (SVD-LLM, arXiv 2403.07378), in interpolative form. With a budget, the best
    of low rank, Kronecker sums and sums of both that has no more parameters is taken; "fast" takes low rank.

    Args:
        w: Shape (m, n), held in × out (the transpose of an `nn.Linear` weight); float16, float32 or float64, computed
            in float32 with float64 sums.
        spec: What it is to become; either this or `budget`.
        budget: A share of its `m·n` parameters, such as 0.5, or their number as an integer.
        moment: What the inputs look like: `C_in = E[x xᵀ]` of shape (m, m), or its diagonal (m,); or a pair of it and
            the second moment `C_out = E[g gᵀ]` of the gradients at the outputs, (n, n) or (n,), either of which may be
            None. Only their directions matter, not their scale. A singular moment is fine.
        objective: "frobenius", "diagonal", "second_moment" or "sensitivity" (both moments); "auto" takes all there is.
        effort: "fast" (some tenths of a second for 768 × 768), "balanced" (seconds) or "best" (tens of seconds).
        seed: With `w`, `spec` and `effort` all that the result depends on: not on `threads`.
        threads: None for all cores.
        progress: True, False, None (a bar where somebody may be watching) or a callable that takes (done, total).

    Raises `ShapeError`, `DtypeError`, `NonFiniteError`, `ConfigError` (effort, objective, budget) and, on Ctrl-C,
    `KeyboardInterrupt`.

    >>> import numpy as np
    >>> w = np.random.default_rng(0).standard_normal((64, 96), dtype=np.float32)
    >>> d = decompose(w, KroneckerSpec(block=(2, 4), rank=2), effort="fast")
    >>> d.a.shape, d.b.shape, d.parameters
    ((2, 32, 24), (2, 2, 4), 1552)
    >>> np.allclose(d.apply(np.eye(64)), d.reconstruct(), atol=1e-5)
    True
    >>> x = np.random.default_rng(1).standard_normal((1000, 64)) * np.linspace(0.1, 2, 64)
    >>> decompose(w, budget=0.5, moment=x.T @ x / 1000, effort="fast")
    LowRankDecomposition(64 × 96, rank 22, 3036 parameters, lost energy 0.1...)
    """
    matrix = _as_matrix(w)
    seed, threads = validate.seed(seed), validate.threads(threads)
    if (spec is None) == (budget is None):
        raise ConfigError(
            "decompose: expected either a spec or a budget, got " + ("neither" if spec is None else "both")
        )
    one_of("effort", effort, EFFORTS)
    rows, columns = matrix.shape
    given = moment if isinstance(moment, tuple) else (moment, None)
    arrays = as_moment(given[0], rows, "input moment"), as_moment(given[1], columns, "output moment")
    moments = moments_for(objective, *arrays)
    with reporter(progress, "decompose") as callback:
        if spec is not None:
            (fitted,) = _core.fit_many(
                [matrix], ["w"], [spec], [moments], effort=effort, seed=seed, threads=threads, progress=callback
            )
        else:
            fitted = _core.fit_within(
                matrix,
                moments,
                parameters=_parameters(budget, rows, columns),
                effort=effort,
                threads=threads,
                progress=callback,
            )
    return from_fit(fitted)


def _parameters(budget: Any, rows: int, columns: int) -> int:
    """A budget for one matrix as a number of parameters."""
    dense = rows * columns
    # numpy's numbers, too.
    whole = isinstance(budget, Integral) and not isinstance(budget, bool) and int(budget) > 0
    share = float(budget) if isinstance(budget, Real) and not isinstance(budget, Integral) else math.nan
    if not whole and not 0 < share < 1:
        raise ConfigError(f"budget must be a share between 0 and 1, or a number of parameters, got {budget!r}")
    allowed = int(budget) if whole else int(share * dense)
    if allowed >= dense:
        raise ConfigError(f"budget: {budget!r} leaves nothing to save for a {rows} × {columns} matrix")
    if allowed < rows + columns - 1:
        raise ConfigError(f"budget: {budget!r} is less than the {rows + columns - 1} parameters of rank 1")
    return allowed


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
    effort: Effort = DEFAULT_EFFORT,
    seed: int = DEFAULT_SEED,
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
    one_of("effort", effort, EFFORTS)
    matrix = _as_matrix(w)
    seed, threads = validate.seed(seed), validate.threads(threads)
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
