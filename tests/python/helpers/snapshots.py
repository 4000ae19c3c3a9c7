"""Snapshots of a model, to check that a call leaves it unchanged."""

import torch


def snapshot(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [type(module) for module in model.modules()], dict(vars(model)), model.config.to_dict()


def assert_untouched(model, before):
    after = snapshot(model)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    for target, source in model.all_tied_weights_keys.items():
        assert model.get_parameter(target) is model.get_parameter(source)
