"""The batches of a calibration: blocks of a text, the caller's own, and invalid ones."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers.measured import gpt2
from helpers.models import tiny_model
from helpers.tokenizer import save_tokenizer
from tokenizers import processors
from tqcompressor import token_blocks
from tqcompressor.calibration.batches import batches_of
from tqcompressor.calibration.calibrate import calibrate
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
