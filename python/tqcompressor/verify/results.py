"""The result of a verification: one row for each check, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from ..utils.tables import format_table

# A check is skipped where it does not apply, and blocked where one that it builds on has failed.
Status: TypeAlias = Literal["passed", "failed", "blocked", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """One check of a verification."""

    name: str
    """The name of the check: "finite", "perplexity"."""
    claim: str
    """What holds where the check has passed."""
    status: Status
    detail: str
    """What was measured, what is wrong, or why the check does not apply."""
    figures: Mapping[str, float]
    """The measured figures by name; none where nothing was measured."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class VerificationReport:
    """All checks of one checkpoint; `str()` of it is a table, `to_json()` the same for machines."""

    version: str
    """The version of tqcompressor."""
    source: str
    """The checkpoint that was verified."""
    teacher: str | None
    """The checkpoint that its quality was held against."""
    checks: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """Whether every check that applies has passed."""
        return all(check.status in ("passed", "skipped") for check in self.checks)

    def __getitem__(self, name: str) -> CheckResult:
        """The check of a name."""
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The report, ready for JSON."""
        return {
            "tqcompressor": self.version,
            "source": self.source,
            "teacher": self.teacher,
            "passed": self.passed,
            "checks": [check.to_dict() for check in self.checks],
        }

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [["check", "seconds", "result"]]
        rows += [[check.name, f"{check.seconds:.1f}", check.status] for check in self.checks]
        # The details are of any length, so that they stand behind the aligned columns.
        header, line, *lines = format_table(rows).splitlines()
        table = [f"{text}  {check.detail}".rstrip() for text, check in zip(lines, self.checks, strict=True)]
        counts = {status: sum(check.status == status for check in self.checks) for status in get_args(Status)}
        summary = [f"{count} {status}" for status, count in counts.items() if count]
        return "\n".join([header, line, *table, f"{self.source}: {', '.join(summary)}"])
