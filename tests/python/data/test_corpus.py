"""Text to blocks of tokens, against a naive oracle; and invalid texts."""

import glob
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.corpora import END, HELD_OUT, TINY, oracle, packed, write
from helpers.processes import run_script
from helpers.tokenizer import save_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqcompressor import errors, token_blocks
from tqcompressor.data import tokenize
from tqcompressor.data.text import open_passages, open_text, open_texts

pytestmark = pytest.mark.usefixtures("cache")

pieces = st.one_of(st.text(max_size=30), st.sampled_from([END, " ", "\n\n", "the end", "<|endoftext", "é\U0001f600"]))
texts = st.lists(st.lists(pieces, max_size=8).map("".join), min_size=1, max_size=5)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=texts, seq_len=st.integers(2, 20), workers=st.sampled_from([1, 2, 5]), batch=st.sampled_from([1, 40]))
def test_blocks_are_the_oracles(tokenizer, tmp_path_factory, monkeypatch, texts, seq_len, workers, batch):
    folder = tmp_path_factory.mktemp("corpus")
    # Tiny batches and little read-ahead, so that short texts pass through many threads too.
    monkeypatch.setattr(tokenize, "_BATCH_CHARACTERS", batch)
    monkeypatch.setattr(tokenize, "_CHARACTERS_AHEAD", 20)
    files = write(folder, **{f"text{index}": text for index, text in enumerate(texts)})
    # A byte order mark at the beginning of a file is not part of its text.
    expected = oracle(tokenizer, [text.removeprefix("\ufeff") for text in texts])
    if len(expected) < seq_len:
        with pytest.raises(errors.TextError):
            token_blocks(files, tokenizer, seq_len, cache=folder, workers=workers)
        return
    blocks = token_blocks(files, tokenizer, seq_len, cache=folder, workers=workers)
    assert len(blocks) == len(expected) // seq_len
    assert blocks.tokens == len(blocks) * seq_len
    assert (blocks.corpus_tokens, blocks.left_over) == (len(expected), len(expected) % seq_len)
    assert packed(blocks) == expected[: blocks.tokens]


