"""The result of a sweep: a row for each budget, as text, as JSON and as figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..compression.budget import Budget
from ..utils.tables import format_table
from ..utils.utf8 import read_form
from .figure import Point, frontier_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is measured of a model: the perplexity of a language model, and of any other the cosine of its embeddings with
# those of the original.
Measure = Literal["perplexity", "cosine"]
# The files in the folder of a sweep.
SWEEP_FILE, FIGURE_FILE, PLOT_FILE = "sweep.json", "frontier.svg", "frontier.png"


@dataclass(frozen=True)
class SweepRow:
    """One model of a sweep."""

    budget: Budget | None
    """None for the original."""
    parameters: int
    bytes: int
    """Size of the weight files."""
    macs: int | None
    """MACs for one token of the matrices that the budgets are spent on; None for the original of a sweep that has not
    planned yet."""
    quality: float
    """What the sweep's `measure` says: smaller is better of a perplexity, larger of a cosine."""
    tokens_per_second: float
    """Of one sequence: of a language model written, of any other read."""
    seconds: float
    """Wall-clock time of planning, compressing and writing; of the original, none."""
    score: Mapping[str, Any]
    """The sums that the quality follows from, and the settings."""

    @property
    def name(self) -> str:
        """The budget as text, or "original"."""
        return "original" if self.budget is None else str(self.budget)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SweepRow:
        """The inverse of `to_dict`."""
        row = cls(**data)
        return replace(row, quality=math.inf if row.quality is None else float(row.quality))

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON types; an infinite quality is None."""
        return {**asdict(self), "quality": self.quality if math.isfinite(self.quality) else None}


@dataclass(frozen=True)
class SweepResult:
    """The result of `sweep`: the original, and the model of each budget from the smallest to the largest.

    `str()` is a table; `to_json` is what `sweep.json` holds, and `plot` draws it with matplotlib.
    """

    version: str
    """The version of tqcompressor."""
    source: str
    """The hub id of the model, or the name of its folder."""
    measure: Measure
    heldout: str
    """The name of the text that quality is measured on."""
    engine: str
    """What quality and speed are measured with: "native" or "torch"."""
    calibrated: bool
    dense: SweepRow | None
    """The original; None while it is not measured."""
    rows: tuple[SweepRow, ...]
    complete: bool
    """Whether every budget is there."""
    run: Mapping[str, Any]
    """What the rows depend on: a resumed run must have the same."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SweepResult:
        """The inverse of `to_dict`."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name not in ("version", "dense", "rows")}
        dense = data["dense"]
        return cls(
            version=data["tqcompressor"],
            dense=None if dense is None else SweepRow.from_dict(dense),
            rows=tuple(SweepRow.from_dict(row) for row in data["rows"]),
            **known,
        )

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        dense = None if self.dense is None else self.dense.to_dict()
        data = {**vars(self), "dense": dense, "rows": [row.to_dict() for row in self.rows]}
        return {"tqcompressor": data.pop("version"), **data}

    def to_json(self) -> str:
        """The result as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def cells(self) -> list[list[str]]:
        """The table of `str()` as cells, the header first."""
        digits = 2 if self.measure == "perplexity" else 4
        rows = [["budget", "parameters", "kept", "bytes", "MACs", self.measure, "tokens/s", "seconds"]]
        before = self.dense.parameters if self.dense is not None else 0
        for row in (*self.rows, *([] if self.dense is None else [self.dense])):
            rows.append(
                [
                    row.name,
                    f"{row.parameters:,}",
                    f"{row.parameters / before:.1%}" if before else "",
                    f"{row.bytes:,}",
                    "" if row.macs is None else f"{row.macs:,}",
                    f"{row.quality:,.{digits}f}",
                    f"{row.tokens_per_second:,.0f}",
                    "" if row.budget is None else f"{row.seconds:.1f}",
                ]
            )
        return rows

    def __str__(self) -> str:
        norm = "in the norm of the calibration" if self.calibrated else "without a calibration"
        summary = f"{self.measure} on {self.heldout}, engine {self.engine}; compressed {norm}"
        return "\n".join([format_table(self.cells()), summary, *([] if self.complete else ["not complete: resume it"])])

    def to_svg(self, *, standalone: bool = True) -> str:
        """Quality and speed against bytes as an SVG file, or as an element for an HTML page; needs no matplotlib."""
        points = [_point(row) for row in self.rows]
        original = None if self.dense is None else _point(self.dense)
        return frontier_figure(self.measure, points, original, standalone=standalone)

    def plot(self) -> Figure:
        """Draws quality against the share of parameters kept, as `plots.plot_frontier` does.

        Raises:
            ConfigError: No budget is measured.
            NonFiniteError: A perplexity is infinite.
            MissingDependencyError: matplotlib is not installed: `to_svg` needs none.
        """
        from ..plots import plot_frontier

        before = self.dense.parameters if self.dense is not None else 1
        points = [(row.parameters / before, row.quality) for row in self.rows]
        dense = None if self.dense is None else (1.0, self.dense.quality)
        return plot_frontier({self.source: points}, dense=dense, quality=self.measure)


def _point(row: SweepRow) -> Point:
    return Point(row.name, row.bytes, row.quality, row.tokens_per_second)


def read_sweep(path: Path) -> SweepResult:
    """Reads a `sweep.json`.

    Raises:
        CheckpointError: It is no result of a sweep.
        OSError: It cannot be read.
    """

    def build(data: Any) -> SweepResult:
        result = SweepResult.from_dict(data)
        # Values of other types show when they are written.
        str(result), result.to_json()
        return result

    return read_form(path, build, "the result of a sweep")
