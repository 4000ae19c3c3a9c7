"""The tokens that are scored and their contexts, for every engine: windows over a text, last words of passages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..data.cut import whole_documents
from ..data.text import utf8
from ..data.token_spool import TokenSpool
from ..data.tokenize import TextEncoder, collected
from ..errors import TextError
from ..utils import validate
from .results import PerplexityResult

# The tokens of a text, with no special tokens added.
Encode: TypeAlias = Callable[[str], list[int]]


@dataclass
class TextToScore:
    """A text, read once: its tokens behind those that it begins with, and its size."""

    tokens: TokenSpool
    words: int
    bytes: int


def text_to_score(texts: Iterable[Iterable[str]], encoder: TextEncoder, begin: Sequence[int]) -> TextToScore:
    """Reads and encodes a text, given by its consecutive parts, with bounded memory.

    Raises `TextError` for fewer than 2 tokens.
    """
    words = size = 0
    inside = False

    def counted(parts: Iterable[str]) -> Iterator[str]:
        nonlocal words, size, inside
        for part in parts:
            size += len(utf8(part))
            # A word that goes on from the part before has been counted there.
            words += len(part.split()) - (inside and not part[0].isspace())
            inside = not part[-1].isspace()
            yield part

    tokens = collected(whole_documents(map(counted, texts)), encoder, None, begin)
    if not words:
        raise TextError("the text is empty")
    if len(tokens) - len(begin) < 2:
        raise TextError("the text has fewer than 2 tokens")
    return TextToScore(tokens, words, size)


def first_token(begin: int | None, end: int | None) -> list[int]:
    """The first token of a text: the begin-of-text token, else the end-of-text token, else none."""
    for token in (begin, end):
        if token is not None:
            return [int(token)]
    return []


def checked_window(longest: int, context: int | None, stride: int | None) -> tuple[int, int]:
    """`context` and `stride` within their ranges, by default the `longest` input and half of the context."""
    context = longest if context is None else validate.integer("context", context, 1, longest)
    return context, validate.integer("stride", max(1, context // 2) if stride is None else stride, 1, context)


def windows(targets: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields `(begin, end, scored)`: the input is `sequence[begin:end]`, its last `scored` positions are scored."""
    end = 0
    while end < targets:
        scored = min(stride if end else context, targets - end)
        end += scored
        yield max(0, end - context), end, scored


def perplexity_result(
    text: TextToScore, total: float, tokens: int, context: int, stride: int, seconds: float
) -> PerplexityResult:
    """The result of scoring `tokens` tokens of a text, of `total` nats in all."""
    return PerplexityResult(
        negative_log_likelihood=total,
        tokens=tokens,
        words=text.words,
        bytes=text.bytes,
        context=context,
        stride=stride,
        seconds=seconds,
    )


def last_word_items(passages: Sequence[str], encode: Encode, context: int) -> list[tuple[list[int], list[int]]]:
    """For each passage its input tokens, and the tokens of its last word, which the last positions of the input
    predict; the longest input first."""
    if not passages:
        raise TextError("there are no passages")
    items = [_last_word_item(passage, number, encode, context) for number, passage in enumerate(passages, 1)]
    return sorted(items, key=lambda item: -len(item[0]))


def _last_word_item(passage: str, number: int, encode: Encode, context: int) -> tuple[list[int], list[int]]:
    words = passage.rsplit(maxsplit=1)
    if len(words) < 2:
        raise TextError(f"passage {number} has no word before its last one")
    head, word = words
    tokens = encode(f"{head} {word}")
    targets = tokens[len(encode(head)) :]
    if len(targets) > context:
        raise TextError(f"passage {number}: its last word has {len(targets)} tokens, the model's context is {context}")
    return tokens[:-1][-context:], targets
