"""Calls that only some operating systems have, each with its equivalent elsewhere.

What is certain once a file or folder has its name; `compress`, `expand` and `convert` promise the same, and
`src/portable.rs` says by which calls:

| | Linux | macOS | Windows |
|---|---|---|---|
| a full disk is found before the work | yes | what is free is compared | what is free is compared |
| a killed run leaves no half result, and its lock is released | yes | yes | yes |
| after a power failure the contents are whole | yes, by `fsync` | yes, by `F_FULLFSYNC` | yes, by `FlushFileBuffers` |
| after a power failure the name is there | yes, by `fsync` of the folder | as on Linux | some seconds later |

A file system without one of these calls, such as some of the network, has the equivalent: a length without reserved
space, a flush without that of the folder, no lock. On Windows, a folder is not replaced while another process has a
file of it open, such as the weights of a loaded model: that is an error, and the folder stays what it was.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

# What a file system says that cannot reserve space or flush a folder.
_NO_SUCH_CALL = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def processors() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def free_space(folder: Path) -> float:
    """Bytes free on the disk that holds a folder; infinity where the system does not say.

    Raises `OSError` where the folder cannot be read.
    """
    try:
        return shutil.disk_usage(folder).free
    except AttributeError:
        return math.inf


def reserve(descriptor: int, length: int, folder: Path) -> None:
    """Makes an open file of `folder` `length` bytes long, and its space certain where the system can promise it.

    Raises `OSError` where the space is not there.
    """
    try:
        os.posix_fallocate(descriptor, 0, length)
        return
    except AttributeError:
        pass
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise
    if free_space(folder) < length - os.fstat(descriptor).st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, length)


def flush(descriptor: int) -> None:
    """Waits until what an open file holds is on the disk."""
    if sys.platform == "darwin":
        # There, `fsync` leaves it in the memory of the disk. Not every file system has the other call.
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk.

    Windows has no way to do that for a folder, and needs write access to do it for a file.
    """
    windows, folder = os.name == "nt", path.is_dir()
    if windows and folder:
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        flush(descriptor)
    except OSError as error:
        if not folder or error.errno not in _NO_SUCH_CALL:
            raise
    finally:
        os.close(descriptor)


def rename(path: Path, to: Path) -> None:
    """Gives a file the name of a file or a free one, and a folder the name of an empty folder or a free one."""
    if os.name == "nt" and path.is_dir() and to.is_dir():
        # Windows renames no folder over an empty one. One that is not empty is refused here.
        to.rmdir()
        try:
            path.rename(to)
        except OSError:
            to.mkdir()
            raise
    else:
        path.replace(to)
