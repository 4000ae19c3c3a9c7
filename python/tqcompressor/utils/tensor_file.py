"""Our own safetensors files: read by the safetensors library, written here.

The library writes a whole file from memory and orders the metadata by chance. Our files must be written in parts (a
cached teacher may exceed the memory), and equal contents must make equal bytes. So the header, which is one line of
JSON, is made here; everything that reads or checks a file is the library's.

Format: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import CheckpointError
from .atomic_io import WholeFile, storage_errors
from .utf8 import HEAD

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Tensors begin at a multiple of this many bytes, where their sizes allow.
_ALIGNMENT = 64
# Bytes that are converted and written at a time.
_CHUNK = 1 << 24


class TensorSpec(NamedTuple):
    """The dtype and the shape of a tensor in a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of what one index of the first dimension selects."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.dtype.itemsize * math.prod(self.shape)


class TensorWriter:
    """Writes tensors into a file, in any order and in parts, with bounded memory.

    The space of the whole file is reserved and the header written at the start; equal arguments make equal headers.

    Args:
        file: The file, still empty.
        tensors: What is to be written, in the order of the bytes. Widest elements first keeps all of them aligned.
        metadata: Text by name.

    Raises:
        StorageError: The file cannot be written.
    """

    def __init__(self, file: WholeFile, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self._file, self._tensors = file, tensors
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        ends = [0]
        for name, spec in tensors.items():
            ends.append(ends[-1] + spec.bytes)
            entries[name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": ends[-2:]}
        text = json.dumps(entries).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        self._begins = {name: len(header) + end for name, end in zip(tensors, ends, strict=False)}
        file.reserve(len(header) + ends[-1])
        file.write_at(0, header)

    def write(self, name: str, rows: NDArray[Any], first: int = 0) -> None:
        """Writes `rows`, `(rows, *shape[1:])`, as the rows of tensor `name` from row `first` on."""
        spec = self._tensors[name]
        step = max(1, _CHUNK // max(1, spec.row_bytes))
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step].astype(spec.dtype).tobytes()
            self._file.write_at(self._begins[name] + (first + begin) * spec.row_bytes, part)


class TensorFile(NamedTuple):
    """A file's contents; the tensors are memory-mapped, read-only."""

    metadata: dict[str, str]
    tensors: dict[str, NDArray[Any]]


def read_tensor_file(path: Path, kind: str, newest: int) -> TensorFile:
    """Maps the file at `path`; a tensor is read from the disk where it is used.

    Args:
        path: A file that `TensorWriter` has written.
        kind: What it is, for messages: "a calibration".
        newest: The newest `format_version` that the caller reads; the key is removed from the metadata.

    Raises:
        CheckpointError: It is truncated, damaged or no safetensors file, has no version or a newer one, or a tensor of
            a dtype that `TensorWriter` does not write.
        StorageError: It cannot be read.
    """
    # Imported here because `import tqcompressor` needs numpy alone.
    from safetensors import SafetensorError, safe_open

    with storage_errors(path), open(path, "rb") as opened:
        try:
            with safe_open(path, framework="numpy") as file:
                metadata: dict[str, str] = file.metadata() or {}
                # The library has checked that the tensors fill the file from the header to the end, without holes.
                found = {name: file.get_slice(name) for name in file.offset_keys()}
                dtypes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
        except SafetensorError as error:
            # Only now: numbers may look like text in another encoding.
            words = _core.foreign_text(opened.read(HEAD)) or f"truncated or damaged, or not a safetensors file: {error}"
            raise CheckpointError(f"{path}: {words}") from error
        try:
            version = int(metadata.pop("format_version"))
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: expected the file of {kind}, got another safetensors file") from error
        if version > newest:
            raise CheckpointError(
                f"{path}: written by a newer tqcompressor (format {version}, this one reads {newest})"
            )
        tensors = {}
        begin = opened.seek(0, 2)
        for name, (dtype, shape) in reversed(dtypes.items()):
            if dtype not in _DTYPES:
                raise CheckpointError(f"{path}: {name}: expected one of the dtypes {', '.join(_DTYPES)}, got {dtype}")
            spec = TensorSpec(_DTYPES[dtype], shape)
            begin -= spec.bytes
            # An empty map is an error.
            tensors[name] = (
                np.memmap(opened, spec.dtype, "r", begin, shape) if spec.bytes else np.empty(shape, spec.dtype)
            )
    return TensorFile(metadata, dict(reversed(tensors.items())))
