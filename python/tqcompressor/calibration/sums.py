"""Sums of outer products of rows: symmetric, so that a triangle is kept; in memory, or in a file if too large."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import NonFiniteError
from ..utils import portable
from ..utils.atomic_io import storage_errors

# Rows whose products are summed in float32 before the sum is added to the float64 total. The error is below 1e-6 of the
# diagonal, and a product takes 0.6 of its time in float64.
_ROWS = 4096
# A triangle is computed in panels of rows: at least so many rows, and about so many panels at most. Narrower ones
# compute less beside the triangle, wider ones wait for other threads less often. A triangle takes 0.55 of the time of
# the whole square at 3072 features on one core, 0.6 at 1536 and 0.7 at 768.
_PANEL_ROWS, _PANELS = 128, 8


class Numbers(Protocol):
    """float64 numbers that are added to, somewhere."""

    def add(self, first: int, values: torch.Tensor) -> None:
        """Adds `values` to the numbers from `first` on."""

    def read(self, first: int, count: int) -> torch.Tensor:
        """A part of the numbers."""


class _InMemory:
    def __init__(self, count: int, device: torch.device) -> None:
        self._numbers = torch.zeros(count, dtype=torch.float64, device=device)

    def add(self, first: int, values: torch.Tensor) -> None:
        self._numbers[first : first + len(values)] += values

    def read(self, first: int, count: int) -> torch.Tensor:
        return self._numbers[first : first + count]


class _InFile:
    def __init__(self, file: _TemporaryFile, count: int) -> None:
        self._file, self._begin = file, file.reserved(8 * count)

    def add(self, first: int, values: torch.Tensor) -> None:
        numbers = self.read(first, len(values))
        numbers += values.cpu()
        self._file.write(self._begin + 8 * first, numbers.numpy())

    def read(self, first: int, count: int) -> torch.Tensor:
        return torch.from_numpy(self._file.read(self._begin + 8 * first, count))


class _TemporaryFile:
    """An unnamed file in the folder for temporary files, `$TMPDIR`: gone with the object or the process.

    It is read and not mapped, because pages that are mapped count as memory of the process.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir())
        with storage_errors(self._folder):
            # Closed with the object.
            self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._length = 0

    def reserved(self, size: int) -> int:
        """Adds `size` bytes of zero, whose space is certain, and returns where they begin."""
        begin = self._length
        with storage_errors(self._folder):
            portable.reserve(self._file.fileno(), begin + size, self._folder)
        self._length += size
        return begin

    def read(self, begin: int, count: int) -> NDArray[np.float64]:
        with storage_errors(self._folder):
            self._file.seek(begin)
            return np.frombuffer(self._file.read(8 * count), np.float64).copy()

    def write(self, begin: int, values: NDArray[np.generic]) -> None:
        with storage_errors(self._folder):
            self._file.seek(begin)
            self._file.write(values.data)

    def mapped(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of `array` in the file, mapped: it takes no memory where it is not read."""
        begin = self.reserved(array.nbytes)
        self.write(begin, array)
        with storage_errors(self._folder):
            self._file.flush()
            return np.memmap(self._file, np.float32, "r", begin, array.shape)


class SumStore:
    """Where sums are kept: on `device` until they take `max_memory` bytes, and from then on in a temporary file."""

    def __init__(self, device: torch.device, max_memory: int) -> None:
        self._device, self._room = device, max_memory
        self._file: _TemporaryFile | None = None
        self._scratch = torch.empty(0, device=device)

    def zeros(self, count: int) -> Numbers:
        """`count` float64 numbers, all zero."""
        if 8 * count <= self._room:
            self._room -= 8 * count
            return _InMemory(count, self._device)
        if self._file is None:
            self._file = _TemporaryFile()
        return _InFile(self._file, count)

    def scratch(self, rows: int, columns: int) -> torch.Tensor:
        """Space for a product, which the next call takes again."""
        if len(self._scratch) < rows * columns:
            self._scratch = torch.empty(rows * columns, device=self._device)
        return self._scratch[: rows * columns].view(rows, columns)

    def beside(self, numbers: Numbers, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """`array`, in memory or in the file, as the sum `numbers` is from which it was computed."""
        return self._file.mapped(array) if self._file is not None and isinstance(numbers, _InFile) else array


class Triangle:
    """`Σ xᵀx` of `size` features: panels of rows of the lower triangle, each to the end of its diagonal block."""

    def __init__(self, size: int, store: SumStore) -> None:
        self._size, self._store = size, store
        step = max(_PANEL_ROWS, -(-size // _PANELS))
        bounds = [(first, min(first + step, size)) for first in range(0, size, step)]
        self._panels: list[tuple[int, int, int]] = []
        count = 0
        for first, end in bounds:
            self._panels.append((first, end, count))
            count += (end - first) * end
        self.count = count
        """How many numbers the sum has."""
        self.numbers = store.zeros(count)
        """The panels, one behind the other."""

    def add(self, rows: torch.Tensor) -> None:
        """Adds the outer products of float32 `rows`, `(count, size)`."""
        for part in torch.split(rows, _ROWS):
            for first, end, begin in self._panels:
                product = self._store.scratch(end - first, end)
                torch.mm(part[:, first:end].t(), part[:, :end], out=product)
                self.numbers.add(begin, product.view(-1))

    def mean(self, count: float) -> NDArray[np.float32]:
        """The whole of the symmetric matrix, divided by `count`."""
        mean = np.empty((self._size, self._size), np.float32)
        for first, end, begin in self._panels:
            numbers = self.numbers.read(begin, (end - first) * end)
            panel = (numbers / count).float().cpu().numpy().reshape(end - first, end)
            mean[first:end, :end] = panel
            mean[:first, first:end] = panel[:, :first].T
            # Products of rounded sums need not be exactly symmetric: the lower half is taken.
            block = mean[first:end, first:end]
            upper = np.triu_indices(end - first, 1)
            block[upper] = block.T[upper]
        return self._store.beside(self.numbers, mean)


class Diagonal:
    """`Σ x²` of `size` features, or other sums of one number a feature."""

    def __init__(self, size: int, store: SumStore) -> None:
        self._store = store
        self.count = size
        """How many numbers the sum has."""
        self.numbers = store.zeros(size)
        """The sums, one a feature."""

    def add(self, rows: torch.Tensor) -> None:
        """Adds the squares of float32 `rows`, `(count, size)`."""
        self.add_sums(rows.square().sum(0))

    def add_sums(self, sums: torch.Tensor) -> None:
        """Adds `sums`, `(size,)`."""
        self.numbers.add(0, sums)

    def mean(self, count: float) -> NDArray[np.float32]:
        """The sums, divided by `count`."""
        mean: NDArray[np.float32] = (self.numbers.read(0, self.count) / count).float().cpu().numpy()
        return self._store.beside(self.numbers, mean)


class Sums:
    """The sums of outer products of arrays, of which each of `parts` is measured on its own.

    A part has a number of columns, and is whole or, where it says so, its diagonal alone.
    """

    def __init__(self, parts: Sequence[tuple[int, bool]], store: SumStore) -> None:
        self.parts = [(Diagonal if diagonal else Triangle)(size, store) for size, diagonal in parts]
        """The sum of each part."""
        self._sizes = [size for size, _ in parts]
        self.tokens = 0
        """The tokens whose rows were added."""

    def add(self, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds `rows`, `(…, columns)`; each represents as many tokens as its entry in the flat `weights` says."""
        first = 0
        counted = _counted(rows, weights)
        for size, total in zip(self._sizes, self.parts, strict=True):
            total.add(counted[:, first : first + size])
            first += size
        self.tokens += int(weights.sum())

    def means(self, names: Sequence[str], count: float) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The parts divided by `count`, each with its name. A sum is gone when its mean is there.

        Raises `NonFiniteError`, which names the part.
        """
        for name in names:
            yield name, checked_mean(name, self.parts.pop(0), count)


def checked_mean(name: str, total: Triangle | Diagonal, count: float) -> NDArray[np.float32]:
    """The mean of a sum; raises `NonFiniteError`, which names it by `name`."""
    mean = total.mean(count)
    # A row with a non-finite entry has a non-finite diagonal entry.
    if not np.isfinite(mean if mean.ndim == 1 else mean.diagonal()).all():
        raise NonFiniteError(f"{name}: the model computes NaN or an infinity, or one in float32")
    return mean


def _counted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The rows of `x` with nonzero weight, in float32."""
    rows = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1]).float()
    return rows if bool(weights.all()) else rows[weights > 0]
