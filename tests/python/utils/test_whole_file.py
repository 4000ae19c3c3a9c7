"""Files that are written aside: whole, or absent, or what they were; writers of one path wait for one another."""

import errno
import os
import resource
import threading

import pytest
from tqcompressor import errors
from tqcompressor.utils.atomic_io import WholeFile


def test_it_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with WholeFile(path) as file:
        file.reserve(8)
        file.write(b"abcd")
        file.write_at(6, b"gh")
        file.write_at(1, b"B")
        file.write(b"ef")
        assert not path.exists()
    assert path.read_bytes() == b"aBcdefgh"
    assert list(path.parent.iterdir()) == [path]


def test_it_is_durable_before_it_appears(tmp_path, monkeypatch):
    """A crash of the machine must not leave a name without its contents."""
    path = tmp_path / "file"
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_ino, path.exists())))
    with WholeFile(path) as file:
        file.write(b"new")
    assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


@pytest.mark.parametrize("before", [None, b"old"])
def test_what_fails_or_is_discarded_changes_nothing(tmp_path, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(KeyboardInterrupt), WholeFile(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    with WholeFile(path) as file:
        file.write(b"new")
        file.discard()
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [before] * (before is not None)


def test_what_a_killed_process_left_is_written_over(tmp_path):
    path = tmp_path / "file"
    (tmp_path / ".file.partial").write_bytes(b"left over, and longer")
    with WholeFile(path) as file:
        file.write(b"new")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"new"]


def test_writers_wait_for_one_another(tmp_path):
    path = tmp_path / "file"
    found = []

    def write():
        with WholeFile(path) as file:
            found.append(path.read_bytes() if path.exists() else None)
            file.write(b"%d" % len(found))

    threads = [threading.Thread(target=write) for _ in range(8)]
    with WholeFile(path) as file:
        for thread in threads:
            thread.start()
        file.write(b"0")
        assert found == []
    for thread in threads:
        thread.join(60)
    # Each saw, whole, what the one before it wrote.
    assert found == [b"%d" % number for number in range(8)]
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"8"]


@pytest.mark.parametrize("write", ["write", "write_at", "reserve"])
def test_what_the_system_refuses(tmp_path, write):
    path = tmp_path / "file"
    calls = {"write": (bytes(4000),), "write_at": (0, bytes(4000)), "reserve": (4000,)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(errors.StorageError) as caught, WholeFile(path) as file:
            getattr(file, write)(*calls[write])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
