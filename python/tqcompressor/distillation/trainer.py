"""`DistillTrainer`: a `transformers.Trainer` whose loss compares the student with its teacher.

All but the loss comes from transformers: logging, checkpoints and resuming, gradient accumulation, schedulers,
mixed precision, several processes and hosts by `torchrun` or `accelerate launch`.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.data.data_collator import default_data_collator

from ..errors import ConfigError, StorageError
from ..losses.hidden import hidden_state_loss
from ..losses.logits import cross_entropy, distillation_loss
from ..losses.topk import topk_distillation_loss
from ..models.matrices import compressed_modules, require_trainable
from ..models.quantization_state import guard_name
from ..utils.atomic_io import free_space
from ..utils.torch_utils import mean_embedding, move, without_dropout
from .artifacts import mark_complete
from .config import DistillConfig
from .tasks import kind_of
from .teacher_cache import CachedTeacher

# Columns of a `CachedTeacherDataset` besides the tokens.
_CACHED = ("teacher_tokens", "teacher_probabilities")
# Views, and operations that make new memory whose values their backward passes do not need.
_VIEWS = frozenset(
    f"{name}Backward0" for name in ("View", "UnsafeView", "Slice", "Unsqueeze", "Transpose", "Permute", "T")
)
_NEED_NO_RESULT = frozenset(
    f"{name}Backward0" for name in ("Mm", "Addmm", "Bmm", "Mul", "Div", "Add", "ToCopy", "Clone", "IndexSelect", "Cat")
)


class DistillTrainer(Trainer):
    """A `transformers.Trainer` whose loss is that of `DistillConfig`, computed by Rust on the CPU.

    The teacher runs in evaluation and inference mode, on the student's device, in its own dtype or in that of the
    mixed precision. It may be None where the training set is a `CachedTeacherDataset`, whose probabilities replace its
    logits. The evaluation loss is the cross-entropy of the labels alone; its exponential is the perplexity. For a model
    without a vocabulary it is the distance from the teacher.

    Items of the datasets have "input_ids" and optionally "attention_mask" and "labels". Without labels, every attended
    token is a label of a causal model. The trainer shifts these labels by one position, like the causal models of
    transformers; those of a masked language model, which are required, stay where they are.

    In a training step the gradient of the loss is written over the student's logits where a matrix product or the like
    has made them, so that a hook that keeps the model's outputs finds the gradient there. Evaluation, and a subclass
    that calls `compute_loss(..., return_outputs=True)`, leave the logits as they are.

    Args:
        model: The student, compressed or not: a causal or masked language model, or a model that returns hidden states.
        args: As for `transformers.Trainer`.
        teacher: A model of the student's kind and vocabulary, or None where the loss does not depend on it.
        distill: The loss.
        teacher_tokenizer: Compared with `processing_class`: both must have equal ids for equal tokens.
        **options: As for `transformers.Trainer`: `train_dataset`, `eval_dataset`, `callbacks`, `processing_class`, …

    Raises `ConfigError` when teacher and student do not fit together: vocabularies, tokenizers, layers, widths.

    Example:
        >>> trainer = DistillTrainer(student, args, teacher=teacher, train_dataset=blocks)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531; hidden states: Sanh et al., arXiv 1910.01108.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        distill: DistillConfig | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, PreTrainedModel) and getattr(model, "peft_config", None) is None:
            require_trainable(model)
        self.distill = distill or DistillConfig()
        self.teacher = teacher
        # A class of the caller's own is taken for a causal one.
        self.kind = kind_of(model) or "causal"
        if self.kind == "embedding" and (teacher is None or self.distill.alpha != 1):
            raise ConfigError(
                f"{type(model).__name__} has no vocabulary and learns from a teacher alone: expected a teacher and "
                f"alpha=1, got alpha={self.distill.alpha:g}"
            )
        if teacher is None and self.distill.hidden_weight:
            raise ConfigError("hidden_weight: expected 0 without a teacher, whose hidden states it weighs")
        self.hidden_pairs: tuple[tuple[int, int], ...] = ()
        self.hidden_weight = 0.0
        if teacher is not None:
            require_same_vocabulary(model, teacher)
            weight = self.distill.hidden_weight
            if weight is None:
                cached = isinstance(getattr(options.get("train_dataset"), "teacher", None), CachedTeacher)
                weight = 0.0 if cached else _default_hidden_weight(model, teacher, self.distill)
            self.hidden_weight = weight
            if self.hidden_weight > 0:
                self.hidden_pairs = _hidden_pairs(model, teacher, self.distill)
        processing_class = options.get("processing_class")
        if teacher_tokenizer is not None and processing_class is not None:
            require_same_tokenizer(processing_class, teacher_tokenizer)
        _check_cached(options.get("train_dataset"), model, self.distill)
        # Given a tokenizer, transformers would choose a collator that pads.
        options.setdefault("data_collator", default_data_collator)
        super().__init__(model, args, **options)
        # The loss is a mean over the tokens of one batch: average it over the accumulated batches.
        self.model_accepts_loss_kwargs = False
        # Keep the cached columns, although the model's forward pass has no such arguments.
        self.args.remove_unused_columns = False
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.train(False)
            move(teacher, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch: that of the config in training, the cross-entropy in evaluation."""
        inputs = dict(inputs)
        if self.kind == "embedding":
            return self._embedding_loss(model, inputs, return_outputs)
        cached = [inputs.pop(name, None) for name in _CACHED]
        labels = self._labels(inputs)
        wants_hidden = model.training and bool(self.hidden_pairs)
        outputs = model(**inputs, use_cache=False, output_hidden_states=wants_hidden)
        # The logits of a training step are read by the loss alone, unless a caller asks for them.
        inplace = model.training and not return_outputs and _may_be_overwritten(outputs.logits)
        if not model.training or not self.distill.needs_teacher:
            loss = cross_entropy(outputs.logits, labels, inplace=inplace)
        else:
            loss = self._distillation(outputs, inputs, labels, inplace, *cached)
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **options: Any) -> Any:
        """As `Trainer.train`, without dropout unless the config asks for it."""
        student: Any = self.model
        with nullcontext() if self.distill.dropout else without_dropout(student):
            return super().train(*args, **options)

    def _labels(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The token that each position predicts, taken out of the inputs; -100 where there is none."""
        labels = inputs.pop("labels", None)
        if self.kind == "causal":
            return _next_tokens(labels, inputs)
        if labels is None:
            raise ConfigError("labels: expected with a masked language model, with -100 where a token is not masked")
        return labels  # type: ignore[no-any-return]

    def _embedding_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The distance of the last hidden states, token by token, and of their means."""
        teacher: Any = self.teacher
        inputs.pop("labels", None)
        with torch.inference_mode(), self.accelerator.autocast():
            expected = teacher(**inputs).last_hidden_state
        outputs = model(**inputs)
        mask = inputs.get("attention_mask")
        found = outputs.last_hidden_state
        loss = hidden_state_loss(
            found, expected, kind=self.distill.hidden_kind, mask=None if mask is None else mask.bool()
        ) + hidden_state_loss(mean_embedding(found, mask), mean_embedding(expected, mask), kind="cosine")
        return (loss, outputs) if return_outputs else loss

    def _distillation(
        self,
        outputs: Any,
        inputs: Mapping[str, Any],
        labels: torch.Tensor,
        inplace: bool,
        tokens: torch.Tensor | None,
        probabilities: torch.Tensor | None,
    ) -> torch.Tensor:
        options: Any = {"temperature": self.distill.temperature, "alpha": self.distill.alpha, "inplace": inplace}
        teacher_outputs: Any = None
        if self.teacher is not None and (tokens is None or self.hidden_pairs):
            # Accelerate applies the mixed precision only to the model that it prepares, the student.
            with torch.inference_mode(), self.accelerator.autocast():
                teacher_outputs = self.teacher(**inputs, use_cache=False, output_hidden_states=bool(self.hidden_pairs))
        loss: torch.Tensor
        if tokens is not None and probabilities is not None:
            loss = topk_distillation_loss(outputs.logits, tokens, probabilities, labels, **options)
        elif teacher_outputs is not None:
            loss = distillation_loss(outputs.logits, teacher_outputs.logits, labels, **options)
        else:
            raise ConfigError("teacher: expected one, since the training set has no cached teacher probabilities")
        if self.hidden_pairs:
            mask = inputs.get("attention_mask")
            mask = None if mask is None else mask.bool()
            distances = [
                hidden_state_loss(
                    outputs.hidden_states[ours],
                    teacher_outputs.hidden_states[theirs],
                    kind=self.distill.hidden_kind,
                    mask=mask,
                )
                for ours, theirs in self.hidden_pairs
            ]
            loss = loss + self.hidden_weight * torch.stack(distances).mean()
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As in `Trainer`, with tokens as default labels; without labels, `Trainer` would compute no loss."""
        if "labels" not in inputs and self.kind == "causal":
            inputs = {**inputs, "labels": _own_labels(inputs)}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            # The libraries that write raise different errors, and some lose the system's error number.
            code = getattr(error, "errno", None) or (errno.EIO if free_space(folder) > 1 << 20 else errno.ENOSPC)
            raise StorageError(code, f"the checkpoint is not written: {error}", str(folder)) from error
        # The marker alone distinguishes a complete checkpoint from one of a process killed while writing.
        if self.args.should_save and folder.is_dir():
            mark_complete(folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Expected in a compressed checkpoint: the guard tensor is there, and the tied head is missing.
        model: Any = self.model
        if next(compressed_modules(model), None) is not None:
            tied = set(model.all_tied_weights_keys)
            load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
            guard = guard_name(model)
            load_result.unexpected_keys[:] = [name for name in load_result.unexpected_keys if name != guard]
        super()._issue_warnings_after_load(load_result)


def _may_be_overwritten(logits: torch.Tensor) -> bool:
    """Whether the operation that made the logits needs them no more, as far as it is one of the usual ones."""
    node = logits.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name() in _NEED_NO_RESULT and logits.is_contiguous()


def _own_labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    ids: torch.Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, -100)


def _next_tokens(labels: torch.Tensor | None, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The token that each position predicts; the last one predicts none. The logits stay whole: cutting copies them."""
    labels = _own_labels(inputs) if labels is None else labels
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], -100)], dim=-1)


def require_same_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises `ConfigError` unless both models have the same vocabulary size."""
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        raise ConfigError(f"the student's vocabulary has {ours} tokens, the teacher's {theirs}: they must be the same")


def require_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises `ConfigError` naming the first token whose ids differ."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    for token in sorted(ours.keys() | theirs.keys(), key=lambda token: ours.get(token, theirs.get(token, 0))):
        if ours.get(token) != theirs.get(token):
            raise ConfigError(
                f"the tokenizers differ: token {token!r} is {ours.get(token)} for the student "
                f"and {theirs.get(token)} for the teacher"
            )


def _check_cached(dataset: Any, student: PreTrainedModel, distill: DistillConfig) -> None:
    """Raises `ConfigError` for a cached teacher of another vocabulary or temperature."""
    cached = getattr(dataset, "teacher", None)
    if not isinstance(cached, CachedTeacher):
        return
    if cached.vocab_size != student.config.vocab_size:
        raise ConfigError(
            f"the student's vocabulary has {student.config.vocab_size} tokens, the cached teacher's {cached.vocab_size}"
        )
    if cached.temperature != distill.temperature:
        raise ConfigError(
            f"temperature: expected {cached.temperature:g}, that of the cached teacher, got {distill.temperature:g}"
        )


def _default_hidden_weight(student: PreTrainedModel, teacher: PreTrainedModel, distill: DistillConfig) -> float:
    """1 where every state of the student has one of the teacher's to be like, and the teacher runs anyway."""
    same = all(
        getattr(student.config, name, None) == getattr(teacher.config, name, ())
        for name in ("hidden_size", "num_hidden_layers")
    )
    return 1.0 if same and distill.alpha > 0 else 0.0


def _hidden_pairs(
    student: PreTrainedModel, teacher: PreTrainedModel, distill: DistillConfig
) -> tuple[tuple[int, int], ...]:
    ours, theirs = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    if student.config.hidden_size != teacher.config.hidden_size:
        raise ConfigError(
            f"hidden_weight: the student's hidden states have {student.config.hidden_size} values, the teacher's "
            f"{teacher.config.hidden_size}; only equal widths can be compared"
        )
    if distill.hidden_layers is None:
        if theirs % ours:
            raise ConfigError(
                f"hidden_layers: the student's {ours} blocks do not divide the teacher's {theirs}: name the pairs"
            )
        return tuple((block, block * theirs // ours) for block in range(1, ours + 1))
    for our, their in distill.hidden_layers:
        if not (0 <= our <= ours and 0 <= their <= theirs):
            raise ConfigError(
                f"hidden_layers: there is no pair ({our}, {their}): the student has states 0 to {ours}, "
                f"the teacher 0 to {theirs}"
            )
    return distill.hidden_layers
