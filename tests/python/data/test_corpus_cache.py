"""The token cache: reused, rewritten when damaged, never half written."""

import errno
import io
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from helpers.corpora import END, HELD_OUT, TINY, oracle, packed, write
from helpers.processes import ENVIRONMENT
from tqcompressor import errors, token_blocks
from tqcompressor.data import token_blocks as corpus
from tqcompressor.data import tokenize

pytestmark = pytest.mark.usefixtures("cache")


def test_cache_files_are_the_same_bytes_for_any_number_of_workers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "_BATCH_CHARACTERS", 1000)
    text = HELD_OUT.read_text(encoding="utf-8").replace("\n\n", END)
    files = write(tmp_path / "in", text=text)
    written = []
    for workers in (1, 2, 7):
        token_blocks(files, tokenizer, 64, cache=tmp_path / str(workers), workers=workers)
        (cached,) = (tmp_path / str(workers)).iterdir()
        written.append((cached.name, cached.read_bytes()))
    assert written[0] == written[1] == written[2]


def test_a_cache_file_is_a_npy_file(tokenizer, cache):
    blocks = token_blocks(HELD_OUT, tokenizer, 128)
    (cached,) = cache.iterdir()
    array = np.load(cached, mmap_mode="r", allow_pickle=False)
    assert array.dtype == np.uint16
    assert array.tolist() == oracle(tokenizer, [HELD_OUT.read_text(encoding="utf-8")])
    assert blocks.vocab_size == 8192


def test_the_cache_is_found_by_contents(tokenizer, cache, tmp_path, tokenised):
    (file,) = write(tmp_path / "in", text=HELD_OUT.read_text(encoding="utf-8"))
    expected = packed(token_blocks(file, tokenizer, 64))
    assert tokenised
    del tokenised[:]
    # Another block size, another name, another limit: the same tokens.
    moved = file.rename(file.with_name("moved.txt"))
    assert packed(token_blocks(moved, tokenizer, 128))[:640] == expected[:640]
    assert packed(token_blocks(moved, tokenizer, 64, tokens=640)) == expected[:640]
    assert tokenised == []
    moved.write_bytes(moved.read_bytes() + b".")
    token_blocks(moved, tokenizer, 64)
    assert tokenised and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("length", [0, 7, 127, 128, 500, -1, "longer", "odd", "header"])
def test_a_damaged_cache_file_is_made_anew(tokenizer, cache, tokenised, length):
    token_blocks(HELD_OUT, tokenizer, 64)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    damaged = {"longer": whole + bytes(64), "odd": whole + b"\0", "header": whole.replace(b"<u2", b"<i2", 1)}
    file.write_bytes(damaged[length] if length in damaged else whole[:length])
    del tokenised[:]
    blocks = token_blocks(HELD_OUT, tokenizer, 64)
    assert tokenised and file.read_bytes() == whole
    assert packed(blocks) == oracle(tokenizer, [HELD_OUT.read_text(encoding="utf-8")])[: blocks.tokens]


def test_where_the_cache_is(tokenizer, tmp_path, monkeypatch):
    for name in ("TQCOMPRESSOR_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert corpus.default_cache() == tmp_path / "TQCOMPRESSOR_CACHE"
    monkeypatch.delenv("TQCOMPRESSOR_CACHE")
    assert corpus.default_cache() == tmp_path / "XDG_CACHE_HOME" / "tqcompressor"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert corpus.default_cache() == tmp_path / "HOME" / ".cache" / "tqcompressor"
    token_blocks(HELD_OUT, tokenizer, 64, cache=tmp_path / "given")
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


SCRIPT = """
    import pathlib
    import sys
    import transformers
    from tqcompressor import token_blocks
    from tqcompressor.data import tokenize

    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    encode = tokenize.Encoder.__call__
    seen = []
    tokenize.Encoder.__call__ = lambda self, documents: seen.append(1) or encode(self, documents)
    print("ready", flush=True)
    sys.stdin.readline()
    blocks = token_blocks(pathlib.Path(sys.argv[2]), tokenizer, 64)
    print(blocks.fingerprint, int(sum(block["input_ids"].sum() for block in blocks)), bool(seen))
"""


def test_two_processes_at_once_make_it_once(tokenizer, cache):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(TINY), str(HELD_OUT)]
    both = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    blocks = token_blocks(HELD_OUT, tokenizer, 64)
    for fingerprint, total, _ in answers:
        assert (fingerprint, int(total)) == (blocks.fingerprint, sum(packed(blocks)))
    assert sorted(seen for *_, seen in answers) == ["False", "True"]
    assert len(list(cache.iterdir())) == 1


def test_a_killed_run_leaves_no_cache_and_the_next_one_cleans_up(tokenizer, cache):
    script = textwrap.dedent(SCRIPT).replace("seen.append(1)", "__import__('os').kill(__import__('os').getpid(), 9)")
    command = [sys.executable, "-c", script, str(TINY), str(HELD_OUT)]
    run = subprocess.run(command, input="\n", capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert run.returncode == -9, run.stderr
    left = sorted(path.name for path in cache.iterdir())
    token_blocks(HELD_OUT, tokenizer, 64)
    (made,) = cache.iterdir()
    assert made.suffix == ".npy" and left == [f".{made.name}.lock", f".{made.name}.partial"]


def test_what_fails_midway_leaves_nothing(tokenizer, cache, monkeypatch):
    def fail(self, documents):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize.Encoder, "__call__", fail)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    with pytest.raises(KeyboardInterrupt):
        token_blocks(HELD_OUT, tokenizer, 64)
    assert list(cache.iterdir()) == []
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_texts_that_change_meanwhile(tokenizer, cache, tmp_path, monkeypatch):
    (file,) = write(tmp_path / "in", text="Some words that are changed.")
    survey = tokenize.Contents.digest.fget

    def change(self):
        digest = survey(self)
        file.write_text("Other words.")
        return digest

    monkeypatch.setattr(tokenize.Contents, "digest", property(change))
    with pytest.raises(errors.TextError, match="changed"):
        token_blocks(file, tokenizer, 2)
    assert list(cache.iterdir()) == []


def test_full_disk(tokenizer, tmpfs):
    place = tmpfs("size=64k")
    with pytest.raises(errors.StorageError) as caught:
        token_blocks(HELD_OUT, tokenizer, 64, cache=place / "cache")
    assert caught.value.errno == errno.ENOSPC and str(place) in caught.value.filename
    assert caught.value.filename.endswith(".npy")
    assert list((place / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_made(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError) as caught:
        token_blocks(HELD_OUT, tokenizer, 64, cache=tmp_path / "file" / "cache")
    assert caught.value.errno == errno.ENOTDIR and str(tmp_path / "file") in caught.value.filename


def test_the_header_of_a_cache_file_has_one_length_for_every_count():
    """The header is written before the count is known, and again after the tokens."""
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        headers = [corpus._header(dtype, count) for count in (0, 1, 10**9, 2**62)]
        assert {len(header) for header in headers} == {128}
        for header, count in zip(headers, (0, 1, 10**9, 2**62), strict=True):
            file = io.BytesIO(header)
            assert np.lib.format.read_magic(file) == (1, 0)
            assert np.lib.format.read_array_header_1_0(file) == ((count,), False, dtype)