def test_the_helper_tokenizer_and_its_gaps(tmp_path):
    """Unknown characters are one token, and the limit of 32 holds."""
    small = save_tokenizer(tmp_path / "tokenizer")
    (file,) = write(tmp_path / "in", text=f"abc ü{END}{END}\n{END}de")
    blocks = token_blocks(file, small, 2)
    assert packed(blocks) == oracle(small, [file.read_text(encoding="utf-8")])[: blocks.tokens]
    with pytest.raises(errors.ConfigError, match=r"seq_len.*at most 32.*got 33"):
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
        """A tokenizer written in Python, without a Rust backend."""

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
        (tmp_path / "in" / "*.txt", [one, two]),
        (tmp_path / "in" / "**" / "*.txt", [deep, one, two]),
        ([two, tmp_path / "in" / "deep" / "*"], [two, deep]),
        ("First one.", [one]),
        ([two, "First one.", deep], [two, one, deep]),
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
    """Threads of the tokenizers library would stay alive, and exceed the number of workers."""
    # The library starts threads when one call has several documents.
    (file,) = write(tmp_path / "in", text=HELD_OUT.read_text(encoding="utf-8").replace("\n\n", END))
    run_script(
        """
        import os, pathlib, sys, time
        import transformers
        from tqcompressor import token_blocks

        del os.environ["TOKENIZERS_PARALLELISM"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
        before = len(os.listdir("/proc/self/task"))
        token_blocks(pathlib.Path(sys.argv[2]), tokenizer, 64, workers=2)
        # The system still lists a thread for a moment after its join.
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


def test_drawn_blocks(tokenizer):
    blocks = token_blocks(HELD_OUT, tokenizer, 100)
    every = [block["input_ids"].tolist() for block in blocks]
    drawn = blocks.drawn(20, 3)
    rows = [block["input_ids"].tolist() for block in drawn]
    places = [every.index(row) for row in rows]
    assert len(drawn) == len(set(places)) == 20 and drawn.tokens == 2000
    assert places != sorted(places) and max(places) > len(blocks) // 2 > min(places)
    assert drawn[-1]["input_ids"].tolist() == rows[-1]
    assert packed(drawn.section(5, 10)) == packed(drawn)[500:1500]
    assert packed(drawn.take(500)) == packed(drawn)[:500]
    assert packed(pickle.loads(pickle.dumps(drawn))) == packed(drawn) == packed(blocks.drawn(20, 3))
    assert sorted(packed(blocks.drawn(len(blocks), 0))) == sorted(packed(blocks))
    # Of a section only its own.
    assert {*packed(blocks.section(2, 4).drawn(4, 0))} == {*packed(blocks.section(2, 4))}
    for count in (0, len(blocks) + 1):
        with pytest.raises(errors.TextError, match=rf"expected {count} blocks, the texts have {len(blocks)}"):
            blocks.drawn(count, 0)


def test_fingerprints_tell_apart_what_differs(tokenizer, tmp_path):
    text = HELD_OUT.read_text(encoding="utf-8")
    (copy, changed, cut) = write(tmp_path / "in", a=text, b=text[:-1] + "!", c=text.replace("\n\n", END, 1))
    other = transformers.AutoTokenizer.from_pretrained(TINY)
    other.add_tokens(["zzzz"])
    blocks = token_blocks(HELD_OUT, tokenizer, 64)
    same = [token_blocks(copy, tokenizer, 64), blocks.take(blocks.tokens), pickle.loads(pickle.dumps(blocks))]
    assert {part.fingerprint for part in same} == {blocks.fingerprint}
    # The same characters in the same order, divided differently.
    (one, two) = write(tmp_path / "cuts", one=f"abcd{END}efgh", two=f"abcde{END}fgh")
    assert token_blocks(one, tokenizer, 2).fingerprint != token_blocks(two, tokenizer, 2).fingerprint
    different = [
        token_blocks(changed, tokenizer, 64),
        token_blocks(cut, tokenizer, 64),
        token_blocks(copy, other, 64),
        token_blocks(copy, tokenizer, 65),
        token_blocks(copy, tokenizer, 64, tokens=640),
        blocks.section(1, 10),
        blocks.drawn(10, 0),
        blocks.drawn(10, 1),
        blocks.drawn(10, 0).section(0, 9),
    ]
    assert len({part.fingerprint for part in [blocks, *different]}) == 10
    assert all(re.fullmatch("[0-9a-f]{32}", part.fingerprint) for part in different)
    assert token_blocks(copy, tokenizer, 64, tokens=640).fingerprint == blocks.take(640).fingerprint
    assert token_blocks(copy, tokenizer, 64).drawn(10, 0).fingerprint == blocks.drawn(10, 0).fingerprint


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        (Path("in/none*.txt"), errors.TextError, ["none*.txt", "no file matches"]),
        ([Path("in/good.txt"), Path("in/**/*.md")], errors.TextError, ["*.md", "no file matches"]),
        ([], errors.TextError, ["no texts"]),
        (Path("in/latin.txt"), errors.TextError, ["latin.txt", "not UTF-8 at byte 3"]),
        ([Path("in/good.txt"), Path("in/latin.txt")], errors.TextError, ["latin.txt"]),
        (Path("in/blank.txt"), errors.TextError, ["white space"]),
        (Path("in/short.txt"), errors.TextError, ["has 3", "128"]),
        (Path("in/missing.txt"), FileNotFoundError, ["missing.txt"]),
        (Path("in"), IsADirectoryError, ["in"]),
        ("in/good.txt", errors.TextError, ["name of a file", "pathlib.Path('in/good.txt')"]),
        (["words", "in/*.txt"], errors.TextError, ["name of a file", "pathlib.Path('in/*.txt')"]),
        (3, errors.ConfigError, ["text", "got int"]),
        ([b"words"], errors.ConfigError, ["text", "got bytes"]),
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
    # The error appears before hours of work on the texts before it.
    assert tokenised == [] or texts == Path("in/short.txt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 1}, ["seq_len", "from 2 up", "got 1"]),
        ({"seq_len": 129}, ["seq_len", "at most 128", "got 129"]),
        ({"tokens": 63}, ["tokens", "at least 64", "got 63"]),
        ({"workers": 0}, ["workers", "from 1 up", "got 0"]),
    ],
)
def test_options_out_of_range(tokenizer, options, words):
    with pytest.raises(errors.ConfigError) as caught:
        token_blocks(HELD_OUT, tokenizer, **{"seq_len": 64, **options})
    for word in words:
        assert word in str(caught.value)


def test_fewer_tokens_than_asked_for(tokenizer):
    blocks = token_blocks(HELD_OUT, tokenizer, 64)
    with pytest.raises(errors.TextError, match=f"9,999,999.*{blocks.tokens:,}"):
        token_blocks(HELD_OUT, tokenizer, 64, tokens=9_999_999)


def joined(texts):
    return ["".join(parts) for parts in texts]


@pytest.mark.parametrize("text", ["What is a *word*?", "[brackets] and **/**", "in", "words " * 2000 + "*", "a\0b*"])
def test_a_text_that_names_no_file_is_a_text(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", good="Good words.")
    assert joined(open_texts(text)) == joined(open_texts([text])) == [text]


def test_one_text_is_one(tmp_path):
    one, two = write(tmp_path / "in", one="First one.", two="Then two.")
    for text in (one, "First one.", tmp_path / "in" / "o*.txt"):
        assert joined(open_text(text)) == ["First one."]
    with pytest.raises(errors.TextError, match="expected one text, got 2"):
        open_text(tmp_path / "in" / "*.txt")
    with pytest.raises(errors.TextError, match=r"pathlib\.Path"):
        open_text(str(two))


def test_passages_are_a_list_or_a_file(tmp_path):
    (file,) = write(tmp_path / "in", passages="First one.\nThen two.\n")
    assert open_passages(file) == open_passages(["First one.", "Then two."]) == ["First one.", "Then two."]
    with pytest.raises(errors.ConfigError, match="got str"):
        open_passages(str(file))
