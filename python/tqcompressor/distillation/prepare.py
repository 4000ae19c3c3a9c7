"""The inputs of a distillation, loaded and checked before any long computation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from .._core import ModelPlan
from ..compression.model_plan import plan_model
from ..config.choices import DTYPES, Dtype, one_of
from ..config.tq_config import TQConfig
from ..data.token_blocks import TokenBlocks, token_blocks
from ..errors import ConfigError, DestinationError, TextError
from ..evaluate.scoring import begin_tokens, tokenised
from ..models.matrices import require_transformers_model
from ..utils import validate
from ..utils.atomic_io import check_destination, require_space, without_leftovers
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption
from .artifacts import STATE
from .config import DistillConfig, TrainingConfig
from .stages import Stage, StagedRecipe, resolve_staged_recipe
from .training import samples_per_step

# Held out by default: a hundredth of the text, but no more than 65,536 tokens, so that scoring stays short.
_HELDOUT_SHARE, _HELDOUT_TOKENS = 100, 1 << 16


@dataclass(frozen=True)
class PreparedStage:
    """A stage of the recipe with its plan and its share of the text."""

    number: int
    """The number of the stage, from 1."""
    stage: Stage
    folder: Path
    """The folder of its state."""
    plan: ModelPlan
    """The plan of its config for the matrices of the teacher, which holds for the student too."""
    samples: TokenBlocks | None
    """None for a stage without training."""
    steps: int
    """Optimiser steps."""


@dataclass(frozen=True)
class Prepared:
    """A distillation that is ready to run: models, text and settings, all of them checked."""

    teacher: PreTrainedModel
    """The teacher, in float32 on the CPU."""
    tokenizer: PreTrainedTokenizerBase
    recipe: StagedRecipe
    stages: tuple[PreparedStage, ...]
    one_shot: TQConfig
    """All stages in one: each matrix has the spec of the last stage that names it."""
    seq_len: int
    heldout: tuple[int, ...]
    """The held-out tokens to score."""
    out: Path
    losses: DistillConfig
    training: TrainingConfig | TrainingArguments
    arguments: TrainingArguments
    """The device and the processes of the run, for no particular stage."""
    device: str | None
    dtype: Dtype
    threads: int | None
    progress: ProgressOption

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step, over all devices and processes."""
        return samples_per_step(self.arguments) * self.seq_len


