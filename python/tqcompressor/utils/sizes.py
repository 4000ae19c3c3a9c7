"""Numbers of bytes as people write them: 1000, "500MB", "2GiB"."""

from __future__ import annotations

import re

from ..errors import ConfigError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b)?\s*", re.IGNORECASE)


def size_in_bytes(text: str) -> float | None:
    """The bytes that "500MB", "2GiB" or "1000" means; None where `text` is no size.

    >>> size_in_bytes("1.5 kB"), size_in_bytes("2KiB"), size_in_bytes("65%")
    (1500.0, 2048.0, None)
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        return None
    unit: int = (1024 if match[3] else 1000) ** _POWERS[(match[2] or "").lower()]
    return float(match[1]) * unit


def byte_count(name: str, size: int | str) -> int:
    """Reads a number of bytes: 1000, "500MB", "2GiB".

    Raises:
        ConfigError: `size` is neither, or less than a byte. The message gives `name` and the value.
    """
    found = None if isinstance(size, bool) else size_in_bytes(str(size))
    if found is None:
        raise ConfigError(f'{name}: expected bytes, or a size like "5GB" or "500MiB", got {size!r}')
    if not 1 <= found < 2**63:
        raise ConfigError(f"{name}: expected a number of bytes from 1 to 2⁶³ − 1, got {size!r}")
    return int(found)
