"""Folders that are written whole or not at all: aside first, made durable, then renamed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StorageError
from .whole_file import storage_errors, sync


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which takes its name when the block ends well, and is removed otherwise.

    A process that is killed leaves `.NAME.partial`, which the next one that writes the path replaces. `path` must not
    exist. Raises `StorageError` when the operating system refuses.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
        with storage_errors(path):
            sync_folder(partial)
            partial.rename(path)
            sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync_folder(folder: Path) -> None:
    """Waits until everything in the folder is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def free_space(folder: Path) -> int:
    """Bytes left on the disk of a folder, or of what is to hold it; raises `StorageError` where there is no saying."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with storage_errors(folder):
        return shutil.disk_usage(existing).free


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises `StorageError` unless the disk that `folder` is on has `needed` bytes left."""
    free = free_space(folder)
    if free < needed:
        message = f"{what} may need {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise StorageError(errno.ENOSPC, message, str(folder))