def prepare(
    teacher: StrPath | PreTrainedModel,
    recipe: StrPath | Mapping[str, Any] | StagedRecipe | TQConfig,
    *,
    text: str | Path | Sequence[str | Path] | TokenBlocks | Any,
    out: StrPath,
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: int | None,
    heldout: str | Path | None,
    losses: DistillConfig,
    training: TrainingConfig | TrainingArguments,
    arguments: TrainingArguments,
    effort: str | None,
    seed: int | None,
    device: str | None,
    dtype: Dtype,
    cache: StrPath | None,
    resume: bool,
    threads: int | None,
    progress: ProgressOption,
) -> Prepared:
    """Loads teacher and text, plans every stage, and checks all inputs. Arguments and errors are those of `distill`.

    `arguments` have the device and the processes of the run.

    The cheap checks come first. Only the token cache is written.
    """
    out, threads = Path(out), validate.threads(threads)
    one_of("dtype", dtype, DTYPES)
    staged = resolve_staged_recipe(recipe, effort=effort, seed=seed)
    _check_destination(out, resume, arguments)
    model = _load_teacher(teacher)
    tokenizer = _load_tokenizer(teacher, tokenizer)
    _check_vocabulary("the tokenizer", len(tokenizer), model)
    seq_len = _sequence_length(model, text, training)
    plans = [plan_model(model, stage.config) for stage in staged.stages]
    heldout_tokens = None if heldout is None else tokenised(tokenizer, heldout).tokens[:].tolist()
    if isinstance(text, TokenBlocks):
        _check_vocabulary("text: its tokenizer", text.vocab_size, model)
        samples = text
    else:
        samples = token_blocks(text, tokenizer, seq_len, cache=cache, progress=progress)
    available = len(samples)
    if heldout_tokens is None:
        available -= min(max(1, available // _HELDOUT_SHARE), max(1, _HELDOUT_TOKENS // seq_len))
        rows = (samples[index]["input_ids"].tolist() for index in range(available, len(samples)))
        heldout_tokens = [*begin_tokens(tokenizer), *chain.from_iterable(rows)]
    if tokens is not None:
        tokens = validate.integer("tokens", tokens, 1)
    wanted = available if tokens is None else tokens // seq_len
    if wanted > available:
        raise TextError(f"tokens: expected at most {available * seq_len:,} (of the text to train on), got {tokens:,}")
    stages = _prepare_stages(staged, plans, samples, wanted, out, samples_per_step(arguments))
    # At most two students of every stage, two checkpoints with two moments each, and the result.
    size = 4 * model.num_parameters()
    require_space(out, size * (2 * len(stages) + 2 * 3 + 1), "the stages and their checkpoints")
    return Prepared(
        teacher=model,
        tokenizer=tokenizer,
        recipe=staged,
        stages=stages,
        one_shot=_one_shot(staged, plans),
        seq_len=seq_len,
        heldout=tuple(heldout_tokens),
        out=out,
        losses=losses,
        training=training,
        arguments=arguments,
        device=device,
        dtype=dtype,
        threads=threads,
        progress=progress,
    )


def _check_destination(out: Path, resume: bool, arguments: TrainingArguments) -> None:
    check_destination(out)
    with arguments.main_process_first(local=False):
        if arguments.process_index != 0 or not out.exists():
            return
        if not out.is_dir():
            raise DestinationError(f"{out} exists and is not a folder: choose another name")
        names = without_leftovers(out)
        if names and not resume:
            raise DestinationError(f"{out} exists and is not empty: choose another folder, or resume")
        if names and STATE not in names:
            raise DestinationError(
                f"{out} holds {names[0]!r} and no {STATE}: it has no run to resume, choose another folder"
            )


def _load_teacher(teacher: StrPath | PreTrainedModel) -> PreTrainedModel:
    model: Any
    if isinstance(teacher, torch.nn.Module):
        # A copy that the run may move and freeze.
        model = copy.deepcopy(require_transformers_model(teacher)).to("cpu", torch.float32)  # type: ignore[arg-type]
    else:
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    loaded: PreTrainedModel = model
    return loaded


def _load_tokenizer(
    teacher: StrPath | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    if tokenizer is not None:
        return tokenizer
    if isinstance(teacher, PreTrainedModel):
        raise ConfigError("tokenizer: expected one along with a teacher that is a live model")
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(teacher)
    return loaded


def _check_vocabulary(name: str, tokens: int, teacher: PreTrainedModel) -> None:
    if tokens > (vocab_size := teacher.config.vocab_size):
        raise ConfigError(
            f"{name} has {tokens} tokens, the teacher's vocabulary only {vocab_size}: it is another model's tokenizer"
        )


def _sequence_length(teacher: PreTrainedModel, text: Any, training: TrainingConfig | TrainingArguments) -> int:
    asked = training.seq_len if isinstance(training, TrainingConfig) else None
    positions: int = teacher.config.max_position_embeddings
    if isinstance(text, TokenBlocks):
        if asked not in (None, text.seq_len):
            raise ConfigError(f"seq_len: expected {text.seq_len}, that of the text's samples, got {asked}")
        asked = text.seq_len
    seq_len = min(positions, 1024) if asked is None else asked
    if not 2 <= seq_len <= positions:
        raise ConfigError(f"seq_len: expected 2 to {positions} (the teacher's positions), got {seq_len}")
    return seq_len


def _one_shot(recipe: StagedRecipe, plans: Iterable[ModelPlan]) -> TQConfig:
    specs = {matrix.name: matrix.spec for plan in plans for matrix in plan.matrices}
    return recipe.stages[-1].config.replace(specs=specs)


def _prepare_stages(
    recipe: StagedRecipe,
    plans: Sequence[ModelPlan],
    samples: TokenBlocks,
    wanted: int,
    out: Path,
    per_step: int,
) -> tuple[PreparedStage, ...]:
    """Distributes the first `wanted` samples among the stages; raises `TextError` for a share below one step."""
    stages = []
    shares = zip(recipe.stages, plans, recipe.samples_of_stages(wanted), strict=True)
    for number, (stage, plan, share) in enumerate(shares, 1):
        if stage.share and len(share) < per_step:
            raise TextError(
                f"stage {stage.name} has {len(share)} samples of {samples.seq_len} tokens to train on, and a step "
                f"takes {per_step}: give more text or smaller batches"
            )
        stages.append(
            PreparedStage(
                number=number,
                stage=stage,
                folder=out / "stages" / f"{number}-{stage.name}",
                plan=plan,
                samples=samples.section(share.start, len(share)) if share else None,
                steps=len(share) // per_step,
            )
        )
    return tuple(stages)
