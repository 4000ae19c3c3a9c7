"""Numbers of bytes as people write them: 1000, "500MB", "2GiB"."""

from __future__ import annotations

import re

from ..errors import ConfigError

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def byte_count(size: int | str) -> int:
    """Reads a number of bytes: 1000, "500MB", "2GiB"."""
    match = _SIZE.fullmatch(str(size))
    if match is None or match[2].lower() not in _UNITS or isinstance(size, bool):
        raise ConfigError(f'max_shard_size: expected bytes, or a size like "5GB" or "500MiB", got {size!r}')
    most = int(float(match[1]) * _UNITS[match[2].lower()])
    if not 0 < most < 2**63:
        raise ConfigError(f"max_shard_size: expected at least one byte, got {size!r}")
    return most
