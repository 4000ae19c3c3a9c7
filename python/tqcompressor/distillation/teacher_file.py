"""The file of a cached teacher: its layout, and probabilities as 16 bits."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.tokenize import token_dtype
from ..errors import CheckpointError
from ..utils.atomic_io import storage_errors

if TYPE_CHECKING:
    import torch

_FORMAT = 1
# A log-probability is stored as a number of steps below zero, in 16 bits: down to -32, with an error of half a step.
_LOWEST = 32.0
_STEPS = (1 << 16) - 1
_SAFETENSORS_DTYPES = {"<f4": "F32", "<u4": "U32", "<u2": "U16"}


class Part(NamedTuple):
    """One tensor, and the offset of its first byte in the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int

    @property
    def stride(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The offset after its last byte."""
        return self.begin + self.shape[0] * self.stride


@dataclass(frozen=True)
class TeacherFile:
    """The header of a cached teacher's file; the layout of its bytes follows from these fields."""

    num_samples: int
    seq_len: int
    k: int
    temperature: float
    vocab_size: int
    fingerprint: str
    teacher: str
    weights: str

    def parts(self, begin: int | None = None) -> tuple[Part, Part, Part]:
        """`tail_mass`, `tokens` and `log_probability_steps`, from the end of the header (or from `begin`) on.

        The widest elements come first, so that all are aligned.
        """
        shape = (self.num_samples, self.seq_len, self.k)
        tail = Part("tail_mass", np.dtype("<f4"), shape[:2], len(self.header()) if begin is None else begin)
        tokens = Part("tokens", token_dtype(self.vocab_size), shape, tail.end)
        return tail, tokens, Part("log_probability_steps", np.dtype("<u2"), shape, tokens.end)

    def header(self) -> bytes:
        """The header of the file, preceded by its length."""
        metadata = {name: value if isinstance(value, str) else repr(value) for name, value in asdict(self).items()}
        entries: dict[str, Any] = {"__metadata__": {"format_version": str(_FORMAT), **metadata}}
        for part in self.parts(begin=0):
            dtype = _SAFETENSORS_DTYPES[part.dtype.str]
            entries[part.name] = {"dtype": dtype, "shape": part.shape, "data_offsets": [part.begin, part.end]}
        text = json.dumps(entries).encode()
        text += b" " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text

    @classmethod
    def read(cls, path: Path) -> TeacherFile:
        """Reads the header of the file at `path`.

        Raises:
            CheckpointError: The file is no cached teacher's, is damaged, does not have the size that its header states,
                or has a newer version.
            StorageError: It cannot be read.
        """
        with storage_errors(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length < size else b""
        try:
            metadata = json.loads(text)["__metadata__"]
            version = int(metadata.pop("format_version"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: no cached teacher, or its header is damaged") from error
        if version > _FORMAT:
            raise CheckpointError(
                f"{path}: written by a newer tqcompressor (format {version}, this one reads {_FORMAT})"
            )
        # With annotations postponed, the types of the fields are their names.
        readers: dict[Any, Any] = {"int": int, "float": float, "str": str}
        try:
            found = cls(**{field.name: readers[field.type](metadata[field.name]) for field in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: the header of the cached teacher is damaged") from error
        # Accept only the header that would be written for these fields.
        if min(found.num_samples, found.seq_len, found.k) < 1 or found.header()[8:] != text:
            raise CheckpointError(f"{path}: the header of the cached teacher is damaged")
        if size != (expected := found.parts()[-1].end):
            raise CheckpointError(f"{path}: truncated or damaged: expected {expected:,} bytes, got {size:,}")
        return found


def largest(logits: torch.Tensor, k: int, temperature: float) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None:
    """Tail mass, tokens and steps of the `k` largest probabilities of each row of `logits`, which are overwritten.

    None where a row has NaN or plus infinity.
    """
    # Subtract before dividing: differences of close logits are exact at any temperature.
    exponentials = logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature).exp_()
    total = exponentials.sum(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        return None
    values, tokens = exponentials.topk(k)
    steps = ((total.log() - values.log()) * (_STEPS / _LOWEST)).round_().clamp_(0, _STEPS)
    # Sum the rest directly: 1 minus the kept mass would round a small tail away.
    exponentials.scatter_(-1, tokens, 0.0)
    tail = exponentials.sum(-1).div_(total[..., 0]).clamp_(0, 1)
    return tail.cpu().numpy(), tokens.cpu().numpy(), steps.cpu().numpy()


def probabilities_of(steps: NDArray[np.uint16], tail: NDArray[np.float64]) -> NDArray[np.float32]:
    """The probabilities `(positions, k)` of `steps`, given the mass `tail` of all other tokens."""
    probabilities = np.exp(steps * (-_LOWEST / _STEPS))
    # Normalise, to slightly below 1: rounding to float32 must not lift the sum above 1.
    scale = (1 - 2.0**-24) / (probabilities.sum(-1) + tail)
    scaled: NDArray[np.float32] = (probabilities * scale[:, None]).astype(np.float32)
    return scaled
