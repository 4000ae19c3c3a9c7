"""The sums of a calibration that is under way, in a file: a run that was killed goes on with them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import CheckpointError, DestinationError
from ..utils.atomic_io import WholeFile
from ..utils.tensor_file import TensorFile, TensorSpec, TensorWriter, read_tensor_file
from .batches import Batch
from .hooks import ReadingPass
from .sharing import SharedSums
from .sums import Diagonal, Numbers, Triangle

_FORMAT = 1
_KIND = "the sums of a calibration"
# Seconds between two savings, at least; and how many times as long as a saving takes.
_SECONDS, _TIMES = 60.0, 20.0
# Numbers that are copied at a time.
_CHUNK = 1 << 20


class PartialSums:
    """The file at `path`, which belongs to the model, the text and the options of `key`.

    It holds the sums of the batches that are done and the state of the random numbers: a pass that goes on ends with
    the bytes of one that was not stopped.

    Raises `CheckpointError` for a file of another key, and for one that is damaged, and `DestinationError` where no
    file can be.
    """

    def __init__(self, path: Path, key: str) -> None:
        if not path.parent.is_dir():
            raise DestinationError(f"{path}: {path.parent} is no folder")
        self._path, self._key = path, key
        self._next = time.monotonic() + _SECONDS
        self._begin = self._read() if path.exists() else None
        if self._begin is not None and self._begin.metadata.get("key") != key:
            raise CheckpointError(
                f"{path}: expected {_KIND} of this model, text and options, got those of another: remove the file"
            )

    def _read(self) -> TensorFile:
        return read_tensor_file(self._path, _KIND, _FORMAT)

    def apart(self) -> set[str]:
        """The units that share no sums, as the earlier run has found."""
        return set() if self._begin is None else set(json.loads(self._begin.metadata.get("apart", "[]")))

    def restore(self, reading: ReadingPass, generator: torch.Generator) -> int:
        """Gives a new pass the sums of an earlier one, and returns the number of batches that are in them."""
        if self._begin is None:
            return 0
        metadata, tensors = self._begin
        try:
            for side, shared in _sides(reading):
                for number, (units, parts, tokens) in enumerate(json.loads(metadata[side])):
                    sums = shared.begin(units, tuple((size, diagonal) for size, diagonal in parts))
                    sums.tokens = tokens
                    for part, total in enumerate(sums.parts):
                        _fill(total.numbers, tensors[f"{side}.{number}.{part}"])
            for number, (name, rows) in enumerate(json.loads(metadata["counts"])):
                reading.counts[name] = reading.new_counts(rows)
                _fill(reading.counts[name].numbers, tensors[f"counts.{number}"])
            generator.set_state(torch.tensor(list(bytes.fromhex(metadata["generator"])), dtype=torch.uint8))
            return int(metadata["done"])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self._path}: the metadata of {_KIND} is damaged: {error}") from error

    def keep(self, reading: ReadingPass, generator: torch.Generator, done: int, apart: set[str]) -> None:
        """Saves the sums of the first `done` batches, if the last saving is long enough ago."""
        start = time.monotonic()
        if start < self._next:
            return
        found = dict(_named(reading))
        described = {
            side: json.dumps([(units, parts, sums.tokens) for units, parts, sums in shared.groups()])
            for side, shared in _sides(reading)
        }
        metadata = {
            "format_version": str(_FORMAT),
            "key": self._key,
            "done": str(done),
            "apart": json.dumps(sorted(apart)),
            "counts": json.dumps([(name, counts.count) for name, counts in reading.counts.items()]),
            "generator": bytes(generator.get_state().tolist()).hex(),
            **described,
        }
        with WholeFile(self._path) as file:
            specs = {name: TensorSpec(np.dtype("<f8"), (total.count,)) for name, total in found.items()}
            writer = TensorWriter(file, specs, metadata)
            for name, total in found.items():
                for first in range(0, total.count, _CHUNK):
                    part = total.numbers.read(first, min(_CHUNK, total.count - first))
                    writer.write(name, part.cpu().numpy(), first)
        now = time.monotonic()
        self._next = now + max(_SECONDS, _TIMES * (now - start))

    def remove(self) -> None:
        """Removes the file, if there is one."""
        self._begin = None
        self._path.unlink(missing_ok=True)


def _sides(reading: ReadingPass) -> tuple[tuple[str, SharedSums], ...]:
    return ("inputs", reading.inputs), ("gradients", reading.gradients)


def _named(reading: ReadingPass) -> Iterator[tuple[str, Triangle | Diagonal]]:
    for side, shared in _sides(reading):
        for number, (_, _, sums) in enumerate(shared.groups()):
            yield from ((f"{side}.{number}.{part}", total) for part, total in enumerate(sums.parts))
    for number, counts in enumerate(reading.counts.values()):
        yield f"counts.{number}", counts


def _fill(numbers: Numbers, values: NDArray[np.float64]) -> None:
    """Adds saved numbers to those that are all 0."""
    for first in range(0, len(values), _CHUNK):
        numbers.add(first, torch.from_numpy(np.array(values[first : first + _CHUNK])))


def key_of(model: nn.Module, batches: Sequence[Batch], **options: Any) -> str:
    """A digest of what the sums depend on; of the parameters, the first values stand for all."""
    digest = hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode() + values)
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
