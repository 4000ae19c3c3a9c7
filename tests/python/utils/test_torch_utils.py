"""Work on several items at a time, each on one of torch's threads."""

import threading

import pytest
import torch
from torch import nn
from tqcompressor.utils.torch_utils import each_alone, replace_modules, take_modes, torch_threads

GIBIBYTE = 1 << 30


@pytest.mark.parametrize("size", [1, GIBIBYTE // 2, GIBIBYTE])
def test_results_are_in_order_and_torch_has_its_threads_again(size):
    with torch_threads(3):
        seen = each_alone(lambda item: (item, torch.get_num_threads()), range(7), size)
        assert torch.get_num_threads() == 3
    # Of a gibibyte each, no two items fit: each has all threads.
    assert seen == [(item, 3 if size == GIBIBYTE else 1) for item in range(7)]


def test_items_are_worked_on_at_the_same_time():
    both = threading.Barrier(2, timeout=60)
    with torch_threads(2):
        assert len(each_alone(lambda item: both.wait(), range(2), 1)) == 2


def test_after_an_error_no_further_item_begins():
    begun = []

    def work(item):
        begun.append(item)
        raise ValueError(item)

    with torch_threads(2), pytest.raises(ValueError, match="0"):
        each_alone(work, range(100), 1)
    assert len(begun) < 100
    assert each_alone(work, [], 1) == []


def test_threads_are_as_before_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ValueError), torch_threads(before + 1):
        raise ValueError
    assert torch.get_num_threads() == before


def test_modules_are_replaced_by_full_name_and_put_back():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)).train()
    before = dict(model.named_modules())
    new = {"0.0": nn.Linear(2, 2).eval(), "1": nn.Identity().eval()}
    old = replace_modules(model, new)
    assert old == {name: before[name] for name in new}
    assert {name: model.get_submodule(name) for name in new} == new
    take_modes(new, old)
    assert all(module.training for module in new.values())
    replace_modules(model, old)
    assert dict(model.named_modules()) == before


def test_an_unknown_name_changes_no_module():
    model = nn.Sequential(nn.Linear(2, 2))
    before = dict(model.named_modules())
    with pytest.raises(AttributeError):
        replace_modules(model, {"0": nn.Identity(), "1": nn.Identity()})
    assert dict(model.named_modules()) == before
