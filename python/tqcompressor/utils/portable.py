"""Calls that only some operating systems have, each with its equivalent elsewhere."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


def processors() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def reserve(descriptor: int, length: int, folder: Path) -> None:
    """Makes an open file of `folder` `length` bytes long, and its space certain where the system can promise it.

    Raises `OSError` where the space is not there.
    """
    try:
        os.posix_fallocate(descriptor, 0, length)
    except AttributeError:
        if shutil.disk_usage(folder).free < length - os.fstat(descriptor).st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        os.ftruncate(descriptor, length)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk.

    Windows has no way to do that for a folder, and needs write access to do it for a file.
    """
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
