"""What a text argument means, everywhere: text as it is, files, or a dataset; and LAMBADA-style passages."""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from .. import _core
from ..errors import ConfigError, TextError
from ..utils.utf8 import HEAD, parsed

# A str is the text itself, a path is a file or a glob pattern; a list or tuple holds either. Any is `datasets.Dataset`,
# which this package does not import.
TextOption: TypeAlias = str | PathLike[str] | Sequence[str | PathLike[str]] | Any
# No longer name of a file exists.
_LONGEST_NAME = 4096
# Bytes of a file that are read at a time, and characters of a text.
_PART = 1 << 20


class Texts(Sized, Protocol):
    """Texts, each by its consecutive parts; `len` is their number."""

    def __iter__(self) -> Iterator[Iterable[str]]: ...


def open_texts(text: TextOption) -> Texts:
    """The texts that an argument stands for, one for each str, file or row; each iteration reads them anew.

    A text is given by its consecutive parts, so that a file of any size takes little memory.

    A str is the text itself. A `pathlib.Path` is a file or, where there is no such file, a glob pattern, whose files
    are sorted (`**` stands for any folders). A list or tuple holds either. A `datasets.Dataset` has a column "text".
    Files are UTF-8.

    Raises:
        TextError: A pattern matches no file, a str is the name of a file, or there are no texts. While iterating: a
            file is not UTF-8, or a row is not text.
        ConfigError: `text` is something else, or the dataset has no column `"text"`.
        OSError: A file cannot be read, while iterating.
    """
    dataset: Any = text
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        if "text" not in columns or isinstance(columns, dict):
            raise ConfigError(f'expected a dataset with a column "text", got the columns or splits {list(columns)}')
        return _Rows(dataset.select_columns(["text"]))
    entries: list[str | Path] = []
    for entry in text if isinstance(text, list | tuple) else [text]:
        if isinstance(entry, str):
            _refuse_name(entry)
            entries.append(entry)
        elif isinstance(entry, PathLike):
            entries += _files(os.fspath(entry))
        else:
            kinds = "a str, a pathlib.Path, a list of them or a datasets.Dataset"
            raise ConfigError(f"text: expected {kinds}, got {type(entry).__name__}")
    if not entries:
        raise TextError("there are no texts")
    return _Entries(entries)


def sources(text: TextOption) -> list[tuple[str, TextOption]]:
    """What a calibration draws from evenly, by name: every path of a list, and its strings together.

    A path that stands twice in a list is two sources. Anything but a list is one source.
    """
    if not isinstance(text, list | tuple):
        return [(os.path.basename(text) if isinstance(text, PathLike) else "text", text)]
    strings = [entry for entry in text if not isinstance(entry, PathLike)]
    paths: list[tuple[str, TextOption]] = [
        (os.path.basename(path), path) for path in text if isinstance(path, PathLike)
    ]
    return ([("text", strings)] if strings or not paths else []) + paths


def open_text(text: str | PathLike[str]) -> Texts:
    """The text that an argument stands for which cannot be several; raises as `open_texts`."""
    texts = open_texts(text)
    if len(texts) != 1:
        raise TextError(f"expected one text, got {len(texts)}")
    return texts


def check_text(text: str | PathLike[str]) -> None:
    """Reads a text to its end, so that an error in it is found before long work; raises as `open_texts`."""
    filled = False
    for parts in open_text(text):
        for part in parts:
            filled = filled or bool(part.strip())
    if not filled:
        raise TextError("the text is empty")


def open_passages(passages: Sequence[str] | PathLike[str]) -> Sequence[str]:
    """The passages that an argument stands for: themselves, or those of a file, as `read_passages` reads it."""
    if isinstance(passages, str):
        raise ConfigError("passages: expected a list of texts or the pathlib.Path of a file, got str")
    return read_passages(passages) if isinstance(passages, PathLike) else passages


class _Entries:
    """Texts and files, in order."""

    def __init__(self, entries: Sequence[str | Path]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Iterable[str]]:
        return (_parts(entry) if isinstance(entry, str) else read_parts(entry) for entry in self._entries)


class _Rows:
    """The rows of a dataset that has a column "text"."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Iterable[str]]:
        number = 0
        for rows in self._dataset.iter(batch_size=1000):
            for text in rows["text"]:
                if not isinstance(text, str):
                    raise TextError(
                        f'row {number} of the dataset: expected a string as "text", got {type(text).__name__}'
                    )
                yield _parts(text)
                number += 1


def _parts(text: str) -> Iterator[str]:
    return (text[begin : begin + _PART] for begin in range(0, len(text), _PART))


def _files(name: str) -> list[Path]:
    if os.path.exists(name) or not glob.has_magic(name):
        return [Path(name)]
    found = _matches(name, recursive=True)
    if not found:
        raise TextError(f"{name}: no file matches")
    return [Path(file) for file in found]


def _matches(pattern: str, recursive: bool) -> list[str]:
    return sorted(name for name in glob.glob(pattern, recursive=recursive) if os.path.isfile(name))


def _refuse_name(text: str) -> None:
    """Raises `TextError` for a text that is the name of a file, or a pattern of names: a path was meant."""
    if len(text) > _LONGEST_NAME or "\n" in text or "\0" in text:
        return
    # A text that holds "**" must not walk every folder there is.
    if os.path.isfile(text) or (glob.has_magic(text) and _matches(text, recursive=False)):
        raise TextError(f"a str is the text itself, and {text!r} is the name of a file: pass pathlib.Path({text!r})")


def read_text(path: str | PathLike[str]) -> str:
    """Reads a raw text such as `wiki.test.raw` unchanged, without its byte order mark.

    Raises:
        TextError: The file is not UTF-8; the message gives what it is, or the offset of the first wrong byte.
        OSError: It cannot be read.
    """
    return "".join(read_parts(path))


def read_parts(path: str | PathLike[str]) -> Iterator[str]:
    """The consecutive parts of the text that `read_text` reads whole; raises as it does."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        head = file.read(HEAD)
        if (words := _core.foreign_text(head)) is not None:
            raise TextError(f"{path}: {words}")
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        while True:
            at = file.tell() - len(decoder.getstate()[0])
            data = file.read(_PART)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise TextError(f"{path}: not UTF-8 at byte {at + error.start} ({error.reason})") from error
            if text:
                yield text
            if not data:
                return


def utf8(text: str) -> bytes:
    """A text as UTF-8; raises `TextError` for lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"the text cannot be encoded as UTF-8: {error.reason} at {error.start}") from error


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
                entry = parsed(line)
            except ValueError as error:
                raise TextError(f"{path}: line {number} is {error}") from error
            if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
                raise TextError(f'{path}: line {number} is not an object with a string "text"')
            line = entry["text"]
        passages.append(line.strip())
    if not passages:
        raise TextError(f"{path}: there are no passages")
    return passages
