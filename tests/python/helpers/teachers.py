"""A random teacher, text for it, and the predictions that its cache must have by definition."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tqcompressor import token_blocks

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"

# The error bounds that CachedTeacher documents for probabilities above and below e^-32.
RELATIVE, ABSOLUTE = 5e-4, 2e-14


def random_model(**changes):
    """Two narrow layers, 16 positions, dropout, and weights large enough for uneven predictions."""
    torch.manual_seed(0)
    shape = {"vocab_size": 8192, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | changes))


def held_out_blocks(cache):
    """All samples of 16 tokens of the held-out text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    return token_blocks(TINY / "heldout.txt", tokenizer, 16, cache=cache)


def softmax(logits, temperature):
    """The predictions in float64, by definition."""
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def dense(model, tokens, temperature):
    with torch.no_grad():
        return softmax(model.eval()(tokens[None]).logits[0].float().numpy(), temperature)


def check(item, expected, k):
    """Asserts that `item` has the k largest values of every row of `expected` in order, and sums to 1 with the rest."""
    tokens, probabilities = item["teacher_tokens"], item["teacher_probabilities"]
    assert tokens.dtype == torch.int64 and probabilities.dtype == torch.float32
    assert tokens.shape == probabilities.shape == (len(expected), k)
    for row, ids, kept in zip(expected, tokens.numpy(), probabilities.double().numpy(), strict=True):
        assert len(set(ids)) == k
        np.testing.assert_allclose(row[ids], np.sort(row)[::-1][:k], rtol=1e-4, atol=1e-30)
        np.testing.assert_allclose(kept, row[ids], rtol=RELATIVE, atol=ABSOLUTE)
        assert (np.diff(kept) <= 0).all()
        assert math.fsum(kept) <= 1
        rest = math.fsum(np.delete(row, ids))
        assert 1 - math.fsum(kept) == pytest.approx(rest, rel=RELATIVE, abs=2e-7)
