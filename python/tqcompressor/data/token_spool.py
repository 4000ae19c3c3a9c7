"""Tokens that need not fit the memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..utils.atomic_io import storage_errors

Tokens: TypeAlias = NDArray[np.unsignedinteger[Any]]
# Bytes that stay in memory.
_IN_MEMORY = 1 << 24


class TokenSpool:
    """A sequence of tokens, of which slices are read: in memory, and beyond 16 MB in an unnamed temporary file.

    The file is in the folder for temporary files, `$TMPDIR`, and is gone with the object or the process. It is read and
    not mapped, because pages that are mapped count as memory of the process.

    Raises:
        StorageError: The file cannot be written.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._length = 0
        self._folder = Path(tempfile.gettempdir())
        # Closed with the object.
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115

    def append(self, tokens: Tokens) -> None:
        """Adds `tokens` at the end."""
        with storage_errors(self._folder):
            self._file.seek(0, 2)
            self._file.write(tokens.astype(self._dtype).tobytes())
        self._length += len(tokens)

    def __len__(self) -> int:
        """The number of tokens."""
        return self._length

    def __getitem__(self, part: slice) -> Tokens:
        """The tokens of a slice without a step."""
        begin, end, _ = part.indices(self._length)
        with storage_errors(self._folder):
            self._file.seek(begin * self._dtype.itemsize)
            return np.frombuffer(self._file.read(max(0, end - begin) * self._dtype.itemsize), self._dtype)
