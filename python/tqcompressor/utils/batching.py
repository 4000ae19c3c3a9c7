"""Groups of items whose sizes fit a limit: a forward pass, or the memory that a caller allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from ..errors import ConfigError

_Item = TypeVar("_Item")


def fitting(items: Iterable[_Item], size: Callable[[_Item], int], most: int) -> Iterator[list[_Item]]:
    """Yields the items in order, in groups of total size `most` or less; a larger item is a group of its own."""
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
    """The items that each pass of a calibration measures, within `max_memory` bytes a pass.

    Raises:
        ConfigError: One item alone needs more. The message names it.
    """
    for item in items:
        if size(item) > max_memory:
            raise ConfigError(
                f"max_memory: expected at least {size(item):,} bytes, for {name(item)}, got {max_memory:,}"
            )
    return list(fitting(items, size, max_memory))
