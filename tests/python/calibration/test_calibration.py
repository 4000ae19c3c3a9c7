"""The file of a calibration: a round trip keeps everything, and hostile files are refused."""

import json

import numpy as np
import pytest
from helpers.checkpoints import encode, read_safetensors, write_safetensors
from helpers.measured import same
from tqcompressor import Calibration
from tqcompressor.errors import CheckpointError, MomentError, NonFiniteError, ShapeError, StorageError


def some_moments():
    random = np.random.default_rng(0)
    x = random.standard_normal((30, 6)).astype(np.float32)
    return {"input.h.0.attn.c_attn": x.T @ x, "output.h.0.attn.c_attn.q": np.arange(4.0), "input.wte": np.ones(9)}


def test_a_file_holds_what_was_saved(tmp_path):
    saved = Calibration(some_moments(), 30, 7, True, "gpt2")
    saved.save(tmp_path / "new" / "file")
    loaded = Calibration.load(tmp_path / "new" / "file")
    assert same(saved, loaded)
    assert (loaded.tokens, loaded.seed, loaded.sensitivity, loaded.model_type) == (30, 7, True, "gpt2")
    assert np.array_equal(loaded.input("h.0.attn.c_attn.q"), saved.input("h.0.attn.c_attn"))
    assert loaded.input("h.0.mlp.c_fc.q") is None and loaded.output("wte") is None
    # Another reader of safetensors reads it.
    stored = read_safetensors(tmp_path / "new" / "file")
    assert {name: tuple(shape) for name, (_, shape, _) in stored.items()} == {
        name: moment.shape for name, moment in saved.moments.items()
    }
    loaded.check("h.0.attn.c_attn.q", 6, 4)
    with pytest.raises(ShapeError, match=r"input\.h\.0\.attn\.c_attn\.q: expected the moment of 8 inputs.* of 6"):
        loaded.check("h.0.attn.c_attn.q", 8, 4)
    assert not list((tmp_path / "new").glob(".*"))


@pytest.mark.parametrize(
    ("name", "moment", "error", "message"),
    [
        ("input.a", np.ones((2, 3)), ShapeError, r"input\.a: expected a square matrix or its diagonal, got .*\(2, 3\)"),
        ("input.a", np.ones((0,)), ShapeError, r"input\.a"),
        ("input.a", np.ones((1, 1, 1)), ShapeError, r"input\.a"),
        ("input.a", np.array([1.0, np.nan]), NonFiniteError, r"input\.a: holds NaN"),
        ("input.a", np.diag([1.0, 1e300]), NonFiniteError, r"input\.a"),
        ("output.a", np.array([1.0, -1.0]), MomentError, r"output\.a: expected a diagonal .* got -1"),
        ("output.a", np.array([[1.0, 2.0], [0.0, 1.0]]), MomentError, r"output\.a: .* symmetric .* 0 at \(1, 0\)"),
        ("a", np.ones(2), MomentError, 'begins with "input."'),
    ],
)
def test_moments_that_are_none_are_refused(tmp_path, name, moment, error, message):
    with pytest.raises(error, match=message):
        Calibration({name: moment}, 1)
    with np.errstate(over="ignore"):
        stored = encode(moment)
    metadata = {"format_version": "1", "tokens": "1", "seed": "0", "sensitivity": "true"}
    write_safetensors(tmp_path / "file", {name: stored})
    write_header(tmp_path / "file", lambda header: header | {"__metadata__": metadata})
    with pytest.raises(error, match=f"file: .*{message}"):
        Calibration.load(tmp_path / "file")


def test_no_tokens_are_refused():
    with pytest.raises(MomentError, match="tokens: expected at least 1, got 0"):
        Calibration({}, 0)


def write_header(path, change):
    """Changes the header of a file and nothing after it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8:end]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def entry(**changes):
    return lambda header: header | {"input.wte": header["input.wte"] | changes}


def metadata(**changes):
    return lambda header: header | {"__metadata__": header["__metadata__"] | changes}


HOSTILE = {
    "no metadata": lambda header: {name: part for name, part in header.items() if name != "__metadata__"},
    "a list": lambda header: [header],
    "no JSON": lambda _: b"{",
    "no text": lambda _: b"\xff\xfe",
    "deep": lambda _: b"[" * 100_000,
    "newer": metadata(format_version="2"),
    "no number": metadata(tokens="many"),
    "no truth": metadata(sensitivity="perhaps"),
    "no texts": metadata(texts="[1]"),
    "no number of a text": metadata(texts='{"wiki.txt": "many"}'),
    "half precision": entry(dtype="F16"),
    "a wider shape": entry(shape=[10]),
    "a negative shape": entry(shape=[-9]),
    "a huge shape": entry(shape=[1 << 40, 1 << 40]),
    "no shape": entry(shape=None),
    "words for a shape": entry(shape=["9"]),
    "offsets beyond the end": entry(data_offsets=[1 << 40, (1 << 40) + 36]),
    "offsets over another": entry(data_offsets=[0, 36]),
    "offsets backwards": entry(data_offsets=[36, 0]),
    "one offset": entry(data_offsets=[0]),
    "no entry": lambda header: header | {"input.more": 3},
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, lie):
    path = tmp_path / "file"
    Calibration(some_moments(), 30).save(path)
    write_header(path, HOSTILE[lie])
    with pytest.raises(CheckpointError, match="file: "):
        Calibration.load(path)


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "file"
    Calibration(some_moments(), 30).save(path)
    content = path.read_bytes()
    for length in (0, 5, 8, 40, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="file: "):
            Calibration.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        Calibration.load(path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Calibration.load(path)
    with pytest.raises(StorageError):
        Calibration.load(tmp_path / "absent")


def test_a_full_disk_leaves_the_old_file(tmp_path, tmpfs):
    path = tmpfs("size=16k") / "file"
    Calibration(some_moments(), 30).save(path)
    before = path.read_bytes()
    with pytest.raises(StorageError):
        Calibration({"input.a": np.eye(100)}, 1).save(path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
