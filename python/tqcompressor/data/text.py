"""Reads the texts that models are evaluated on: raw text, and passages in the style of LAMBADA."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

from ..errors import TextError


def read_text(path: str | PathLike[str]) -> str:
    """Reads a raw text such as `wiki.test.raw` unchanged, without its byte order mark.

    Raises:
        TextError: The file is not UTF-8; the message gives the offset of the first wrong byte.
        OSError: It cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 at byte {error.start} ({error.reason})") from error


def read_passages(path: str | PathLike[str]) -> list[str]:
    """Reads a file of passages: one a line, or in a `.jsonl` file one JSON object with a `"text"` a line.

    Blank lines are skipped.

    Raises:
        TextError: The file is not UTF-8, holds no passage, or a line is not an object with a string `"text"`.
        OSError: It cannot be read.
    """
    passages = []
    # Not `splitlines`: it also splits at form feeds and other characters that a passage may contain.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        if Path(path).suffix == ".jsonl":
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise TextError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
                raise TextError(f'{path}: line {number} is not an object with a string "text"')
            line = entry["text"]
        passages.append(line.strip())
    if not passages:
        raise TextError(f"{path}: there are no passages")
    return passages
