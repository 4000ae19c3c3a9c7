"""What a compression on disk will take, before it begins: about how many seconds, and how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import _core
from .._core import MatrixInfo
from ..config.choices import DEFAULT_EFFORT, EFFORTS, Effort, one_of
from ..config.recipes import ConfigOption, resolve_config
from ..config.specs import KroneckerSpec, MatrixSpec, MixedSpec
from ..errors import ConfigError
from ..utils import validate
from ..utils.hub import StrPath, local_directory
from ..utils.portable import processors
from .budget import Budget, Spending, eligible, matrix_patterns, meaning

# Seconds on one core of an AMD EPYC (Zen 4), measured on matrices of 256 to 4096 rows. For sides s ≤ l: an
# eigendecomposition is s³ of these, a product s²·l.
_EIGEN, _PRODUCT = 2.5e-10, 6.2e-11
# Finding the best approximation of any kind, s²·l of these.
_REFINE: dict[str, float] = {"fast": 0.0, "balanced": 7e-9, "best": 5e-8}
# Searching the permutations of a Kronecker sum, for each value of the matrix.
_SEARCH: dict[str, float] = {"fast": 2.2e-7, "balanced": 9.7e-7, "best": 5e-6}
# A forward and a backward pass, for each token and parameter.
_PASS = 2e-10
# Bytes read, checked or written a second.
_DISK = 4e8
# Bytes of the interpreter and this package; of each value of a matrix that is being worked on, with its factors; and of
# the copies of an s × s matrix in float64.
_BASE, _VALUE, _SQUARE = 90 << 20, 6, 4 * 8


@dataclass(frozen=True)
class CostEstimate:
    """About what a compression takes: the times of another machine differ by its speed, and by other work on it."""

    seconds: float
    """Wall-clock time of all phases."""
    peak_bytes: int
    """Memory at most, beside a calibration that the caller holds."""
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """One sentence.

        >>> print(CostEstimate(400.0, 1_400_000_000, 2))
        about 7 minutes and 1.4 GB of memory on 2 threads
        """
        on = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"about {duration(self.seconds)} and {_size(self.peak_bytes)} of memory on {on}"


def estimate_cost(
    source: StrPath,
    config: ConfigOption | None = None,
    *,
    budget: Budget | None = None,
    calibrated: bool = False,
    tokens: int = 0,
    matrices: Sequence[str] | None = None,
    effort: Effort | None = None,
    threads: int | None = None,
) -> CostEstimate:
    """About what `compress_checkpoint` will take, from the shapes of the matrices alone.

    Args:
        source, config, budget, matrices, effort, threads: As for `compress_checkpoint`.
        calibrated: Whether there is a calibration with both moments.
        tokens: Tokens of a text to calibrate on, `num_samples · seq_len`.

    Raises:
        ConfigError, CheckpointError, ShapeError: As `compress_checkpoint`, as far as shapes show them.

    Cost: reads the headers of the source.

    Example:
        >>> estimate_cost("tests/data/tiny-gpt2", budget=0.65).seconds < 60
        True
    """
    if (config is None) == (budget is None):
        raise ConfigError("expected a config or budget=… to estimate, got neither or both")
    checkpoint = _core.Checkpoint.open(local_directory(source))
    options: dict[str, Any] = {"calibrated": calibrated, "tokens": tokens, "matrices": matrices, "effort": effort}
    return cost_of(checkpoint, config, budget, **options, threads=validate.threads(threads))


def cost_of(
    checkpoint: _core.Checkpoint,
    config: ConfigOption | None,
    budget: Budget | None,
    *,
    calibrated: bool,
    tokens: int,
    matrices: Sequence[str] | None,
    effort: Effort | None,
    threads: int | None,
) -> CostEstimate:
    """`estimate_cost` for an open checkpoint, for either a config or a budget."""
    count = threads or processors()
    if budget is None:
        resolved = resolve_config(config, effort=effort)
        listed: Sequence[MatrixInfo] = checkpoint.plan(resolved).matrices
        effort = resolved.effort
    else:
        effort = effort or DEFAULT_EFFORT
        one_of("effort", effort, EFFORTS)
        meaning(budget)
        found = checkpoint.list_matrices(matrix_patterns(matrices))
        chosen = eligible(found, Spending(budget, matrices=matrices))
        listed = [matrix for matrix in found if matrix.name in chosen]
    calibrated = calibrated or tokens > 0
    planned = sum(_spectrum(matrix, calibrated) for matrix in listed)
    spectra = sum(_bytes_of_spectrum(matrix, calibrated) for matrix in listed)
    kept = min(spectra, _core.KEPT_SPECTRA) if budget is not None else 0
    if budget is None:
        work = sum(_fit(matrix, matrix.spec, effort, calibrated) for matrix in listed)
    else:
        again = 0.0 if effort != "fast" else planned * (1 - kept / max(spectra, 1))
        work = planned + again + sum(_low_rank(matrix) + _REFINE[effort] * _product(matrix) for matrix in listed)
    seconds = work / min(count, max(len(listed), 1)) + 3 * checkpoint.bytes / _DISK
    seconds += _PASS * tokens * checkpoint.parameters / count
    largest = sorted((_bytes_of_work(matrix, calibrated) for matrix in listed), reverse=True)
    peak = _BASE + kept + sum(largest[:count])
    if tokens:
        # The model in float32, its gradients at work, and the moments.
        peak = max(peak, _BASE + 8 * checkpoint.parameters)
    return CostEstimate(seconds, int(peak), count)


def _sides(matrix: MatrixInfo) -> tuple[int, int]:
    short, long = sorted(matrix.shape)
    return short, long


def _product(matrix: MatrixInfo) -> float:
    short, long = _sides(matrix)
    return float(short) ** 2 * long


def _spectrum(matrix: MatrixInfo, calibrated: bool) -> float:
    short, long = _sides(matrix)
    seconds = _EIGEN * short**3 + _PRODUCT * _product(matrix)
    if calibrated:
        seconds += (_EIGEN + 2 * _PRODUCT) * short**3
        if matrix.kind != "embedding":
            # The moment of the longer side. That of an embedding's rows is its diagonal.
            seconds += _PRODUCT * short * float(long) ** 2
    return seconds


def _low_rank(matrix: MatrixInfo) -> float:
    return 0.7 * _PRODUCT * _product(matrix)


def _fit(matrix: MatrixInfo, spec: MatrixSpec | None, effort: str, calibrated: bool) -> float:
    seconds = 0.0
    for term in spec.terms if isinstance(spec, MixedSpec) else (spec,):
        if isinstance(term, KroneckerSpec):
            seconds += _SEARCH[effort] * matrix.shape[0] * matrix.shape[1]
        else:
            seconds += _spectrum(matrix, calibrated) + _low_rank(matrix)
    return seconds


def _bytes_of_spectrum(matrix: MatrixInfo, calibrated: bool) -> int:
    return 8 * (2 if calibrated else 1) * _sides(matrix)[0] ** 2


def _bytes_of_work(matrix: MatrixInfo, calibrated: bool) -> int:
    short, long = _sides(matrix)
    size = _VALUE * short * long + _SQUARE * short**2
    if calibrated:
        size += _SQUARE * short**2 + (0 if matrix.kind == "embedding" else 12 * long**2)
    return size


def duration(seconds: float) -> str:
    """About how long, in words."""
    if seconds < 10:
        return "some seconds"
    if seconds < 90:
        return f"{round(seconds, -1):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 95e7 else f"{round(count / 1e6, -1):.0f} MB"
