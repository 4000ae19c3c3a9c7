"""The report of a distillation, which `distill` returns and writes as `training_report.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..compression.card import metadata
from ..utils.tables import format_table

# The report's file in the folder of a distilled checkpoint.
REPORT_FILE = "training_report.json"


@dataclass(frozen=True)
class LossRecord:
    """A point of the loss curve: means over the steps since the previous point."""

    step: int
    """Optimiser steps of this stage so far."""
    tokens: int
    """Tokens trained on in this stage so far, over all processes."""
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class ModelResult:
    """A model with its score on the held-out text; lower is better."""

    parameters: int
    score: float
    """What the report's `measure` says: the perplexity of a language model."""

    @property
    def perplexity(self) -> float:
        """The score of a language model."""
        return self.score


@dataclass(frozen=True)
class StageResult:
    """One stage: the student after its compression and after its training."""

    name: str
    compressed: ModelResult
    """The student after this stage's compression, before its training."""
    trained: ModelResult
    """The student at the end of the stage."""
    kept_step: int
    """The step whose student is kept, the best of those that were scored: 0 is the student before the training."""
    lost_energy: Mapping[str, float]
    """The lost energy of each matrix that this stage decomposed, relative to the student's weights before the stage."""
    tokens: int
    """Tokens trained on in this stage."""
    steps: int
    seconds: float
    """Seconds of training since the last start; a resumed stage does not count the time before."""
    tokens_per_second: float
    losses: Sequence[LossRecord]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StageResult:
        """The inverse of `dataclasses.asdict`."""
        return cls(
            **{
                **data,
                "compressed": ModelResult(**data["compressed"]),
                "trained": ModelResult(**data["trained"]),
                "losses": tuple(LossRecord(**record) for record in data["losses"]),
            }
        )


@dataclass(frozen=True)
class TrainingReport:
    """The scores from the teacher to the distilled student, with all settings; `str()` is a table of them."""

    version: str
    """The version of tqcompressor."""
    settings: Mapping[str, Any]
    """All settings that affect the result: teacher, recipe, text, losses, training, processes, dtype."""
    versions: Mapping[str, str]
    """The versions of Python, torch and transformers."""
    measure: str
    """What is scored: "perplexity", "perplexity of masked tokens", or the "cosine distance" of embeddings."""
    heldout_tokens: int
    teacher: ModelResult
    one_shot: ModelResult
    """The student without training: compressed in one step, to the final shapes or the last budget, or as it was given.
    """
    stages: Sequence[StageResult]

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads the student."""
        masked = "AutoModelForMaskedLM" if self.measure == "perplexity of masked tokens" else "AutoModelForCausalLM"
        return "AutoModel" if self.measure == "cosine distance" else masked

    @property
    def tokens(self) -> int:
        """Tokens trained on in all stages together."""
        return sum(stage.tokens for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        data = asdict(self)
        data["stages"] = [{**stage, "losses": list(stage["losses"])} for stage in data["stages"]]
        return {"tqcompressor": data.pop("version"), **data, "tokens": self.tokens}

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingReport:
        """The inverse of `to_dict`."""
        return cls(
            version=data["tqcompressor"],
            settings=data["settings"],
            versions=data["versions"],
            measure=data["measure"],
            heldout_tokens=data["heldout_tokens"],
            teacher=ModelResult(**data["teacher"]),
            one_shot=ModelResult(**data["one_shot"]),
            stages=tuple(StageResult.from_dict(stage) for stage in data["stages"]),
        )

    def rows(self) -> list[list[str]]:
        """The table of `str()` as cells, the header first."""
        rows = [["model", "parameters", self.measure, "tokens", "tokens/s", "final loss"]]

        # A distance is below 1.
        digits = ".5f" if self.measure == "cosine distance" else ".2f"

        def add(name: str, model: ModelResult, *training: str) -> None:
            rows.append([name, f"{model.parameters:,}", f"{model.score:{digits}}", *(training or ("", "", ""))])

        add("teacher", self.teacher)
        add("one-shot", self.one_shot)
        for number, stage in enumerate(self.stages, 1):
            final = f"{stage.losses[-1].loss:.4f}" if stage.losses else ""
            add(f"stage {number}, {stage.name}: compressed", stage.compressed)
            speed = f"{stage.tokens_per_second:,.0f}"
            add(f"stage {number}, {stage.name}: trained", stage.trained, f"{stage.tokens:,}", speed, final)
        return rows

    def __str__(self) -> str:
        share = 100 * self.stages[-1].trained.parameters / self.teacher.parameters
        summary = f"{share:.1f}% of the teacher's parameters; {self.tokens:,} tokens trained on"
        kept = "".join(
            f"\nstage {number}, {stage.name}: the student of step {stage.kept_step} of {stage.steps} is kept, "
            "the best on the held-out text"
            for number, stage in enumerate(self.stages, 1)
            if stage.kept_step != stage.steps
        )
        return f"{format_table(self.rows())}\n{summary}, {self.heldout_tokens:,} held out{kept}"

    def model_card(self, teacher: str | None = None) -> str:
        """The README of the student's folder, in Markdown.

        `teacher` is the directory of the teacher, whose licence and the like are carried over; None where there is
        none.
        """
        task = "text-generation" if self.auto_class == "AutoModelForCausalLM" else None
        header, *rows = self.rows()
        table = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        lines = "\n".join("| " + " | ".join(row) + " |" for row in table)
        return (
            f"{metadata(teacher, ['distillation'], pipeline_tag=task)}"
            "# A model compressed with tqcompressor and distilled from its teacher\n\n"
            "Load it with transformers after `pip install tqcompressor`:\n\n"
            f"```python\nimport tqcompressor\nfrom transformers import {self.auto_class}\n\n"
            f'model = {self.auto_class}.from_pretrained("path/of/this/folder")\n```\n\n'
            f"{self.measure.capitalize()} on {self.heldout_tokens:,} held-out tokens; "
            "all settings are in `training_report.json`.\n\n"
            f"{lines}\n"
        )
