"""One budget for a whole model: its meaning, and the matrices that it is spent on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np

from ..calibration.calibration import Calibration
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, EFFORTS, OBJECTIVES, Effort, Objective, one_of
from ..config.recipes import CONFIG_FORMS
from ..config.specs import KroneckerSpec, MatrixSpec
from ..config.tq_config import TQConfig
from ..decomposition.norm import Moments, moments_for
from ..errors import ConfigError

Budget: TypeAlias = float | int | str
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[kmgt]i?b|b)?", re.IGNORECASE)
_QUALITY = re.compile(r"lost[_ ]energy\s*=\s*(\d*\.?\d+(?:e-?\d+)?)\s*", re.IGNORECASE)
_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
# Narrower matrices, such as a classifier's, are not worth compressing.
_NARROWEST = 16
# Embeddings of positions and token types: they are small, and every row is used all the time.
_NOT_TOKENS = re.compile(r"wpe|position|token_type")


@dataclass(frozen=True)
class Spending:
    """A budget and the options of spending it, as `plan` documents them."""

    budget: Budget
    calibration: Calibration | None = None
    objective: Objective = "auto"
    matrices: Sequence[str] | None = None
    max_multiplies: float | None = None
    effort: Effort = DEFAULT_EFFORT
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        one_of("effort", self.effort, EFFORTS)
        one_of("objective", self.objective, OBJECTIVES)


def meaning(budget: Budget) -> str:
    """The meaning of a budget, in words. Raises `ConfigError` for an invalid one."""
    kind, value = _parsed(budget)
    if kind == "share":
        return f"at most {value:.4g} of the model's parameters, all saved tensors counted"
    if kind == "parameters":
        return f"at most {value:,.0f} parameters, all saved tensors counted"
    if kind == "bytes":
        return f"at most {value:,.0f} bytes of weights, beside permutations and headers"
    return f"as few parameters as lose {value:.4g} of the energy of the matrices"


def target_of(budget: Budget, before: int, matrices: int, bytes_each: float) -> tuple[str, float]:
    """The target of the matrices, for the boundary, of a model with `before` parameters of `bytes_each` bytes.

    `matrices` is the number of parameters that the budget may be spent on. Raises `ConfigError` for a budget that the
    other parameters exceed.
    """
    kind, value = _parsed(budget)
    if kind == "lost_energy":
        return kind, value
    allowed = {"share": value * before, "parameters": value, "bytes": value / bytes_each}[kind]
    left = math.floor(allowed) - (before - matrices)
    if left <= 0:
        raise ConfigError(
            f"budget {budget}: {meaning(budget)}, but what is not compressed has {before - matrices:,} of the model's "
            f"{before:,} parameters already"
        )
    return "parameters", float(left)


def _parsed(budget: Budget) -> tuple[str, float]:
    wrong = ConfigError(
        f'budget must be a share of the parameters such as 0.65 or "65%", their number, a size such as "300MB", or '
        f'"lost_energy=0.1", got {budget!r}'
    )
    if isinstance(budget, bool):
        raise wrong
    # numpy's numbers, too.
    if isinstance(budget, Integral):
        kind, value = "parameters", float(min(int(budget), 2**63))
    elif isinstance(budget, Real):
        kind, value = "share", float(budget)
    elif isinstance(budget, str) and (quality := _QUALITY.fullmatch(budget.strip())):
        kind, value = "lost_energy", float(quality[1])
    elif isinstance(budget, str) and (size := _SIZE.fullmatch(budget.strip())):
        number, unit = float(size[1]), (size[2] or "").lower()
        if unit == "%":
            kind, value = "share", number / 100
        elif unit:
            kind, value = "bytes", number * _UNITS[unit]
        else:
            # "0.65" as from a command line; "81336388" is a number of parameters.
            kind, value = ("parameters", number) if number > 1 else ("share", number)
    else:
        raise wrong
    if not 0 < value < math.inf or (kind in ("share", "lost_energy") and value >= 1):
        raise wrong
    return kind, value


def every_matrix(patterns: Sequence[str] | None) -> str:
    """The config, in JSON, that lists the matrices of a model that match `patterns`: all of them for None."""
    if patterns is None:
        patterns = ("*",)
    elif isinstance(patterns, str):
        # One pattern, not one for each of its letters.
        patterns = (patterns,)
    if not patterns:
        raise ConfigError("matrices: expected at least one pattern, got none")
    # Blocks of one entry fit every matrix.
    specs: dict[str, MatrixSpec] = {pattern: KroneckerSpec((1, 1), 1, "none") for pattern in patterns}
    return TQConfig(specs).to_json()


def eligible(listed: Sequence[Mapping[str, Any]], spending: Spending) -> dict[str, Moments]:
    """The matrices of a listing that a budget is spent on, by name, with their moments.

    Without patterns these are all but embeddings of positions, narrow matrices, and those without a moment in the
    calibration.
    """
    patterns, calibration = spending.matrices, spending.calibration
    _check_model(calibration, listed)
    chosen: dict[str, Moments] = {}
    for entry in listed:
        name, shape = entry["name"], entry["shape"]
        if min(shape) < 2 or (patterns is None and _left_out(entry)):
            continue
        # The text may not have gone through all of a model: a pooler, a head.
        if patterns is None and calibration is not None and _unused(calibration, name):
            continue
        chosen[name] = _moments(calibration, spending.objective, name, shape)
    if not chosen:
        raise ConfigError("budget: no matrix to spend it on")
    return chosen


def check_options(
    config: Any, budget: Budget | None, matrices: Sequence[str] | None, max_multiplies: float | None
) -> None:
    """Raises `ConfigError` unless there is either a config or a budget, and for options that go with the other."""
    if matrices is not None and budget is None:
        raise ConfigError("matrices: expected with a budget only: a config names its own")
    if max_multiplies is not None and budget is None:
        raise ConfigError("max_multiplies: expected with a budget only: a config says what its matrices take")
    if (config is None) == (budget is None):
        raise ConfigError(
            f"expected a config ({CONFIG_FORMS}) or budget=…, got {'neither' if config is None else 'both'}"
        )


def cap_of(max_multiplies: float | None) -> float | None:
    """A cap on multiplies, for the boundary. Raises `ConfigError` unless it is a positive number."""
    if max_multiplies is None:
        return None
    number = isinstance(max_multiplies, Real) and not isinstance(max_multiplies, bool)
    if not number or not 0 < max_multiplies < math.inf:
        raise ConfigError(
            "max_multiplies must be a positive share of the multiplies of the dense matrices such as 0.7, got "
            f"{max_multiplies!r}"
        )
    return float(max_multiplies)


def calibrated(calibration: Calibration | None, objective: Objective) -> bool:
    """Whether errors are measured in the norm of a calibration rather than the Frobenius norm."""
    return calibration is not None and objective != "frobenius"


def moments_of(
    calibration: Calibration | None, objective: Objective, listed: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Moments]]:
    """The name and the moments of every matrix of a listing; the moments are None without a calibration.

    Raises `ConfigError` where the calibration lacks the moments of the objective, and that or `ShapeError` where it is
    of another model.
    """
    _check_model(calibration, listed)
    return [(entry["name"], _moments(calibration, objective, entry["name"], entry["shape"])) for entry in listed]


def _check_model(calibration: Calibration | None, listed: Sequence[Mapping[str, Any]]) -> None:
    """Raises `ConfigError` where a calibration has the moments of none of the matrices."""
    names = [entry["name"] for entry in listed]
    if calibration is not None and names and all(calibration.input(name) is None for name in names):
        raise ConfigError(
            f"calibration: expected the moments of {', '.join(names[:3])}…, got none: it is of another model"
        )


def _moments(calibration: Calibration | None, objective: Objective, matrix: str, shape: Sequence[int]) -> Moments:
    if calibration is None:
        return moments_for(objective, None, None)
    calibration.check(matrix, *shape)
    try:
        return moments_for(objective, calibration.input(matrix), calibration.output(matrix))
    except ConfigError as error:
        raise ConfigError(f"{matrix}: {error}") from None


def _left_out(entry: Mapping[str, Any]) -> bool:
    positions = entry["kind"] == "embedding" and _NOT_TOKENS.search(entry["name"]) is not None
    return positions or min(entry["shape"]) < _NARROWEST


def _unused(calibration: Calibration, matrix: str) -> bool:
    """Whether a layer had no input, or no gradient where gradients were measured."""
    if calibration.input(matrix) is None:
        return True
    moment = calibration.output(matrix)
    if moment is None:
        return calibration.sensitivity
    return not np.any(np.diagonal(moment) if moment.ndim == 2 else moment)
