"""Calibration layer by layer: the groups, and moments that follow what was done to the layers before."""

import numpy as np
import pytest
import torch
from helpers.models import tiny_model
from test_calibration import FAMILIES, batches, bert, gpt2, llama, opt, same, state
from tqcompressor import Calibration
from tqcompressor.errors import ConfigError, ShapeError, TextError
from tqcompressor.modules import KroneckerLinear
from tqcompressor.moment_hooks import calibrate
from tqcompressor.moment_sums import units
from tqcompressor.sequential import calibrate_layers, layer_groups


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_hold_every_matrix_once(family):
    model = FAMILIES[family]()
    groups = layer_groups(model, batches()[0])
    matrices = [matrix for group in groups for matrix in group.matrices]
    expected = [name for unit in units(model) if unit.tied_to is None for name, _ in unit.outputs]
    assert sorted(matrices) == sorted(expected) and len(set(matrices)) == len(matrices)
    assert [group.block is None for group in groups[:3]] == [True, False, False]
    for index, group in enumerate(groups[1:3]):
        assert all(f".{index}." in matrix for matrix in group.matrices)
    assert all(group.block is None for group in groups[3:]) and len(groups) <= 4


def test_groups_are_in_the_order_of_the_computation():
    # What projects from the blocks to a narrower embedding is registered before them.
    groups = layer_groups(opt(word_embed_proj_dim=8), batches()[0])
    assert "decoder.project_in" in groups[0].matrices
    assert "decoder.project_out" in groups[3].matrices
    assert layer_groups(llama(), batches()[0])[3].matrices == ("lm_head",)
    assert layer_groups(bert(), batches()[0])[3].matrices == ("pooler.dense",)


def test_blocks_that_run_several_times_end_no_pass():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(9, 4)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

        def forward(self, input_ids):
            x = self.embedding(input_ids)
            for index in (0, 1, 0):
                x = self.blocks[index](x)
            return x

    groups = layer_groups(Twice(), {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    assert [(group.matrices, group.block) for group in groups] == [
        (("embedding",), None),
        (("blocks.0",), None),
        (("blocks.1",), "blocks.1"),
    ]
    with pytest.raises(ConfigError, match="LayerNorm has no linear layer"):
        layer_groups(torch.nn.LayerNorm(3), {})


@pytest.mark.parametrize("sensitivity", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_untouched_layers_have_the_moments_of_the_whole_model(family, sensitivity):
    model = FAMILIES[family]()
    before = state(model)
    moments = {}
    for _, found in calibrate_layers(model, batches(), sensitivity=sensitivity):
        assert not moments.keys() & found.moments.keys()
        moments |= found.moments
        assert found.tokens == 41 and found.sensitivity == sensitivity
        assert state(model)["hooks"] == 0 and state(model)["required"] == before["required"]
    assert same(Calibration(moments, 41), calibrate(FAMILIES[family](), batches(), sensitivity=sensitivity))


@pytest.mark.parametrize("with_original", [False, True])
def test_a_group_sees_what_was_done_to_those_before(with_original):
    model = gpt2()
    original = calibrate(model, batches()) if with_original else None
    for group, found in calibrate_layers(model, batches(), original=original):
        now = calibrate(model, batches())
        for name, moment in found.moments.items():
            expected = now if name.startswith("input.") or original is None else original
            if "wte" in name or "wpe" in name:
                expected = original or now
            assert np.array_equal(moment, expected.moments[name]), name
        assert len(found.moments) == (4 if "wte" in group.matrices else 10)
        assert found.sensitivity
        if group.block is not None:
            damage(model, group)
    if with_original:
        changed = [name for name, moment in original.moments.items() if not np.array_equal(moment, now.moments[name])]
        assert any(name.startswith("input.h.1.") for name in changed)


def damage(model, group):
    """Puts another kind of module, with other values, in the place of a layer."""
    block = model.get_submodule(group.block)
    torch.manual_seed(1)
    block.mlp.c_fc = KroneckerLinear(16, 64, (2, 2), 2)


def test_a_pass_without_gradients_ends_behind_the_block():
    model = gpt2()
    calls = []
    for index, block in enumerate(model.transformer.h):
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    layers = calibrate_layers(model, batches(), original=calibrate(model, batches()))
    for expected in ([], [0, 0], [0, 1, 0, 1]):
        calls.clear()
        next(layers)
        assert calls == expected
    with pytest.raises(StopIteration):
        next(layers)


def test_progress_counts_each_group_once():
    model = tiny_model()
    done = []
    for _ in calibrate_layers(model, batches(), max_memory=1 << 20, progress=lambda *state: done.append(state)):
        pass
    assert done[-1] == (6, 6) and done == sorted(done)
    assert {total for _, total in done} == {6}


def test_leaving_early_leaves_nothing_behind():
    model = gpt2()
    before = state(model)
    layers = calibrate_layers(model, batches())
    next(layers)
    layers.close()
    after = state(model)
    assert (after["hooks"], after["training"], after["required"]) == (0, before["training"], before["required"])


def test_errors_come_before_the_first_group():
    with pytest.raises(TextError, match="there are no batches"):
        calibrate_layers(gpt2(), [])
    other = calibrate(tiny_model(), batches())
    with pytest.raises(ShapeError, match="it is of another model"):
        calibrate_layers(gpt2(), batches(), original=other)
