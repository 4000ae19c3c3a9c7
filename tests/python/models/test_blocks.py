"""Transformer blocks and their calls: found in any family, and repeated outside of the model to the same outputs."""

import pytest
import torch
from helpers.measured import FAMILIES, batches
from tqcompressor.calibration.hooks import run
from tqcompressor.models.blocks import input_of, passing, recorded_calls, transformer_blocks


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same_from_the_hidden_states_behind_its_last_block(family):
    model, (batch, _) = FAMILIES[family](), batches()
    blocks = list(transformer_blocks(model).values())
    with torch.no_grad():
        with recorded_calls(blocks) as calls:
            wanted = run(model, batch)
        of = [call for _, call, _ in calls]
        before = blocks[0].forward
        with passing(blocks, of, calls[-1][2][0]):
            found = run(model, batch)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted if torch.is_tensor(wanted[name]))
        with recorded_calls(blocks) as again, passing(blocks, of):
            run(model, batch)
        first = calls[0][0]
        assert all(torch.equal(before, first) and torch.equal(after, first) for before, _, (after,) in again)
        assert [set(call.keywords) for _, call, _ in again] == [set(call.keywords) for call in of]
        with passing(blocks, of, torch.zeros_like(calls[-1][2][0])):
            assert not torch.equal(run(model, batch)[0], wanted[0])
        assert all("forward" not in vars(block) for block in blocks)
        assert torch.equal(run(model, batch)[0], wanted[0])
        blocks[0].forward = before
        with pytest.raises(KeyboardInterrupt), passing(blocks, of, calls[-1][2][0]):
            raise KeyboardInterrupt
        assert blocks[0].forward is before


def test_the_form_of_an_output_is_kept():
    blocks = torch.nn.ModuleList([Paired() for _ in range(2)])
    hidden = torch.ones(2)
    with recorded_calls(list(blocks)) as calls:
        for block in blocks:
            hidden, extra = block(hidden, 3)
    assert torch.equal(hidden, torch.full((2,), 3.0)) and extra == 3
    with passing(blocks, [call for _, call, _ in calls], torch.zeros(2)):
        hidden, extra = blocks[1](hidden, 4)
    assert torch.equal(hidden, torch.zeros(2)) and extra == 3


class Paired(torch.nn.Module):
    """A block that returns more than hidden states."""

    def forward(self, hidden, other):
        return hidden + 1, other


def test_the_longest_list_has_the_blocks():
    model = torch.nn.Module()
    model.short = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model.long = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(5)]) for _ in range(3)])
    assert list(transformer_blocks(model)) == ["long.0", "long.1", "long.2"]
    assert transformer_blocks(torch.nn.Linear(2, 2)) == {}
