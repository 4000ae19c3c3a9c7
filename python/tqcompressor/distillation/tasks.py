"""What a student learns and is scored by: the next token, masked tokens, or the embedding of a text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from ..data.token_blocks import TokenBlocks
from ..data.tokenize import drawn_indices, special_tokens
from ..errors import ConfigError, TextError
from ..evaluate.results import exponential
from ..evaluate.scoring import begin_tokens, checked_batch_size, negative_log_likelihood
from ..losses.logits import cross_entropy
from ..utils.progress import Report
from ..utils.torch_utils import evaluating, mean_embedding

Kind: TypeAlias = Literal["causal", "masked", "embedding"]
# The share of tokens that are masked, as in BERT's training.
_MASKED = 0.15
# Seeds of the masks, so that those of the held-out text never change.
_TRAINING_MASKS, _HELDOUT_MASKS = 1, 2
IGNORED = -100
# Tokens that every held-out token may be read with, if the training has no longer samples.
_LONGEST_WINDOW = 1024


def kind_of(model: PreTrainedModel) -> Kind | None:
    """The kind of a model of transformers by its class; None for what `distill` cannot train."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if names & set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return "causal"
    if names & set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()):
        return "masked"
    bases = {name for found in modeling_auto.MODEL_MAPPING_NAMES.values() for name in _as_tuple(found)}
    reads_text = getattr(model.config, "vocab_size", None) is not None and not model.config.is_encoder_decoder
    return "embedding" if reads_text and names & bases else None


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


