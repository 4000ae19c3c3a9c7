"""Long documents in pieces: the tokens of the whole, for tokenizers of every kind."""

import math
import random

import numpy as np
import pytest
import transformers
from helpers.corpora import END, HELD_OUT, oracle, packed, write
from helpers.processes import run_script
from helpers.toy_tokenizers import KINDS, WORDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqcompressor import token_blocks
from tqcompressor.data import cut, text
from tqcompressor.data.cut import documents, whole_documents
from tqcompressor.data.token_spool import TokenSpool

MADE = {}


def tokenizer_of(kind):
    return MADE.setdefault(kind, kind())


def encoder_of(tokenizer):
    return lambda texts: [row.ids for row in tokenizer.encode_batch(texts, add_special_tokens=False)]


def tokens_in_pieces(parts, encode):
    """The tokens of one document by its pieces, and how many pieces there were."""
    pieces = list(cut.cut(whole_documents([parts]), encode))
    assert "".join(piece.text for piece in pieces) == "".join(parts)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    rows = [encode([piece.context + piece.text])[0][piece.known :] for piece in pieces]
    return [token for row in rows for token in row], len(pieces)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Pieces of 120 characters, so that short texts are cut."""
    monkeypatch.setattr(cut, "_LONGEST", 120)
    monkeypatch.setattr(cut, "_WINDOW", 40)


words = st.sampled_from(
    [
        *WORDS.split(" "),
        "the cat",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "don't",
        "'ll",
        "1234567",
        "...",
        "e\u0301",
        "ﬁ",
        "İ",
        "漢字",
        "\U0001f600",
    ]
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(words, st.sampled_from([" ", " ", " ", " ", "\n", "", "  "])), min_size=40, max_size=150))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_pieces_have_the_tokens_of_the_whole(kind, pairs):
    document = "".join(word + space for word, space in pairs)
    encode = encoder_of(tokenizer_of(kind))
    tokens, count = tokens_in_pieces([document[begin : begin + 50] for begin in range(0, len(document), 50)], encode)
    assert tokens == encode([document])[0]
    assert count >= len(document) // 160


# A line without any space: marks between words, digits alone, a script without spaces, one letter, one long word.
SOLID = {
    "marks": "the-cat,sat;on(the)mat." * 30,
    "digits": "1234567890" * 60,
    "script": "日本語、日本語。" * 60,
    "one letter": "t" * 700,
    "letters": "".join(random.Random(0).choices("thecatsonmd", k=700)),
}


@pytest.mark.parametrize("name", SOLID)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_line_without_any_space(kind, name):
    encode = encoder_of(tokenizer_of(kind))
    tokens, count = tokens_in_pieces([SOLID[name]], encode)
    assert tokens == encode([SOLID[name]])[0]
    assert count >= 4


def test_an_added_token_with_a_space_is_not_cut(monkeypatch):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=KINDS[0]())
    tokenizer.add_tokens(["cat sat", "the mat"])
    encode = encoder_of(tokenizer.backend_tokenizer)
    document = "the cat sat on the mat " * 40
    tokens, count = tokens_in_pieces([document], encode)
    assert tokens == encode([document])[0] and count > 5


def test_a_document_that_is_cut_ends_once(tokenizer, tmp_path, monkeypatch):
    """The end-of-text token follows the last piece alone; also where a part of the file ends inside it."""
    monkeypatch.setattr(text, "_PART", 37)
    content = f" \n{END}{HELD_OUT.read_text(encoding='utf-8')[:2000]}{END}\n \n{END}Two words{END}{' ' * 300}end"
    (file,) = write(tmp_path / "in", text=content)
    expected = oracle(tokenizer, [content])
    blocks = token_blocks(file, tokenizer, 3, cache=tmp_path)
    assert blocks.corpus_tokens == len(expected) and packed(blocks) == expected[: blocks.tokens]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["<", "|end|", "<|end|>", "|>", " ", "\n", "a", "b "])), st.integers(1, 9))
def test_documents_do_not_depend_on_the_parts(pieces, size):
    content = "".join(pieces)
    parts = [content[begin : begin + size] for begin in range(0, len(content), size)]
    found = [""]
    for piece in documents([parts], "<|end|>"):
        found[-1] += piece.text
        found += [""] * piece.ends
    assert found.pop() == ""
    assert found == [part for part in content.split("<|end|>") if part.strip()]


def test_a_file_in_parts_is_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_PART", 5)
    path = tmp_path / "text"
    for content in ("", "\ufeff", "\ufeffcafé \U0001f600 日本語" * 3, "plain"):
        path.write_bytes(content.encode())
        assert text.read_text(path) == content.removeprefix("\ufeff")
    for before in (b"", "\ufeff".encode()):
        path.write_bytes(before + "日本語 ".encode() + b"ab\xff")
        with pytest.raises(text.TextError, match=f"not UTF-8 at byte {len(before) + 12} "):
            text.read_text(path)
    path.write_bytes("words 日".encode()[:-1])
    with pytest.raises(text.TextError, match="not UTF-8 at byte 6 "):
        text.read_text(path)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_tokens_beyond_the_memory_are_in_a_file(monkeypatch, dtype):
    monkeypatch.setattr("tqcompressor.data.token_spool._IN_MEMORY", 64)
    spool, expected = TokenSpool(np.dtype(dtype)), []
    for count in (0, 5, 100, 1, 3000):
        added = list(range(len(expected), len(expected) + count))
        assert spool[2:-1].tolist() == expected[2:-1]
        spool.append(np.array(added))
        expected += added
        assert len(spool) == len(expected) and spool[:].tolist() == expected
    assert spool[50:60].tolist() == expected[50:60] and spool[5:2].tolist() == []


def test_the_memory_does_not_grow_with_the_file(tmp_path):
    """In bytes for each byte of text, both engines: 120 without pieces."""
    content = " ".join(HELD_OUT.read_text(encoding="utf-8").split()) + " "
    size = 3_000_000
    (tmp_path / "line.txt").write_text(content * math.ceil(size / len(content)))
    printed = run_script(
        """
        import resource, sys
        from pathlib import Path
        from transformers import AutoTokenizer
        from tqcompressor import token_blocks
        from tqcompressor.evaluate.scoring import tokenised
        from tqcompressor.native.model import NativeModel

        model, line, few, folder = sys.argv[1:]
        tokenizer, native = AutoTokenizer.from_pretrained(model), NativeModel.from_pretrained(model)

        def work(text):
            token_blocks(text, tokenizer, 128, cache=folder, workers=2)
            native.calibrate(text, num_samples=1, seq_len=8)
            tokenised(tokenizer, text)

        work(Path(few))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work(Path(line))
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
        """,
        HELD_OUT.parent,
        tmp_path / "line.txt",
        HELD_OUT,
        tmp_path,
    )
    assert int(printed) < 40 * size
