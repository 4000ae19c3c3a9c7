"""The quality of a compressed encoder: the cosine of its text embeddings with those of its teacher."""

from __future__ import annotations

import time
from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.text import open_text
from ..errors import ConfigError, TextError
from ..utils import validate
from ..utils.progress import ProgressOption, reporter
from ..utils.torch_utils import evaluating, mean_embedding
from .results import EmbeddingResult
from .scoring import import_torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH_SIZE = 16


def embedding_cosine(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | PathLike[str],
    *,
    num_samples: int = 256,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> EmbeddingResult:
    """How far a compressed encoder's embeddings of texts are those of its teacher.

    `cosine = (1/N) Σ_i ⟨s_i, t_i⟩ / (‖s_i‖ ‖t_i‖)`, where `s_i` and `t_i` are the means of the last hidden states over
    the tokens of text `i`, padding left out. A head is left out, too; of a model with an encoder and a decoder, the
    encoder is measured.

    Args:
        student: The compressed model.
        teacher: The model that it was compressed from.
        tokenizer: The tokenizer of both.
        text: A str is the text itself, a `pathlib.Path` is a UTF-8 file. Each line that is not blank is one of the
            texts that are embedded, cut to the longest input of the model.
        num_samples: How many lines are embedded at most, taken at equal distances.
        batch_size: Texts in one forward pass; results do not depend on it but for rounding. Default: 16.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Raises:
        TextError: The text has no line that is not blank.
        ConfigError: An argument is out of its range, or a model returns no `.last_hidden_state` for `input_ids`.
        MissingDependencyError: torch is not installed.

    Example:
        >>> from transformers import AutoModel, AutoTokenizer
        >>> model = AutoModel.from_pretrained("tests/data/tiny-gpt2")
        >>> tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-gpt2")
        >>> result = embedding_cosine(model, model, tokenizer, "He looked at her.\\nShe looked at the door.")
        >>> result.texts, round(result.cosine, 3)
        (2, 1.0)
    """
    torch = import_torch()
    start = time.perf_counter()
    num_samples = validate.integer("num_samples", num_samples, 1)
    batch_size = _BATCH_SIZE if batch_size is None else validate.integer("batch_size", batch_size, 1)
    lines = _spread(list(_lines(text)), num_samples)
    encoders = [_encoder(model) for model in (student, teacher)]
    longest = min(_longest(encoder, tokenizer) for encoder in encoders)
    cosines: list[float] = []
    with evaluating(student), evaluating(teacher), torch.inference_mode(), reporter(progress, "embeddings") as report:
        for begin in range(0, len(lines), batch_size):
            rows = tokenizer(lines[begin : begin + batch_size], truncation=True, max_length=longest)["input_ids"]
            ids, mask = _padded(rows)
            found, expected = (_pooled(encoder, ids, mask) for encoder in encoders)
            cosines += torch.nn.functional.cosine_similarity(found, expected).tolist()
            if report is not None:
                report(len(cosines), len(lines))
    return EmbeddingResult(float(np.mean(cosines)), float(np.min(cosines)), len(lines), time.perf_counter() - start)


def _lines(text: str | PathLike[str]) -> Iterator[str]:
    """The lines of a text that are not blank."""
    for parts in open_text(text):
        rest = ""
        for part in parts:
            *whole, rest = (rest + part).split("\n")
            yield from filter(None, map(str.strip, whole))
        if rest.strip():
            yield rest.strip()


def _spread(lines: list[str], most: int) -> list[str]:
    if not lines:
        raise TextError("the text is empty")
    chosen = np.linspace(0, len(lines) - 1, min(most, len(lines))).round().astype(int)
    # Of similar length, to save padding.
    return sorted((lines[index] for index in chosen), key=len)


def _encoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that embeds a text."""
    if model.main_input_name != "input_ids":
        raise ConfigError(f"{type(model).__name__}: expected a model of text, got one of {model.main_input_name}")
    encoder: Any = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model.base_model
    found: PreTrainedModel = encoder
    return found


def _longest(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    positions = getattr(encoder.config, "max_position_embeddings", None)
    longest = int(tokenizer.model_max_length)
    return min(longest, positions) if isinstance(positions, int) else min(longest, 512)


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of tokens with padding on the right, and the mask; a tokenizer need not have a padding token."""
    import torch

    ids = torch.zeros((len(rows), max(1, *map(len, rows))), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def _pooled(encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The mean of the last hidden states over the tokens, in float32: `(rows, width)`."""
    outputs = encoder(input_ids=ids.to(encoder.device), attention_mask=mask.to(encoder.device))
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None:
        raise ConfigError(f"{type(encoder).__name__}: expected outputs with a .last_hidden_state")
    return mean_embedding(hidden, mask).cpu()
