"""Training a student for one stage: the arguments of transformers' trainer, its progress, its loss curve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..data.token_blocks import TokenBlocks
from ..utils.progress import ProgressOption, Report, reporter
from ..utils.torch_utils import move
from .artifacts import last_complete_checkpoint
from .config import DistillConfig, TrainingConfig
from .report import LossRecord
from .trainer import DistillTrainer

# Points of a stage's loss curve.
_LOSS_RECORDS = 50


class Trained(NamedTuple):
    """How the training of a stage went."""

    losses: tuple[LossRecord, ...]
    seconds: float
    """Since its last start."""
    tokens_per_second: float


def training_arguments(training: TrainingConfig, folder: Path, steps: int, device: str | None) -> TrainingArguments:
    """What transformers' trainer is told; its checkpoints go to `folder`."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=round(training.warmup * steps),
        bf16=training.precision == "bfloat16",
        fp16=training.precision == "float16",
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=max(1, steps // _LOSS_RECORDS),
        save_strategy="steps",
        save_steps=max(1, steps // training.checkpoints),
        # The one before it is still there when the newest is only half written.
        save_total_limit=2,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )


def train_stage(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: TokenBlocks,
    arguments: TrainingArguments,
    losses: DistillConfig,
    title: str,
    progress: ProgressOption,
) -> Trained:
    """Trains the student in place, from its last complete checkpoint if there is one. Both models end on the CPU."""
    last = last_complete_checkpoint(Path(arguments.output_dir or "."))
    batches = arguments.gradient_accumulation_steps * arguments.world_size
    tokens_per_step = arguments.per_device_train_batch_size * batches * blocks.seq_len
    started = time.perf_counter()
    with reporter(progress if arguments.process_index == 0 else False, title) as report:
        follower = _Follower(report, tokens_per_step)
        trainer = DistillTrainer(
            student,
            arguments,
            teacher=teacher,
            distill=losses,
            train_dataset=blocks,
            processing_class=tokenizer,
            callbacks=[follower],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    seconds = time.perf_counter() - started
    # Undoes mixed precision, which accelerate wraps around the model's own forward pass.
    trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    move(student, "cpu")
    move(teacher, "cpu")
    curve = tuple(
        LossRecord(entry["step"], entry["step"] * tokens_per_step, entry["loss"], entry["learning_rate"])
        for entry in cast("list[dict[str, Any]]", trainer.state.log_history)
        if "loss" in entry
    )
    return Trained(curve, seconds, follower.tokens / seconds)


class _Follower(TrainerCallback):
    """Tells the progress bar of tokens, loss and speed."""

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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and notes of transformers among ours."""
    hub: Any = logging
    verbosity, bars = hub.get_verbosity(), hub.is_progress_bar_enabled()
    hub.set_verbosity_error()
    hub.disable_progress_bar()
    try:
        yield
    finally:
        hub.set_verbosity(verbosity)
        if bars:
            hub.enable_progress_bar()
