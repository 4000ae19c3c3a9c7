"""Text and JSON files, which must be UTF-8: what they hold in its place is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .. import _core
from ..errors import CheckpointError

_Form = TypeVar("_Form")

# Bytes at the beginning of a file that show its encoding.
HEAD = _core.TEXT_HEAD


def decoded(data: bytes) -> str:
    """UTF-8 text without its byte order mark.

    Raises:
        ValueError: It is not UTF-8; the message names what it is, or the offset of the first wrong byte.
    """
    if (words := _core.foreign_text(data[:HEAD])) is not None:
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
    if (words := _core.foreign_json(data[:HEAD])) is not None:
        raise ValueError(words)
    return parsed(decoded(data))


def read_form(path: Path, build: Callable[[Any], _Form], what: str) -> _Form:
    """What `build` makes of the value in a JSON file.

    Raises:
        CheckpointError: It is not JSON, or `build` cannot make anything of it: it is not `what`.
        OSError: It cannot be read.
    """
    try:
        return build(read_json(path))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: not {what}: {error}") from None
