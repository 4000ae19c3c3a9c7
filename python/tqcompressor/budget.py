"""One budget for a whole model: what it means, which matrices it is spent on, and the plan that comes of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration
from .config import TQConfig, split_part
from .errors import ConfigError
from .objective import Moments, moments_for
from .specs import KroneckerSpec, LowRankSpec, MatrixSpec, describe, spec_from_dict
from .tables import format_table

Budget: TypeAlias = float | int | str
# What the boundary says of a matrix: its spec in JSON or None, its parameters, the energy it loses, its energies.
Choice: TypeAlias = tuple[str | None, int, float, NDArray[np.float64]]
# From entries of a listing, their moments by name and the target for the boundary to a choice for each, in order.
Choose: TypeAlias = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Moments], tuple[str, float]], Sequence[Choice]]

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
# Narrower matrices (a classifier's, say) have nothing to save.
_NARROWEST = 16
# Embeddings whose rows are positions or kinds of tokens: small, and every row is used all the time.
_NOT_TOKENS = re.compile(r"wpe|position|token_type")


@dataclass(frozen=True, eq=False)
class PlannedMatrix:
    """What one matrix is to become."""

    name: str
    shape: tuple[int, int]
    spec: MatrixSpec | None
    """None where it stays dense."""
    parameters_before: int
    parameters: int
    lost_energy: float
    """The share of its energy that it then loses, in the norm of the objective."""
    energies: NDArray[np.float64]
    """Its energies in descending order: rank `k` loses all but the first `k`, as a share of their sum."""


@dataclass(frozen=True, eq=False)
class BudgetPlan:
    """How a budget is spent: what `plan` returns, and `compress` follows.

    `str()` is a table that says what the budget means and where it went.
    """

    budget: Budget
    config: TQConfig
    """The config that does it: `compress(model, plan.config)`."""
    matrices: tuple[PlannedMatrix, ...]
    parameters_before: int
    """Of the whole model; a tied head does not count again."""
    parameters: int
    """Of the whole model when done."""
    objective: str
    calibrated: bool
    """Whether the norm is that of a calibration."""

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types, with what the budget means, and without the energies."""
        matrices = [
            {
                "name": matrix.name,
                "shape": list(matrix.shape),
                "spec": None if matrix.spec is None else matrix.spec.to_dict(),
                "parameters_before": matrix.parameters_before,
                "parameters": matrix.parameters,
                "lost_energy": matrix.lost_energy,
            }
            for matrix in self.matrices
        ]
        return {
            "budget": self.budget,
            "meaning": meaning(self.budget),
            "objective": self.objective,
            "calibrated": self.calibrated,
            "parameters_before": self.parameters_before,
            "parameters": self.parameters,
            "config": self.config.to_dict(),
            "matrices": matrices,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        rows = [["matrix", "shape", "becomes", "parameters", "after", "kept", "lost energy"]]
        for matrix in self.matrices:
            kept = f"{matrix.parameters / matrix.parameters_before:.0%}"
            row = [
                matrix.name,
                "×".join(map(str, matrix.shape)),
                "stays dense" if matrix.spec is None else describe(matrix.spec),
            ]
            row += [f"{matrix.parameters_before:,}", f"{matrix.parameters:,}", kept, f"{matrix.lost_energy:.4f}"]
            rows.append(row)
        before, after = self.parameters_before, self.parameters
        rest = before - sum(matrix.parameters_before for matrix in self.matrices)
        rows.append(["everything else", "", "", f"{rest:,}", f"{rest:,}", "100%", ""])
        rows.append(["total", "", "", f"{before:,}", f"{after:,}", f"{after / before:.1%}", ""])
        norm = "in the norm of the calibration" if self.calibrated else "in the Frobenius norm"
        return f"{format_table(rows)}\nbudget {self.budget}: {meaning(self.budget)}; lost energy {norm}"


def meaning(budget: Budget) -> str:
    """What a budget means, in words. Raises `ConfigError` for one that cannot be understood."""
    kind, value = _parsed(budget)
    if kind == "share":
        return f"at most {value:.4g} of the model's parameters, all saved tensors counted"
    if kind == "parameters":
        return f"at most {value:,.0f} parameters, all saved tensors counted"
    if kind == "bytes":
        return f"at most {value:,.0f} bytes of weights, beside permutations and headers"
    return f"as few parameters as lose {value:.4g} of the energy of the matrices"


def target_of(budget: Budget, before: int, matrices: int, bytes_each: float) -> tuple[str, float]:
    """What the matrices may take, for the boundary, of a model of `before` parameters of `bytes_each` bytes.

    `matrices` are the parameters of those that the budget may be spent on. Raises `ConfigError` for a budget that the
    others exceed already, or that needs no compression.
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


def eligible(
    listed: Sequence[Mapping[str, Any]],
    patterns: Sequence[str] | None,
    calibration: Calibration | None,
    objective: str,
) -> dict[str, Moments]:
    """The matrices of a listing that a budget is spent on, by name, with their moments.

    What the user did not name must be worth it: no positions, nothing narrow, and with a calibration nothing that it
    never saw in use.
    """
    _check_model(calibration, listed)
    chosen: dict[str, Moments] = {}
    for entry in listed:
        name, shape = entry["name"], entry["shape"]
        if min(shape) < 2 or (patterns is None and _left_out(entry)):
            continue
        # A model may have more than the text went through: a pooler, a head.
        if patterns is None and calibration is not None and _unused(calibration, name):
            continue
        chosen[name] = _moments(calibration, objective, name, shape)
    if not chosen:
        raise ConfigError("budget: no matrix to spend it on")
    return chosen


def check_options(config: Any, budget: Budget | None, matrices: Sequence[str] | None) -> None:
    """Raises `ConfigError` for options of a compression that exclude each other."""
    if config is not None and budget is not None:
        raise ConfigError("expected either a config or a budget, got both")
    if matrices is not None and budget is None:
        raise ConfigError("matrices: expected with a budget only: a config names its own")


def calibrated(calibration: Calibration | None, objective: str) -> bool:
    """Whether the norm is that of a calibration, and not the Frobenius norm."""
    return calibration is not None and objective != "frobenius"


def moments_of(
    calibration: Calibration | None, objective: str, listed: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Moments]]:
    """The name and the moments of every matrix of a listing; none where there is no calibration.

    Raises `ConfigError` where a calibration lacks what the objective needs, and that or `ShapeError` where it is
    another model's.
    """
    _check_model(calibration, listed)
    return [(entry["name"], _moments(calibration, objective, entry["name"], entry["shape"])) for entry in listed]


def _check_model(calibration: Calibration | None, listed: Sequence[Mapping[str, Any]]) -> None:
    """Raises `ConfigError` where a calibration knows not one of the matrices."""
    names = [entry["name"] for entry in listed]
    if calibration is not None and names and all(calibration.input(name) is None for name in names):
        raise ConfigError(
            f"calibration: expected the moments of {', '.join(names[:3])}…, got none: it is of another model"
        )


def _moments(calibration: Calibration | None, objective: str, matrix: str, shape: Sequence[int]) -> Moments:
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
    """Whether no token went through a layer, or no gradient came back, where gradients were measured."""
    if calibration.input(matrix) is None:
        return True
    moment = calibration.output(matrix)
    if moment is None:
        return calibration.sensitivity
    return not np.any(np.diagonal(moment) if moment.ndim == 2 else moment)


def plan_with(
    choose: Choose,
    listed: Sequence[Mapping[str, Any]],
    model: tuple[int, float],
    budget: Budget,
    *,
    calibration: Calibration | None,
    objective: str,
    matrices: Sequence[str] | None,
    effort: str,
    seed: int,
) -> BudgetPlan:
    """The plan that `choose` makes of a listing of the matrices that match `matrices`.

    `model` are the parameters of the whole model before, and the bytes that each takes when done.
    """
    chosen = eligible(listed, matrices, calibration, objective)
    entries = [entry for entry in listed if entry["name"] in chosen]
    before, bytes_each = model
    spendable = sum(entry["parameters_before"] for entry in entries)
    choices = choose(entries, chosen, target_of(budget, before, spendable, bytes_each))
    found = []
    for entry, (spec, parameters, lost_energy, energies) in zip(entries, choices, strict=True):
        rows, columns = entry["shape"]
        read = None if spec is None else spec_from_dict(json.loads(spec))
        shares = energies / max(float(energies.sum()), np.finfo(np.float64).tiny)
        found.append(
            PlannedMatrix(entry["name"], (rows, columns), read, rows * columns, parameters, lost_energy, shares)
        )
    planned = _fused_together(found)
    specs = {matrix.name: matrix.spec for matrix in planned if matrix.spec is not None}
    if not specs:
        raise ConfigError(f"budget {budget}: {meaning(budget)}, which the model has as it is: nothing to compress")
    after = before - sum(matrix.parameters_before - matrix.parameters for matrix in planned)
    config = TQConfig(specs, effort=effort, seed=seed)
    in_its_norm = calibrated(calibration, objective)
    return BudgetPlan(budget, config, tuple(planned), before, after, objective, in_its_norm)


def _fused_together(matrices: list[PlannedMatrix]) -> list[PlannedMatrix]:
    """Parts of a fused weight are compressed all or none: a dense part beside others gets all but one of its ranks.

    That has one parameter less or so, and loses next to nothing.
    """
    compressed = {split_part(matrix.name)[0] for matrix in matrices if matrix.spec is not None}
    together = []
    for matrix in matrices:
        # A matrix that is no part is not in the set: it is dense.
        if matrix.spec is None and split_part(matrix.name)[0] in compressed:
            spec = LowRankSpec(min(matrix.shape) - 1)
            lost = float(matrix.energies[-1])
            matrix = replace(matrix, spec=spec, parameters=spec.parameters(*matrix.shape), lost_energy=lost)
        together.append(matrix)
    return together
