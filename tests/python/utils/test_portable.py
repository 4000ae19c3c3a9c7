"""Each call of an operating system, and its equivalent, with the other systems imitated."""

import errno
import os
import sys
import types

import pytest
from tqcompressor.utils import portable


@pytest.fixture
def system(monkeypatch):
    """Changes `os` for the module alone: pathlib has one that it works with."""

    def change(**values):
        names = {name: value for name, value in {**vars(os), **values}.items() if value is not None}
        monkeypatch.setattr(portable, "os", types.SimpleNamespace(**names))

    return change


def refuse(number):
    def call(*arguments):
        raise OSError(number, os.strerror(number))

    return call


def test_processors(system):
    system(sched_getaffinity=lambda process: {3, 5})
    assert portable.processors() == 2
    system(sched_getaffinity=None)
    assert portable.processors() == os.cpu_count()
    system(sched_getaffinity=None, cpu_count=lambda: None)
    assert portable.processors() == 1


@pytest.mark.parametrize(
    "call", [getattr(os, "posix_fallocate", None), None, refuse(errno.EOPNOTSUPP), refuse(errno.EINVAL)]
)
def test_space_is_reserved_with_or_without_a_call_for_it(tmp_path, system, call):
    system(posix_fallocate=call)
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"abc")
        file.flush()
        portable.reserve(file.fileno(), 4000, tmp_path)
        assert os.fstat(file.fileno()).st_size == 4000
        with pytest.raises(OSError) as caught:
            portable.reserve(file.fileno(), 1 << 60, tmp_path)
        # The call itself may say that no file is that long.
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert (tmp_path / "file").read_bytes()[:3] == b"abc"


def test_a_full_disk_is_no_missing_call(tmp_path, system):
    system(posix_fallocate=refuse(errno.ENOSPC), ftruncate=None)
    with open(tmp_path / "file", "w+b") as file, pytest.raises(OSError) as caught:
        portable.reserve(file.fileno(), 1, tmp_path)
    assert caught.value.errno == errno.ENOSPC


def test_space_that_the_system_does_not_say_is_no_limit(tmp_path, monkeypatch):
    assert 0 < portable.free_space(tmp_path) < 1 << 60
    monkeypatch.delattr(portable.shutil, "disk_usage")
    assert portable.free_space(tmp_path) > 1 << 60


@pytest.mark.parametrize("lacking", ["nothing", "module", "file system"])
def test_macos_flushes_the_disk_too(tmp_path, system, monkeypatch, lacking):
    calls = []

    def fcntl(descriptor, command):
        calls.append(command)
        if lacking == "file system":
            raise OSError(errno.ENOTSUP, "not here")

    module = None if lacking == "module" else types.SimpleNamespace(fcntl=fcntl, F_FULLFSYNC=51)
    monkeypatch.setitem(sys.modules, "fcntl", module)
    monkeypatch.setattr(portable, "sys", types.SimpleNamespace(platform="darwin"))
    system(fsync=lambda descriptor: calls.append("fsync"))
    (tmp_path / "file").write_bytes(b"a")
    portable.sync(tmp_path / "file")
    assert calls == {"nothing": [51], "module": ["fsync"], "file system": [51, "fsync"]}[lacking]


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folder")
def test_a_folder_is_flushed_where_that_is_possible(tmp_path, system, monkeypatch):
    flushed = []
    (tmp_path / "file").write_bytes(b"a")
    monkeypatch.setattr(portable, "sys", types.SimpleNamespace(platform="linux"))
    system(fsync=lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    portable.sync(tmp_path)
    portable.sync(tmp_path / "file")
    assert flushed == [tmp_path.stat().st_ino, (tmp_path / "file").stat().st_ino]
    # Windows cannot, and some network file systems cannot.
    system(name="nt", fsync=lambda descriptor: flushed.append("again"))
    portable.sync(tmp_path)
    assert len(flushed) == 2
    portable.sync(tmp_path / "file")
    assert flushed[2:] == ["again"]
    system(fsync=refuse(errno.EINVAL))
    portable.sync(tmp_path)
    with pytest.raises(OSError):
        portable.sync(tmp_path / "file")
    system(fsync=refuse(errno.EIO))
    with pytest.raises(OSError):
        portable.sync(tmp_path)


@pytest.mark.parametrize("name", sorted({os.name, "nt"}))
def test_a_name_is_taken_from_a_file_or_an_empty_folder(tmp_path, system, name):
    system(name=name)
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    portable.rename(tmp_path / "a", tmp_path / "b")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("b", b"a")]
    for folder in ("new", "empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "new" / "ours").touch()
    (tmp_path / "full" / "theirs").touch()
    with pytest.raises(OSError):
        portable.rename(tmp_path / "new", tmp_path / "full")
    assert (tmp_path / "full" / "theirs").exists() and (tmp_path / "new" / "ours").exists()
    portable.rename(tmp_path / "new", tmp_path / "empty")
    portable.rename(tmp_path / "empty", tmp_path / "free")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "free", "full"]
    assert (tmp_path / "free" / "ours").exists()


def test_an_empty_folder_stays_where_the_rename_is_refused(tmp_path, system, monkeypatch):
    system(name="nt")
    for folder in ("new", "empty"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(type(tmp_path), "rename", refuse(errno.EACCES))
    with pytest.raises(PermissionError):
        portable.rename(tmp_path / "new", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]
