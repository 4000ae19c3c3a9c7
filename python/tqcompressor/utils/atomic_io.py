"""Files and folders that appear whole or not at all: written aside, flushed to disk, renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ..errors import StorageError


class WholeFile:
    """A context manager that writes beside `path` and takes its place when the block ends well.

    When the block raises, or `discard` was called, nothing is left and `path` stays what it was. Processes that write
    the same path wait for one another when they enter; a process that is killed leaves `.NAME.partial`, which the next
    one that writes the path takes over.

    Raises:
        StorageError: The operating system refused: no space, no permission, no locks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self._discarded = False

    def __enter__(self) -> WholeFile:
        with storage_errors(self._partial):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                # Neither "w", which would empty what another process is writing, nor "a", which ignores offsets.
                descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._file = open(descriptor, "r+b", buffering=0)
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX)
                    if _is_at(self._file.fileno(), self._partial):
                        self._file.truncate(0)
                        return self
                except BaseException:
                    self._file.close()
                    raise
                # What was waited for has been renamed or removed by the process that held it.
                self._file.close()

    def reserve(self, length: int) -> None:
        """Makes the file `length` bytes long, so that a full disk is found before the work is done."""
        with storage_errors(self.path):
            os.posix_fallocate(self._file.fileno(), 0, length)

    def write(self, data: bytes) -> None:
        """Writes `data` behind what was written by this method before."""
        view = memoryview(data)
        with storage_errors(self.path):
            while view:
                view = view[self._file.write(view) :]

    def write_at(self, offset: int, data: bytes) -> None:
        """Writes `data` from byte `offset` on."""
        view = memoryview(data)
        with storage_errors(self.path):
            while view:
                written = os.pwrite(self._file.fileno(), view, offset)
                view = view[written:]
                offset += written

    def discard(self) -> None:
        """Leaves `path` as it is when the block ends."""
        self._discarded = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._discarded:
                with storage_errors(self.path):
                    os.fsync(self._file.fileno())
                    self._partial.replace(self.path)
                    sync(self.path.parent)
        finally:
            # Before the lock goes: behind it, the name may be another process's.
            if _is_at(self._file.fileno(), self._partial):
                self._partial.unlink()
            self._file.close()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raises what the operating system refuses as a `StorageError` with `path` as its file name."""
    try:
        yield
    except OSError as error:
        raise StorageError(error.errno, error.strerror or str(error), str(path)) from error


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


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
