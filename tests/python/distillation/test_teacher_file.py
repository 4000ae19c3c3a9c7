"""The file of a cached teacher: its documented contents, and damaged files."""

import json
import math

import numpy as np
import pytest
import safetensors.numpy
import torch
from helpers.teachers import RELATIVE, check, held_out_blocks, random_model, softmax
from hypothesis import given
from hypothesis import strategies as st
from tqcompressor import errors
from tqcompressor.distillation import teacher_file
from tqcompressor.distillation.teacher_cache import CachedTeacher, cache_teacher


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return cache_teacher(random_model(), held_out_blocks(folder).section(3, 7), folder / "teacher.safetensors", k=8)


rows = st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5)


@given(
    logits=st.lists(rows, min_size=1, max_size=4), k=st.integers(1, 5), temperature=st.sampled_from([0.1, 1.0, 30.0])
)
def test_the_error_bounds_hold_for_any_finite_logits(logits, k, temperature):
    logits = np.array(logits, np.float32)
    tail, tokens, steps = teacher_file.largest(torch.tensor(logits), k, temperature)
    kept = teacher_file.probabilities_of(steps.astype(np.uint16), tail.astype(np.float64))
    item = {"teacher_tokens": torch.from_numpy(tokens), "teacher_probabilities": torch.from_numpy(kept)}
    check(item, softmax(logits, temperature), k)


def test_safetensors_reads_the_file(cached):
    tensors = safetensors.numpy.load_file(cached._path)
    assert {name: (value.dtype, value.shape) for name, value in tensors.items()} == {
        "tail_mass": (np.float32, (7, 16)),
        "tokens": (np.uint16, (7, 16, 8)),
        "log_probability_steps": (np.uint16, (7, 16, 8)),
    }
    assert (tensors["tokens"][5] == cached[5]["teacher_tokens"].numpy()).all()
    # The documented formula, up to the common scale of a row.
    probabilities = np.exp(-32 / 65535 * tensors["log_probability_steps"][5].astype(np.float64))
    np.testing.assert_allclose(cached[5]["teacher_probabilities"], probabilities, rtol=RELATIVE)
    with safetensors.safe_open(cached._path, "np") as file:
        assert file.metadata()["temperature"] == "1.0" and file.metadata()["fingerprint"] == cached.fingerprint


@pytest.mark.parametrize("length", [0, 7, 8, 100, 300, -1, "longer"])
def test_a_file_of_another_length(cached, tmp_path, length):
    whole = cached._path.read_bytes()
    damaged = tmp_path / "damaged"
    damaged.write_bytes(whole + b"\0" if length == "longer" else whole[:length])
    with pytest.raises(errors.CheckpointError, match="damaged"):
        CachedTeacher.open(damaged)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('"k": "8"', '"k": "7"', "damaged"),
        ('"k": "8"', '"k": "x"', "damaged"),
        ('"num_samples": "7"', '"num_samples": "0"', "damaged"),
        ('"temperature": "1.0"', '"temperature": "2,0"', "damaged"),
        ('"vocab_size": "8192"', '"vocab_size": "81920"', "damaged"),
        ('"U16"', '"U32"', "damaged"),
        ('"U16"', '"I16"', "tokens: expected one of the dtypes F64, F32, U32, U16, got I16"),
        ('"format_version": "1"', '"format_version": "2"', "newer tqcompressor"),
        ('"fingerprint"', '"fingerprimt"', "damaged"),
        ('"format_version"', '"format_versiom"', "expected the file of a cached teacher"),
        ('{"__metadata__"', '["__metadata__"', "not a safetensors file"),
    ],
)
def test_a_header_with_wrong_fields(cached, tmp_path, before, after, words):
    whole = cached._path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].decode()
    assert before in header
    header = header.replace(before, after, 1).encode()
    damaged = tmp_path / "damaged"
    damaged.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    with pytest.raises(errors.CheckpointError, match=words):
        CachedTeacher.open(damaged)


@pytest.mark.parametrize(("name", "value"), [("tokens", 0xFFFF), ("tail_mass", math.nan), ("tail_mass", 1.5)])
def test_damaged_contents_are_an_error(cached, tmp_path, name, value):
    whole = bytearray(cached._path.read_bytes())
    length = int.from_bytes(whole[:8], "little")
    begin, end = json.loads(whole[8 : 8 + length])[name]["data_offsets"]
    dtype = np.uint16 if name == "tokens" else np.float32
    np.frombuffer(whole, dtype, (end - begin) // dtype().itemsize, 8 + length + begin)[-1] = value
    (tmp_path / "damaged").write_bytes(whole)
    damaged = CachedTeacher.open(tmp_path / "damaged")
    assert damaged[5]["teacher_tokens"].equal(cached[5]["teacher_tokens"])
    with pytest.raises(errors.CheckpointError, match="sample 6 is damaged"):
        damaged[6]
