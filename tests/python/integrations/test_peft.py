"""LoRA on compressed models: attaching, training, saving, loading, and merging where that is right."""

import copy

import pytest
import torch
from helpers.models import CONFIG, agree, first_output, some_ids, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from tqcompressor.compression.model import compress
from tqcompressor.integrations.peft import LoraKroneckerLinear, merge_lora, register_lora
from tqcompressor.modules import FusedLinear, KroneckerLinear
from transformers.pytorch_utils import Conv1D

# Some of each are compressed and some are not.
TARGETS = ["c_attn", "c_fc", "mlp.c_proj"]


def lora_config(**changes):
    return LoraConfig(**{"target_modules": TARGETS, "r": 4, "lora_dropout": 0.0, "fan_in_fan_out": True, **changes})


def compressed_model(**changes):
    model = tiny_model(**changes)
    compress(model, CONFIG)
    return model


def trained(model, steps=3):
    """Trains the adapter a little, and returns the model in evaluation mode."""
    ids = some_ids()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.05)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.fixture
def adapted():
    """A compressed model with a trained adapter, and a copy of it without."""
    base = compressed_model()
    return trained(get_peft_model(copy.deepcopy(base), register_lora(lora_config()))), base


@pytest.mark.filterwarnings("error:Unsupported layer type")
def test_only_the_adapter_learns_and_it_comes_back_from_disk(adapted, tmp_path):
    model, base = adapted
    layers = [module for module in model.modules() if isinstance(module, LoraKroneckerLinear)]
    assert {type(layer.base_layer) for layer in layers} == {KroneckerLinear, FusedLinear}
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    expected = first_output(model, some_ids())
    before = first_output(base, some_ids())
    assert not torch.allclose(expected, before, atol=1e-2)
    with model.disable_adapter():
        assert agree(first_output(model, some_ids()), before)

    model.save_pretrained(tmp_path)
    config = register_lora(LoraConfig.from_pretrained(tmp_path))
    loaded = PeftModel.from_pretrained(base, tmp_path, config=config)
    assert agree(first_output(loaded, some_ids()), expected)


def test_a_compressed_model_is_the_same_after_unloading(adapted):
    model, base = adapted
    unloaded = model.unload()
    assert agree(first_output(unloaded, some_ids()), first_output(base, some_ids()))


def test_merging_is_refused_and_changes_no_output(adapted):
    model, _ = adapted
    expected = first_output(model, some_ids())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="merge_lora"):
            merge()
        assert agree(first_output(model, some_ids()), expected)


def test_merging_into_the_dense_equivalent(adapted):
    model, _ = adapted
    expected = first_output(model, some_ids())
    merged = merge_lora(model)
    assert [type(module) for module in merged.modules()] == [type(module) for module in tiny_model().modules()]
    assert type(merged.transformer.h[1].mlp.c_fc) is Conv1D
    assert torch.allclose(first_output(merged, some_ids()), expected, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_needs_the_dense_weight_is_refused(changes):
    with pytest.raises(ValueError, match=r"use_dora|dense weight"):
        get_peft_model(compressed_model(), register_lora(lora_config(**changes)))


def test_lora_on_every_kind_of_factored_module():
    from helpers.families import family_config, family_model
    from tqcompressor.modules import LowRankLinear, MixedLinear

    model = family_model("llama-tied")
    compress(model, family_config("llama-tied"))
    expected = first_output(model, some_ids())
    targets = ["q_proj", "up_proj"]
    adapted = get_peft_model(model, register_lora(lora_config(target_modules=targets, fan_in_fan_out=False))).eval()
    layers = [module for module in adapted.modules() if isinstance(module, LoraKroneckerLinear)]
    assert {type(layer.base_layer) for layer in layers} == {LowRankLinear, MixedLinear}
    assert agree(first_output(adapted, some_ids()), expected)
    trained(adapted)
    assert not agree(first_output(adapted, some_ids()), expected)


def test_without_the_helper_peft_refuses():
    with pytest.raises(ValueError, match="KroneckerLinear"):
        get_peft_model(compressed_model(), lora_config())


def test_adapters_take_the_device_and_dtype_of_the_factors():
    model = compressed_model().to(torch.bfloat16)
    adapted = get_peft_model(model, register_lora(lora_config()), autocast_adapter_dtype=False)
    layer = adapted.base_model.model.transformer.h[1].mlp.c_fc
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    assert first_output(adapted, some_ids()).dtype == torch.bfloat16
