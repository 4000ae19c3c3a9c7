"""Decompose one matrix: by a spec or a budget, to its nearest Kronecker sum, or into permutations alone."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, EFFORTS, Effort, Objective, one_of
from ..config.specs import KroneckerSpec, MatrixSpec
from ..errors import ConfigError, DtypeError, NonFiniteError, ShapeError
from ..utils import validate
from ..utils.progress import ProgressOption, reporter
from ..utils.torch_utils import as_array
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
    max_macs: float | None = None,
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
    max_macs: float | None = None,
    moment: MomentOption = None,
    objective: Objective = "auto",
    effort: Effort = DEFAULT_EFFORT,
    seed: int = DEFAULT_SEED,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> Decomposition:
    """Decomposes a matrix by a spec, or as well as a budget of parameters allows.

    Minimises `tr(C_in (W − Ŵ) C_out (W − Ŵ)ᵀ)`, which is the Frobenius norm without moments. The permutations that
    `spec.permute` allows and the factors of a Kronecker sum are searched together (TQCompressor, arXiv 2401.16367; Van
    Loan and Pitsianis, 1993); the result never loses more energy than without permutations. Low rank is the whitened
    truncated singular value decomposition (SVD-LLM, arXiv 2403.07378), in interpolative form. A budget selects the best
    of low rank and sums of it and permuted Kronecker terms with no more parameters; the effort "fast" selects low rank.

    Args:
        w: Shape (m, n), held in × out (the transpose of an `nn.Linear` weight); float16, float32 or float64, computed
            in float32 with float64 sums. A torch tensor may be bfloat16, too, on any device and with a gradient.
        spec: A `KroneckerSpec`, `LowRankSpec`, `GroupedSpec` or `MixedSpec`. Either this or `budget`.
        budget: The share of its `m·n` parameters to keep, such as 0.5, or their number as an integer.
        max_macs: With a budget: the most MACs of one product with a vector, as a share of the `m·n` of `w`; `math.inf`
            for no limit. Default: 1.
        moment: The second moment of the inputs, `C_in = E[x xᵀ]` of shape (m, m), or its diagonal (m,); or a pair of it
            and the second moment `C_out = E[g gᵀ]` of the gradients at the outputs, (n, n) or (n,). Either of a pair
            may be None. Their scale does not matter, and they may be singular.
        objective: The norm of errors: "frobenius", "diagonal", "second_moment" or "sensitivity" (both moments). "auto"
            uses all moments given.
        effort: "fast" (some tenths of a second for 768 × 768), "balanced" (seconds) or "best" (tens of seconds).
        seed: Of the search. The result depends on `w`, the spec or budget, the moments, the effort and the seed alone.
        threads: Worker threads. Default: one per core.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Raises:
        ConfigError: Neither or both of `spec` and `budget`; an invalid effort, objective or budget; an objective
            without its moments.
        ShapeError: `w` is no matrix, or the spec or a moment does not fit it.
        DtypeError: `w` or a moment is not float16, float32 or float64.
        NonFiniteError: `w` or a moment has NaN or an infinity, or `w` or a factor is beyond the range of float32.
        MomentError: A moment is not symmetric or has a negative diagonal.

    Cost: see `effort`; memory for a few float32 copies of `w`.

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
    cap = validate.max_macs(max_macs)
    if cap is not None and budget is None:
        raise ConfigError("max_macs: expected with a budget only: a spec says what it takes")
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
                max_macs=cap,
                effort=effort,
                threads=threads,
                progress=callback,
            )
    return from_fit(fitted)


def _parameters(budget: Any, rows: int, columns: int) -> int:
    """The number of parameters of a budget for one matrix."""
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
    """The nearest Kronecker sum of `w` with the block and rank of `spec`, without permutations.

    It is the truncated singular value decomposition of the rearranged matrix, whose rows are the blocks of `w` (Van
    Loan and Pitsianis, 1993). With `block = (1, n)` it is that of `w` itself. `spec.permute` is ignored. Arguments and
    errors are those of `decompose`.

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
    """Searches gather indices `p` and `q` such that `w[p][:, q]` is near a Kronecker sum of this spec.

    Returns `(p, q, lost_energy)`. It is the search of `decompose` without the factors. Arguments, errors and cost are
    those of `decompose`.

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
    array = as_array(w, "w")
    if array.ndim != 2:
        raise ShapeError(f"w: expected a matrix, got {array.ndim} dimensions, shape {array.shape}")
    if array.dtype.kind != "f":
        raise DtypeError(f"w: expected float16, float32 or float64, got {array.dtype}")
    # A float64 beyond the range of float32 becomes an infinity, which the kernels report.
    with np.errstate(over="ignore"):
        matrix = np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype.itemsize > 4 and array.any() and np.abs(matrix).max() < np.finfo(np.float32).tiny:
        largest = float(np.abs(array).max())
        raise NonFiniteError(f"w: the largest magnitude, {largest:g}, is below the range of float32: scale w up")
    return matrix
