"""Layers that read one tensor share a sum, recognised as the run goes, and none that does not."""

import numpy as np
import pytest
import torch
import transformers
from helpers.measured import SMALL, batches, bert, built, gpt2, llama
from helpers.models import tiny_model
from torch import nn
from tqcompressor.calibration import sharing
from tqcompressor.calibration.calibrate import calibrate


def neox(**changes):
    """A model whose attention and MLP add to one residual: the gradients at both outputs are one tensor."""
    return built("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**SMALL | {"intermediate_size": 32} | changes))


def t5():
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return built("T5ForConditionalGeneration", config)


def with_labels():
    return [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches(False)]


def albert():
    config = transformers.AlbertConfig(**SMALL | {"intermediate_size": 32, "embedding_size": 8})
    return built("AlbertModel", config)


class _Off(sharing.SharedSums):
    def _beginning(self, key, parts):
        return None


def both(monkeypatch, model, data, **options):
    """A calibration, and one without sharing."""
    found = calibrate(model, data, **options)
    with monkeypatch.context() as patch:
        patch.setattr("tqcompressor.calibration.hooks.SharedSums", _Off)
        return found, calibrate(model, data, **options)


def sharers(calibration, side):
    """The names of moments that are one array, for every array of several."""
    by_array = {}
    for name, moment in calibration.moments.items():
        if name.startswith(side):
            by_array.setdefault(id(moment), []).append(name.removeprefix(f"{side}."))
    return sorted(names for names in by_array.values() if len(names) > 1)


def assert_equal(one, other):
    assert one.moments.keys() == other.moments.keys()
    for name, moment in other.moments.items():
        np.testing.assert_allclose(
            one.moments[name], moment, rtol=0, atol=1e-6 * np.abs(moment).max() + 1e-30, err_msg=name
        )


@pytest.mark.parametrize(
    ("family", "data", "inputs"),
    [
        (llama, batches, ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]),
        (llama, batches, ["mlp.gate_proj", "mlp.up_proj"]),
        (bert, batches, ["attention.self.key", "attention.self.query", "attention.self.value"]),
        (neox, batches, []),
        (albert, batches, ["attention.key", "attention.query", "attention.value"]),
        (lambda: tiny_model(scale_attn_by_inverse_layer_idx=True), batches, []),
    ],
)
def test_layers_that_read_one_tensor_share_a_sum(family, data, inputs, monkeypatch):
    found, alone = both(monkeypatch, family(), data())
    assert_equal(found, alone)
    groups = [[name.split(".", 2)[-1] for name in names] for names in sharers(found, "input")]
    assert not inputs or any(
        all(name.endswith(end) for name, end in zip(names, inputs, strict=False))
        for names in groups
        if len(names) == len(inputs)
    ), groups
    assert sharers(alone, "input") == sharers(alone, "output") == []


def test_every_decoder_layer_shares_what_the_encoder_returns(monkeypatch):
    found, alone = both(monkeypatch, t5(), with_labels())
    assert_equal(found, alone)
    cross = [f"decoder.block.{layer}.layer.1.EncDecAttention.{name}" for layer in (0, 1) for name in "kv"]
    assert cross in sharers(found, "input")


def test_gradients_of_one_residual_are_shared(monkeypatch):
    found, alone = both(monkeypatch, neox(), batches())
    assert_equal(found, alone)
    assert ["layers.1.attention.dense", "layers.1.mlp.dense_4h_to_h"] in sharers(found, "output")


def test_the_sum_of_a_group_is_computed_once(monkeypatch):
    added = []
    add = sharing.Sums.add
    monkeypatch.setattr(
        sharing.Sums, "add", lambda self, x, weights: (added.append(x.shape[-1]), add(self, x, weights))
    )
    calibrate(llama(), batches()[:1], sensitivity=False)
    # A layer: query with key and value, output, gate with up, down; and the head.
    assert sorted(added) == [16] * 7 + [32] * 2


class Odd(nn.Module):
    """A stand-in for a block of a model: `one` and `two` read what `rule` gives them."""

    def __init__(self, rule):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(16, 16) for _ in range(3))
        self.rule, self.calls = rule, 0

    def forward(self, x):
        self.calls += 1
        return self.rule(self, x)


def second_batch_differs(block, x):
    return block.one(x) + block.two(x if block.calls % 2 else x * 2) + block.three(x)


def changed_in_place(block, x):
    x = x.clone()
    first = block.one(x)
    return first + block.two(x.mul_(2)) + block.three(x)


def read_twice(block, x):
    return block.one(block.one(x)) + block.two(x) + block.three(x * 1)


def read_twice_by_one(block, x):
    return block.one(x) + block.two(x) + block.one(x)


def other_view(block, x):
    return (
        block.one(x[..., :8].repeat(1, 1, 2))
        + block.two(x.view(x.shape))
        + block.three(x.transpose(0, 1)).transpose(0, 1)
    )


def skipped(block, x):
    return block.one(x) + block.two(x) if block.calls % 2 else block.one(x)


def reused_memory(block, x):
    # A freed input, and another at its address.
    total = x
    for layer in (block.one, block.two, block.three):
        total = total + layer(x * (1 + total.numel() % 7) + total.mean())
    return total


@pytest.mark.parametrize(
    "rule",
    [second_batch_differs, changed_in_place, read_twice, read_twice_by_one, other_view, skipped, reused_memory],
)
@pytest.mark.parametrize("sensitivity", [False, True])
def test_layers_that_only_sometimes_read_one_tensor_have_their_own(rule, sensitivity, monkeypatch):
    def model():
        found = gpt2()
        torch.manual_seed(0)
        found.transformer.h[0].mlp = Odd(rule)
        return found

    data = [*batches(False), *batches(False, 1)]
    # A pass that is begun again must not change what an odd call is.
    found, alone = (calibrate_fresh(model(), data, off, sensitivity, monkeypatch) for off in (False, True))
    assert_equal(found, alone)


def calibrate_fresh(model, data, off, sensitivity, monkeypatch):
    block = model.transformer.h[0].mlp
    with monkeypatch.context() as patch:
        if off:
            patch.setattr("tqcompressor.calibration.hooks.SharedSums", _Off)
        # The text begins again where layers turn out to differ.
        seen = []
        model.register_forward_pre_hook(
            lambda _module, _args, kwargs: setattr(block, "calls", position(kwargs["input_ids"], data, seen)),
            with_kwargs=True,
        )
        return calibrate(model, data, sensitivity=sensitivity)


def position(ids, data, seen):
    return next(index for index, batch in enumerate(data) if torch.equal(batch["input_ids"], ids))


def test_only_the_layers_that_differ_stop_sharing():
    model = llama()
    model.model.layers[0].mlp = Odd(second_batch_differs)
    calls = []
    found = calibrate(
        model, [*batches(), *batches(seed=1)], sensitivity=False, progress=lambda *at: calls.append(at[0])
    )
    assert calls == [1, 1, 2, 3, 4]
    assert [names[0] for names in sharers(found, "input")] == [
        "layers.0.self_attn.k_proj",
        "layers.1.mlp.gate_proj",
        "layers.1.self_attn.k_proj",
    ]
