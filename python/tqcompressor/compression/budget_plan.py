"""The plan of a budget: the spec, parameters and lost energy of every matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..config.choices import Objective
from ..config.specs import LowRankSpec, MatrixSpec, describe, spec_from_dict
from ..config.tq_config import TQConfig, split_part
from ..decomposition.norm import Moments
from ..errors import ConfigError
from ..utils.tables import format_table
from .budget import Budget, Spending, calibrated, cap_of, eligible, meaning, target_of

# What the boundary says of a matrix: its spec in JSON or None, its parameters, its multiplies before and after, the
# energy that it loses, its energies.
Choice: TypeAlias = tuple[str | None, int, tuple[int, int], float, NDArray[np.float64]]
# From entries of a listing, their moments by name, and the target and the cap on multiplies for the boundary, to a
# choice for each entry.
Choose: TypeAlias = Callable[
    [Sequence[Mapping[str, Any]], Mapping[str, Moments], tuple[str, float], float | None], Sequence[Choice]
]


@dataclass(frozen=True, eq=False)
class PlannedMatrix:
    """The plan of one matrix."""

    name: str
    shape: tuple[int, int]
    spec: MatrixSpec | None
    """None where it stays dense."""
    parameters_before: int
    parameters_after: int
    multiplies_before: int
    """For one token: none for an embedding that is only looked up."""
    multiplies: int
    """For one token, when done: of a low rank as many as parameters, and those that make a row that is looked up."""
    lost_energy: float
    """The share of its energy that it then loses, in the norm of the objective."""
    energies: NDArray[np.float64]
    """Its energies in descending order: rank `k` loses all but the first `k`, as a share of their sum."""


@dataclass(frozen=True, eq=False)
class BudgetPlan:
    """The result of `plan`: how a budget is spent.

    `str()` is a table of the matrices, with the meaning of the budget.
    """

    budget: Budget
    config: TQConfig
    """The config of the plan: `compress(model, plan.config)`."""
    matrices: tuple[PlannedMatrix, ...]
    parameters_before: int
    """Of the whole model; a tied head does not count again."""
    parameters_after: int
    """Of the whole model after compression."""
    objective: Objective
    calibrated: bool
    """Whether lost energies are in the norm of a calibration."""
    max_multiplies: float | None = None
    """The cap on `multiplies`, as a share of `multiplies_before`."""

    @property
    def multiplies_before(self) -> int:
        """Multiplies for one token of all planned matrices together, while they are dense."""
        return sum(matrix.multiplies_before for matrix in self.matrices)

    @property
    def multiplies(self) -> int:
        """Multiplies for one token of all planned matrices together when done."""
        return sum(matrix.multiplies for matrix in self.matrices)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types, with the meaning of the budget and without the energies."""
        matrices = [
            {
                "name": matrix.name,
                "shape": list(matrix.shape),
                "spec": None if matrix.spec is None else matrix.spec.to_dict(),
                "parameters_before": matrix.parameters_before,
                "parameters_after": matrix.parameters_after,
                "multiplies_before": matrix.multiplies_before,
                "multiplies": matrix.multiplies,
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
            "parameters_after": self.parameters_after,
            "multiplies_before": self.multiplies_before,
            "multiplies": self.multiplies,
            "max_multiplies": self.max_multiplies,
            "config": self.config.to_dict(),
            "matrices": matrices,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        rows = [["matrix", "shape", "becomes", "parameters", "after", "kept", "lost energy"]]
        for matrix in self.matrices:
            kept = f"{matrix.parameters_after / matrix.parameters_before:.0%}"
            row = [
                matrix.name,
                "×".join(map(str, matrix.shape)),
                "stays dense" if matrix.spec is None else describe(matrix.spec),
            ]
            row += [f"{matrix.parameters_before:,}", f"{matrix.parameters_after:,}", kept, f"{matrix.lost_energy:.4f}"]
            rows.append(row)
        before, after = self.parameters_before, self.parameters_after
        rest = before - sum(matrix.parameters_before for matrix in self.matrices)
        rows.append(["everything else", "", "", f"{rest:,}", f"{rest:,}", "100%", ""])
        rows.append(["total", "", "", f"{before:,}", f"{after:,}", f"{after / before:.1%}", ""])
        norm = "in the norm of the calibration" if self.calibrated else "in the Frobenius norm"
        means = f"budget {self.budget}: {meaning(self.budget)}; lost energy {norm}"
        before, after = self.multiplies_before, self.multiplies
        multiplies = f"multiplies for one token: {before:,} by the dense matrices, then {after:,}"
        if before:
            multiplies += f" ({after / before:.1%})"
        if self.max_multiplies is not None:
            multiplies += f", at most {self.max_multiplies:.4g} of them allowed"
        return f"{format_table(rows)}\n{means}\n{multiplies}"


def plan_with(
    choose: Choose,
    listed: Sequence[Mapping[str, Any]],
    model: tuple[int, float],
    spending: Spending,
) -> BudgetPlan:
    """The plan that `choose` makes of a listing of the matrices that match `spending.matrices`.

    `model` are the parameters of the whole model before, and the bytes that each takes when done.
    """
    budget, cap = spending.budget, cap_of(spending.max_multiplies)
    chosen = eligible(listed, spending)
    entries = [entry for entry in listed if entry["name"] in chosen]
    before, bytes_each = model
    spendable = sum(entry["parameters_before"] for entry in entries)
    choices = choose(entries, chosen, target_of(budget, before, spendable, bytes_each), cap)
    found = []
    for entry, (spec, parameters, multiplies, lost_energy, energies) in zip(entries, choices, strict=True):
        rows, columns = entry["shape"]
        counts = (rows * columns, parameters, *multiplies)
        read = None if spec is None else spec_from_dict(json.loads(spec))
        shares = energies / max(float(energies.sum()), np.finfo(np.float64).tiny)
        found.append(PlannedMatrix(entry["name"], (rows, columns), read, *counts, lost_energy, shares))
    planned = _fused_together(found)
    specs = {matrix.name: matrix.spec for matrix in planned if matrix.spec is not None}
    if not specs:
        raise ConfigError(f"budget {budget}: {meaning(budget)}, which the model has as it is: nothing to compress")
    after = before - sum(matrix.parameters_before - matrix.parameters_after for matrix in planned)
    config = TQConfig(specs, effort=spending.effort, seed=spending.seed)
    in_its_norm = calibrated(spending.calibration, spending.objective)
    return BudgetPlan(budget, config, tuple(planned), before, after, spending.objective, in_its_norm, cap)


def _fused_together(matrices: list[PlannedMatrix]) -> list[PlannedMatrix]:
    """Parts of a fused weight are compressed all or none: a dense part beside others gets its full rank less one.

    That loses next to nothing and has about as many parameters.
    """
    compressed = {split_part(matrix.name)[0] for matrix in matrices if matrix.spec is not None}
    together = []
    for matrix in matrices:
        # A matrix that is no part is not in the set: it is dense.
        if matrix.spec is None and split_part(matrix.name)[0] in compressed:
            spec = LowRankSpec(min(matrix.shape) - 1)
            lost = float(matrix.energies[-1])
            count = spec.parameters(*matrix.shape)
            matrix = replace(matrix, spec=spec, parameters_after=count, multiplies=count, lost_energy=lost)
        together.append(matrix)
    return together
