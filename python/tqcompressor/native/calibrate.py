"""Second moments of a decoder's layer inputs, measured by the native runtime."""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..calibration.calibration import Calibration, merge_tied
from ..data.text import TextOption, sources
from ..data.tokenize import CALIBRATION_SEQ_LEN, drawn_evenly
from ..errors import ConfigError, TextError
from ..utils import validate
from ..utils.progress import ProgressOption, reporter
from .tokens import NativeEncoder


def draw_sequences(
    runtime: _core.Runtime,
    tokenizer: _core.Tokenizer,
    text: TextOption,
    num_samples: int,
    seq_len: int | None,
    seed: int,
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """The sequences `(num_samples, seq_len)` that `calibrate` draws from the same text with the same seed.

    Behind them stands how many tokens each text gave, by its name.
    """
    longest = runtime.context
    length = min(longest, CALIBRATION_SEQ_LEN) if seq_len is None else seq_len
    if not 2 <= length <= longest:
        raise ConfigError(f"seq_len: expected 2 to {longest} (the model's positions), got {length}")
    end = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    end_text = None if end is None else tokenizer.decode([end], False)
    return drawn_evenly(
        sources(text), NativeEncoder(tokenizer), end_text, end, length=length, wanted=num_samples, seed=seed
    )


def measure(
    runtime: _core.Runtime,
    sequences: NDArray[np.int64],
    texts: dict[str, int],
    *,
    seed: int,
    max_memory: int,
    progress: ProgressOption,
) -> Calibration:
    """The `Calibration` of the inputs of the layers while the model reads `sequences`."""
    tokens = sequences.size
    if tokens == 0:
        raise TextError("sequences: expected at least one token, got none")
    rows = sequences.tolist()
    layers = [names for names, _ in runtime.linear_layers()]
    # What no machine has is as good as no bound.
    max_memory = min(validate.integer("max_memory", max_memory, 0), sys.maxsize)
    with reporter(progress, "calibrate") as report:
        found = runtime.input_moments(rows, [names[0] for names in layers], max_memory, report)
    # Layers that read one tensor share what was measured once.
    moments = {f"input.{name}": moment for names, moment in zip(layers, found, strict=True) for name in names}
    of_tokens, of_positions = runtime.embeddings
    inputs = {of_tokens: (sequences, runtime.vocab_size)}
    if of_positions is not None:
        positions = np.broadcast_to(np.arange(sequences.shape[1]), sequences.shape)
        inputs[of_positions] = (positions, runtime.context)
    for name, (ids, size) in inputs.items():
        counts = np.bincount(ids.ravel(), minlength=size)
        moments[f"input.{name}"] = (counts / tokens).astype(np.float32)
    if runtime.tied:
        # A tied head and its embedding share one matrix. Without a head there is nothing to merge.
        merge_tied(moments, of_tokens, runtime.output_head)
    return Calibration(moments, tokens, seed, sensitivity=False, model_type=runtime.model_type, texts=texts)
