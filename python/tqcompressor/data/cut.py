"""Documents in pieces: a text of any length is read, divided and encoded with bounded memory.

A tokenizer keeps about 120 bytes for every byte of a text that it encodes at once. A long document is therefore cut.
The pieces have the tokens of the whole: a cut is made where the tokens on both sides, encoded apart, are those of both
sides together. White space after a word is such a place for almost every tokenizer. Where only the tokens on the left
agree, as with a tokenizer that puts a space before every text, a piece is encoded behind the characters before it, and
their tokens are left out.

No such place exists inside one word of a pre-tokenizer that is longer than a piece. The document is then cut all the
same, and a few tokens beside the cut may be others than those of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

# The tokens of each text, with no special tokens added.
Encode: TypeAlias = Callable[[list[str]], list[list[int]]]
# A document of at most so many characters, and those on the right of a cut that are compared, is encoded whole.
_LONGEST = 1 << 15
# Characters on either side of a cut that are encoded to compare.
_WINDOW = 256
# Where a cut is tried, the best kind first: before one space between words, before any white space, between kinds of
# characters.
_BETWEEN = [re.compile(pattern) for pattern in (r"(?<=\S)(?= \w)", r"(?<=\S)(?=\s)", r"\b|(?<=\d)(?=\D)|(?<=\D)(?=\d)")]
# How many places of a kind are tried.
_TRIED = 8
# The longest token that a cut inside a word allows for, in characters.
_LONGEST_TOKEN = 16


class Piece(NamedTuple):
    """Consecutive characters of a document."""

    text: str
    ends: bool
    """Whether the document ends here."""
    context: str = ""
    """Characters before `text` that are encoded with it."""
    known: int = 0
    """The tokens of `context`, which are left out."""


def whole_documents(texts: Iterable[Iterable[str]]) -> Iterator[Piece]:
    """Every text, given by its consecutive parts, as one document."""
    for parts in texts:
        yield from _divided(parts, None)


def documents(texts: Iterable[Iterable[str]], end_text: str | None) -> Iterator[Piece]:
    """The documents of texts that are given by their consecutive parts.

    A text is divided at end-of-text tokens. Documents of white space alone are left out.
    """
    for parts in texts:
        blanks: list[str] = []
        filled = False
        for piece in _divided(parts, end_text):
            filled = filled or bool(piece.text.strip())
            if filled:
                yield from (Piece(blank, False) for blank in blanks)
                yield piece
                blanks.clear()
            else:
                # Equal parts are kept once: a file of spaces alone takes no memory.
                blanks.append(blanks[-1] if blanks and blanks[-1] == piece.text else piece.text)
            if piece.ends:
                blanks.clear()
                filled = False


def _divided(parts: Iterable[str], end_text: str | None) -> Iterator[Piece]:
    rest = ""
    # The beginning of an end-of-text token that the next part may complete.
    kept = len(end_text) - 1 if end_text else 0
    for part in parts:
        *whole, rest = (rest + part).split(end_text) if end_text else [rest + part]
        yield from (Piece(text, True) for text in whole)
        if (ready := len(rest) - kept) > 0:
            yield Piece(rest[:ready], False)
            rest = rest[ready:]
    yield Piece(rest, True)


def cut(pieces: Iterable[Piece], encode: Encode) -> Iterator[Piece]:
    """The documents of `pieces` in pieces that may be encoded one by one; short documents are one piece each.

    Memory: a piece and a part of a text.
    """
    held, start = "", Piece("", False)
    for piece in pieces:
        held += piece.text
        begin = 0
        while len(held) - begin > _LONGEST + _WINDOW:
            end, following = _place(held, begin, start, encode)
            yield start._replace(text=held[begin:end])
            begin, start = end, following
        held = held[begin:]
        if piece.ends:
            yield start._replace(text=held, ends=True)
            held, start = "", Piece("", False)


def _place(text: str, begin: int, start: Piece, encode: Encode) -> tuple[int, Piece]:
    """Where the piece from `begin` on ends, and how the next one starts."""
    limit = begin + _LONGEST
    for kind in _BETWEEN:
        # Two more characters, which the patterns look at.
        found = [match.start() for match in kind.finditer(text, limit - _LONGEST // 2, limit + 2)]
        for end in reversed(found[-_TRIED:]):
            if begin < end <= limit and (following := _checked(text, end, encode)):
                return end, following
    return _inside_a_word(text, begin, limit, start, encode)


def _checked(text: str, end: int, encode: Encode) -> Piece | None:
    """How a piece from `end` on starts if a window shows that the tokens on its left do not depend on it."""
    left, right = text[max(0, end - _WINDOW) : end], text[end : end + _WINDOW]
    tokens, following, together = encode([left, right, left + right])
    if together == tokens + following:
        return Piece("", False)
    return Piece("", False, left, len(tokens)) if together[: len(tokens)] == tokens else None


def _inside_a_word(text: str, begin: int, limit: int, start: Piece, encode: Encode) -> tuple[int, Piece]:
    """The cut of a piece without any certain place: a token of the whole piece ends there, where that is possible."""
    before, after = start.context + text[begin:limit], text[limit : limit + _WINDOW]
    ends = range(limit, max(begin + 1, limit - _LONGEST_TOKEN), -1)
    (together,) = encode([before + after])
    for end in ends:
        # First the short part: it rules most places out.
        (following,) = encode([text[end : limit + _WINDOW]])
        if together[len(together) - len(following) :] == following:
            (tokens,) = encode([start.context + text[begin:end]])
            if tokens + following == together:
                return end, Piece("", False)
    for end in ends:
        if following_piece := _checked(text, end, encode):
            return end, following_piece
    return limit, Piece("", False)
