"""Local directories of checkpoints that are given by a path or by an id on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TypeAlias

from ..errors import CheckpointError

StrPath: TypeAlias = str | os.PathLike[str]
# "name" or "organisation/name", as the hub allows them.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def local_directory(source: StrPath, weights: Sequence[str] = ("*.safetensors",)) -> str:
    """The local directory of `source`; a model on the hub is downloaded, with the files that match `weights`.

    Raises:
        CheckpointError: There is no such directory, and no such model on the hub or no huggingface_hub to fetch it.
    """
    name = os.fspath(source)
    if os.path.exists(name) or not isinstance(source, str):
        return name
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such directory")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"{name}: no such directory (to fetch it from the hub, install huggingface_hub)"
        ) from None
    try:
        return snapshot_download(name, allow_patterns=[*weights, "*.json", "*.txt", "README.md"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: no such directory, and the hub does not give it: {reason}") from error


def cached_directory(name: str) -> str | None:
    """The directory of a model in the hub's cache; None where it is not there. Never uses the network."""
    if not _HUB_ID.fullmatch(name):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        found = try_to_load_from_cache(name, "config.json")
    except (ImportError, HFValidationError):
        return None
    return os.path.dirname(found) if isinstance(found, str) else None
