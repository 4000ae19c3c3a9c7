"""Files and folders that appear whole or not at all: written aside, flushed to disk, renamed.

What is to become `NAME` is written as `.NAME.partial` beside it, by the process that holds the lock `.NAME.lock`. The
operating system releases the lock of a process that is killed, so that the next writer of `NAME` takes both over.
A long run that ends with `NAME` holds the lock `.NAME.tqcompressor-lock` from its beginning, and a second run is
refused at once. Locks are filelock's; those of `compress` are the same to the operating system.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import DestinationError, StorageError
from . import portable

if TYPE_CHECKING:
    from filelock import BaseFileLock

# What the system says of a folder that cannot be written to, or of a file system without locks.
_NO_LOCK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP)


class WholeFile:
    """A context manager that writes a file beside `path` and renames it to `path` when the block ends well.

    When the block raises, or `discard` was called, nothing is left and `path` stays what it was. Processes and threads
    that write the same path wait for one another when they enter.

    Raises:
        DestinationError: As `check_destination`.
        StorageError: The operating system refused: no space, no permission, no locks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._end = 0
        self._discarded = False

    def __enter__(self) -> WholeFile:
        with ExitStack() as stack:
            self._partial = stack.enter_context(_locked(self.path))
            with storage_errors(self._partial):
                self._file = stack.enter_context(open(self._partial, "w+b", buffering=0))
            self._stack = stack.pop_all()
        return self

    def reserve(self, length: int) -> None:
        """Makes the file `length` bytes long, so that a full disk is found before the work is done."""
        with storage_errors(self.path):
            portable.reserve(self._file.fileno(), length, self.path.parent)

    def write(self, data: bytes) -> None:
        """Writes `data` behind what this method has written before."""
        self.write_at(self._end, data)
        self._end += len(data)

    def write_at(self, offset: int, data: bytes) -> None:
        """Writes `data` from byte `offset` on."""
        view = memoryview(data)
        with storage_errors(self.path):
            self._file.seek(offset)
            while view:
                view = view[self._file.write(view) :]

    def discard(self) -> None:
        """Leaves `path` as it is when the block ends."""
        self._discarded = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None and not self._discarded:
                with storage_errors(self.path):
                    portable.flush(self._file.fileno())
                    # Windows renames no open file.
                    self._file.close()
                    _publish(self._partial, self.path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, renamed to `path` when the block ends well, and removed otherwise.

    `path` must not exist. Processes and threads that write the same path wait for one another when they enter.

    Raises:
        DestinationError: As `check_destination`.
        StorageError: The operating system refused: no space, no permission, no locks, or `path` is not empty.
    """
    with _locked(path) as partial:
        with storage_errors(partial):
            partial.mkdir()
        yield partial
        with storage_errors(path):
            sync_folder(partial)
            _publish(partial, path)


def check_destination(path: Path) -> None:
    """Raises `DestinationError` if `path`, which need not exist, can lead nowhere, as src/checkpoint/staging.rs does.

    That is a symbolic link without its target, in any place of the path, and ".." after a folder that does not exist.
    """
    for part in (path, *path.parents):
        # Not the methods of Path, which raise where a folder may not be read: that is found on writing.
        if os.path.islink(part) and not os.path.exists(part):
            raise DestinationError(
                f"{path}: {part} is a symbolic link to a place that does not exist: remove it or make its target"
            )
        if part.name == ".." and not os.path.exists(part):
            raise DestinationError(f"{path}: there is no {part}: make the folder before '..', or leave both out")


@contextmanager
def sole_run(path: Path) -> Iterator[None]:
    """Holds the lock of a run that writes the file or folder at `path`; at the end nothing of it is left.

    Where the folder above admits no lock, such as a read-only one around a mounted folder, there is none.

    Raises:
        DestinationError: Another run holds it, or the path can lead nowhere.
        StorageError: The operating system refused.
    """
    check_destination(path)
    # Imported here because `import tqcompressor` needs numpy alone.
    from filelock import FileLock, Timeout

    resolved = path.resolve()
    lock_path = resolved.with_name(f".{resolved.name}.tqcompressor-lock")
    # A run that is just ending releases it within the second.
    lock = FileLock(lock_path, timeout=1)
    missing = [folder for folder in resolved.parents if not folder.exists()]
    try:
        try:
            resolved.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            message = "another run of tqcompressor is writing it: wait for its end, or choose another destination"
            raise DestinationError(f"{path}: {message}") from None
        except OSError as error:
            if error.errno not in _NO_LOCK:
                raise StorageError(error.errno, error.strerror or str(error), str(lock_path)) from error
        yield
    finally:
        if lock.is_locked:
            _release(lock, lock_path)
        for folder in missing:
            # Those that hold the result stay.
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Yields the free name `.NAME.partial` beside `path`, which only the holder of the lock on `path` may use.

    What is there at the end is removed.
    """
    # Imported here because `import tqcompressor` needs numpy alone.
    from filelock import FileLock

    check_destination(path)
    partial, lock_path = (path.with_name(f".{path.name}.{suffix}") for suffix in ("partial", "lock"))
    lock = FileLock(lock_path)
    with storage_errors(lock_path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        with storage_errors(partial):
            # A killed process left it.
            _remove(partial)
        yield partial
    finally:
        try:
            with storage_errors(partial):
                _remove(partial)
        finally:
            _release(lock, lock_path)


def _release(lock: BaseFileLock, path: Path) -> None:
    # Removed while it is held: filelock sees that a lock that it was waiting for has lost its name, and takes a new
    # one. Windows removes no open file; there, filelock does it on release.
    with suppress(OSError):
        path.unlink()
    lock.release()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> None:
    portable.rename(partial, path)
    portable.sync(path.parent)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raises what the operating system refuses as a `StorageError` with `path` as its file name."""
    try:
        yield
    except OSError as error:
        raise StorageError(error.errno, error.strerror or str(error), str(path)) from error


def sync_folder(folder: Path) -> None:
    """Waits until everything in the folder is on the disk."""
    for path in folder.rglob("*"):
        portable.sync(path)
    portable.sync(folder)


def without_leftovers(folder: Path) -> list[str]:
    """The names in a folder, sorted, without what killed writers of its files left."""
    return sorted(path.name for path in folder.iterdir() if not _is_left(path))


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left in a folder and below, of which no writer is alive.

    The next writer of a name takes its leftovers over, but a name that was complete is not written again.
    """
    with storage_errors(folder):
        for path in [path for path in folder.rglob(".*") if _is_left(path)]:
            _remove(path)


def _is_left(path: Path) -> bool:
    return path.name[0] == "." and path.name.endswith((".partial", ".lock"))


def free_space(folder: Path) -> float:
    """Bytes free on the disk that holds a folder, or will hold it. Raises `StorageError` where it cannot be read."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with storage_errors(folder):
        return portable.free_space(existing)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises `StorageError` unless the disk of `folder` has `needed` bytes free."""
    free = free_space(folder)
    if free < needed:
        message = f"{what} may need {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise StorageError(errno.ENOSPC, message, str(folder))
