"""Figures of what compression costs and where, drawn with matplotlib (`pip install "tqcompressor[plots]"`).

Every function returns a `matplotlib.figure.Figure` that is not registered with pyplot: no window opens.
`figure.savefig("plan.png")` writes it; a notebook shows it after `%matplotlib inline`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .compression.budget_plan import BudgetPlan
from .compression.kinds import KINDS, kind_of
from .compression.report import CompressionReport
from .config.specs import KroneckerSpec
from .errors import ConfigError, DtypeError, MissingDependencyError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_block_energy", "plot_frontier", "plot_lost_energy", "plot_plan"]
LostEnergies: TypeAlias = Mapping[str, float] | CompressionReport | BudgetPlan
_MARKERS = "osD^vP*X"
# In larger blocks the numbers of a heat map would overlap.
_MOST_NUMBERS = 64


def plot_lost_energy(methods: Mapping[str, LostEnergies], *, log_scale: bool = False) -> Figure:
    """Draws the lost energy `‖W − Ŵ‖² / ‖W‖²` of every layer, one row per layer and one marker per method.

    Only energies in the same norm can be compared, so all methods should have the same objective.

    Args:
        methods: By the method's name, the lost energies by the layer's name: a mapping, a report of `compress` or
            `compress_checkpoint`, or a plan. Layers come in the order in which they are first named, from the top; one
            that a method does not have has no marker of it.
        log_scale: Whether the axis is logarithmic. Layers without loss are then drawn at a true 0.

    Raises:
        ConfigError: There is nothing to draw, or a report comes from `inspect`, which has no lost energies.
        NonFiniteError: A lost energy is NaN or infinite.
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> import numpy as np
        >>> from tqcompressor import KroneckerSpec, decompose, nearest_kronecker_sum
        >>> w = np.random.default_rng(0).standard_normal((16, 16), dtype=np.float32)
        >>> found = decompose(w, KroneckerSpec(block=(2, 2), rank=1), effort="fast")
        >>> plain = nearest_kronecker_sum(w, found.spec)
        >>> plot_lost_energy({"permuted": {"w": found.lost_energy}, "unpermuted": {"w": plain.lost_energy}})
        <Figure size ...>
    """
    energies = {method: _lost_energies(method, given) for method, given in methods.items()}
    layers = list(dict.fromkeys(layer for found in energies.values() for layer in found))
    if not layers:
        raise ConfigError("methods: no lost energy to draw")
    values = [value for found in energies.values() for value in found.values()]
    figure = _figure(7.5, _height(layers))
    axes = figure.subplots()
    for number, (method, found) in enumerate(energies.items()):
        rows = [row for row, layer in enumerate(layers) if layer in found]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot([found[layers[row]] for row in rows], rows, marker, label=method, alpha=0.8)
    _name_rows(axes, layers)
    _energy_axis(axes, values, log_scale)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def plot_frontier(
    methods: Mapping[str, Iterable[tuple[float, float]]],
    *,
    dense: tuple[float, float] | None = None,
    quality: str = "perplexity",
    log_scale: bool = False,
) -> Figure:
    """Draws quality against parameters: one line per method, its points in the order of their parameters.

    Args:
        methods: By the method's name, pairs `(parameters, quality)`. The parameters are numbers of them, or shares of
            the dense model's from 0 to 1, the same in all pairs.
        dense: The pair of the uncompressed model: a point, and a dashed line at its quality.
        quality: The name of the quality, for the axis.
        log_scale: Whether quality is on a logarithmic axis, as suits perplexities that are far apart.

    Raises:
        ConfigError: There is nothing to draw, parameters are not positive, or shares are mixed with numbers; with
            `log_scale` also a quality that is not positive.
        NonFiniteError: A value is NaN or infinite.
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> scores = {"second moment": [(0.5, 120.0), (0.65, 98.5)], "sensitivity": [(0.5, 101.0), (0.65, 87.9)]}
        >>> plot_frontier(scores, dense=(1.0, 80.4))
        <Figure size ...>
    """
    lines = {method: sorted((float(x), float(y)) for x, y in points) for method, points in methods.items()}
    known = [(method, *point) for method, points in lines.items() for point in points]
    if not known:
        raise ConfigError("methods: no point to draw")
    if dense is not None:
        known.append(("dense", float(dense[0]), float(dense[1])))
    for method, parameters, value in known:
        if not np.isfinite([parameters, value]).all():
            raise NonFiniteError(f"{method}: expected finite parameters and {quality}, got ({parameters}, {value})")
        if parameters <= 0 or (log_scale and value <= 0):
            raise ConfigError(f"{method}: expected positive parameters and {quality}, got ({parameters:g}, {value:g})")
    shares = {parameters <= 1 for _, parameters, _ in known}
    if len(shares) > 1:
        raise ConfigError("parameters: expected either shares up to 1 or numbers in all pairs, got both")
    figure = _figure(7.5, 4.5)
    axes = figure.subplots()
    for number, (method, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.plot(x, y, marker=_MARKERS[number % len(_MARKERS)], label=method)
    if dense is not None:
        axes.axhline(dense[1], color="gray", linestyle="--", linewidth=1)
        axes.plot(*dense, marker="o", color="black", linestyle="none", label="dense model")
    _parameter_axis(axes, shares == {True})
    axes.set_ylabel(quality)
    if log_scale:
        from matplotlib.ticker import LogLocator, ScalarFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_block_energy(
    w: ArrayLike,
    block: tuple[int, int],
    row_permutation: ArrayLike | None = None,
    column_permutation: ArrayLike | None = None,
) -> Figure:
    """Draws how the energy of a matrix is spread over the entries of the block, before and after its permutation.

    Entry `(i2, j2)` of a block `(m2, n2)` has the share `Σ_{i1, j1} W[i1·m2 + i2, j1·n2 + j2]² / ‖W‖²`. A Kronecker sum
    of few terms approximates evenly spread energy badly; the permutations gather the energy in few entries.

    Args:
        w: Shape (m, n), in × out, of any floating dtype; summed in float64.
        block: `(m2, n2)`, which divides the shape.
        row_permutation: Gather indices p of the rows, as in `KroneckerDecomposition.row_permutation`.
        column_permutation: Gather indices q of the columns. Without either there is one map, as `w` stands.

    Raises:
        ShapeError: `w` is not a matrix, the block does not divide it, or an index array does not permute its side.
        DtypeError: `w` is not of a floating dtype.
        NonFiniteError: `w` holds NaN or an infinity.
        ConfigError: The block is not two positive integers, or `w` is zero and has no energy.
        MissingDependencyError: matplotlib is not installed.

    Cost: reads `w` twice.

    Example:
        >>> import numpy as np
        >>> from tqcompressor import KroneckerSpec, decompose
        >>> w = np.random.default_rng(0).standard_normal((16, 32), dtype=np.float32)
        >>> found = decompose(w, KroneckerSpec(block=(2, 4), rank=2), effort="fast")
        >>> plot_block_energy(w, found.spec.block, found.row_permutation, found.column_permutation)
        <Figure size ...>
    """
    matrix = np.asarray(w)
    if matrix.ndim != 2:
        raise ShapeError(f"w: expected a matrix, got {matrix.ndim} dimensions, shape {matrix.shape}")
    if matrix.dtype.kind != "f":
        raise DtypeError(f"w: expected a floating dtype, got {matrix.dtype}")
    rows, columns = matrix.shape
    spec = KroneckerSpec(block, 1)
    spec.check(rows, columns)
    if not np.isfinite(matrix).all():
        raise NonFiniteError("w: holds NaN or an infinity")
    p = _permutation(row_permutation, rows, "row_permutation")
    q = _permutation(column_permutation, columns, "column_permutation")
    maps = {"before the permutation": _block_energy(matrix, spec.block)}
    if row_permutation is not None or column_permutation is not None:
        maps["after the permutation"] = _block_energy(matrix[p][:, q], spec.block)
    figure = _figure(1.5 + 4.0 * len(maps), 4.0)
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    highest = max(float(energy.max()) for energy in maps.values())
    for axes, (title, energy) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(energy, vmin=0.0, vmax=highest, cmap="viridis", aspect="auto")
        axes.set(title=title, xlabel="column in the block", ylabel="row in the block")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        if energy.size <= _MOST_NUMBERS:
            for (row, column), share in np.ndenumerate(energy):
                color = "black" if share > 0.6 * highest else "white"
                axes.text(column, row, f"{share:.1%}", ha="center", va="center", color=color, fontsize="small")
    figure.colorbar(image, ax=list(panels), label="share of the energy")
    return figure


def plot_plan(plan: BudgetPlan) -> Figure:
    """Draws the parameters of each matrix of a plan before and after compression, and its lost energy.

    Pale bars are the parameters before. Full bars are the parameters after, with their share; their colour is the kind
    of the fit. The lost energies beside them are those of the plan, in the norm of its objective.

    Raises:
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> from tqcompressor import plan
        >>> plot_plan(plan("tests/data/tiny-gpt2", 0.65)).savefig("plan.png")
    """
    matrices = plan.matrices
    names = [matrix.name for matrix in matrices]
    rows = range(len(matrices))
    colors = [KINDS[kind_of(matrix.spec)] for matrix in matrices]
    figure = _figure(11.0, _height(names) + 0.4)
    kept, lost = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    kept.barh(rows, [matrix.parameters_before for matrix in matrices], color=colors, alpha=0.3)
    bars = kept.barh(rows, [matrix.parameters_after for matrix in matrices], color=colors)
    shares = [f"{matrix.parameters_after / matrix.parameters_before:.0%}" for matrix in matrices]
    # To the right of the longer bar, where nothing overlaps the text.
    for bar, matrix, share in zip(bars, matrices, shares, strict=True):
        end, middle = max(matrix.parameters_after, matrix.parameters_before), bar.get_y() + bar.get_height() / 2
        kept.annotate(share, (end, middle), (3, 0), textcoords="offset points", va="center", fontsize="small")
    kept.margins(x=0.1)
    _parameter_axis(kept, False)
    _name_rows(kept, names)
    kept.grid(False)
    lost.barh(rows, [matrix.lost_energy for matrix in matrices], color=colors)
    _energy_axis(lost, [matrix.lost_energy for matrix in matrices], False)
    lost.set_xlabel(f"lost energy ({_norm(plan)})")
    after, before = plan.parameters_after, plan.parameters_before
    figure.suptitle(f"budget {plan.budget}: {after:,} of {before:,} parameters, {after / before:.1%}")
    used = {kind_of(matrix.spec) for matrix in matrices}
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=kind) for kind, color in KINDS.items() if kind in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('drawing needs matplotlib: pip install "tqcompressor[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _height(rows: Sequence[str]) -> float:
    """Inches for a figure with one named row for each of `rows`."""
    return 1.2 + 0.24 * max(len(rows), 5)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Labels the rows 0, 1, … from the top of a figure."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _energy_axis(axes: Axes, values: Sequence[float], log_scale: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("lost energy")
    positive = [value for value in values if value > 0]
    if not log_scale or not positive:
        axes.set_xlim(left=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    elif len(positive) == len(values):
        axes.set_xscale("log")
    else:
        # A logarithmic axis has no zero, so this one is linear below the smallest value.
        axes.set_xscale("symlog", linthresh=min(positive))


def _parameter_axis(axes: Axes, shares: bool) -> None:
    from matplotlib.ticker import EngFormatter, PercentFormatter

    axes.set_xlabel("parameters kept" if shares else "parameters")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0) if shares else EngFormatter(sep=""))


def _lost_energies(method: str, given: LostEnergies) -> dict[str, float]:
    found: dict[str, Any]
    if isinstance(given, Mapping):
        found = dict(given)
    else:
        found = {matrix.name: matrix.lost_energy for matrix in given.matrices}
    for layer, value in found.items():
        if value is None:
            raise ConfigError(f"{method}: {layer} has no lost energy yet: it comes from a plan without a fit")
        if not np.isfinite(value):
            raise NonFiniteError(f"{method}: {layer}: expected a finite lost energy, got {value}")
    return {layer: float(value) for layer, value in found.items()}


def _norm(plan: BudgetPlan) -> str:
    if not plan.calibrated or plan.objective == "frobenius":
        return "Frobenius norm"
    if plan.objective == "auto":
        return "norm of the calibration"
    return f"objective {plan.objective}"


def _permutation(given: ArrayLike | None, length: int, name: str) -> NDArray[np.int64]:
    if given is None:
        return np.arange(length)
    indices = np.asarray(given)
    if indices.dtype.kind not in "iu" or not np.array_equal(np.sort(indices, axis=None), np.arange(length)):
        raise ShapeError(f"{name}: expected a permutation of 0 to {length - 1}, got {indices.dtype} {indices.shape}")
    return indices.astype(np.int64).reshape(-1)


def _block_energy(matrix: NDArray[Any], block: tuple[int, int]) -> NDArray[np.float64]:
    """The share of the energy at every entry of the block, shape `block`."""
    m2, n2 = block
    rows, columns = matrix.shape
    values = matrix.astype(np.float64).reshape(rows // m2, m2, columns // n2, n2)
    energy: NDArray[np.float64] = np.einsum("aibj,aibj->ij", values, values)
    total = float(energy.sum())
    if total == 0:
        raise ConfigError("w: expected a matrix that is not zero: it has no energy to draw")
    return energy / total
