"""What a student learns from, and how it is trained. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from ..losses._arrays import check_alpha, check_temperature
from ..losses.hidden import HiddenKind, check_hidden_kind

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DistillConfig:
    """What the student learns from: `alpha·T²·KL(teacher ‖ student at T) + (1 − alpha)·CE + hidden_weight·H`.

    `H` is the mean over the pairs of `hidden_layers` of the distance (`hidden_kind`: "mse" or "cosine") between hidden
    states. A pair is (student's, teacher's) number of a state: 0 is the sum of the embeddings, `i` the output of block
    `i`; the last one comes after the final normalisation. By default every block of a student with as many blocks as
    its teacher is paired with its own, and of a shallower one with the blocks that divide the teacher evenly.

    Raises `ConfigError` for values that cannot be followed.
    """

    temperature: float = 2.0
    alpha: float = 0.5
    hidden_weight: float = 0.0
    hidden_kind: HiddenKind = "mse"
    hidden_layers: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_alpha(self.alpha)
        if not 0 <= self.hidden_weight < math.inf:
            raise ConfigError(f"hidden_weight: expected a number from 0 up, got {self.hidden_weight}")
        check_hidden_kind("hidden_kind", self.hidden_kind)
        if self.hidden_layers is not None:
            pairs = self.hidden_layers.items() if isinstance(self.hidden_layers, Mapping) else self.hidden_layers
            object.__setattr__(self, "hidden_layers", tuple((int(ours), int(theirs)) for ours, theirs in pairs))

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is learned from the teacher."""
        return self.alpha > 0 or self.hidden_weight > 0


@dataclass(frozen=True)
class TrainingConfig:
    """How every stage is trained: AdamW, a linear warm-up, then a cosine down to zero.

    Raises `ConfigError` for values that cannot be followed.
    """

    block_size: int | None = None
    """Tokens of a block; by default the teacher's positions, at most 1024."""
    batch_size: int = 8
    """Blocks of a step on each process."""
    gradient_accumulation_steps: int = 1
    """Batches that are added up to one optimiser step."""
    learning_rate: float = 5e-4
    """At the end of the warm-up."""
    warmup: float = 0.05
    """Share of a stage's steps."""
    weight_decay: float = 0.0
    precision: str = "float32"
    """Of the forward pass; weights and optimiser are float32 always."""
    checkpoints: int = 10
    """Checkpoints of a stage, from which a killed run can go on; two are kept at a time."""
    seed: int = 0
    """Of the order of the blocks, and of dropout."""

    def __post_init__(self) -> None:
        for name in ("block_size", "batch_size", "gradient_accumulation_steps", "checkpoints"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and not (name == "block_size" and value is None):
                raise ConfigError(f"{name}: expected a positive integer, got {value!r}")
        for name in ("learning_rate", "warmup", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (name == "warmup" and value > 1):
                raise ConfigError(
                    f"{name}: expected a finite number from 0 up{' to 1' * (name == 'warmup')}, got {value}"
                )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
