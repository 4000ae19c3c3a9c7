"""The methods that ours is compared with, written from their papers: numpy in float64, `W` held in × out.

Layer by layer, from a spectrum that is computed once and cut for any number of parameters:

- SVD: the truncated singular value decomposition, k(m + n) parameters;
- ASVD (arXiv 2312.05821): the rows of W scaled by (mean |x_i|)^α, α = 0.5; uniform ratio, no search for ranks;
- SVD-LLM (arXiv 2403.07378): whitening by the Cholesky factor of C = Σ x xᵀ; uniform ratio, no fine-tuning;
- SVD-LLM V2 (arXiv 2503.12340): eigenvectors of C in place of Cholesky; ratios by the theoretical loss;
- PIFA (arXiv 2501.19090): any low-rank matrix, exactly, in k(m + n − k) parameters;
- Kronecker sums with the block of the published recipe of TQCompressor (arXiv 2401.16367), permuted or not.

On whole models: structured pruning of heads and hidden units, and layers dropped as DistilGPT-2's were.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from search import kronecker_sum
from tqcompressor import KroneckerSpec, decompose

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Spectrum:
    """`W = left @ right`; the error of the first k terms, in the method's own norm, is `Σ_{i ≥ k} values_i²`."""

    left: Matrix
    values: NDArray[np.float64]
    right: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left), self.right.shape[1]

    def truncated(self, rank: int) -> Matrix:
        return self.left[:, :rank] @ self.right[:rank]

    def tail(self, rank: int) -> float:
        return float((self.values[rank:] ** 2).sum())


# Spectra.


def svd(w: Matrix) -> Spectrum:
    return _scaled_svd(w, None, None)


def asvd(w: Matrix, mean_absolute_input: NDArray[np.float64], alpha: float = 0.5) -> Spectrum:
    """The SVD of `S W` with `S = diag((mean |x|)^α)`; an input that is always 0 is scaled as the smallest other."""
    scale = mean_absolute_input**alpha
    scale = np.maximum(scale, scale[scale > 0].min(initial=1.0))
    return _scaled_svd(w, scale[:, None], 1 / scale[:, None])


def svd_llm(w: Matrix, moment: Matrix) -> Spectrum:
    """The SVD of `Lᵀ W` with the Cholesky factor `C = L Lᵀ`.

    Where C is singular it gets the smallest ridge, of 1e-12, 1e-11, … times its mean diagonal, that Cholesky accepts:
    the paper presumes a regular C.
    """
    ridge = 0.0
    while True:
        try:
            factor = np.linalg.cholesky(moment + ridge * np.eye(len(moment)))
            break
        except np.linalg.LinAlgError:
            ridge = max(10 * ridge, 1e-12 * (moment.trace() / len(moment) or 1.0))
    return _spectrum(factor.T @ w, lambda u: scipy.linalg.solve_triangular(factor, u, lower=True, trans="T"))


def svd_llm_v2(w: Matrix, moment: Matrix) -> Spectrum:
    """The SVD of `Λ^½ Qᵀ W` with the eigenvectors `C = Q Λ Qᵀ`; directions without inputs are left out."""
    eigenvalues, vectors = np.linalg.eigh(moment)
    seen = eigenvalues > 1e-13 * eigenvalues[-1]
    root, vectors = np.sqrt(eigenvalues[seen]), vectors[:, seen]
    return _spectrum((root[:, None] * vectors.T) @ w, lambda u: (vectors / root) @ u)


def _scaled_svd(w, scale, inverse) -> Spectrum:
    if scale is None:
        return _spectrum(w, lambda u: u)
    return _spectrum(scale * w, lambda u: inverse * u)


def _spectrum(whitened: Matrix, undo) -> Spectrum:
    u, values, right = np.linalg.svd(whitened, full_matrices=False)
    return Spectrum(undo(u * values), values, right)


# Ranks within a number of parameters.


