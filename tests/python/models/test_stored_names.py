"""Names of tensors in compressed checkpoints, for families whose tensors transformers renames, merges or splits."""

import re

import pytest
import torch
import transformers
from helpers.architectures import all_outputs, architecture
from helpers.models import agree
from safetensors.torch import load_file, save_file
from tqcompressor.compression.model import compress
from tqcompressor.errors import CheckpointError
from tqcompressor.models.matrices import bare_name, compressed_modules, factor_parameters

RENAMED = [
    "GPTNeoXForCausalLM",
    "ViTForImageClassification",
    "SwinForImageClassification",
    "Dinov2ForImageClassification",
    "MixtralForCausalLM",
]
MERGED = ["NomicBertModel", "Phi3ForCausalLM"]


def _compressed(name):
    model, inputs, patterns = architecture(name)
    compress(model, budget=0.85, effort="fast", progress=False, matrices=patterns)
    return model, inputs


def _is_loaded(name, folder, model, inputs, **options):
    loaded, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    pairs = zip(all_outputs(loaded, inputs), all_outputs(model, inputs), strict=True)
    return all(agree(output, expected) for output, expected in pairs)


@pytest.mark.parametrize("name", [*RENAMED, *MERGED])
def test_tensors_keep_the_models_names_and_a_missing_one_is_refused(name, tmp_path):
    model, inputs = _compressed(name)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    module, _ = next(compressed_modules(model))
    tied = model.all_tied_weights_keys.keys()
    assert tensors.keys() - {f"{module}.weight"} == model.state_dict().keys() - tied
    assert _is_loaded(name, tmp_path, model, inputs)
    factor = next(key for key in tensors if key.startswith(f"{module}.") and not key.endswith(".weight"))
    del tensors[factor]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(f"{bare_name(model, factor)} is missing")):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", RENAMED)
def test_older_names_and_those_of_the_caller_are_read_too(name, tmp_path):
    model, inputs = _compressed(name)
    # As 0.1.0 saved: under the names of the family's first checkpoints.
    conversions, model._weight_conversions = model._weight_conversions, None
    model.save_pretrained(tmp_path / "older")
    model._weight_conversions = conversions
    stored = load_file(tmp_path / "older" / "model.safetensors")
    assert not stored.keys() <= model.state_dict().keys()
    assert _is_loaded(name, tmp_path / "older", model, inputs)

    model.save_pretrained(tmp_path / "mapped")
    file = tmp_path / "mapped" / "model.safetensors"
    save_file({f"wrapped.{key}": tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert _is_loaded(name, tmp_path / "mapped", model, inputs, key_mapping={r"^wrapped\.": ""})
    with pytest.raises(CheckpointError, match="is missing"):
        type(model).from_pretrained(tmp_path / "mapped")


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("GPTNeoXForCausalLM", "GPTNeoXModel"),
        ("ViTForImageClassification", "ViTModel"),
        ("SwinForImageClassification", "SwinModel"),
    ],
)
def test_a_base_model_is_loaded_from_a_checkpoint_with_a_head_and_back(name, base, tmp_path):
    model, _ = _compressed(name)
    model.save_pretrained(tmp_path / "head")
    body = getattr(transformers, base).from_pretrained(tmp_path / "head")
    expected = {key: tensor for key, tensor in model.base_model.state_dict().items()}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in body.state_dict().items() if key in expected)
    body.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base").base_model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.items() if key in expected)


@pytest.mark.parametrize("name", [*RENAMED, *MERGED])
def test_a_dense_model_again_is_saved_as_the_family_is(name, tmp_path):
    dense, inputs, _ = architecture(name)
    dense.save_pretrained(tmp_path / "stock")
    loaded = type(dense).from_pretrained(tmp_path / "stock")
    for number, model in enumerate((dense, loaded)):
        before = getattr(model, "_weight_conversions", None)
        compress(model, budget=0.85, effort="fast", progress=False)
        model.dequantize()
        assert getattr(model, "_weight_conversions", None) is before
        model.save_pretrained(tmp_path / str(number))
        names = load_file(tmp_path / str(number) / "model.safetensors").keys()
        assert names == load_file(tmp_path / "stock" / "model.safetensors").keys()
        assert _is_loaded(name, tmp_path / str(number), model, inputs)


def test_a_tensor_of_one_name_and_two_layouts_is_not_converted_twice(tmp_path):
    """The experts of this family have the same name in its checkpoints, transposed."""
    text = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 24}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    more = {"num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    patches = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0], "patch_size": 4}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**text, **heads, **rope, **more}, vision_config={**vision, **patches}, tie_word_embeddings=False
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    compress(model, budget=0.9, effort="fast", progress=False)
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    model.save_pretrained(tmp_path / "own")
    assert _is_loaded(type(model).__name__, tmp_path / "own", model, inputs)
    model._weight_conversions = None
    model.save_pretrained(tmp_path / "older")
    assert _is_loaded(type(model).__name__, tmp_path / "older", model, inputs)


def test_factors_are_told_from_parameters_of_the_same_names(tmp_path):
    """Doge's attention has a parameter "A"."""
    model, inputs = _compressed("DogeForCausalLM")
    model.save_pretrained(tmp_path)
    assert "model.layers.0.self_attn.A" in model.state_dict()
    assert _is_loaded("DogeForCausalLM", tmp_path, model, inputs)
    assert all(
        factor is not model.model.layers[0].self_attn.A
        for _, module in compressed_modules(model)
        for factor in factor_parameters(module)
    )
