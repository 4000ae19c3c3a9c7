"""Groups of items whose sizes fit a limit, such as a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

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