class Task(ABC):
    """How a kind of models is trained and scored on tokens of a text. A lower score is better."""

    kind: ClassVar[Kind]
    measure: ClassVar[str]
    """The name of the score."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        before, after = self._edges(tokenizer)
        self.before, self.after = torch.tensor(before, dtype=torch.int64), torch.tensor(after, dtype=torch.int64)

    def _edges(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        return special_tokens(tokenizer)

    @property
    def edges(self) -> int:
        """The special tokens of an input, beside its text."""
        return len(self.before) + len(self.after)

    def row(self, tokens: torch.Tensor) -> torch.Tensor:
        """The input of a text: its tokens between the special tokens."""
        return torch.cat([self.before, tokens, self.after])

    def samples(self, blocks: TokenBlocks) -> Samples:
        """The training samples of the blocks."""
        return Samples(blocks, self)

    def item(self, tokens: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
        """One sample; `seed` is that of its mask."""
        return {"input_ids": self.row(tokens)}

    def drawn(self, blocks: TokenBlocks, num_samples: int, seq_len: int, seed: int) -> Iterator[torch.Tensor]:
        """Batches to calibrate on: inputs of `seq_len` text tokens, drawn from the blocks."""
        chosen = drawn_indices(len(blocks), num_samples, blocks.seq_len, blocks.tokens, seed)
        for begin in range(0, len(chosen), 8):
            yield torch.stack([self.row(blocks[index]["input_ids"][:seq_len]) for index in chosen[begin : begin + 8]])

    @abstractmethod
    def score(
        self, model: PreTrainedModel, teacher: PreTrainedModel, heldout: Sequence[int], seq_len: int, report: Report
    ) -> float:
        """The score of a model on held-out tokens, in inputs of `seq_len` text tokens; both models on one device."""

    def _rows(self, heldout: Sequence[int], seq_len: int) -> Iterator[torch.Tensor]:
        """The tokens of inputs that do not overlap; a last one that is not full is left out."""
        seq_len = min(seq_len, len(heldout))
        if seq_len == 0:
            raise TextError("the held-out text is empty")
        for begin in range(0, len(heldout) - seq_len + 1, seq_len):
            yield torch.tensor(heldout[begin : begin + seq_len], dtype=torch.int64)


class CausalTask(Task):
    """The next token; the score is the perplexity."""

    kind = "causal"
    measure = "perplexity"

    def _edges(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        # Blocks are cut from running text.
        self.begin = begin_tokens(tokenizer)
        return [], []

    def score(
        self, model: PreTrainedModel, teacher: PreTrainedModel, heldout: Sequence[int], seq_len: int, report: Report
    ) -> float:
        """The perplexity, as `tqcompressor.perplexity` has it by default for a model of at most 1,024 positions."""
        total, tokens = negative_log_likelihood(
            model, [*self.begin, *heldout], context=_window(model, seq_len), progress=report
        )
        return exponential(total / tokens)


def _window(model: PreTrainedModel, seq_len: int) -> int:
    """The window to score in: the model's own, but no longer than that of the training where this is long.

    Windows of thousands of tokens, of which each sees the one before, would take longer than the training.
    """
    own = getattr(model.config, "max_position_embeddings", None)
    return min(own, max(seq_len, _LONGEST_WINDOW)) if isinstance(own, int) else seq_len


class MaskedTask(Task):
    """Masked tokens, 15% of the text; the score is the perplexity of those of fixed masks."""

    kind = "masked"
    measure = "perplexity of masked tokens"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if tokenizer.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token, which a masked language model learns with")
        self.mask_token: int = tokenizer.mask_token_id

    def item(self, tokens: torch.Tensor, seed: int, masks: int = _TRAINING_MASKS) -> dict[str, torch.Tensor]:
        """The input with some tokens masked, and the labels: the masked tokens, and `IGNORED` elsewhere."""
        generator = torch.Generator().manual_seed((seed << 2) + masks)
        masked = torch.rand(len(tokens), generator=generator) < _MASKED
        if not masked.any():
            masked[int(torch.randint(len(tokens), (1,), generator=generator))] = True
        inputs, labels = (
            self.row(tokens.masked_fill(masked, self.mask_token)),
            torch.full_like(self.row(tokens), IGNORED),
        )
        begin = len(self.before)
        labels[begin : begin + len(tokens)][masked] = tokens[masked]
        return {"input_ids": inputs, "labels": labels}

    def score(
        self, model: PreTrainedModel, teacher: PreTrainedModel, heldout: Sequence[int], seq_len: int, report: Report
    ) -> float:
        """`exp` of the mean cross-entropy of the masked tokens."""
        rows = [self.item(row, number, _HELDOUT_MASKS) for number, row in enumerate(self._rows(heldout, seq_len))]
        total, count = 0.0, 0
        for batch in _batches(rows, model, report):
            labels = batch.pop("labels")
            found = int((labels != IGNORED).sum())
            total += found * float(cross_entropy(model(**batch).logits, labels))
            count += found
        return exponential(total / count)


class EmbeddingTask(Task):
    """The embedding of a text, the mean of its last hidden states; the score is the distance from the teacher's."""

    kind = "embedding"
    measure = "cosine distance"

    def score(
        self, model: PreTrainedModel, teacher: PreTrainedModel, heldout: Sequence[int], seq_len: int, report: Report
    ) -> float:
        """The mean of 1 minus the cosine of the student's and the teacher's embedding."""
        rows = [self.item(row, 0) for row in self._rows(heldout, seq_len)]
        total = 0.0
        for batch in _batches(rows, model, report):
            ours, theirs = (mean_embedding(each(**batch).last_hidden_state, None) for each in (model, teacher))
            total += float((1 - torch.cosine_similarity(ours.double(), theirs.double())).sum())
        # A model beside itself: rounding makes no distance.
        return max(total / len(rows), 0.0)


def _batches(
    rows: Sequence[dict[str, torch.Tensor]], model: PreTrainedModel, report: Report
) -> Iterator[dict[str, torch.Tensor]]:
    """The rows in batches on the model's device, in evaluation and inference mode."""
    size = checked_batch_size(model, None, len(rows[0]["input_ids"]))
    with evaluating(model), torch.inference_mode():
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            yield {name: torch.stack([row[name] for row in part]).to(model.device) for name in part[0]}
            report(begin + len(part), len(rows))


_TASKS: dict[Kind, type[Task]] = {task.kind: task for task in (CausalTask, MaskedTask, EmbeddingTask)}


def task_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task of a model; raises `ConfigError` for a model that `distill` cannot train."""
    kind = kind_of(model)
    if kind is None:
        raise ConfigError(
            f"the teacher is a {type(model).__name__}: distill trains causal and masked language models and text "
            "encoders. Compress it with `compress`, and train it with a trainer of its own kind"
        )
    return _TASKS[kind](tokenizer)


class Samples:
    """A map-style dataset: the blocks of a text as the inputs of a task."""

    def __init__(self, blocks: TokenBlocks, task: Task) -> None:
        self.blocks, self.task = blocks, task

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.task.item(self.blocks[index]["input_ids"], index)
