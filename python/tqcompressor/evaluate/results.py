"""The results of an evaluation: sums with their averages, rows and tables, as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..utils.tables import format_table


@dataclass(frozen=True)
class PerplexityResult:
    """Sums over the scored tokens of a text, and the averages that follow from them."""

    negative_log_likelihood: float
    """Sum over the scored tokens, in nats."""
    tokens: int
    """Scored tokens."""
    words: int
    """Words of the text, separated by white space."""
    bytes: int
    """Bytes of the text in UTF-8."""
    context: int
    stride: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """`exp(nll / tokens)`: per token, so comparable only between models with the same tokenizer."""
        return exponential(self.negative_log_likelihood / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """`exp(nll / words)`: comparable across tokenizers."""
        return exponential(self.negative_log_likelihood / self.words) if self.words else math.inf

    @property
    def bits_per_byte(self) -> float:
        """`nll / (bytes · ln 2)`: comparable across tokenizers."""
        return self.negative_log_likelihood / (self.bytes * math.log(2))

    def to_dict(self) -> dict[str, Any]:
        """Sums and averages, ready for JSON."""
        averages = {name: getattr(self, name) for name in ("perplexity", "word_perplexity", "bits_per_byte")}
        return {name: _json_number(value) for name, value in {**averages, **asdict(self)}.items()}


@dataclass(frozen=True)
class WindowResult:
    """The perplexity of a text by the mean over windows that do not overlap."""

    perplexity: float
    """`exp` of the mean of the windows' mean negative log-likelihoods."""
    windows: int
    tokens: int
    """Tokens of the text; the first of each window is not scored."""
    context: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {name: _json_number(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class EmbeddingResult:
    """The cosine of a student's text embeddings with its teacher's."""

    cosine: float
    """The mean over the texts."""
    smallest: float
    """The cosine of the text that has the smallest."""
    texts: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {name: _json_number(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class LastWordResult:
    """The accuracy and perplexity of the last words of passages."""

    accuracy: float
    """Share of the passages whose last word is the model's first choice, token by token."""
    perplexity: float
    """`exp` of the mean negative log-likelihood of a last word (of a word, not of a token)."""
    passages: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {name: _json_number(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class ModelScore:
    """One row of a `Comparison`."""

    name: str
    parameters: int
    bytes: int
    text: PerplexityResult
    """Sums and averages over the scored text."""
    last_word: LastWordResult | None = None
    """None where no passages were given."""

    @property
    def perplexity(self) -> float:
        """The perplexity of the text, per token."""
        return self.text.perplexity

    def to_dict(self) -> dict[str, Any]:
        """The row, ready for JSON."""
        row: dict[str, Any] = {"name": self.name, "parameters": self.parameters, "bytes": self.bytes}
        row["text"] = self.text.to_dict()
        if self.last_word is not None:
            row["last_word"] = self.last_word.to_dict()
        return row


@dataclass(frozen=True)
class Comparison:
    """A table of models scored on the same text; `str()` of it is the table, `to_json()` the same for machines."""

    rows: tuple[ModelScore, ...]

    def to_dict(self) -> dict[str, Any]:
        """The table, ready for JSON."""
        return {"models": [row.to_dict() for row in self.rows]}

    def to_json(self) -> str:
        """The table as JSON text; a figure that is not finite is `null`."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        header = ["model", "parameters", "bytes", "perplexity", "per word", "bits/byte"]
        last_word = any(row.last_word for row in self.rows)
        if last_word:
            header += ["last word", "its perplexity"]
        lines = [[*header, "seconds"]]
        for row in self.rows:
            text = row.text
            cells = [row.name, f"{row.parameters:,}", f"{row.bytes:,}"]
            cells += [f"{text.perplexity:.2f}", f"{text.word_perplexity:.2f}", f"{text.bits_per_byte:.4f}"]
            seconds = text.seconds
            if last_word:
                words = row.last_word
                cells += [f"{100 * words.accuracy:.2f}%", f"{words.perplexity:.2f}"] if words else ["", ""]
                seconds += words.seconds if words else 0.0
            lines.append([*cells, f"{seconds:.1f}"])
        return format_table(lines)


def exponential(value: float) -> float:
    """`exp`, infinite where it overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _json_number(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
