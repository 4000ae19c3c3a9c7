"""The report of a compression, done or planned: the result of `compress`, `compress_checkpoint` and `inspect`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._core import Fitted, MatrixInfo, macs
from ..calibration.calibration import Calibration
from ..config.specs import MatrixSpec, describe, planned_spec
from ..utils.tables import format_table
from ..utils.utf8 import read_form

# The report's file in the folder of a compressed checkpoint.
REPORT_FILE = "compression_report.json"


@dataclass(frozen=True)
class MatrixReport:
    """One compressed matrix, in × out."""

    name: str
    """The name in a config: "wte", "h.0.attn.c_attn.q"."""
    tensor: str
    """The name of the stored tensor."""
    shape: tuple[int, int]
    """In features (or the vocabulary) and out features (or the dimension)."""
    parameters_before: int
    parameters_after: int
    macs_before: int | None = None
    """MACs for one token while it is dense, none for an embedding that is only looked up; None where not counted."""
    macs_after: int | None = None
    """MACs for one token by its spec."""
    lost_energy: float | None = None
    """`‖W − Ŵ‖² / ‖W‖²` of the float32 factors; None in a plan."""
    seconds: float | None = None
    """Wall-clock time; None in a plan."""
    block: tuple[int, int] | None = None
    """The block `(m2, n2)` of a Kronecker sum."""
    rank: int | None = None
    """The rank of a Kronecker sum, or of a low-rank matrix."""
    permute: str | None = None
    """Which sides of a Kronecker sum may be permuted."""
    terms: tuple[Mapping[str, Any], ...] | None = None
    """The specs of the terms, as in a config, where there are several."""
    groups: tuple[tuple[int, int], ...] | None = None
    """The rows and the rank of each group of rows of an embedding."""

    @property
    def spec(self) -> MatrixSpec | None:
        """The spec, as in a config; None in a list of the matrices of a dense model."""
        given = (self.rank, self.terms, self.groups)
        return None if all(each is None for each in given) else planned_spec(vars(self))

    @classmethod
    def of(cls, matrix: MatrixInfo, fitted: Fitted | None = None, usage: str | None = None) -> MatrixReport:
        """The row of a matrix that became what was fitted, or that stays as it is.

        `usage` is how the model uses it for a token, by its name at the boundary.
        """
        counts = {"parameters_before": matrix.parameters_before, "parameters_after": matrix.parameters_after}
        found: dict[str, Any] = {}
        if fitted is not None:
            found = {**fitted.spec.to_dict(), "lost_energy": fitted.lost_energy, "seconds": fitted.seconds}
            if usage is not None:
                found["macs_before"], found["macs_after"] = macs(fitted.spec, matrix.shape, usage)
        place = {"name": matrix.name, "tensor": matrix.tensor, "shape": matrix.shape}
        row: MatrixReport = _read(cls, {**place, **counts, **found})
        return row


@dataclass(frozen=True)
class UntouchedTensor:
    """A tensor that is not compressed."""

    tensor: str
    shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class CalibrationRecord:
    """What the moments of a calibration were measured on."""

    tokens: int
    """How many tokens were read."""
    seed: int
    """The seed that drew them from the texts."""
    sensitivity: bool
    """Whether gradients were measured, too."""
    texts: dict[str, int]
    """The names of the texts, each with its tokens; empty where unknown."""

    @classmethod
    def of(cls, calibration: Calibration) -> CalibrationRecord:
        """The record of a calibration."""
        return cls(calibration.tokens, calibration.seed, calibration.sensitivity, calibration.texts)


@dataclass(frozen=True)
class CompressionReport:
    """The report of a compression that was done, or that a config would do.

    `str()` is a table. `to_dict` and `to_json` give what `compression_report.json` holds.
    """

    version: str
    """The version of tqcompressor."""
    format_version: int
    source: str | None
    """The checkpoint's hub id, or the name of its folder; None for a model in memory."""
    effort: str | None
    """How long permutations and factors were searched; None where nothing is compressed."""
    seed: int | None
    """The seed of the search; None where nothing is compressed."""
    dtype: str | None
    """The requested dtype; None where each tensor keeps its own."""
    matrices: tuple[MatrixReport, ...]
    """The compressed matrices, in model order."""
    untouched: tuple[UntouchedTensor, ...]
    """The other tensors, in model order."""
    parameters_before: int
    """Elements of all floating tensors; a tied head is the token embedding and does not count again."""
    parameters_after: int
    bytes_before: int | None = None
    """Size of the weight files; None for a model in memory."""
    bytes_after: int | None = None
    seconds: float | None = None
    """Wall-clock time in all; None in a plan."""
    calibrated: bool | None = None
    """Whether lost energies are in the norm of a calibration, and not in the Frobenius norm."""
    calibration: CalibrationRecord | None = None
    """That calibration, where it is known."""
    note: str | None = None
    """What a reader must know of the result: that a budget was spent without a calibration, what had to stay dense."""
    budget: float | int | str | None = None
    """The budget, where one was spent."""
    objective: str | None = None
    """The norm of errors that was asked for, where it was not "auto"."""
    command: str | None = None
    """What makes the same result again: a command, or the call of a function in Python."""
    versions: Mapping[str, str] | None = None
    """The versions of the other programs that the result depends on."""
    carried: tuple[str, ...] | None = None
    """The files copied from the source, beside the weights and the configuration; None where there are none."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionReport:
        """The inverse of `to_dict`. Keys that a report does not have are left out, so it reads plans too."""
        if not isinstance(data["tqcompressor"], str):
            raise ValueError(f"tqcompressor: expected a version, got {data['tqcompressor']!r}")
        names = set(cls.__dataclass_fields__) - {"version", "matrices", "untouched", "carried", "calibration"}
        return cls(
            version=data["tqcompressor"],
            matrices=tuple(_read(MatrixReport, matrix) for matrix in data["matrices"]),
            untouched=tuple(_read(UntouchedTensor, tensor) for tensor in data["untouched"]),
            carried=tuple(data["carried"]) if "carried" in data else None,
            calibration=CalibrationRecord(**data["calibration"]) if "calibration" in data else None,
            **{name: data[name] for name in names if name in data},
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types, without unknown values."""
        data = _known(asdict(self), keep=("source", "effort", "seed", "dtype"))
        data["matrices"] = [_known(matrix) for matrix in data["matrices"]]
        data["untouched"] = [_known(tensor) for tensor in data["untouched"]]
        return {"tqcompressor": data.pop("version"), **data}

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A table: one line per matrix, one for all other tensors, the total."""
        specs = [matrix.spec for matrix in self.matrices]
        if not any(specs):
            return self._listing()
        done = self.seconds is not None
        header = ["matrix", "shape", "becomes", "parameters", "after"]
        rows = [header + ["lost energy", "seconds"] * done]
        for matrix, spec in zip(self.matrices, specs, strict=True):
            row = [matrix.name, _times(matrix.shape), "stays dense" if spec is None else describe(spec)]
            row += [f"{matrix.parameters_before:,}", f"{matrix.parameters_after:,}"]
            rows.append(row + [f"{matrix.lost_energy or 0:.4f}", f"{matrix.seconds or 0:.2f}"] * done)
        kept = f"{sum(tensor.parameters for tensor in self.untouched):,}"
        rows.append([f"{len(self.untouched)} other tensors", "", "", kept, kept, *[""] * (2 * done)])
        total = ["total", "", "", f"{self.parameters_before:,}", f"{self.parameters_after:,}"]
        rows.append(total + ["", f"{self.seconds or 0:.2f}"] * done)
        share = 100 * self.parameters_after / max(self.parameters_before, 1)
        # A conversion is not timed.
        exists = done or self.bytes_after is not None
        summary = f"{share:.1f}% of the parameters {'are left' if exists else 'would be left'}"
        if self.bytes_before is not None and self.bytes_after is not None:
            summary += f", in {self.bytes_after:,} of {self.bytes_before:,} bytes"
        return "\n".join([format_table(rows), summary, *([] if self.note is None else [self.note])])

    def _listing(self) -> str:
        """The table of a model of which nothing is compressed."""
        rows = [["matrix", "shape", "parameters"]]
        rows += [[matrix.name, _times(matrix.shape), f"{matrix.parameters_before:,}"] for matrix in self.matrices]
        others = sum(tensor.parameters for tensor in self.untouched)
        rows.append([f"{len(self.untouched)} other tensors", "", f"{others:,}"])
        rows.append(["total", "", f"{self.parameters_before:,}"])
        return format_table(rows)


def read_report(path: Path) -> CompressionReport:
    """Reads a `compression_report.json`.

    Raises:
        CheckpointError: It is no report.
        OSError: It cannot be read.
    """

    def build(data: Any) -> CompressionReport:
        report = CompressionReport.from_dict(data)
        # Values of other types show when they are written.
        str(report), report.to_json()
        return report

    return read_form(path, build, "a compression report")


def _read(cls: Any, data: Mapping[str, Any]) -> Any:
    """Builds a dataclass from its keys in `data`; JSON arrays become tuples."""
    known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
    return cls(**{name: tuple(value) if isinstance(value, list | tuple) else value for name, value in known.items()})


def _known(data: dict[str, Any], keep: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entries that are not None, with lists for tuples."""
    known = {name: value for name, value in data.items() if value is not None or name in keep}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
