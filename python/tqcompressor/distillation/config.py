"""The loss of a distillation and the settings of its training, as plain values. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from ..losses._arrays import check_alpha, check_temperature
from ..losses.hidden import HiddenKind as HiddenKind
from ..losses.hidden import check_hidden_kind
from ..utils import validate

# transformers also seeds numpy's old generator, which is limited to 32 bits.
_LARGEST_SEED = (1 << 32) - 1


@dataclass(frozen=True)
class DistillConfig:
    """The loss of the student: `alpha·T²·KL(teacher ‖ student at T) + (1 − alpha)·CE + hidden_weight·H`.

    `H` is the mean distance of hidden states over the pairs of `hidden_layers`; `hidden_kind` is "relative_mse", "mse"
    or "cosine", as for `losses.hidden_state_loss`. By default its weight is 1 where a teacher with the student's widths
    and layers runs beside it, and 0 otherwise. A pair is (student's, teacher's) number of a state: 0 is the sum of the
    embeddings, `i` the output of transformer block `i`, the last one after the final normalisation. By default block
    `i` of the student is paired with block `i · (teacher's depth / student's depth)` of the teacher.

    A masked language model has the loss at its masked tokens. A model without a vocabulary, such as a sentence encoder,
    has `H` of its last hidden state and of the mean over the tokens in place of KL and CE; then `alpha` is 1.

    The defaults learn from the teacher alone, at its own temperature: its distribution says all that a label says,
    without a label's noise. That holds for texts like those that the teacher has learned; on others labels teach the
    student what the teacher does not know, and `alpha=0.5` is better. Dropout would be noise as well; it is off unless
    `dropout` is True.

    Raises `ConfigError` for values out of range.
    """

    temperature: float = 1.0
    alpha: float = 1.0
    hidden_weight: float | None = None
    hidden_kind: HiddenKind = "relative_mse"
    hidden_layers: tuple[tuple[int, int], ...] | None = None
    dropout: bool = False
    """Whether the student keeps the dropout of its config while it learns."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_alpha(self.alpha)
        if self.hidden_weight is not None and not 0 <= self.hidden_weight < math.inf:
            raise ConfigError(f"hidden_weight: expected a number from 0 up, got {self.hidden_weight}")
        check_hidden_kind("hidden_kind", self.hidden_kind)
        if self.hidden_layers is not None:
            pairs = self.hidden_layers.items() if isinstance(self.hidden_layers, Mapping) else self.hidden_layers
            object.__setattr__(self, "hidden_layers", tuple((int(ours), int(theirs)) for ours, theirs in pairs))

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss depends on the teacher."""
        return self.alpha > 0 or bool(self.hidden_weight)


@dataclass(frozen=True)
class TrainingConfig:
    """How every stage is trained: AdamW (0.9, 0.95), a linear warm-up, then a cosine decay to zero.

    Gradients are scaled down to a norm of 1.

    This is a short form of `transformers.TrainingArguments`, which `distill` also accepts. Fields of the same name have
    the same meaning.

    Raises `ConfigError` for values out of range.
    """

    seq_len: int | None = None
    """Tokens of a sample; by default the teacher's positions, at most 1024."""
    batch_size: int | None = None
    """Samples of a batch on each process. By default as many as leave 1,000 steps for all stages together, from 1 to
    16: with few tokens, more steps help more than less noise does."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged for one optimiser step."""
    learning_rate: float | None = None
    """The learning rate at the end of the warm-up. By default `3e-4 · 256 / width`, for the width of the hidden states:
    1e-4 for GPT-2, 2e-5 at 4,096. A wider model forgets more than it learns at the rate of a narrow one."""
    warmup_ratio: float = 0.05
    """The warm-up's share of a stage's steps."""
    weight_decay: float = 0.0
    bf16: bool = False
    """bfloat16 in the forward pass; weights and optimiser stay float32."""
    fp16: bool = False
    """float16 in the forward pass; weights and optimiser stay float32."""
    save_steps: float = 0.25
    """Steps from one checkpoint to the next, an integer, or below 1 a share of the stage's steps. A killed run resumes
    from the last checkpoint; the last two are kept."""
    seed: int = 0
    """The seed of the samples that are drawn from the text, of their order and of dropout."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) is not None or name == "gradient_accumulation_steps":
                object.__setattr__(self, name, validate.integer(name, getattr(self, name), 1))
        object.__setattr__(self, "seed", validate.integer("seed", self.seed, 0, _LARGEST_SEED))
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name}: expected a finite number from 0 up, got {value}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio: expected a number from 0 to 1, got {self.warmup_ratio}")
        if not _is_count(self.save_steps) and not 0 < self.save_steps < 1:
            raise ConfigError(f"save_steps: expected a positive integer or a share below 1, got {self.save_steps!r}")
        if self.bf16 and self.fp16:
            raise ConfigError("bf16 and fp16: expected at most one of them")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
