"""The inputs of a distillation, loaded and checked before any long computation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from .._core import ModelPlan
from ..calibration.calibration import Calibration, load_calibration
from ..compression.budget import Budget, check_model
from ..compression.model_plan import plan_model
from ..config.choices import DTYPES, Dtype, one_of
from ..config.tq_config import TQConfig
from ..data.token_blocks import TokenBlocks, token_blocks
from ..errors import ConfigError, DestinationError, TextError
from ..evaluate.scoring import begin_tokens, tokenised
from ..models.balancing import has_low_rank, low_rank_sizes
from ..models.matrices import require_trainable, require_transformers_model
from ..utils import validate
from ..utils.atomic_io import check_destination, require_space, without_leftovers
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption
from .artifacts import STATE, load_model
from .config import DistillConfig, TrainingConfig
from .stages import DEFAULT_BUDGET, Stage, StagedRecipe, resolve_staged_recipe
from .tasks import Task, task_of
from .trainer import require_same_vocabulary
from .training import samples_per_step

# Steps of all stages together that the default batch size leaves, and its largest.
_STEPS, _LARGEST_BATCH = 1000, 16
# The default learning rate is 3e-4 at a width of 256, where it was found. SmolLM2, 576 wide, unlearns with it for most
# of a run; tests/benchmarks/README.md has figures.
_RATE_TIMES_WIDTH, _USUAL_WIDTH = 3e-4 * 256, 768
# Tokens of a sample by default, at most.
_LONGEST = 1024
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
    plan: ModelPlan | None
    """The plan of its config for the matrices of the teacher, and so of the student. None without one."""
    samples: TokenBlocks | None
    """None for a stage without training."""
    steps: int
    """Optimiser steps."""


@dataclass(frozen=True)
class Prepared:
    """A distillation that is ready to run: models, text and settings, all of them checked."""

    teacher: PreTrainedModel
    """The teacher, in float32 on the CPU."""
    student: PreTrainedModel | None
    """The student that was given, in float32 on the CPU."""
    task: Task
    tokenizer: PreTrainedTokenizerBase
    recipe: StagedRecipe
    stages: tuple[PreparedStage, ...]
    one_shot: TQConfig | None
    """All configs in one: each matrix has the spec of the last stage that names it. None without configs."""
    calibration: Calibration | None
    """The calibration that was given for the first budget, or for the student."""
    num_samples: int
    """The sequences that a calibration reads."""
    refine: bool
    """Whether the factors of a budget are refined before they are trained."""
    calibration_text: TokenBlocks
    """What they are drawn from: the text of the training."""
    seq_len: int
    """Text tokens of a sample, without the special tokens of an encoder's input."""
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
    recipe: StrPath | Mapping[str, Any] | StagedRecipe | TQConfig | None,
    *,
    budget: Budget | None,
    student: StrPath | PreTrainedModel | None,
    calibration: Calibration | StrPath | None,
    num_samples: int,
    refine: bool,
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
    num_samples = validate.integer("num_samples", num_samples, 1)
    staged = _recipe(recipe, budget, student, effort=effort, seed=seed)
    if calibration is not None and not staged.budgets and student is None:
        raise ConfigError("calibration: expected with a budget, which is spent by it, or with a student")
    if refine and not staged.budgets:
        raise ConfigError("refine: expected with a budget, whose factors it trains")
    _check_destination(out, resume, arguments)
    known = load_calibration(calibration)
    model = _load(teacher)
    tokenizer = _load_tokenizer(teacher, tokenizer)
    task = task_of(model, tokenizer)
    _check_vocabulary("the tokenizer", len(tokenizer), model)
    given = None if student is None else _load(student)
    if given is not None:
        _check_student(given, model)
        require_trainable(given)
        if known is not None:
            _check_calibration(known, given)
    seq_len = _sequence_length(model, tokenizer, task, text, training)
    plans = [None if stage.config is None else plan_model(model, stage.config) for stage in staged.stages]
    if isinstance(text, TokenBlocks):
        _check_vocabulary("text: its tokenizer", text.vocab_size, model)
        samples = text
    else:
        samples = token_blocks(text, tokenizer, seq_len, cache=cache, progress=progress)
    available = len(samples)
    if heldout is None:
        available -= min(max(1, available // _HELDOUT_SHARE), max(1, _HELDOUT_TOKENS // seq_len))
        rows = (samples[index]["input_ids"].tolist() for index in range(available, len(samples)))
        heldout_tokens = list(chain.from_iterable(rows))
    else:
        heldout_tokens = tokenised(tokenizer, heldout).tokens[len(begin_tokens(tokenizer)) :].tolist()
    if tokens is not None:
        tokens = validate.integer("tokens", tokens, 1)
    wanted = available if tokens is None else tokens // seq_len
    if wanted > available:
        raise TextError(f"tokens: expected at most {available * seq_len:,} (of the text to train on), got {tokens:,}")
    if isinstance(training, TrainingConfig):
        if training.batch_size is None:
            each = training.gradient_accumulation_steps * arguments.world_size
            training = replace(training, batch_size=min(max(wanted // (_STEPS * each), 1), _LARGEST_BATCH))
            arguments.per_device_train_batch_size = training.batch_size or 1
        if training.learning_rate is None:
            training = replace(training, learning_rate=default_learning_rate(model))
    # With tokens to spare, those of every part of the text teach more than the first ones.
    drawn = samples.section(0, available).drawn(wanted, arguments.seed) if wanted else samples
    stages = _prepare_stages(staged, plans, drawn, wanted, out, samples_per_step(arguments))
    calibrates = known is None and (staged.budgets or (given is not None and has_low_rank(given)))
    if (calibrates or refine) and num_samples > available:
        raise TextError(
            f"num_samples: expected at most {available} (the samples of the text to train on), got {num_samples}"
        )
    # At most two students of every stage, two checkpoints with two moments each, and the result.
    size = 4 * model.num_parameters()
    require_space(out, size * (2 * len(stages) + 2 * 3 + 1), "the stages and their checkpoints")
    return Prepared(
        teacher=model,
        student=given,
        task=task,
        tokenizer=tokenizer,
        recipe=staged,
        stages=stages,
        one_shot=_one_shot(staged, plans),
        calibration=known,
        num_samples=num_samples,
        refine=refine,
        calibration_text=samples.section(0, available),
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


def default_learning_rate(model: PreTrainedModel) -> float:
    """In inverse proportion to the width of the hidden states; that of GPT-2 for a model that names no width."""
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    return _RATE_TIMES_WIDTH / (width if isinstance(width, int) and width > 0 else _USUAL_WIDTH)


def _recipe(
    recipe: StrPath | Mapping[str, Any] | StagedRecipe | TQConfig | None,
    budget: Budget | None,
    student: object,
    **changes: Any,
) -> StagedRecipe:
    """The stages of a recipe, a budget or a student, of which there is at most one; by default a budget."""
    given = {"recipe": recipe, "budget": budget, "student": student}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConfigError(f"expected one of recipe, budget and student, got {' and '.join(names)}")
    if student is not None:
        return StagedRecipe((Stage("student"),))
    if recipe is None:
        return StagedRecipe((Stage("one-shot", budget=DEFAULT_BUDGET if budget is None else budget),)).replace(
            **changes
        )
    staged = resolve_staged_recipe(recipe, **changes)
    if staged.stages[0].config is None and staged.stages[0].budget is None:
        raise ConfigError(f"stage {staged.stages[0].name}: expected a config or a budget, as it is the first")
    return staged


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


def _load(source: StrPath | PreTrainedModel) -> PreTrainedModel:
    if isinstance(source, torch.nn.Module):
        # A copy that the run may move, freeze and train.
        live: Any = copy.deepcopy(require_transformers_model(source))
        model: PreTrainedModel = live.to("cpu", torch.float32)
        return model
    return load_model(source)


def _check_student(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    if type(student) is not type(teacher):
        raise ConfigError(
            f"student: expected a {type(teacher).__name__} as its teacher is, got {type(student).__name__}"
        )
    require_same_vocabulary(student, teacher)


def _check_calibration(calibration: Calibration, student: PreTrainedModel) -> None:
    """Raises `ShapeError` or `ConfigError` for the calibration of another model."""
    sizes = low_rank_sizes(student)
    for name, size in sizes.items():
        calibration.check(name, *size)
    check_model(calibration, list(sizes))


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
    if tokens > (vocab_size := teacher.config.get_text_config().vocab_size):
        raise ConfigError(
            f"{name} has {tokens} tokens, the teacher's vocabulary only {vocab_size}: it is another model's tokenizer"
        )


def _sequence_length(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    text: Any,
    training: TrainingConfig | TrainingArguments,
) -> int:
    """Text tokens of a sample; with the special tokens of the task they are the length of an input."""
    asked = training.seq_len if isinstance(training, TrainingConfig) else None
    positions = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    longest = positions if isinstance(positions, int) else min(tokenizer.model_max_length, _LONGEST)
    if isinstance(text, TokenBlocks):
        found = text.seq_len + task.edges
        if asked not in (None, found):
            raise ConfigError(f"seq_len: expected {found}, that of the text's samples, got {asked}")
        asked = found
    seq_len = min(longest, tokenizer.model_max_length, _LONGEST) if asked is None else asked
    least = 2 + task.edges
    if not least <= seq_len <= longest:
        raise ConfigError(f"seq_len: expected {least} to {longest} (the teacher's positions), got {seq_len}")
    return seq_len - task.edges


def _one_shot(recipe: StagedRecipe, plans: Iterable[ModelPlan | None]) -> TQConfig | None:
    configs = [stage.config for stage in recipe.stages if stage.config is not None]
    specs = {matrix.name: matrix.spec for plan in plans if plan is not None for matrix in plan.matrices}
    return configs[-1].replace(specs=specs) if configs else None


def _prepare_stages(
    recipe: StagedRecipe,
    plans: Sequence[ModelPlan | None],
    samples: TokenBlocks,
    wanted: int,
    out: Path,
    per_step: int,
) -> tuple[PreparedStage, ...]:
    """Distributes `wanted` samples among the stages; raises `TextError` for a share below one step."""
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
