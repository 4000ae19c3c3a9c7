"""The methods that ours is compared with, written from their papers: numpy in float64, `W` held in × out.

Layer by layer, from a spectrum that is computed once and cut for any number of parameters:

- SVD: the truncated singular value decomposition, k(m + n) parameters;
- ASVD (arXiv 2312.05821): the rows of W scaled by (mean |x_i|)^α, α = 0.5; uniform ratio, no search for ranks;
- SVD-LLM (arXiv 2403.07378): whitening by the Cholesky factor of C = Σ x xᵀ; uniform ratio, no fine-tuning;
- SVD-LLM V2 (arXiv 2503.12340): eigenvectors of C in place of Cholesky; ratios by the theoretical loss;
- PIFA (arXiv 2501.19090): any low-rank matrix, exactly, in k(m + n − k) parameters;
- two-sided: the SVD of `C^½ W G^½` with the second moments of the inputs and of the gradients at the outputs, the
  objective of OBD-LLM (arXiv 2604.00821), GFWSVD (2505.17974) and IO-SVD (2605.15626); with one ratio, or with ranks by
  the error per parameter over all matrices;
- AA-SVD (arXiv 2604.02119): the original layer's outputs, fitted from its inputs in the model compressed so far;
- Kronecker sums with the block of the published recipe of TQCompressor (arXiv 2401.16367), permuted or not.

On whole models: structured pruning of heads and hidden units, layers dropped as DistilGPT-2's were, and MoDeGPT
(arXiv 2408.09632), which makes the inner dimensions of attention and MLP smaller.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from search import kronecker_sum
from tqcompressor import KroneckerSpec, decompose

Matrix = NDArray[np.float64]


class NotDefined(ValueError):
    """A method has no result for a model and a budget."""


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
    root, vectors = _seen_directions(moment)
    return _spectrum((root[:, None] * vectors.T) @ w, lambda u: (vectors / root) @ u)


def two_sided(w: Matrix, inputs: Matrix, gradients: Matrix) -> Spectrum:
    """The SVD of `C^½ W G^½`; directions that are without inputs or gradients are left out."""
    (root_in, vectors_in), (root_out, vectors_out) = (_seen_directions(moment) for moment in (inputs, gradients))
    scaled = root_in[:, None] * (vectors_in.T @ w @ vectors_out) * root_out
    u, values, right = np.linalg.svd(scaled, full_matrices=False)
    return Spectrum(vectors_in @ (u * values / root_in[:, None]), values, (right / root_out) @ vectors_out.T)


def anchored(w: Matrix, shifted: Matrix, cross: Matrix) -> Spectrum:
    """The best `Ŵ` of each rank for `‖X W − X̂ Ŵ‖`, with `shifted = X̂ᵀ X̂` and `cross = X̂ᵀ X`.

    It is the SVD, in the norm of `X̂`, of the regression `(X̂ᵀ X̂)⁻¹ X̂ᵀ X W`, whose own error no rank can mend.
    """
    root, vectors = _seen_directions(shifted)
    return svd_llm_v2(vectors @ ((vectors.T @ cross @ w) / (root**2)[:, None]), shifted)


def _seen_directions(moment: Matrix) -> tuple[NDArray[np.float64], Matrix]:
    """The roots of the eigenvalues of a moment that are not 0, and their eigenvectors."""
    eigenvalues, vectors = np.linalg.eigh(moment)
    seen = eigenvalues > 1e-13 * eigenvalues[-1]
    return np.sqrt(eigenvalues[seen]), vectors[:, seen]


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
    loses the ratio `(1 − share) · len(group) · (1 / log L) / Σ_group (1 / log L)`. Raises `NotDefined` for a loss of
    at most 1, where the paper's formula means nothing.
    """
    inverse_logs = {}
    for name, spectrum in spectra.items():
        rows, columns = spectrum.shape
        loss = spectrum.tail(low_rank_within(spectrum.shape, share * rows * columns)) ** 0.5
        if loss <= 1:
            raise NotDefined(f"{name}: SVD-LLM V2's ratios need a theoretical loss above 1, got {loss}")
        inverse_logs[name] = 1 / np.log(loss)
    shares = {}
    for name in spectra:
        of_group = [value for other, value in inverse_logs.items() if groups[other] == groups[name]]
        shares[name] = 1 - (1 - share) * inverse_logs[name] * len(of_group) / sum(of_group)
    return shares


