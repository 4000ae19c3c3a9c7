"""Compressed checkpoints in transformers: saved again, made while loading, made dense, and damaged.

Numbers in names are those of the pitfalls that a naive integration falls into.
"""

import hashlib
import json
import shutil
import warnings

import pytest
import torch
import transformers
from helpers.models import CONFIG, agree, first_output, some_ids
from helpers.processes import run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqcompressor import TQConfig
from tqcompressor.errors import CheckpointError, ConfigError
from transformers import AutoModel, AutoModelForCausalLM


def digest(directory):
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_saving_round_trips_bit_for_bit_in_one_file_or_many(checkpoints, tmp_path):
    """Pitfalls 2 (tied head), 3 (buffers), 8 (metadata)."""
    for name in ("compressed", "untied", "base"):
        model = (AutoModel if name == "base" else AutoModelForCausalLM).from_pretrained(checkpoints / name)
        model.save_pretrained(tmp_path / name)
        assert digest(tmp_path / name) == digest(checkpoints / name), name
        configs = [(parent / name / "config.json").read_text() for parent in (checkpoints, tmp_path)]
        assert configs[0] == configs[1], name
    with safe_open(checkpoints / "compressed/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
        assert file.get_tensor("transformer.wte.weight").tolist() == [0]
    assert not any(key.startswith("lm_head") for key in shapes)
    assert [key for key, shape in shapes.items() if shape == (1,)] == ["transformer.wte.weight"]
    assert not any(104 in shape for key, shape in shapes.items() if not key.endswith("_permutation"))

    model = AutoModelForCausalLM.from_pretrained(checkpoints / "compressed")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert agree(first_output(model, some_ids()), torch.load(checkpoints / "compressed.pt"))
    model.save_pretrained(tmp_path / "whole")
    assert digest(tmp_path / "whole") == digest(checkpoints / "compressed")


def test_dequantize_gives_a_stock_model_that_needs_no_package(checkpoints, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(checkpoints / "compressed").dequantize()
    dense.save_pretrained(tmp_path / "stock")
    half = AutoModelForCausalLM.from_pretrained(checkpoints / "untied").dequantize(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half")
    assert half.lm_head.weight is not half.transformer.wte.weight
    run_script(
        """
import sys, torch, json, pathlib, transformers
directory, out = sys.argv[1:]
model, info = transformers.AutoModelForCausalLM.from_pretrained(f"{out}/stock", output_loading_info=True)
assert not any(info.values()) and "tqcompressor" not in sys.modules
assert "quantization_config" not in json.loads(pathlib.Path(out, "stock", "config.json").read_text())
stock = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/dense")
assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
ids = torch.randint(1, 104, (2, 9), generator=torch.Generator().manual_seed(0))
logits = torch.load(f"{directory}/compressed.pt")
assert torch.allclose(model(ids).logits, logits, atol=1e-4 * logits.abs().max())
half = transformers.AutoModelForCausalLM.from_pretrained(f"{out}/half")
assert half.dtype == torch.bfloat16
logits = torch.load(f"{directory}/untied.pt")
assert (half(ids).logits - logits).abs().max() < 0.1 * logits.abs().max()
""",
        checkpoints,
        tmp_path,
        warm="transformers",
    )


def test_compressing_while_loading(checkpoints, tmp_path):
    for config in (CONFIG, CONFIG.to_dict()):
        model = AutoModelForCausalLM.from_pretrained(checkpoints / "dense", quantization_config=config)
        assert agree(first_output(model, some_ids()), torch.load(checkpoints / "compressed.pt"))
    model.save_pretrained(tmp_path / "saved")
    assert digest(tmp_path / "saved") == digest(checkpoints / "compressed")
    assert model.half().dequantize().dtype == torch.float16
    # A config for a checkpoint that already has one is ignored, with a warning.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AutoModelForCausalLM.from_pretrained(checkpoints / "compressed", quantization_config=CONFIG)
    assert any("already has a `quantization_config`" in str(warning.message) for warning in caught)
    assert agree(first_output(model, some_ids()), torch.load(checkpoints / "compressed.pt"))
    unknown = TQConfig({"nothing": {"block": [1, 4], "rank": 1}})
    with pytest.raises(ConfigError, match="nothing"):
        AutoModelForCausalLM.from_pretrained(checkpoints / "dense", quantization_config=unknown)
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match='"wte" matches no matrix'):
        AutoModelForCausalLM.from_pretrained(tmp_path / "llama", quantization_config=CONFIG)


def test_5_checkpoints_that_are_not_what_their_config_says(checkpoints, tmp_path):
    """Missing factors, factors of other shapes, extra factors, indices that are not permutations, newer formats."""

    def altered(change_tensors=lambda tensors: None, change_config=lambda config: None):
        target = tmp_path / "altered"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(checkpoints / "compressed", target)
        tensors = load_file(target / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        config = json.loads((target / "config.json").read_text())
        change_config(config)
        (target / "config.json").write_text(json.dumps(config))
        return target

    def refused(error_type, *words, load=lambda target: AutoModelForCausalLM.from_pretrained(target), **changes):
        with pytest.raises(error_type) as caught:
            load(altered(**changes))
        assert all(word in str(caught.value) for word in words), caught.value

    def without_headers(target):
        config, tensors = transformers.AutoConfig.from_pretrained(target), load_file(target / "model.safetensors")
        return transformers.GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=tensors)

    for name in (
        "wte.A",
        "wte.input_permutation",
        "h.0.attn.c_attn.k.B",
        "h.1.mlp.c_fc.output_permutation",
        "h.1.mlp.c_fc.bias",
    ):

        def drop(tensors, name=name):
            tensors.pop(f"transformer.{name}")

        refused(CheckpointError, name, "missing", change_tensors=drop)
        refused(CheckpointError, name, "missing", load=without_headers, change_tensors=drop)
    # A missing guard is no error.
    altered(change_tensors=lambda tensors: tensors.pop("transformer.wte.weight"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "altered")

    def lies(error_type, *words, change):
        refused(error_type, *words, change_config=lambda config: change(config["quantization_config"]["specs"]))

    lies(CheckpointError, "h.1.mlp.c_fc", "is not in quantization_config", change=lambda s: s.pop("h.1.mlp.c_fc"))
    lies(CheckpointError, "h.0.mlp.c_fc.A", "missing", change=lambda s: s.update({"h.0.mlp.c_fc": s["h.1.mlp.c_fc"]}))
    lies(CheckpointError, "h.1.mlp.c_fc.A", "shape", change=lambda s: s["h.1.mlp.c_fc"].update(rank=3))
    lies(CheckpointError, "wte.A", "shape", change=lambda s: s["wte"].update(block=[4, 2]))
    lies(ConfigError, "h.7.mlp.c_fc", change=lambda s: s.update({"h.7.mlp.c_fc": s["h.1.mlp.c_fc"]}))
    lies(ConfigError, "h.*.mlp.c_fc", "patterns", change=lambda s: s.update({"h.*.mlp.c_fc": s["wte"]}))
    lies(ConfigError, "c_attn", "all or none", change=lambda s: s.pop("h.0.attn.c_attn.q"))
    for key, value, message in [("format_version", 5, "newer tqcompressor (format 5)"), ("blok", 2, "blok")]:
        newer = {key: value}
        refused(
            ConfigError, message, change_config=lambda config, newer=newer: config["quantization_config"].update(newer)
        )
    for values in (0, 1000):
        refused(
            CheckpointError,
            "wte.input_permutation",
            "not a permutation",
            change_tensors=lambda tensors, values=values: tensors["transformer.wte.input_permutation"].fill_(values),
        )
