"""Items in groups that fit: into one forward pass, or into the memory that a user allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ..errors import ConfigError

_Item = TypeVar("_Item")


def fitting(items: Sequence[_Item], size: Callable[[_Item], int], most: int) -> Iterator[list[_Item]]:
    """The items, in order, in groups whose sizes add up to `most` at most; one that is larger is alone."""
    group: list[_Item] = []
    room = most
    for item in items:
        if group and size(item) > room:
            yield group
            group, room = [], most
        group.append(item)
        room -= size(item)
    if group:
        yield group


def measured_together(
    items: Sequence[_Item], size: Callable[[_Item], int], name: Callable[[_Item], str], max_memory: int
) -> list[list[_Item]]:
    """What one pass of a calibration measures in `max_memory` bytes, pass by pass.

    Raises `ConfigError` that names an item which alone needs more.
    """
    for item in items:
        if size(item) > max_memory:
            raise ConfigError(
                f"max_memory: expected at least {size(item):,} bytes, for {name(item)}, got {max_memory:,}"
            )
    return list(fitting(items, size, max_memory))
