"""Tensor files: written in parts, read by the safetensors library, equal contents in equal bytes."""

import numpy as np
import pytest
import safetensors.numpy
from tqcompressor.errors import CheckpointError, StorageError
from tqcompressor.utils import tensor_file
from tqcompressor.utils.atomic_io import WholeFile
from tqcompressor.utils.tensor_file import TensorSpec, TensorWriter, read_tensor_file

TENSORS = {
    "wide": np.arange(24, dtype=np.uint32).reshape(4, 3, 2),
    "empty": np.empty((0, 7), np.float32),
    "narrow": np.arange(5, dtype=np.uint16),
}
METADATA = {"format_version": "1", **{f"key{number}": f"välue {number}" for number in range(9)}}


def write(path, tensors=TENSORS, metadata=METADATA, parts=1):
    specs = {name: TensorSpec(value.dtype, value.shape) for name, value in tensors.items()}
    with WholeFile(path) as file:
        writer = TensorWriter(file, specs, metadata)
        # The last rows are written first: the order must not affect the file.
        for name, value in tensors.items():
            for rows in reversed(np.array_split(np.arange(len(value)), parts)):
                if len(rows):
                    writer.write(name, value[rows], rows[0])
    return path


@pytest.mark.parametrize("chunk", [1, 16, 1 << 24])
def test_parts_in_any_order_make_the_same_bytes(tmp_path, monkeypatch, chunk):
    expected = write(tmp_path / "whole").read_bytes()
    monkeypatch.setattr(tensor_file, "_CHUNK", chunk)
    for parts in (1, 2, 5):
        assert write(tmp_path / "parts", parts=parts).read_bytes() == expected


def test_the_library_reads_what_is_written(tmp_path):
    path = write(tmp_path / "file")
    for found in (safetensors.numpy.load_file(path), read_tensor_file(path, "a test", 1).tensors):
        assert set(found) == set(TENSORS)
        for name, value in TENSORS.items():
            assert found[name].dtype == value.dtype and np.array_equal(found[name], value)
    found = read_tensor_file(path, "a test", 1)
    assert list(found.tensors) == list(TENSORS)
    assert {"format_version": "1", **found.metadata} == METADATA


def test_tensors_stay_on_the_disk(tmp_path):
    found = read_tensor_file(write(tmp_path / "file"), "a test", 1).tensors
    assert isinstance(found["wide"], np.memmap) and not found["wide"].flags.writeable


def test_any_safetensors_file_of_these_dtypes_is_mapped(tmp_path):
    """The library writes tensors in its own order."""
    safetensors.numpy.save_file(TENSORS, tmp_path / "file", {"format_version": "1"})
    for name, value in read_tensor_file(tmp_path / "file", "a test", 1).tensors.items():
        assert np.array_equal(value, TENSORS[name])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "expected the file of a test, got another"),
        ({"format_version": "one"}, "expected the file of a test"),
        ({"format_version": "2"}, r"newer tqcompressor \(format 2, this one reads 1\)"),
    ],
)
def test_a_version_is_asked_for(tmp_path, metadata, message):
    with pytest.raises(CheckpointError, match=f"file: .*{message}"):
        read_tensor_file(write(tmp_path / "file", metadata=metadata), "a test", 1)


def test_other_dtypes_are_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2, np.int8)}, tmp_path / "file", {"format_version": "1"})
    with pytest.raises(CheckpointError, match="file: a: expected one of the dtypes F64, F32, U32, U16, got I8"):
        read_tensor_file(tmp_path / "file", "a test", 1)


def test_a_damaged_file_is_refused(tmp_path):
    content = write(tmp_path / "file").read_bytes()
    for damaged in (b"", content[:7], content[:100], content[:-1], content + b"\0"):
        (tmp_path / "file").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="file: truncated or damaged"):
            read_tensor_file(tmp_path / "file", "a test", 1)
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(StorageError) as caught:
            read_tensor_file(absent, "a test", 1)
        assert caught.value.filename == str(absent)


def test_a_pointer_of_git_is_named(tmp_path):
    (tmp_path / "file").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"file: a Git LFS pointer, .*: fetch it with `git lfs pull`"):
        read_tensor_file(tmp_path / "file", "a test", 1)
