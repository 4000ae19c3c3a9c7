"""The two engines that run a model: torch, and the native runtime."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from ..errors import ConfigError


def is_native(engine: str, limits: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether the native engine runs: if asked for, or with "auto" where torch or transformers is not installed.

    `limits` has the options that only torch has, or has more values of: names with the value given and the one value
    that the native engine takes beside None. Raises `ConfigError` for another value.
    """
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if engine == "torch" or (engine == "auto" and not missing):
        return False
    why = f": {missing[0]} is not installed" if engine == "auto" else ""
    for name, (value, only) in limits.items():
        if value is not None and value != only:
            allowed = "not an option" if only is None else f"expected {only}"
            raise ConfigError(f"{name} {value}: {allowed} with the native engine{why}")
    return True
