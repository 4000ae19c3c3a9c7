"""The training of one stage: the arguments of transformers' trainer, its progress, its loss curve."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from ..errors import ConfigError
from ..models.balancing import MomentsOf, balanced
from ..utils.atomic_io import WholeFile
from ..utils.progress import ProgressOption, Report, reporter
from ..utils.torch_utils import on_device
from .artifacts import last_complete_checkpoint, read_json, write_json
from .config import DistillConfig, TrainingConfig
from .report import LossRecord
from .tasks import Samples
from .trainer import DistillTrainer

# Of AdamW: runs are short, and a longer memory would still hold the first gradients at their end.
_BETA2 = 0.95
# Points of a stage's loss curve, about.
_LOSS_RECORDS = 50


class Trained(NamedTuple):
    """The loss curve and speed of a stage's training, and the step that is kept."""

    losses: tuple[LossRecord, ...]
    seconds: float
    """Seconds since the last start of the stage."""
    tokens_per_second: float
    step: int
    """The step with the best score, whose weights the student has. With 0 the student before the training is the best,
    and the trained one is to be dropped."""


def training_arguments(
    training: TrainingConfig | TrainingArguments, folder: Path, steps: int, device: str | None
) -> TrainingArguments:
    """The arguments of transformers' trainer for one stage of `steps` steps, whose checkpoints go to `folder`.

    Raises `ConfigError` for values that contradict a stage or that this machine does not support.
    """
    if isinstance(training, TrainingArguments):
        _check_arguments(training, device)
        arguments = copy.copy(training)
    elif isinstance(training, TrainingConfig):
        arguments = _arguments_of(training, steps, device)
    else:
        kinds = "a TrainingConfig or a transformers.TrainingArguments"
        raise ConfigError(f"training: expected {kinds}, got {type(training).__name__}")
    arguments.output_dir = str(folder)
    arguments.max_steps = steps
    # With two, one complete checkpoint is left while the newest is written.
    arguments.save_total_limit = max(2, arguments.save_total_limit or 2)
    arguments.dataloader_drop_last = True
    arguments.disable_tqdm = True
    return arguments


