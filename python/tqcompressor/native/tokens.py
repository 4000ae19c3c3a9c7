"""Tokens on their way into the native runtime and out of it: checked, in batches, as text that streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, DtypeError, ShapeError
from ..utils.batching import fitting

# Called with the number of a prompt and the text that is new behind it.
Stream: TypeAlias = Callable[[int, str], object]
_Item = TypeVar("_Item")
# Tokens of one forward pass where there are more sequences: enough for a full matrix product, little to hold, and
# little to wait for after Ctrl-C.
_TOKENS_PER_PASS = 1024


class TextStreams:
    """Hands on what continuations say as their tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], prompts: int, tell: Stream | None) -> None:
        self._decode, self._tell = decode, tell
        self._tokens: list[list[int]] = [[] for _ in range(prompts)]
        self._told = [0] * prompts

    def add(self, fresh: list[tuple[int, int]]) -> None:
        """Takes new `(number of prompt, token)`."""
        for prompt, token in fresh:
            self._tokens[prompt].append(token)
        for prompt in sorted({prompt for prompt, _ in fresh}):
            # A character whose bytes are not all there yet is U+FFFD for the time being.
            text = self._decode(self._tokens[prompt]).rstrip("\ufffd")
            self._tell_more(prompt, text)

    def finish(self, texts: Sequence[str]) -> None:
        """Tells the rest of the whole `texts`."""
        for prompt, text in enumerate(texts):
            self._tell_more(prompt, text)

    def _tell_more(self, prompt: int, text: str) -> None:
        if self._tell is not None and len(text) > self._told[prompt]:
            self._tell(prompt, text[self._told[prompt] :])
            self._told[prompt] = len(text)


def batches(items: Sequence[_Item], length: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """The items, in order, as many at a time as a forward pass takes."""
    return fitting(items, length, _TOKENS_PER_PASS)


def integers(name: str, values: ArrayLike) -> NDArray[Any]:
    """An array of any integer dtype; raises `DtypeError` for others."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise DtypeError(f"{name}: expected integers, got {array.dtype}")
    return array


def checked_tokens(values: ArrayLike, vocabulary: int) -> list[int]:
    """One sequence of tokens as the extension module takes it; raises `ConfigError` for one out of range."""
    tokens = integers("tokens", values)
    if tokens.ndim != 1:
        raise ShapeError(f"tokens: expected one dimension, got shape {tokens.shape}")
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if wrong.size:
        raise ConfigError(f"tokens: expected 0 to {vocabulary - 1}, got {wrong[0]}")
    return [int(token) for token in tokens]
