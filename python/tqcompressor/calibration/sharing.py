"""Tensors that several layers read, such as the input of query, key and value, are measured once.

They are recognised as the run goes. In a pass of the model, a unit that has not read anything before shares the sum of
another if it reads the tensor that this sum consists of. From then on, whatever one unit of the group reads is added
once, and all others must read it as well before the pass ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .sums import Sums, SumStore

# The columns of each part that is measured on its own, and whether only its diagonal is.
Parts = Sequence[tuple[int, bool]]


class NotShared(Exception):
    """Units that read one tensor in one place read different ones in another: their sums cannot be told apart."""

    def __init__(self, units: set[str]) -> None:
        super().__init__(units)
        self.units = units
        """The units that must not share."""


class _Identity(NamedTuple):
    """What distinguishes a tensor, in its present state, from every other one."""

    # A weak reference: no other storage takes its place, and its memory is free.
    storage: StorageWeakRef
    view: tuple[object, ...]
    version: int


@dataclass
class _Group:
    """Units that share a sum."""

    sums: Sums
    parts: Parts
    members: set[str]
    first: _Identity | None
    """The only tensor that was added, until another is or the pass ends."""
    readers: dict[_Identity, list[set[str]]] = field(default_factory=dict)
    """Who has read each tensor that was added in this pass, once for every time that it was added."""


class SharedSums:
    """The sums of all that some units read: of their inputs, or of the gradients at their outputs.

    Each of the units `apart` has a sum of its own.
    """

    def __init__(self, store: SumStore, apart: Collection[str]) -> None:
        self._store, self._apart = store, apart
        self._groups: dict[str, _Group] = {}

    def add(self, unit: str, parts: Parts, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds the tensor `x` that `unit` reads, unless a unit that shares its sum has read it in this pass."""
        key = _Identity(
            StorageWeakRef(x.untyped_storage()),  # type: ignore[no-untyped-call]
            (x.storage_offset(), x.shape, x.stride(), x.dtype),
            x._version,
        )
        group = self._groups.get(unit)
        if group is None:
            alone = unit in self._apart
            group = None if alone else self._beginning(key, parts)
            if group is not None:
                group.members.add(unit)
                group.readers[key][0].add(unit)
            else:
                group = _Group(Sums(parts, self._store), parts, {unit}, None if alone else key, {key: [{unit}]})
                group.sums.add(x, weights)
            self._groups[unit] = group
            return
        times = group.readers.setdefault(key, [])
        for readers in times:
            if unit not in readers:
                readers.add(unit)
                return
        group.first = None
        times.append({unit})
        group.sums.add(x, weights)

    def _beginning(self, key: _Identity, parts: Parts) -> _Group | None:
        """The group whose sum consists of one tensor."""
        return next((group for group in self._groups.values() if group.first == key and group.parts == parts), None)

    def end_pass(self) -> None:
        """Ends a pass of the model, forward or backward.

        Raises `NotShared` where a unit did not read what its group has read.
        """
        different: set[str] = set()
        for group in self._groups.values():
            if any(readers != group.members for times in group.readers.values() for readers in times):
                different |= group.members
            group.first = None
            group.readers.clear()
        if different:
            raise NotShared(different)

    def groups(self) -> Iterator[tuple[list[str], Parts, Sums]]:
        """The units that share a sum, its parts, and the sum, in the order in which they were first read."""
        for group in {id(group): group for group in self._groups.values()}.values():
            yield sorted(group.members), group.parts, group.sums

    def begin(self, units: Collection[str], parts: Parts) -> Sums:
        """A new sum, shared by `units` as in an earlier run."""
        group = _Group(Sums(parts, self._store), parts, set(units), None)
        self._groups.update(dict.fromkeys(units, group))
        return group.sums

    def taken(self) -> Iterator[tuple[list[str], Sums]]:
        """The sums, each with the units that share it; a sum is gone when the next one is asked for."""
        while self._groups:
            group = next(iter(self._groups.values()))
            for unit in group.members:
                del self._groups[unit]
            yield sorted(group.members), group.sums
