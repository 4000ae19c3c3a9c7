"""Text to blocks of tokens, against a naive oracle; and the cache: found again, made anew, never half written."""

import errno
import glob
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.processes import ENVIRONMENT, run_script
from helpers.tokenizer import save_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqcompressor import corpus, errors, token_blocks, token_stream

TINY = Path(__file__).parents[1] / "data" / "tiny-gpt2"
HELD_OUT = TINY / "heldout.txt"
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of every test is its own, the user's is never touched."""
    monkeypatch.setenv("TQCOMPRESSOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenised(monkeypatch):
    """The documents that were tokenised since the test began."""
    seen = []
    encode = token_stream.Encoder.__call__
    monkeypatch.setattr(
        token_stream.Encoder, "__call__", lambda self, documents: seen.extend(documents) or encode(self, documents)
    )
    return seen


def oracle(tokenizer, texts):
    """Every token of the corpus, document by document, by the tokenizer's own call."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens = []
    for text in texts:
        for document in text.split(END) if end else [text]:
            if document.strip():
                tokens += [*tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"], *end]
    return tokens


def packed(blocks):
    """All tokens of the blocks in a row, and that every block is as the contract says."""
    for block in blocks:
        assert set(block) == {"input_ids"}
        assert block["input_ids"].dtype == torch.int64 and block["input_ids"].shape == (blocks.block_size,)
    return [int(token) for block in blocks for token in block["input_ids"]]


def write(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return [folder / f"{name}.txt" for name in texts]


pieces = st.one_of(st.text(max_size=30), st.sampled_from([END, " ", "\n\n", "the end", "<|endoftext", "é\U0001f600"]))
texts = st.lists(st.lists(pieces, max_size=8).map("".join), min_size=1, max_size=5)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=texts, block_size=st.integers(2, 20), workers=st.sampled_from([1, 2, 5]), batch=st.sampled_from([1, 40]))
def test_blocks_are_the_oracles(tokenizer, tmp_path_factory, monkeypatch, texts, block_size, workers, batch):
    folder = tmp_path_factory.mktemp("corpus")
    # Tiny batches, and next to nothing read ahead, so that short texts too go through many threads.
    monkeypatch.setattr(token_stream, "_BATCH_CHARACTERS", batch)
    monkeypatch.setattr(token_stream, "_CHARACTERS_AHEAD", 20)
    files = write(folder, **{f"text{index}": text for index, text in enumerate(texts)})
    # A byte order mark at the beginning of a file is no part of its text.
    expected = oracle(tokenizer, [text.removeprefix("\ufeff") for text in texts])
    if len(expected) < block_size:
        with pytest.raises(errors.TextError):
            token_blocks(files, tokenizer, block_size, cache=folder, workers=workers)
        return
    blocks = token_blocks(files, tokenizer, block_size, cache=folder, workers=workers)
    assert len(blocks) == len(expected) // block_size
    assert blocks.tokens == len(blocks) * block_size
    assert (blocks.corpus_tokens, blocks.left_over) == (len(expected), len(expected) % block_size)
    assert packed(blocks) == expected[: blocks.tokens]


def test_cache_files_are_the_same_bytes_for_any_number_of_workers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_stream, "_BATCH_CHARACTERS", 1000)
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
    assert blocks.vocabulary == 8192


def test_the_helper_tokenizer_and_its_gaps(tmp_path):
    """Unknown characters are one token, and its limit of 32 holds."""
    small = save_tokenizer(tmp_path / "tokenizer")
    (file,) = write(tmp_path / "in", text=f"abc ü{END}{END}\n{END}de")
    blocks = token_blocks(file, small, 2)
    assert packed(blocks) == oracle(small, [file.read_text(encoding="utf-8")])[: blocks.tokens]
    with pytest.raises(errors.ConfigError, match=r"block_size.*at most 32.*got 33"):
        token_blocks(file, small, 33)


def test_a_wide_vocabulary_is_four_bytes_wide(tmp_path, cache):
    wide = save_tokenizer(tmp_path / "tokenizer")
    wide.add_tokens([f"word{number}" for number in range(70_000)])
    (file,) = write(tmp_path / "in", text="word69999 word0")
    blocks = token_blocks(file, wide, 2)
    assert packed(blocks) == oracle(wide, ["word69999 word0"]) and max(packed(blocks)) > 1 << 16
    (cached,) = cache.iterdir()
    assert np.load(cached).dtype == np.uint32


def test_a_slow_tokenizer_gives_the_same(tokenizer, tmp_path):
    class Slow:
        """A tokenizer written in Python: no Rust behind it."""

        model_max_length, eos_token, eos_token_id = 128, END, 0

        def __len__(self):
            return len(tokenizer)

        def get_vocab(self):
            return tokenizer.get_vocab()

        def __call__(self, documents, **options):
            return tokenizer(documents, **options)

    files = write(tmp_path / "in", one=f"Some words.{END}Others.", two="And more.")
    assert packed(token_blocks(files, Slow(), 3)) == packed(token_blocks(files, tokenizer, 3))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_tokenizer_without_an_end_joins_documents(tmp_path):
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"))
    files = write(tmp_path / "in", one="Some words.", two=" More of them.")
    expected = [token for text in ("Some words.", " More of them.") for token in plain(text)["input_ids"]]
    assert packed(token_blocks(files, plain, len(expected))) == expected


def test_the_tokenizers_own_settings_neither_matter_nor_change(tokenizer):
    settled = transformers.AutoTokenizer.from_pretrained(TINY)
    settled(["a b c d e f"], truncation=True, max_length=2)
    assert settled.backend_tokenizer.truncation is not None
    assert packed(token_blocks(HELD_OUT, settled, 128)) == packed(token_blocks(HELD_OUT, tokenizer, 128))
    assert settled.backend_tokenizer.truncation is not None


def test_globs_are_sorted_and_lists_keep_their_order(tokenizer, tmp_path):
    one, two = write(tmp_path / "in", one="First one.", two="Then two.")
    (deep,) = write(tmp_path / "in" / "deep", three="Three is deep.")
    expected = {path: oracle(tokenizer, [path.read_text()]) for path in (one, two, deep)}
    for given_texts, order in [
        (str(tmp_path / "in" / "*.txt"), [one, two]),
        (tmp_path / "in" / "*.txt", [one, two]),
        (str(tmp_path / "in" / "**" / "*.txt"), [deep, one, two]),
        ([two, str(tmp_path / "in" / "deep" / "*")], [two, deep]),
        ((two, one), [two, one]),
    ]:
        tokens = [token for path in order for token in expected[path]]
        assert packed(token_blocks(given_texts, tokenizer, len(tokens))) == tokens


@pytest.mark.parametrize("backwards", [False, True])
def test_globs_do_not_follow_the_file_system(tokenizer, tmp_path, monkeypatch, backwards):
    files = write(tmp_path / "in", **{f"text{number}": f"Text number {number}." for number in range(10)})
    expand = glob.glob
    monkeypatch.setattr(glob, "glob", lambda *names, **options: sorted(expand(*names, **options), reverse=backwards))
    expected = oracle(tokenizer, [path.read_text() for path in files])
    assert packed(token_blocks(tmp_path / "in" / "*", tokenizer, len(expected))) == expected


def test_a_name_with_brackets_is_a_file(tokenizer, tmp_path):
    (tmp_path / "a[1].txt").write_text("In brackets.")
    assert len(token_blocks(tmp_path / "a[1].txt", tokenizer, 2)) >= 1


def test_datasets_are_read_by_their_text(tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = ["First one.", "", f"Then two.{END}Three."] * 700
    dataset = datasets.Dataset.from_dict({"number": list(range(len(rows))), "text": rows})
    blocks = token_blocks(dataset, tokenizer, 8)
    assert packed(blocks) == oracle(tokenizer, rows)[: blocks.tokens]
    with pytest.raises(errors.ConfigError, match="number"):
        token_blocks(dataset.remove_columns("text"), tokenizer, 8)
    with pytest.raises(errors.ConfigError, match="train"):
        token_blocks(datasets.DatasetDict({"train": dataset}), tokenizer, 8)
    with pytest.raises(errors.TextError, match=r"row 1 .*NoneType"):
        token_blocks(datasets.Dataset.from_dict({"text": ["words", None]}), tokenizer, 8)


def test_progress_is_in_bytes_and_only_where_there_is_work(tokenizer):
    calls = []
    token_blocks(HELD_OUT, tokenizer, 128, progress=lambda *call: calls.append(call))
    assert calls[-1] == (HELD_OUT.stat().st_size, HELD_OUT.stat().st_size)
    assert calls == sorted(calls)
    del calls[:]
    token_blocks(HELD_OUT, tokenizer, 64, progress=lambda *call: calls.append(call))
    assert calls == []


def test_loaders_take_it_with_worker_processes(tokenizer):
    blocks = token_blocks(HELD_OUT, tokenizer, 128)
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(blocks, 16, num_workers=2, multiprocessing_context=context)
        assert [int(token) for batch in loader for token in batch["input_ids"].flatten()] == packed(blocks)
    assert len(pickle.dumps(blocks)) < 1000


def test_no_threads_are_left_behind(tmp_path):
    """The tokenizers library's own would be, and would be more than were asked for."""
    # Several documents in one call are what it starts threads for.
    (file,) = write(tmp_path / "in", text=HELD_OUT.read_text(encoding="utf-8").replace("\n\n", END))
    run_script(
        """
        import os, sys, time
        import transformers
        from tqcompressor import token_blocks

        del os.environ["TOKENIZERS_PARALLELISM"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
        before = len(os.listdir("/proc/self/task"))
        token_blocks(sys.argv[2], tokenizer, 64, workers=2)
        # The system forgets a thread a moment after it was joined.
        deadline = time.monotonic() + 30
        while len(os.listdir("/proc/self/task")) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/task")) <= before
        assert "TOKENIZERS_PARALLELISM" not in os.environ
        """,
        TINY,
        file,
    )


def test_parts(tokenizer):
    blocks = token_blocks(HELD_OUT, tokenizer, 100)
    first, second = blocks.section(0, 3), blocks.section(3, 4)
    assert (
        packed(first) + packed(second) == packed(blocks.take(700)) == packed(blocks.take(799)) == packed(blocks)[:700]
    )
    assert packed(second.section(1, 2)) == packed(blocks.section(4, 2))
    assert packed(pickle.loads(pickle.dumps(second))) == packed(second)
    assert second[-1]["input_ids"].equal(blocks[6]["input_ids"])
    for index in (4, -5):
        with pytest.raises(IndexError):
            second[index]
    for begin, count in ((-1, 2), (0, 0), (0, 5)):
        with pytest.raises(errors.TextError):
            second.section(begin, count)
    with pytest.raises(errors.TextError, match=r"500 tokens.* 400 "):
        second.take(500)
    with pytest.raises(errors.ConfigError, match=r"at least 100 .*got 99"):
        second.take(99)


def test_fingerprints_tell_apart_what_differs(tokenizer, tmp_path):
    text = HELD_OUT.read_text(encoding="utf-8")
    (copy, changed, cut) = write(tmp_path / "in", a=text, b=text[:-1] + "!", c=text.replace("\n\n", END, 1))
    other = transformers.AutoTokenizer.from_pretrained(TINY)
    other.add_tokens(["zzzz"])
    blocks = token_blocks(HELD_OUT, tokenizer, 64)
    same = [token_blocks(copy, tokenizer, 64), blocks.take(blocks.tokens), pickle.loads(pickle.dumps(blocks))]
    assert {part.fingerprint for part in same} == {blocks.fingerprint}
    # The same characters in the same order, cut elsewhere.
    (one, two) = write(tmp_path / "cuts", one=f"abcd{END}efgh", two=f"abcde{END}fgh")
    assert token_blocks(one, tokenizer, 2).fingerprint != token_blocks(two, tokenizer, 2).fingerprint
    different = [
        token_blocks(changed, tokenizer, 64),
        token_blocks(cut, tokenizer, 64),
        token_blocks(copy, other, 64),
        token_blocks(copy, tokenizer, 65),
        token_blocks(copy, tokenizer, 64, tokens=640),
        blocks.section(1, 10),
    ]
    assert len({part.fingerprint for part in [blocks, *different]}) == 7
    assert all(re.fullmatch("[0-9a-f]{32}", part.fingerprint) for part in different)
    assert token_blocks(copy, tokenizer, 64, tokens=640).fingerprint == blocks.take(640).fingerprint


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
    import sys
    import transformers
    from tqcompressor import token_blocks, token_stream

    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    encode = token_stream.Encoder.__call__
    seen = []
    token_stream.Encoder.__call__ = lambda self, documents: seen.append(1) or encode(self, documents)
    print("ready", flush=True)
    sys.stdin.readline()
    blocks = token_blocks(sys.argv[2], tokenizer, 64)
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
    (left,) = cache.iterdir()
    assert left.name.endswith(".npy.partial")
    token_blocks(HELD_OUT, tokenizer, 64)
    (made,) = cache.iterdir()
    assert made.name == left.name.removeprefix(".").removesuffix(".partial")


def test_what_fails_midway_leaves_nothing(tokenizer, cache, monkeypatch):
    def fail(self, documents):
        raise KeyboardInterrupt

    monkeypatch.setattr(token_stream.Encoder, "__call__", fail)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    with pytest.raises(KeyboardInterrupt):
        token_blocks(HELD_OUT, tokenizer, 64)
    assert list(cache.iterdir()) == []
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_texts_that_change_meanwhile(tokenizer, cache, tmp_path, monkeypatch):
    (file,) = write(tmp_path / "in", text="Some words that are changed.")
    survey = token_stream.Contents.digest.fget

    def change(self):
        digest = survey(self)
        file.write_text("Other words.")
        return digest

    monkeypatch.setattr(token_stream.Contents, "digest", property(change))
    with pytest.raises(errors.TextError, match="changed"):
        token_blocks(file, tokenizer, 2)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        ("in/none*.txt", errors.TextError, ["none*.txt", "no file matches"]),
        (["in/good.txt", "in/**/*.md"], errors.TextError, ["*.md", "no file matches"]),
        ([], errors.TextError, ["no texts"]),
        ("in/latin.txt", errors.TextError, ["latin.txt", "not UTF-8 at byte 3"]),
        (["in/good.txt", "in/latin.txt"], errors.TextError, ["latin.txt"]),
        ("in/blank.txt", errors.TextError, ["white space"]),
        ("in/short.txt", errors.TextError, ["has 3", "128"]),
        ("in/missing.txt", FileNotFoundError, ["missing.txt"]),
        ("in", IsADirectoryError, ["in"]),
    ],
)
def test_texts_that_cannot_be_used(tokenizer, cache, tmp_path, monkeypatch, tokenised, texts, error, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", good="Good words. " * 100, blank=f" \n{END}\n{END}", short="A few")
    (tmp_path / "in" / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(error) as caught:
        token_blocks(texts, tokenizer, 128)
    for word in words:
        assert word in str(caught.value).replace("have", "has")
    # Found before hours are spent on the texts before it.
    assert tokenised == [] or "short" in texts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 1}, ["block_size", "at least 2", "got 1"]),
        ({"block_size": 129}, ["block_size", "at most 128", "got 129"]),
        ({"tokens": 63}, ["tokens", "at least 64", "got 63"]),
        ({"workers": 0}, ["workers", "at least 1", "got 0"]),
    ],
)
def test_options_out_of_range(tokenizer, options, words):
    with pytest.raises(errors.ConfigError) as caught:
        token_blocks(HELD_OUT, tokenizer, **{"block_size": 64, **options})
    for word in words:
        assert word in str(caught.value)


def test_fewer_tokens_than_asked_for(tokenizer):
    blocks = token_blocks(HELD_OUT, tokenizer, 64)
    with pytest.raises(errors.TextError, match=f"9,999,999.*{blocks.tokens:,}"):
        token_blocks(HELD_OUT, tokenizer, 64, tokens=9_999_999)


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
