"""One budget for a whole model: its meaning, and the matrices that it is spent on."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np

from .._core import UNCALIBRATED_BUDGET, MatrixInfo
from ..calibration.calibration import Calibration
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, EFFORTS, OBJECTIVES, Effort, Objective, StoredDtype, one_of
from ..config.recipes import CONFIG_FORMS
from ..config.tq_config import INT8
from ..decomposition.norm import Moments, moments_for
from ..errors import ConfigError
from ..utils import validate
from ..utils.sizes import size_in_bytes

Budget: TypeAlias = float | int | str
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
# At least as many as the groups of rows that an embedding is cut into.
_GROUPS = 16
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*(%?)")
_QUALITY = re.compile(r"lost[_ ]energy\s*=\s*(\d*\.?\d+(?:e-?\d+)?)\s*", re.IGNORECASE)
# How many matrices that stay dense a note names for each reason.
_NAMED = 4
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
    max_macs: float | None = None
    effort: Effort = DEFAULT_EFFORT
    seed: int = DEFAULT_SEED
    dtype: StoredDtype | None = None
    """Of the result: a budget in bytes depends on it, and int8 alone may meet it."""

    def __post_init__(self) -> None:
        one_of("effort", self.effort, EFFORTS)
        one_of("objective", self.objective, OBJECTIVES)
        validate.seed(self.seed)


def meaning(budget: Budget) -> str:
    """The meaning of a budget, in words. Raises `ConfigError` for an invalid one."""
    kind, value = parsed(budget)
    if kind == "share":
        return f"at most {value:.4g} of the model's parameters, all saved tensors counted"
    if kind == "parameters":
        return f"at most {value:,.0f} parameters, all saved tensors counted"
    if kind == "bytes":
        return f"at most {value:,.0f} bytes of weights, beside permutations and headers"
    return f"as few parameters as lose {value:.4g} of the energy of the matrices"


def target_of(budget: Budget, before: int, matrices: int, bytes_each: float, beside: float = 0.0) -> dict[str, Any]:
    """The target of the matrices, as the boundary takes it, of a model with `before` parameters of `bytes_each` bytes.

    `matrices` is the number of parameters that the budget may be spent on; `beside` are bytes that the model takes
    besides, of scales. Raises `ConfigError` for a budget that the other parameters exceed.
    """
    kind, value = parsed(budget)
    if kind == "lost_energy":
        return {"lost_energy": value}
    allowed = {"share": value * before, "parameters": value, "bytes": (value - beside) / bytes_each}[kind]
    left = math.floor(allowed) - (before - matrices)
    if left <= 0:
        raise ConfigError(
            f"budget {budget}: {meaning(budget)}, but what is not compressed has {before - matrices:,} of the model's "
            f"{before:,} parameters already"
        )
    return {"parameters": left}


def parsed(budget: Budget) -> tuple[str, float]:
    """The kind of a budget ("share", "parameters", "bytes" or "lost_energy") and its number; raises as `meaning`."""
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
    elif isinstance(budget, str) and (plain := _NUMBER.fullmatch(budget.strip())):
        number = float(plain[1])
        if plain[2]:
            kind, value = "share", number / 100
        else:
            # "0.65" as from a command line; "81336388" is a number of parameters.
            kind, value = ("parameters", number) if number > 1 else ("share", number)
    elif isinstance(budget, str) and (size := size_in_bytes(budget)) is not None:
        kind, value = "bytes", size
    else:
        raise wrong
    if not 0 < value < math.inf or (kind in ("share", "lost_energy") and value >= 1):
        raise wrong
    return kind, value


def matrix_patterns(matrices: Sequence[str] | None) -> list[str] | None:
    """The patterns that a budget's `matrices` means, for the boundary; None for all matrices.

    Raises `ConfigError` for none at all.
    """
    if matrices is None:
        return None
    # One pattern, not one for each of its letters.
    patterns = [matrices] if isinstance(matrices, str) else list(matrices)
    if not patterns:
        raise ConfigError("matrices: expected at least one pattern, got none")
    return patterns


def eligible(listed: Sequence[MatrixInfo], spending: Spending) -> dict[str, Moments]:
    """The matrices of a listing that a budget is spent on, by name, with their moments.

    Without patterns these are all but embeddings of positions, narrow matrices, and those without a moment in the
    calibration.
    """
    patterns, calibration = spending.matrices, spending.calibration
    check_model(calibration, [matrix.name for matrix in listed])
    chosen: dict[str, Moments] = {}
    for matrix in listed:
        if min(matrix.shape) < 2 or (patterns is None and _left_out(matrix)):
            continue
        # The text may not have gone through all of a model: a pooler, a head.
        if patterns is None and calibration is not None and _unused(calibration, matrix.name):
            continue
        chosen[matrix.name] = _moments(calibration, spending.objective, matrix)
    if not chosen:
        raise ConfigError("budget: no matrix to spend it on")
    return chosen


def check_options(
    config: Any,
    budget: Budget | None,
    matrices: Sequence[str] | None,
    max_macs: float | None,
    calibration: object,
    text: object,
    dtype: str | None = None,
) -> None:
    """Raises `ConfigError` unless there is either a config or a budget, and for options that go with the other.

    There is at most one of a calibration and a text to calibrate on. int8 as a dtype needs neither config nor budget.
    """
    if text is not None and calibration is not None:
        raise ConfigError("expected a calibration or a text to calibrate on, got both")
    if matrices is not None and budget is None:
        raise ConfigError("matrices: expected with a budget only: a config names its own")
    if max_macs is not None and budget is None:
        raise ConfigError("max_macs: expected with a budget only: a config says what its matrices take")
    if config is None and budget is None and dtype == INT8:
        return
    if (config is None) == (budget is None):
        raise ConfigError(
            f"expected a config ({CONFIG_FORMS}) or budget=…, got {'neither' if config is None else 'both'}"
        )


def calibrated(calibration: Calibration | None, objective: Objective) -> bool:
    """Whether errors are measured in the norm of a calibration rather than the Frobenius norm."""
    return calibration is not None and objective != "frobenius"


def note_of(calibrated: bool, left_dense: Mapping[str, str]) -> str | None:
    """What a reader must know of a budget: that there is no calibration, and which matrices it cannot be spent on.

    `left_dense` has the reason for each of these.
    """
    notes = [] if calibrated else [UNCALIBRATED_BUDGET]
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in left_dense.items():
        names[reason].append(name)
    for reason, those in names.items():
        more = f" and {len(those) - _NAMED} more" if len(those) > _NAMED else ""
        notes.append(f"stays dense: {', '.join(those[:_NAMED])}{more}: {reason}")
    return "\n".join(notes) or None


def moments_of(
    calibration: Calibration | None, objective: Objective, listed: Sequence[MatrixInfo]
) -> list[tuple[str, Moments]]:
    """The name and the moments of every matrix of a listing; the moments are None without a calibration.

    Raises `ConfigError` where the calibration lacks the moments of the objective, and that or `ShapeError` where it is
    of another model.
    """
    check_model(calibration, [matrix.name for matrix in listed])
    return [(matrix.name, _moments(calibration, objective, matrix)) for matrix in listed]


def check_model(calibration: Calibration | None, names: Sequence[str]) -> None:
    """Raises `ConfigError` where a calibration has the moments of none of the matrices."""
    if calibration is not None and names and all(calibration.input(name) is None for name in names):
        raise ConfigError(
            f"calibration: expected the moments of {', '.join(names[:3])}…, got none: it is of another model"
        )


def _moments(calibration: Calibration | None, objective: Objective, matrix: MatrixInfo) -> Moments:
    if calibration is None:
        return moments_for(objective, None, None)
    calibration.check(matrix.name, *matrix.shape)
    try:
        return moments_for(objective, calibration.input(matrix.name), calibration.output(matrix.name))
    except ConfigError as error:
        raise ConfigError(f"{matrix.name}: {error}") from None


def _left_out(matrix: MatrixInfo) -> bool:
    positions = matrix.kind == "embedding" and _NOT_TOKENS.search(matrix.name) is not None
    return positions or min(matrix.shape) < _NARROWEST


def _unused(calibration: Calibration, matrix: str) -> bool:
    """Whether a layer had no input, or no gradient where gradients were measured."""
    if calibration.input(matrix) is None:
        return True
    moment = calibration.output(matrix)
    if moment is None:
        return calibration.sensitivity
    return not np.any(np.diagonal(moment) if moment.ndim == 2 else moment)


def stored_sizes(
    listed: Sequence[MatrixInfo], before: int, bytes_each: float, dtype: str | None
) -> tuple[int, float, float]:
    """How `BudgetRequest.of` takes a model of `before` parameters that take `bytes_each` in their own dtypes.

    `listed` are all of its matrices. Eight-bit weights take one byte each, and two for each scale: one for each output,
    and at most as many as the shorter side has for the other factor. All that is no matrix keeps its dtype.
    """
    if dtype != INT8:
        return before, _BYTES.get(dtype or "", bytes_each), 0.0
    others = before - sum(matrix.parameters_before for matrix in listed)
    scales = 0
    for matrix in listed:
        embedding = matrix.kind == "embedding"
        # The rows of an embedding may be in some groups, each with a second factor.
        scales += matrix.shape[0 if embedding else 1] + min(matrix.shape) * (_GROUPS if embedding else 1)
    return before, 1.0, others * (bytes_each - 1) + 2 * scales
