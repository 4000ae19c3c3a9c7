"""LoRA on compressed models: attaching, training, saving, loading, and merging where that is right."""

import copy

import pytest
import torch
from helpers.models import CONFIG, agree, first_output, some_ids, tiny_model
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from tqcompressor.compression.model import compress
from tqcompressor.errors import ConfigError
from tqcompressor.integrations.peft import LoraKroneckerLinear, merge_lora, register_lora
from tqcompressor.models.matrices import compressed_modules
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


def factored_targets(model):
    return {name for name, module in model.named_modules() if isinstance(module, LoraKroneckerLinear)}


def assert_merges(adapted, tmp_path, load):
    """An adapter with values computes the same from disk and merged; `load` makes its compressed base again."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.eval()
    expected = first_output(adapted, some_ids())
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path).eval()
    assert factored_targets(loaded) == factored_targets(adapted)
    assert agree(first_output(loaded, some_ids()), expected)
    assert not agree(first_output(load(), some_ids()), expected)
    merged = merge_lora(adapted)
    assert not [name for name, _ in compressed_modules(merged)] and "lora" not in str(merged)
    assert torch.allclose(first_output(merged, some_ids()), expected, atol=1e-4 * expected.abs().max())
    return merged


@pytest.mark.parametrize(
    ("family", "targets", "of"),
    [
        ("gpt2", ["q", "k"], 4),
        ("gpt2", r".*\.c_attn\.v|.*\.mlp\.c_proj|.*\.c_fc", 4),
        ("gpt2", r".*\.c_attn\.k\.terms\.1", 2),
        ("gpt2", "all-linear", 4),
        ("llama-untied", "all-linear", 10),
        ("opt-tied", ["q_proj", "v_proj", "out_proj", "fc2"], 6),
        ("bert-tied", "all-linear", 9),
    ],
)
def test_adapters_on_anything_that_takes_them_are_saved_loaded_and_merged(family, targets, of, tmp_path):
    from helpers.families import family_config, family_model

    def load():
        model = family_model(family)
        compress(model, family_config(family), progress=False)
        return model

    config = LoraConfig(target_modules=targets, r=2, lora_bias=family == "opt-tied")
    adapted = get_peft_model(load(), config)
    assert len(factored_targets(adapted)) == of
    merged = assert_merges(adapted, tmp_path, load)
    assert [type(module) for module in merged.modules()] == [type(module) for module in family_model(family).modules()]
    assert merged.config.to_dict() == family_model(family).config.to_dict()


def test_all_linear_leaves_out_the_heads_as_for_a_dense_model():
    from helpers.families import family_config, family_model

    for family in ("gpt2", "llama-untied", "bert-untied", "opt-tied"):
        dense, model = family_model(family), family_model(family)
        compress(model, family_config(family), progress=False)
        names = [
            {
                name.removesuffix(".base_layer")
                for name, module in get_peft_model(each, LoraConfig(target_modules="all-linear")).named_modules()
                if hasattr(module, "lora_A")
            }
            for each in (dense, model)
        ]
        assert names[0] == names[1] and not any(name.endswith(("lm_head", "decoder")) for name in names[0]), family


def test_a_compressed_classifier_is_left_out_too():
    import transformers
    from helpers.families import LOW_RANK, bert_config
    from tqcompressor.config import TQConfig

    model = transformers.BertForSequenceClassification(bert_config(num_labels=8))
    compress(model, TQConfig({"classifier": LOW_RANK, "*.query": LOW_RANK}), progress=False)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert {name.split(".")[-1] for name in factored_targets(adapted)} == {"query"}


def test_several_adapters_and_dense_layers_merge_together(tmp_path):
    model = get_peft_model(compressed_model(), lora_config(target_modules="all-linear"), adapter_name="one")
    model.add_adapter("two", lora_config(target_modules=["q", "v", "c_fc", "mlp.c_proj"], r=2, lora_alpha=3))
    model.base_model.set_adapter(["one", "two"])
    assert_merges_active(model)


def assert_merges_active(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    expected = first_output(model.eval(), some_ids())
    merged = merge_lora(model)
    assert torch.allclose(first_output(merged, some_ids()), expected, atol=1e-4 * expected.abs().max())


def test_the_methods_of_transformers_take_adapters_too(tmp_path):
    model = compressed_model()
    model.add_adapter(lora_config(target_modules="all-linear"))
    assert factored_targets(model)
    expected = first_output(model, some_ids())
    assert agree(expected, first_output(compressed_model(), some_ids()))
    with pytest.raises(ConfigError, match="expected a PeftModel with a LoRA adapter, got a GPT2LMHeadModel"):
        merge_lora(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["c_fc"], use_dora=True), r"h\.1\.mlp\.c_fc is compressed, and use_dora=True"),
        (LoraConfig(target_modules="all-linear", init_lora_weights="olora"), r"c_attn is compressed, .*'olora'"),
        (LoraConfig(target_modules=["wte", "c_fc"]), r"transformer\.wte is a compressed embedding"),
        (LoraConfig(target_modules=["c_proj", "lm_head"]), "lm_head is a compressed output layer.*target_modules"),
        (LoHaConfig(target_modules=["c_fc"]), r"c_fc is compressed, and LOHA adapters.*use LoRA.*dequantize\(\)"),
        (IA3Config(target_modules=["c_fc"], feedforward_modules=[]), "IA3 adapters"),
    ],
)
def test_a_refusal_names_the_module_and_leaves_the_model_alone(config, message):
    model = compressed_model()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, config)
    assert [type(module) for module in model.modules()] == before


def test_a_bias_without_a_place_is_refused_before_anything_is_merged():
    from helpers.families import family_config, family_model

    model = family_model("llama-untied")
    compress(model, family_config("llama-untied"), progress=False)
    with pytest.warns(UserWarning, match="has no bias"):
        adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], lora_bias=True))
    expected = first_output(adapted, some_ids())
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj.*lora_bias=True"):
        merge_lora(adapted)
    assert agree(first_output(adapted, some_ids()), expected)


def test_a_head_that_is_trained_beside_the_adapter_is_merged(tmp_path):
    import transformers
    from helpers.families import LOW_RANK, bert_config
    from tqcompressor.config import TQConfig

    def load():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(bert_config(num_labels=8)).eval()
        compress(model, TQConfig({"classifier": LOW_RANK, "*.query": LOW_RANK}), progress=False)
        return model

    adapted = get_peft_model(load(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    with torch.no_grad():
        for parameter in adapted.base_model.model.classifier.modules_to_save["default"].parameters():
            parameter.mul_(2)
    assert_merges(adapted, tmp_path, load)


def test_registering_again_does_nothing():
    # The other order of imports is tested beside transformers' registration.
    from peft.tuners.tuners_utils import BaseTuner
    from tqcompressor.integrations import import_hook

    before = BaseTuner.inject_adapter
    import_hook.install()
    assert BaseTuner.inject_adapter is before
    assert not hasattr(before._without_tqcompressor, "_without_tqcompressor")


def test_adapters_take_the_device_and_dtype_of_the_factors():
    model = compressed_model().to(torch.bfloat16)
    adapted = get_peft_model(model, register_lora(lora_config()), autocast_adapter_dtype=False)
    layer = adapted.base_model.model.transformer.h[1].mlp.c_fc
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    assert first_output(adapted, some_ids()).dtype == torch.bfloat16
