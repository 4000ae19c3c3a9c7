"""Transformer blocks and their calls: found in any family, and repeated outside of the model to the same outputs."""

import pytest
import torch
from helpers.measured import FAMILIES, batches
from tqcompressor.calibration.hooks import run
from tqcompressor.models.blocks import input_of, recorded_calls, transformer_blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_calls_give_the_same_outputs(family):
    model, (batch, _) = FAMILIES[family](), batches()
    blocks = transformer_blocks(model)
    assert [name.rpartition(".")[2] for name in blocks] == ["0", "1"]
    with torch.no_grad():
        with recorded_calls(list(blocks.values())) as calls:
            run(model, batch)
        assert len(calls) == 2
        for block, (before, call, (after,)) in zip(blocks.values(), calls, strict=True):
            assert torch.equal(call.of(block, before), after)
            in_float64 = call.of(block.double(), before.double())
            assert in_float64.dtype == torch.float64
            torch.testing.assert_close(in_float64.float(), after, rtol=1e-4, atol=1e-5)
            block.float()
        first = next(iter(blocks.values()))
        assert torch.equal(input_of(first, lambda: run(model, batch)), calls[0][0])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_the_longest_list_has_the_blocks():
    model = torch.nn.Module()
    model.short = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model.long = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(5)]) for _ in range(3)])
    assert list(transformer_blocks(model)) == ["long.0", "long.1", "long.2"]
    assert transformer_blocks(torch.nn.Linear(2, 2)) == {}
