"""The batches of a calibration: blocks of a text, the caller's own, and invalid ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.measured import gpt2
from helpers.models import tiny_model
from helpers.tokenizer import save_tokenizer
from tokenizers import processors
from tqcompressor import Calibration, NativeModel, token_blocks
from tqcompressor.calibration.batches import batches_and_texts, batches_of
from tqcompressor.calibration.calibrate import calibrate
from tqcompressor.data.tokenize import even_shares
from tqcompressor.errors import ConfigError, TextError

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"


def tiny_gpt2():
    return (
        transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(TINY),
    )


def test_blocks_of_a_text_are_drawn_by_the_seed(tmp_path):
    model, tokenizer = tiny_gpt2()
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")[:5000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    whole = token_blocks(tmp_path / "text.txt", tokenizer, 8, cache=tmp_path)
    rows = {tuple(whole[index]["input_ids"].tolist()) for index in range(len(whole))}

    def drawn(source, text=None, **options):
        found = batches_of(model, source, text, **{"num_samples": 20, "seq_len": 8, "seed": 1} | options)
        return [tuple(row.tolist()) for batch in found for row in batch["input_ids"]]

    one = drawn(tokenizer, text)
    assert len(set(one)) == 20 and set(one) <= rows
    assert one == drawn(tokenizer, [text]) == drawn(tokenizer, tmp_path / "text.txt") == drawn(whole)
    assert one != drawn(tokenizer, text, seed=2)
    assert len(set(drawn(whole, num_samples=len(whole)))) == len(rows)
    (longest,) = {len(row) for row in drawn(tokenizer, text, num_samples=2, seq_len=None)}
    assert longest == 128


def test_blocks_have_the_special_tokens_of_an_input(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <|endoftext|>", special_tokens=[("<unk>", 1), ("<|endoftext|>", 0)]
    )
    model = tiny_model()
    (batch,) = batches_of(model, tokenizer, "letters " * 40, num_samples=3, seq_len=7, seed=0)
    ids = batch["input_ids"]
    assert ids.shape == (3, 7) and ids[:, 0].tolist() == [1] * 3 and ids[:, -1].tolist() == [0] * 3
    assert ids[:, 1:-1].min() > 1
    with pytest.raises(ConfigError, match="seq_len: expected 4 to 32"):
        calibrate(model, tokenizer, "letters " * 40, seq_len=3)


def test_errors_of_the_text(tmp_path):
    model, tokenizer = tiny_gpt2()
    for text, options, error, message in (
        ("short", {}, TextError, r"expected 128 sequences of 128 tokens, got a text of \d+ tokens: 0"),
        ("", {}, TextError, "expected 128 sequences"),
        (None, {}, ConfigError, "text: a tokenizer needs a text"),
        ("a" * 999, {"num_samples": 0}, ConfigError, "num_samples: expected an integer from 1 up, got 0"),
        ("a" * 999, {"seq_len": 1}, ConfigError, "seq_len: expected 2 to 128"),
        ("a" * 999, {"seq_len": 129}, ConfigError, "seq_len: expected 2 to 128"),
    ):
        with pytest.raises(error, match=message):
            calibrate(model, tokenizer, text, **options)
    with pytest.raises(ConfigError, match="text: expected tokens below 60, the model's vocab_size, got"):
        calibrate(
            gpt2(), tokenizer, (TINY / "heldout.txt").read_text(encoding="utf-8")[:5000], num_samples=2, seq_len=8
        )


def test_errors_of_batches():
    ids = torch.ones(2, 5, dtype=torch.long)
    for source, error, message in (
        ([], TextError, "there are no batches"),
        (3, ConfigError, "expected a tokenizer, TokenBlocks or batches, got int"),
        ("text", ConfigError, "got str"),
        ([ids, {"attention_mask": ids}], ConfigError, 'batch 1: expected a tensor "input_ids"'),
        ([ids.float()], ConfigError, "batch 0: expected input_ids .* of integers"),
        ([ids[:, :0]], ConfigError, "batch 0: expected input_ids"),
        ([ids, ids * 60], ConfigError, "batch 1: expected tokens below 60, got 60"),
        ([{"input_ids": ids, "attention_mask": ids[:, :3]}], ConfigError, r"expected an attention_mask \(2, 5\)"),
        ([{"input_ids": ids, "attention_mask": 0 * ids}], TextError, "all tokens are padding"),
    ):
        with pytest.raises(error, match=message):
            calibrate(gpt2(), source)


def test_shares_are_even_where_a_text_has_enough():
    for available, wanted, expected in (
        ([100, 100], 8, [4, 4]),
        ([2, 100], 10, [2, 8]),
        ([5, 100, 100], 25, [5, 10, 10]),
        ([0, 5], 3, [0, 3]),
        ([3, 3, 3], 100, [3, 3, 3]),
        ([7], 4, [4]),
    ):
        assert even_shares(available, wanted, 0) == expected
    # More texts than sequences: which ones are read depends on the seed.
    chosen = [even_shares([9] * 50, 5, seed) for seed in (0, 1)]
    assert all(sorted(shares) == [0] * 45 + [1] * 5 for shares in chosen) and chosen[0] != chosen[1]


def test_paths_of_a_list_are_drawn_from_evenly(tmp_path):
    model, tokenizer = tiny_gpt2()
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "long.txt").write_text(text[:60_000], encoding="utf-8")
    (tmp_path / "short.txt").write_text(text[60_000:64_000], encoding="utf-8")
    for number in (1, 2, 3):
        (tmp_path / f"tiny{number}.md").write_text("of so many words", encoding="utf-8")
    long, short, tiny = tmp_path / "long.txt", tmp_path / "short.txt", [tmp_path / f"tiny{n}.md" for n in (1, 2, 3)]

    def read(given, num_samples=20):
        rows, texts = batches_and_texts(model, tokenizer, given, num_samples=num_samples, seq_len=8, seed=1)
        assert sum(len(batch["input_ids"]) for batch in rows) == num_samples
        return texts

    assert read([long, short]) == {"long.txt": 80, "short.txt": 80}
    assert read([long, short, long], 30) == {"long.txt": 160, "short.txt": 80}
    # A pattern is one text, and so are all strings.
    assert read([tmp_path / "*.txt", text[-4000:], text[-5000:-4000]]) == {"*.txt": 80, "text": 80}
    assert read(long) == read([long]) == {"long.txt": 160} and read(text) == {"text": 160}
    few = read([long, *tiny])
    assert few.pop("short texts") in (8, 16) and list(few) == ["long.txt"]
    assert read([tiny[0], *tiny], 1) == {"short texts": 8}
    everything = read([short, long], 1000)
    assert everything["short.txt"] < 0.2 * everything["long.txt"]
    with pytest.raises(
        TextError, match=r"expected 99999 sequences of 8 tokens, got a text of [\d,]+ tokens: \d+\. Give a longer text"
    ):
        read([long, short], 99_999)


def test_a_calibration_says_what_was_read(tmp_path):
    model, tokenizer = tiny_gpt2()
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    for name in ("wiki.txt", "books.txt"):
        (tmp_path / name).write_text(text[:4000], encoding="utf-8")
    texts = [tmp_path / "wiki.txt", tmp_path / "books.txt"]
    options = {"num_samples": 4, "seq_len": 16}
    found = calibrate(model, tokenizer, texts, sensitivity=False, **options)
    native = NativeModel.from_pretrained(TINY).calibrate(texts, **options)
    assert found.texts == native.texts == {"wiki.txt": 32, "books.txt": 32}
    assert "over 64 tokens: 32 of wiki.txt, 32 of books.txt)" in repr(found)
    np.testing.assert_array_equal(found.input("wpe"), native.input("wpe"))
    np.testing.assert_allclose(found.input("wte"), native.input("wte"), rtol=1e-5)
    found.save(tmp_path / "file")
    assert Calibration.load(tmp_path / "file").texts == found.texts
    assert calibrate(model, [torch.ones(1, 4, dtype=torch.long)], sensitivity=False).texts == {}