def low_rank_within(shape: tuple[int, int], parameters: float) -> int:
    """The largest k with `k(m + n)` at most `parameters`."""
    return int(parameters // sum(shape))


def pifa_rank_within(shape: tuple[int, int], parameters: float) -> int:
    """The largest k up to min(m, n) with `k(m + n − k)` at most `parameters`, which grows with k up to there."""
    k = np.arange(min(shape) + 1)
    return int(np.searchsorted(k * (sum(shape) - k), parameters, side="right")) - 1


def svd_llm_v2_shares(spectra: Mapping[str, Spectrum], groups: Mapping[str, str], share: float) -> dict[str, float]:
    """The share of its parameters that each matrix keeps, `share` on average within each group.

    With L the theoretical loss at the uniform ratio, `‖X(W − Ŵ)‖` over all calibration tokens, a matrix of a group
    loses the ratio `(1 − share) · len(group) · (1 / log L) / Σ_group (1 / log L)`. Raises `ValueError` for a loss of
    at most 1, where the paper's formula means nothing.
    """
    inverse_logs = {}
    for name, spectrum in spectra.items():
        rows, columns = spectrum.shape
        loss = spectrum.tail(low_rank_within(spectrum.shape, share * rows * columns)) ** 0.5
        if loss <= 1:
            raise ValueError(f"{name}: SVD-LLM V2's ratios need a theoretical loss above 1, got {loss}")
        inverse_logs[name] = 1 / np.log(loss)
    shares = {}
    for name in spectra:
        of_group = [value for other, value in inverse_logs.items() if groups[other] == groups[name]]
        shares[name] = 1 - (1 - share) * inverse_logs[name] * len(of_group) / sum(of_group)
    return shares


# Pivoting factorization.


@dataclass(frozen=True)
class PivotingFactorization:
    """A matrix of rank k: k columns as they are, the others as linear combinations of them.

    The paper's "pivot rows" are rows of out × in, columns here.
    """

    pivots: NDArray[np.int64]
    others: NDArray[np.int64]
    columns: Matrix
    """(m, k)."""
    coefficients: Matrix
    """(k, n − k)."""

    @property
    def parameters(self) -> int:
        return self.columns.size + self.coefficients.size

    def matrix(self) -> Matrix:
        dense = np.empty((len(self.columns), len(self.pivots) + len(self.others)))
        dense[:, self.pivots] = self.columns
        dense[:, self.others] = self.columns @ self.coefficients
        return dense


def pifa(left: Matrix, right: Matrix) -> PivotingFactorization:
    """`left @ right`, of shapes (m, k) and (k, n): pivots by a QR decomposition with column pivoting."""
    rank = right.shape[0]
    # `left = Q R`: the columns of `left @ right` are related as those of the small `R @ right` are.
    small = np.linalg.qr(left, mode="r") @ right
    triangle, order = scipy.linalg.qr(small, mode="r", pivoting=True)
    coefficients = scipy.linalg.solve_triangular(triangle[:, :rank], triangle[:, rank:])
    pivots, others = order[:rank], order[rank:]
    return PivotingFactorization(pivots, others, left @ right[:, pivots], coefficients)


# Kronecker sums.


def recipe_block(shape: tuple[int, int]) -> tuple[int, int]:
    """(2, 4), and the transpose for matrices that are taller than wide, as the published recipe has it."""
    return (2, 4) if shape[0] <= shape[1] else (4, 2)


def kronecker_parameters(shape: tuple[int, int], rank: int) -> int:
    size = recipe_block(shape)[0] * recipe_block(shape)[1]
    return rank * (shape[0] * shape[1] // size + size)


def kronecker(w: Matrix, rank: int, permuted: bool) -> Matrix:
    """Permuted by this package's own search at effort "fast": the paper has published no search."""
    if not permuted:
        return kronecker_sum(w, recipe_block(w.shape), rank)
    spec = KroneckerSpec(recipe_block(w.shape), rank)
    return decompose(w.astype(np.float32), spec, effort="fast").reconstruct().astype(np.float64)


def dealt_ranks(
    shapes: Mapping[str, tuple[int, int]], errors: Mapping[str, Sequence[float]], base: int, parameters: float
) -> dict[str, int]:
    """Rank `base` or `base + 1` for every matrix, so that a budget between the two is used up.

    `errors[name]` are those of the two ranks; the higher rank goes where it gains most per parameter.
    """
    ranks = dict.fromkeys(shapes, base)
    left = parameters - sum(kronecker_parameters(shape, base) for shape in shapes.values())
    price = {name: kronecker_parameters(shape, 1) for name, shape in shapes.items()}
    for name in sorted(shapes, key=lambda name: (errors[name][1] - errors[name][0]) / price[name]):
        if price[name] <= left:
            ranks[name] += 1
            left -= price[name]
    return ranks


# Whole models.


def kept_of_block(width: int, hidden: int, heads: int, share: float) -> tuple[int, int]:
    """Heads and hidden units to keep of one transformer block, at most `share` of the parameters of its matrices.

    Four width × width matrices in attention, two width × hidden ones in the MLP. Heads first, the largest number that
    is at most `share` of them; hidden units for what is left.
    """
    kept_heads = max(1, int(share * heads))
    parameters = share * (4 * width * width + 2 * width * hidden) - 4 * width * (width // heads) * kept_heads
    return kept_heads, int(min(hidden, parameters // (2 * width)))


def strongest(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The indices of the `count` largest, in ascending order."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def kept_layers(layers: int, share: float) -> list[int]:
    """Evenly spaced, the first and the last among them: [0, 2, 4, 7, 9, 11] of 12 for a half, as DistilGPT-2 began."""
    count = max(1, int(share * layers))
    return [int(index) for index in np.rint(np.linspace(0, layers - 1, count))]
