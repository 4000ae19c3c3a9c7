"""Atomic files and folders: they appear complete or not at all, and writers of one path wait for each other."""

import errno
import os
import subprocess
import sys
import textwrap
import threading

import pytest
from tqcompressor import errors
from tqcompressor.utils import portable
from tqcompressor.utils.atomic_io import WholeFile, remove_leftovers, whole_folder, without_leftovers


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
    """After a crash of the machine, a renamed file must have its contents."""
    path = tmp_path / "file"
    synced = []
    monkeypatch.setattr(
        portable, "flush", lambda descriptor: synced.append((os.fstat(descriptor).st_ino, path.exists()))
    )
    with WholeFile(path) as file:
        file.write(b"new")
    folder = [] if os.name == "nt" else [(tmp_path.stat().st_ino, True)]
    assert synced == [(path.stat().st_ino, False), *folder]


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
    # Each writer read the complete file of its predecessor.
    assert found == [b"%d" % number for number in range(8)]
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"8"]


@pytest.mark.parametrize("write", ["write", "write_at", "reserve"])
def test_what_the_system_refuses(tmp_path, write):
    resource = pytest.importorskip("resource", reason="Windows has no limit of file sizes")
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


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
@pytest.mark.parametrize("write", ["file", "folder"])
def test_a_killed_process_is_taken_over(tmp_path, write):
    script = f"""
        import os
        from pathlib import Path
        from tqcompressor.utils.atomic_io import WholeFile, whole_folder

        path = Path({str(tmp_path / "it")!r})
        with WholeFile(path) if {write!r} == "file" else whole_folder(path) as partial:
            partial.write(b"half") if {write!r} == "file" else (partial / "half").write_bytes(b"half")
            os.kill(os.getpid(), 9)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert run.returncode == -9, run.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".it.lock", ".it.partial"]
    # The next writer may write the other kind, a file or a folder.
    with whole_folder(tmp_path / "it") as folder:
        assert list(folder.iterdir()) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["it"]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder"
    with whole_folder(path) as partial:
        (partial / "a").write_bytes(b"a")
        assert not path.exists()
    assert (path / "a").read_bytes() == b"a" and list(path.parent.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "second") as partial:
        raise KeyboardInterrupt
    # An existing folder is left alone.
    with pytest.raises(errors.StorageError), whole_folder(path) as partial:
        (partial / "b").write_bytes(b"b")
    assert (path / "a").read_bytes() == b"a" and list(path.parent.iterdir()) == [path]
    assert list(tmp_path.iterdir()) == [path.parent]


def test_writers_of_a_folder_wait_for_one_another(tmp_path):
    path = tmp_path / "folder"
    found = []

    def write():
        with pytest.raises(errors.StorageError), whole_folder(path) as partial:
            found.append((path / "a").exists())
            (partial / "b").touch()

    threads = [threading.Thread(target=write) for _ in range(3)]
    with whole_folder(path) as partial:
        for thread in threads:
            thread.start()
        (partial / "a").touch()
        assert found == []
    for thread in threads:
        thread.join(60)
    assert found == [True] * 3 and [entry.name for entry in path.iterdir()] == ["a"]


def test_space_is_reserved_where_the_system_has_no_call_for_it(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with WholeFile(tmp_path / "file") as file:
        file.write(b"abc")
        file.reserve(4000)
    assert (tmp_path / "file").read_bytes() == b"abc" + bytes(3997)
    with pytest.raises(errors.StorageError) as caught, WholeFile(tmp_path / "huge") as file:
        file.reserve(1 << 60)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "huge")


@pytest.mark.parametrize("write", [WholeFile, whole_folder])
def test_a_path_that_leads_nowhere_is_refused_and_nothing_made(tmp_path, write):
    (tmp_path / "broken").symlink_to("none-such")
    (tmp_path / "far").symlink_to(tmp_path / "none" / "such")
    before = sorted(tmp_path.rglob("*"))
    for name, words in [
        ("broken", r"broken is a symbolic link to a place that does not exist: remove it or make its target"),
        ("broken/file", r"broken is a symbolic link"),
        ("far/below/file", r"far is a symbolic link"),
        ("missing/../file", r"there is no .*missing/\.\.: make the folder before '\.\.'"),
        ("missing/below/../../file", r"there is no .*missing/below/"),
    ]:
        with pytest.raises(errors.DestinationError, match=words), write(tmp_path / name):
            pass
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "here").mkdir()
    for name in ("here/../file", "new/file"):
        with write(tmp_path / name):
            pass
        assert (tmp_path / name).exists()


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    for name in (".a.lock", "a", "b/.c.partial/half", "b/.hidden", "b/d.lock", ".git/config.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert without_leftovers(tmp_path) == [".git", "a", "b"]
    remove_leftovers(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"a", "b/.hidden", "b/d.lock", ".git/config.lock"}