def _arguments_of(training: TrainingConfig, steps: int, device: str | None) -> TrainingArguments:
    try:
        return TrainingArguments(
            per_device_train_batch_size=training.batch_size or 1,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            learning_rate=training.learning_rate or 0.0,
            weight_decay=training.weight_decay,
            adam_beta2=_BETA2,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            warmup_steps=round(training.warmup_ratio * steps),
            bf16=training.bf16,
            fp16=training.fp16,
            seed=training.seed,
            data_seed=training.seed,
            logging_steps=max(1, steps // _LOSS_RECORDS),
            save_strategy="steps",
            save_steps=training.save_steps,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
    except ValueError as error:
        # The device does not support the precision.
        raise ConfigError(f"training: {error}") from error


# The values of TrainingArguments that a stage allows, and why it allows no others.
_FOLLOWED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "max_steps": ((-1, 0), "the steps follow from `tokens`"),
    # The default is 3.
    "num_train_epochs": ((1, 3), "every sample is trained on once"),
    "save_strategy": (("steps",), "resuming needs a checkpoint every `save_steps` steps"),
    "save_only_model": ((False,), "resuming needs the state of the optimiser"),
    "ignore_data_skip": ((False,), "a resumed stage skips the samples that it has trained on"),
    "resume_from_checkpoint": ((None, False), "distill's `resume` finds the checkpoint"),
    "load_best_model_at_end": ((False,), "the best of a stage's checkpoints on `heldout` is kept"),
    "eval_strategy": (("no",), "every stage is scored on `heldout`"),
    "eval_on_start": ((False,), "every stage is scored on `heldout`"),
    "auto_find_batch_size": ((False,), "the steps are counted for one batch size"),
    "label_smoothing_factor": ((0,), "the loss is that of `losses`"),
    "push_to_hub": ((False,), "push the result in `out`"),
    "deepspeed": ((None, False, ""), "every process holds the whole student"),
    "fsdp": ((None, False, ""), "every process holds the whole student"),
    "parallelism_config": ((None,), "every process holds the whole student"),
}


def _check_arguments(arguments: TrainingArguments, device: str | None) -> None:
    """Raises `ConfigError` naming every argument that contradicts a stage."""
    contradictions = []
    for name, (followed, why) in _FOLLOWED.items():
        value = getattr(arguments, name, followed[0])
        if value not in followed and value != []:
            contradictions.append(f"{name}={getattr(value, 'value', value)!r} ({why})")
    if device == "cpu" and not arguments.use_cpu:
        contradictions.append("use_cpu=False (device is 'cpu')")
    if contradictions:
        raise ConfigError(f"training: distill cannot follow {', '.join(contradictions)}")


# Arguments that do not affect the result: paths of files, logs and reports, and the identity of the process.
_WITHOUT_EFFECT = (
    "output_dir",
    "run_name",
    "project",
    "report_to",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "disable_tqdm",
    "local_rank",
)


def training_settings(training: TrainingConfig | TrainingArguments, seq_len: int) -> dict[str, Any]:
    """The settings of the training as JSON types; equal for equal arguments, in every process of a run."""
    if isinstance(training, TrainingConfig):
        return {**asdict(training), "seq_len": seq_len}
    arguments = training.to_sanitized_dict()
    return {**{name: value for name, value in arguments.items() if name not in _WITHOUT_EFFECT}, "seq_len": seq_len}


def samples_per_step(arguments: TrainingArguments) -> int:
    """Samples of one optimiser step, over all devices and processes."""
    samples: int = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return samples


def train_stage(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    arguments: TrainingArguments,
    losses: DistillConfig,
    title: str,
    progress: ProgressOption,
    *,
    score: Callable[[PreTrainedModel], float],
    start: float,
    moments: MomentsOf | None,
) -> Trained:
    """Trains the student in place, from its last complete checkpoint if there is one; moves both models to the CPU.

    Every checkpoint is scored. The student ends with the weights of the lowest `score`; `start` is its score before.
    `moments` are the norm in which low-rank factors are balanced while they learn; None leaves them as they are.
    """
    folder = Path(arguments.output_dir or ".")
    last = last_complete_checkpoint(folder)
    tokens_per_step = samples_per_step(arguments) * samples.blocks.seq_len
    started = time.perf_counter()
    shown = progress if arguments.process_index == 0 else False
    balancing = nullcontext() if moments is None else balanced(student, moments)
    with balancing, on_device(arguments.device, student, teacher), reporter(shown, title) as report:
        follower = _Follower(report, tokens_per_step)
        keeper = _Keeper(folder, student, score, start, writes=arguments.process_index == 0)
        trainer = DistillTrainer(
            student,
            arguments,
            teacher=teacher,
            distill=losses,
            train_dataset=samples,
            processing_class=tokenizer,
            callbacks=[follower, keeper],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = time.perf_counter() - started
        # Removes the mixed precision that accelerate wraps around the model's forward pass.
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
        step = keeper.restore_best()
    curve = tuple(
        LossRecord(entry["step"], entry["step"] * tokens_per_step, entry["loss"], entry["learning_rate"])
        for entry in cast("list[dict[str, Any]]", trainer.state.log_history)
        if "loss" in entry
    )
    return Trained(curve, seconds, follower.tokens / seconds, step)


class _Follower(TrainerCallback):
    """Shows tokens, loss and speed on the progress bar."""

    def __init__(self, report: Report | None, tokens_per_step: int) -> None:
        self.report, self.tokens_per_step = report, tokens_per_step
        self.tokens = 0
        self.loss = ""
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}, "

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        self.tokens += self.tokens_per_step
        if self.report is not None:
            speed = self.tokens / (time.perf_counter() - self.started)
            done, total = state.global_step * self.tokens_per_step, state.max_steps * self.tokens_per_step
            self.report(done, total, f"{self.loss}{speed:,.0f} tokens/s")


class _Keeper(TrainerCallback):
    """Scores the student at every checkpoint, and keeps the weights of the best on disk.

    Scores are on disk, too: a resumed run ends with the same student as one that was not killed.
    """

    def __init__(
        self,
        folder: Path,
        student: PreTrainedModel,
        score: Callable[[PreTrainedModel], float],
        start: float,
        *,
        writes: bool,
    ) -> None:
        self.student, self.score, self.writes = student, score, writes
        self.scores, self.weights = folder / "scores.json", folder / "best.safetensors"
        self.found: dict[str, float] = read_json(self.scores) if self.scores.exists() else {"0": start}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        if state.global_step > 0:
            self._score(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        self._score(state.global_step)

    def _score(self, step: int) -> None:
        if str(step) in self.found:
            return
        value = self.score(self.student)
        # A diverged student has no score.
        value = value if math.isfinite(value) else math.inf
        if value < min(self.found.values()) and self.writes:
            with WholeFile(self.weights) as file:
                file.write(save({name: p.detach().cpu().contiguous() for name, p in self.student.named_parameters()}))
        self.found[str(step)] = value
        if self.writes:
            write_json(self.scores, self.found)

    def restore_best(self) -> int:
        """Gives the student its best weights, unless they are those from before the training; returns their step."""
        step = min(self.found, key=lambda step: (self.found[step], int(step)))
        if step not in ("0", max(self.found, key=int)):
            best = load_file(self.weights)
            with torch.no_grad():
                for name, parameter in self.student.named_parameters():
                    parameter.copy_(best[name])
        return int(step)