def global_ranks(spectra: Mapping[str, Spectrum], parameters: float) -> dict[str, int | None]:
    """Ranks of all matrices, with at most `parameters` of plain factors, that lose the least in sum; None is dense.

    A matrix offers its ranks below `mn / (m + n)`, and itself. The pieces of the lower hulls of their losses over their
    parameters are taken, steepest first, for as long as those of a matrix fit.
    """
    pieces = []
    for name, spectrum in spectra.items():
        rows, columns = spectrum.shape
        tails = np.append(np.cumsum(spectrum.values[::-1] ** 2)[::-1], 0.0)
        ranks = range((rows * columns - 1) // (rows + columns) + 1)
        points = [(rank * (rows + columns), float(tails[rank]), rank) for rank in ranks]
        points.append((rows * columns, 0.0, None))
        for (cost, loss, _), (next_cost, next_loss, rank) in itertools.pairwise(lower_hull(points)):
            pieces.append(((loss - next_loss) / (next_cost - cost), next_cost - cost, name, rank))
    chosen: dict[str, int | None] = dict.fromkeys(spectra, 0)
    full = set()
    for _, cost, name, rank in sorted(pieces, key=lambda piece: -piece[0]):
        if name in full or cost > parameters:
            full.add(name)
            continue
        parameters -= cost
        chosen[name] = rank
    return chosen


def lower_hull(points: Sequence[tuple]) -> list[tuple]:
    """The points on the lower convex hull of the first two coordinates, which ascend and descend."""
    hull: list[tuple] = []
    for x, y, *rest in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y, *rest))
    return hull


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


def nystrom(moment: Matrix, down: Matrix, units: int) -> Matrix:
    """MoDeGPT's MLP: `down` with the rows of all but `units` hidden units set to 0, and the others fitted.

    The units are those of the largest ridge leverage scores of the activations' second moment C, and the rows that
    stay are `(Sᵀ C S)⁻¹ Sᵀ C down`. The ridge is the mean of C's diagonal.
    """
    ridge = moment.trace() / len(moment)
    scores = np.linalg.solve(moment + ridge * np.eye(len(moment)), moment).diagonal()
    kept = strongest(scores, units)
    inner = moment[np.ix_(kept, kept)]
    fitted = np.zeros_like(down)
    fitted[kept] = np.linalg.solve(inner + 1e-9 * ridge * np.eye(units), moment[kept] @ down)
    return fitted


def kept_of_head(moment: Matrix, queries: Sequence[Matrix], key: Matrix, size: int, rotary: bool) -> NDArray[np.int64]:
    """MoDeGPT's queries and keys: the `size` dimensions of one key head that count most.

    By `‖C^½ q_i‖ ‖C^½ k_i‖`, with the query heads that read the key taken together. A rotary embedding turns pairs of
    dimensions, half a head apart, which stay or go together.
    """
    energy_q = sum(np.einsum("ij,ij->j", query, moment @ query) for query in queries)
    scores = np.sqrt(energy_q * np.einsum("ij,ij->j", key, moment @ key))
    if not rotary:
        return strongest(scores, size)
    half = len(scores) // 2
    kept = strongest(scores[:half] + scores[half:], size // 2)
    return np.concatenate([kept, kept + half])


def value_and_output(moment: Matrix, value: Matrix, outputs: Matrix, size: int) -> tuple[Matrix, Matrix]:
    """MoDeGPT's values: the best product of rank `size` of a value head and all that reads it, `outputs` side by side.

    In the norm of the inputs; the dimensions beyond `size` are 0.
    """
    root, vectors = _seen_directions(moment)
    # The product is as low in rank as a head is wide, so a QR decomposition makes the SVD small.
    q, r = np.linalg.qr((root[:, None] * vectors.T) @ value)
    u, values, right = np.linalg.svd(r @ outputs, full_matrices=False)
    new_value, new_outputs = np.zeros_like(value), np.zeros_like(outputs)
    new_value[:, :size] = (vectors / root) @ (q @ u[:, :size] * values[:size])
    new_outputs[:size] = right[:size]
    return new_value, new_outputs


def modegpt_shares(influences: NDArray[np.float64], share: float, temperature: float) -> NDArray[np.float64]:
    """The share that each block keeps: it loses `L (1 − share) softmax(−influence / temperature)`.

    A block's influence is `1 − cos(x, y)` between its inputs and outputs. Where a block would lose more than all, the
    temperature is doubled until none does.
    """
    while True:
        weights = np.exp(-(influences - influences.min()) / temperature)
        shares = 1 - len(influences) * (1 - share) * weights / weights.sum()
        if shares.min() > 0:
            return shares
        temperature *= 2


def strongest(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The indices of the `count` largest, in ascending order."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def kept_layers(layers: int, share: float) -> list[int]:
    """Evenly spaced, the first and the last among them: [0, 2, 4, 7, 9, 11] of 12 for a half, as DistilGPT-2 began."""
    count = max(1, int(share * layers))
    return [int(index) for index in np.rint(np.linspace(0, layers - 1, count))]
