"""Second moments of a GPT-2's inputs, measured by the native runtime: what compressing in their norm needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration, merge_tied
from .errors import ConfigError, TextError
from .progress import ProgressOption, reporter
from .token_stream import BLOCK_LENGTH, block_choice, documents, encoded, open_texts, token_dtype

if TYPE_CHECKING:
    from .runtime import NativeModel

# float64 sums, and float32 means of them.
_BYTES_PER_ENTRY = 12


class _Encoder:
    """A native model's tokenizer, as `token_stream` needs one."""

    # The extension module lets go of the interpreter's lock.
    is_fast = True

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self.end = next(iter(model.end_of_text()), None)
        self.end_text = None if self.end is None else model.decode([self.end])
        self.dtype = token_dtype(model.vocabulary)

    def __call__(self, documents: list[str]) -> NDArray[Any]:
        """The tokens of every document, each followed by the end-of-text token."""
        rows = [self._model.encode(document) for document in documents]
        end = [] if self.end is None else [self.end]
        return np.array([token for row in rows if row for token in (*row, *end)], dtype=np.int64).astype(self.dtype)


def draw_blocks(model: NativeModel, text: Any, blocks: int, block_length: int | None, seed: int) -> NDArray[np.int64]:
    """The blocks `(blocks, block_length)` that `calibrate` draws from the same text with the same seed."""
    longest = model.context
    length = min(longest, BLOCK_LENGTH) if block_length is None else block_length
    if not 2 <= length <= longest:
        raise ConfigError(f"block_length: expected 2 to {longest} (the model's positions), got {length}")
    encoder: Any = _Encoder(model)
    given = [text] if isinstance(text, str) else text
    if isinstance(given, Sequence) and all(isinstance(document, str) for document in given):
        parts = (part for document in given for part in (document.split(encoder.end_text or "\0")) if part.strip())
    else:
        parts = documents(open_texts(text), encoder.end_text)
    chunks = [tokens for tokens, _ in encoded(parts, encoder, None)]
    tokens = np.concatenate(chunks) if chunks else np.empty(0, np.int64)
    count = len(tokens) // length
    chosen = block_choice(count, blocks, length, len(tokens), seed)
    return tokens[: count * length].reshape(count, length)[chosen].astype(np.int64)


def measure(
    model: NativeModel, blocks: NDArray[np.int64], *, seed: int, max_memory: int, progress: ProgressOption
) -> Calibration:
    """The `Calibration` of the inputs that the layers see while the model reads `blocks`."""
    tokens = blocks.size
    if tokens == 0:
        raise TextError("there is no token")
    sequences = blocks.tolist()
    groups = list(_groups(model.runtime.linear_layers(), max_memory))
    moments: dict[str, NDArray[np.float32]] = {}
    with reporter(progress, "calibrate") as report:
        for index, names in enumerate(groups):

            def tell(done: int, total: int, index: int = index) -> None:
                if report is not None:
                    report(index * total + done, len(groups) * total)

            found = model.runtime.input_moments(sequences, names, None if report is None else tell)
            moments |= {f"input.{name}": moment for name, moment in zip(names, found, strict=True)}
    for name, ids, rows in (
        ("wte", blocks, model.vocabulary),
        ("wpe", np.broadcast_to(np.arange(blocks.shape[1]), blocks.shape), model.context),
    ):
        counts = np.bincount(ids.ravel(), minlength=rows)
        moments[f"input.{name}"] = (counts / tokens).astype(np.float32)
    if model.runtime.tied:
        merge_tied(moments, "wte", "lm_head")
    return Calibration(moments, tokens, seed, sensitivity=False, model_type="gpt2")


def _groups(layers: Sequence[tuple[str, int]], max_memory: int) -> Iterator[list[str]]:
    """Layers that are measured in one pass, in order."""
    group: list[str] = []
    room = max_memory
    for name, inputs in layers:
        needed = _BYTES_PER_ENTRY * inputs**2
        if needed > max_memory:
            raise ConfigError(f"max_memory: expected at least {needed:,} bytes, for {name}, got {max_memory:,}")
        if needed > room:
            yield group
            group, room = [], max_memory
        group.append(name)
        room -= needed
    if group:
        yield group
