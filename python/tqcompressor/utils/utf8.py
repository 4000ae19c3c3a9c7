"""Text and JSON files, which must be UTF-8: what they hold in its place is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# As src/checkpoint/foreign.rs, which reads the JSON of checkpoints.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MARK = b"\xef\xbb\xbf"
# Bytes at the beginning of a file that show its encoding.
HEAD = 4096


def foreign_text(head: bytes) -> str | None:
    """What the beginning of a file that should be UTF-8 shows in its place, with the way out; None if nothing.

    >>> foreign_text("{}".encode("utf-16"))
    'UTF-16 text: save it as UTF-8'
    """
    if head.startswith(_LFS_POINTER):
        return "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    head = head[:HEAD]
    # Without a mark, every second byte of mostly western text is zero.
    zeros = max(head[::2].count(0), head[1::2].count(0)), min(head[::2].count(0), head[1::2].count(0))
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (zeros[0] > len(head) / 4 and zeros[1] <= len(head) / 64):
        return "UTF-16 text: save it as UTF-8"
    return None


def decoded(data: bytes) -> str:
    """UTF-8 text without its byte order mark.

    Raises:
        ValueError: It is not UTF-8; the message names what it is, or the offset of the first wrong byte.
    """
    if (words := foreign_text(data[:HEAD])) is not None:
        raise ValueError(words)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} ({error.reason})") from error


def parsed(text: str) -> Any:
    """The value of a JSON text. Raises `ValueError` for anything else, however deep it nests."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: It is not JSON in UTF-8 without a byte order mark; the message says what it is, without the path.
        OSError: It cannot be read.
    """
    data = path.read_bytes()
    if data.startswith(_MARK):
        raise ValueError("begins with a byte order mark (BOM): save it as UTF-8 without one")
    return parsed(decoded(data))
