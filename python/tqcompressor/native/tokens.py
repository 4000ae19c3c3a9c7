"""Token inputs of the native runtime, validated and batched, and the streamed text of its output tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..data.tokenize import token_dtype
from ..errors import ConfigError, DtypeError, ShapeError
from ..utils import validate
from ..utils.batching import fitting

# Called with the number of a prompt and the new text of its continuation.
Streamer: TypeAlias = Callable[[int, str], object]
_Item = TypeVar("_Item")
# Tokens of one forward pass over several sequences: enough for efficient matrix products, few enough for little memory
# and a fast reaction to Ctrl-C.
_TOKENS_PER_PASS = 1024


class NativeEncoder:
    """A native tokenizer as a `data.tokenize.TextEncoder`."""

    # The extension module releases the GIL.
    is_fast = True

    def __init__(self, tokenizer: _core.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The tokens of every text, with no special tokens added."""
        return [self._tokenizer.encode(text) for text in texts]


class TextStreams:
    """Streams the text of several continuations as their tokens arrive.

    Args:
        tokenizer: Decodes the tokens, each once; special tokens are skipped.
        prompts: The number of continuations.
        streamer: Called with the number of a prompt and its new text, in whole characters.
    """

    def __init__(self, tokenizer: _core.Tokenizer, prompts: int, streamer: Streamer) -> None:
        self._streamer = streamer
        self._decoders = [tokenizer.decode_stream(True) for _ in range(prompts)]
        self._passed_on = [0] * prompts

    def add(self, fresh: list[tuple[int, int]]) -> None:
        """Adds new `(number of prompt, token)` and streams their text."""
        tokens: dict[int, list[int]] = {}
        for prompt, token in fresh:
            tokens.setdefault(prompt, []).append(token)
        for prompt in sorted(tokens):
            self._pass_on(prompt, self._decoders[prompt].push(tokens[prompt]))

    def finish(self, texts: Sequence[str]) -> None:
        """Streams the rest of the complete `texts`, such as an incomplete last character."""
        for prompt, text in enumerate(texts):
            self._pass_on(prompt, text[self._passed_on[prompt] :])

    def _pass_on(self, prompt: int, text: str) -> None:
        if text:
            self._passed_on[prompt] += len(text)
            self._streamer(prompt, text)


def batches(items: Iterable[_Item], length: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Yields the items in order, in batches for one forward pass each."""
    return fitting(items, length, _TOKENS_PER_PASS)


def integers(name: str, values: ArrayLike) -> NDArray[Any]:
    """`values` as an array; raises `DtypeError` unless it holds integers, `ShapeError` if ragged."""
    array = validate.array(name, values)
    if array.size and array.dtype.kind not in "iu":
        raise DtypeError(f"{name}: expected integers, got {array.dtype}")
    return array


def checked_tokens(values: ArrayLike, vocab_size: int) -> list[int]:
    """One sequence of tokens in the dtype of the extension module; raises `ConfigError` for a token out of range."""
    tokens = integers("tokens", values)
    if tokens.ndim != 1:
        raise ShapeError(f"tokens: expected one dimension, got shape {tokens.shape}")
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if wrong.size:
        raise ConfigError(f"tokens: expected 0 to {vocab_size - 1}, got {wrong[0]}")
    return [int(token) for token in tokens]
