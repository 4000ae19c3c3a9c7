"""The plan of a budget: the spec, parameters and lost energy of every matrix."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import Choice, MatrixInfo, least_parameters
from ..config.choices import Objective
from ..config.specs import MatrixSpec, describe
from ..config.tq_config import INT8, TQConfig
from ..decomposition.norm import Moments
from ..errors import ConfigError
from ..utils import validate
from ..utils.tables import format_table
from .budget import Budget, Spending, calibrated, eligible, meaning, note_of, target_of


@dataclass(frozen=True, eq=False)
class PlannedMatrix:
    """The plan of one matrix."""

    name: str
    shape: tuple[int, int]
    spec: MatrixSpec | None
    """None where it stays dense."""
    parameters_before: int
    parameters_after: int
    macs_before: int
    """For one token: none for an embedding that is only looked up."""
    macs_after: int
    """For one token, when done: of a low rank as many as parameters, and those that make a row that is looked up."""
    lost_energy: float
    """The share of its energy that it then loses, in the norm of the objective."""
    energies: NDArray[np.float64]
    """Its energies in descending order, as shares of their sum, those of all groups of its rows together. A matrix
    without groups loses all but the first `k` at rank `k`."""


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
    left_dense: Mapping[str, str] = field(default_factory=dict)
    """The matrices that it cannot be spent on, with the reasons."""
    max_macs: float | None = None
    """The cap on `macs_after`, as a share of `macs_before`; None for the default of `plan`, infinity for none."""

    @property
    def note(self) -> str | None:
        """What a reader must know of the plan: that there is no calibration, and what has to stay dense."""
        return note_of(self.calibrated, self.left_dense)

    @property
    def macs_before(self) -> int:
        """MACs for one token of all planned matrices together, while they are dense."""
        return sum(matrix.macs_before for matrix in self.matrices)

    @property
    def macs_after(self) -> int:
        """MACs for one token of all planned matrices together when done."""
        return sum(matrix.macs_after for matrix in self.matrices)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types, with the meaning of the budget and without the energies."""
        matrices = [
            {
                "name": matrix.name,
                "shape": list(matrix.shape),
                "spec": None if matrix.spec is None else matrix.spec.to_dict(),
                "parameters_before": matrix.parameters_before,
                "parameters_after": matrix.parameters_after,
                "macs_before": matrix.macs_before,
                "macs_after": matrix.macs_after,
                "lost_energy": matrix.lost_energy,
            }
            for matrix in self.matrices
        ]
        return {
            "budget": self.budget,
            "meaning": meaning(self.budget),
            "objective": self.objective,
            "calibrated": self.calibrated,
            "note": self.note,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            # JSON has no infinity.
            "max_macs": "inf" if self.max_macs == math.inf else self.max_macs,
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
        before, after = self.macs_before, self.macs_after
        macs = f"MACs for one token: {before:,} by the dense matrices, then {after:,}"
        if before:
            macs += f" ({after / before:.1%})"
        if self.max_macs not in (None, math.inf):
            macs += f", at most {self.max_macs:.4g} of them allowed"
        return "\n".join([format_table(rows), means, macs, *([] if self.note is None else [self.note])])


@dataclass(frozen=True)
class BudgetRequest:
    """A budget applied to the matrices of one model, ready to be spent."""

    spending: Spending
    matrices: tuple[MatrixInfo, ...]
    """Those that it is spent on."""
    moments: tuple[Moments, ...]
    parameters_before: int
    """Of the whole model."""
    limits: Mapping[str, Any]
    """How the boundary takes the target, the cap on MACs and the effort."""
    left_dense: Mapping[str, str] = field(default_factory=dict)
    """The matrices that it cannot be spent on, with the reasons."""

    @classmethod
    def of(
        cls,
        listed: Sequence[MatrixInfo],
        model: tuple[int, float, float],
        spending: Spending,
        left_dense: Mapping[str, str] | None = None,
    ) -> BudgetRequest:
        """The request for a listing of the matrices that match `spending.matrices`.

        `model` are the parameters of the whole model before, the bytes that each takes when done, and those beside;
        `left_dense` are matrices that cannot be compressed, with the reasons.
        """
        cap = validate.max_macs(spending.max_macs)
        chosen = eligible(listed, spending)
        matrices = tuple(matrix for matrix in listed if matrix.name in chosen)
        before, *sizes = model
        spendable = sum(matrix.parameters_before for matrix in matrices)
        target = target_of(spending.budget, before, spendable, *sizes)
        if "parameters" in target:
            least = sum(_least(matrix, moments) for matrix, moments in zip(matrices, chosen.values(), strict=True))
            _check_least(spending, target["parameters"], least, before - spendable + least, before, *sizes)
        limits = {"parameters": None, "lost_energy": None, **target, "max_macs": cap, "effort": spending.effort}
        return cls(spending, matrices, tuple(chosen.values()), before, limits, left_dense or {})

    @property
    def names(self) -> list[str]:
        """The names of the matrices."""
        return [matrix.name for matrix in self.matrices]

    def plan(self, choices: Sequence[Choice]) -> BudgetPlan:
        """The plan that a choice for each matrix makes; raises `ConfigError` where nothing is compressed."""
        spending = self.spending
        planned = tuple(_planned(matrix, choice) for matrix, choice in zip(self.matrices, choices, strict=True))
        specs = {matrix.name: matrix.spec for matrix in planned if matrix.spec is not None}
        if not specs and spending.dtype != INT8:
            raise ConfigError(
                f"budget {spending.budget}: {meaning(spending.budget)}, which the model has as it is: "
                "nothing to compress"
            )
        after = self.parameters_before - sum(matrix.parameters_before - matrix.parameters_after for matrix in planned)
        return BudgetPlan(
            budget=spending.budget,
            config=TQConfig(
                specs,
                effort=spending.effort,
                seed=spending.seed,
                dtype=INT8 if spending.dtype == INT8 else None,
            ),
            matrices=planned,
            parameters_before=self.parameters_before,
            parameters_after=after,
            objective=spending.objective,
            calibrated=calibrated(spending.calibration, spending.objective),
            left_dense=self.left_dense,
            max_macs=self.limits["max_macs"],
        )


def _least(matrix: MatrixInfo, moments: Moments) -> int:
    """The fewest parameters that a matrix can have."""
    counts, _ = moments
    counted = counts is not None and counts.ndim == 1 and bool(np.any(counts > 0))
    return least_parameters(matrix.shape, matrix.kind == "embedding" and counted)


def _check_least(
    spending: Spending, left: int, least: int, smallest: int, before: int, bytes_each: float, beside: float
) -> None:
    """Raises `ConfigError` for a budget that rank 1 of every matrix exceeds, with the smallest that can be met."""
    if least <= left:
        return
    # Rounded up, so that the stated share suffices.
    share = math.ceil(1e4 * smallest / max(before, 1)) / 1e4
    size = math.ceil(smallest * bytes_each + beside)
    raise ConfigError(
        f"budget {spending.budget}: {meaning(spending.budget)}, but the matrices have {least:,} at rank 1: the "
        f"smallest budget that can be met is {share:g}, or {smallest:,} parameters, about {size:,} bytes"
    )


def _planned(matrix: MatrixInfo, choice: Choice) -> PlannedMatrix:
    return PlannedMatrix(
        name=matrix.name,
        shape=matrix.shape,
        spec=choice.spec,
        parameters_before=matrix.parameters_before,
        parameters_after=choice.parameters,
        macs_before=choice.macs_before,
        macs_after=choice.macs,
        lost_energy=choice.lost_energy,
        energies=choice.energies / max(float(choice.energies.sum()), np.finfo(np.float64).tiny),
    )
