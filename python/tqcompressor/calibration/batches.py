"""The batches that a calibration reads: sequences of tokens drawn from a text, or the caller's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.text import sources
from ..data.token_blocks import TokenBlocks, token_blocks
from ..data.tokenize import CALIBRATION_SEQ_LEN, Encoder, drawn_evenly, drawn_indices, special_tokens
from ..errors import ConfigError, TextError

Batch: TypeAlias = dict[str, torch.Tensor]
# Limits of one batch: the activations that a GPT-2 small keeps for the backward pass then take about half a gigabyte,
# and the logits of a wide vocabulary at most 128 MB.
_TOKENS_PER_BATCH = 1 << 10
_LOGITS_PER_BATCH = 1 << 25


def batches_of(
    model: nn.Module, source: Any, text: Any, *, num_samples: int, seq_len: int | None, seed: int
) -> list[Batch]:
    """The batches of `batches_and_texts`."""
    return batches_and_texts(model, source, text, num_samples=num_samples, seq_len=seq_len, seed=seed)[0]


def batches_and_texts(
    model: nn.Module, source: Any, text: Any, *, num_samples: int, seq_len: int | None, seed: int
) -> tuple[list[Batch], dict[str, int]]:
    """The batches that `calibrate` describes, on the CPU: each has `input_ids` and may have `attention_mask`.

    Behind them stand the names of the texts that they were drawn from, each with its number of tokens.

    Raises `TextError` and `ConfigError` as `calibrate` says.
    """
    if isinstance(source, PreTrainedTokenizerBase):
        if text is None:
            raise ConfigError("text: a tokenizer needs a text to tokenise, got None")
        rows, read = _from_text(model, source, text, num_samples, seq_len, seed)
        return _batched(model, rows), read
    return _given(model, source, text, num_samples, seed), {}


def _given(model: nn.Module, source: Any, text: Any, num_samples: int, seed: int) -> list[Batch]:
    """The batches of a source that is not a tokenizer."""
    if text is not None:
        raise ConfigError(f"text: expected with a tokenizer, got it with {type(source).__name__}")
    if isinstance(source, TokenBlocks):
        return _batched(model, _drawn(source, num_samples, seed))
    if isinstance(source, str | Mapping) or not isinstance(source, Iterable):
        raise ConfigError(f"expected a tokenizer, TokenBlocks or batches, got {type(source).__name__}")
    batches = [_checked(number, batch, is_encoder_decoder(model)) for number, batch in enumerate(source)]
    if not batches:
        raise TextError("there are no batches")
    vocabulary = _vocabulary(model)
    for number, batch in enumerate(batches):
        if vocabulary is not None and int(batch["input_ids"].max()) >= vocabulary:
            raise ConfigError(
                f"batch {number}: expected tokens below {vocabulary}, got {int(batch['input_ids'].max())}"
            )
    return batches


def mask_of(batch: Batch) -> torch.Tensor:
    """The mask `(rows, positions)` of a batch: 1 at tokens, 0 at padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else (mask != 0).long()


def _from_text(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: Any, num_samples: int, seq_len: int | None, seed: int
) -> tuple[torch.Tensor, dict[str, int]]:
    """Sequences drawn from a text, each between the special tokens that the tokenizer adds to an input.

    Behind them stands how many tokens each text gave, by its name.
    """
    longest = min(_positions(model), tokenizer.model_max_length)
    length = min(longest, CALIBRATION_SEQ_LEN) if seq_len is None else seq_len
    before, after = special_tokens(tokenizer)
    inner = length - len(before) - len(after)
    if inner < 2 or length > longest:
        least = 2 + len(before) + len(after)
        raise ConfigError(f"seq_len: expected {least} to {longest} (the model's positions), got {length}")
    texts = sources(text)
    if len(texts) == 1 and not isinstance(text, str) and not _are_strings(text):
        drawn = _drawn(token_blocks(text, tokenizer, inner, progress=False), num_samples, seed)
        read = {texts[0][0]: drawn.numel()}
    else:
        encoder = Encoder(tokenizer)
        found, read = drawn_evenly(
            texts, encoder, encoder.end_text, encoder.end, length=inner, wanted=num_samples, seed=seed
        )
        drawn = torch.from_numpy(found)
    edges = [torch.tensor(ids, dtype=torch.int64).expand(len(drawn), -1) for ids in (before, after)]
    return torch.cat([edges[0], drawn, edges[1]], dim=1), read


def _are_strings(text: Any) -> bool:
    return isinstance(text, list | tuple) and all(isinstance(entry, str) for entry in text)


def _drawn(blocks: TokenBlocks, count: int, seed: int) -> torch.Tensor:
    chosen = drawn_indices(len(blocks), count, blocks.seq_len, blocks.tokens, seed)
    return torch.stack([blocks[index]["input_ids"] for index in chosen])


def _batched(model: nn.Module, rows: torch.Tensor) -> list[Batch]:
    vocabulary = _vocabulary(model)
    if vocabulary is not None and int(rows.max()) >= vocabulary:
        raise ConfigError(f"text: expected tokens below {vocabulary:,}, the model's vocab_size, got {int(rows.max())}")
    length = rows.shape[1]
    size = min(_TOKENS_PER_BATCH // length, _LOGITS_PER_BATCH // (length * (vocabulary or 1)))
    return [{"input_ids": part} for part in torch.split(rows, max(1, size))]


def _checked(number: int, batch: Any, decodes: bool) -> Batch:
    tensors = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
    if not isinstance(tensors, Mapping) or not isinstance(tensors.get("input_ids"), torch.Tensor):
        raise ConfigError(f'batch {number}: expected a tensor "input_ids", got {type(batch).__name__}')
    found = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    # Labels would make the model compute a loss that is not used. A decoder derives its input from labels of tokens.
    labels = found.pop("labels", None)
    if decodes and labels is not None and labels.ndim == found["input_ids"].ndim and "decoder_input_ids" not in found:
        found["labels"] = labels
    found = {name: value[None] if value.ndim == 1 else value for name, value in found.items()}
    shape = tuple(found["input_ids"].shape)
    if len(shape) != 2 or 0 in shape or found["input_ids"].dtype not in (torch.int32, torch.int64):
        raise ConfigError(
            f"batch {number}: expected input_ids (rows, positions) of integers, got {found['input_ids'].dtype} {shape}"
        )
    mask = found.get("attention_mask")
    if mask is not None and tuple(mask.shape) != shape:
        raise ConfigError(f"batch {number}: expected an attention_mask {shape}, got {tuple(mask.shape)}")
    return found


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder, each with an input of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _vocabulary(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    return getattr(config, "vocab_size", None)


def _positions(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else 1 << 30
