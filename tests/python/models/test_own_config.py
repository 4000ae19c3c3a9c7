"""Models that share a config object: compressing one of them changes no other."""

import pytest
import torch
import transformers
from helpers.architectures import architecture
from tqcompressor.compression.model import compress, recompress
from transformers import PreTrainedConfig


def _clip():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 120, "max_position_embeddings": 16}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


MODELS = {
    name: lambda name=name: architecture(name)[0]
    for name in ("GPT2LMHeadModel", "BertForMaskedLM", "ViTForImageClassification", "BartForConditionalGeneration")
} | {"CLIPModel": _clip}


def _configs(model):
    """Every config that the model or a part of it refers to."""
    values = [value for module in model.modules() for value in vars(module).values()]
    configs = [value for value in values if isinstance(value, PreTrainedConfig)]
    return {
        id(part)
        for config in configs
        for part in (config, *vars(config).values())
        if isinstance(part, PreTrainedConfig)
    }


@pytest.mark.filterwarnings("error:.*untested")
@pytest.mark.parametrize("name", MODELS)
def test_compressing_one_model_changes_no_other(name, tmp_path):
    teacher = MODELS[name]()
    student = type(teacher)(teacher.config)
    student.load_state_dict(teacher.state_dict())
    described, generation = teacher.config.to_dict(), student.generation_config if student.can_generate() else None
    compress(
        student,
        budget=0.9,
        effort="fast",
        progress=False,
        matrices=["*h.*" if name == "GPT2LMHeadModel" else "*layer*"],
    )
    assert teacher.config.to_dict() == described
    assert not _configs(student) & _configs(teacher)
    # A part has the part of the config that it had.
    assert student.base_model.config.to_dict() == student.config.to_dict() or name == "CLIPModel"
    if name == "CLIPModel":
        assert student.text_model.config is student.config.text_config
    if generation is not None:
        assert student.generation_config is generation
    teacher.save_pretrained(tmp_path / "teacher")
    again = type(teacher).from_pretrained(tmp_path / "teacher").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in teacher.state_dict().items())
    student.save_pretrained(tmp_path / "student")
    assert type(teacher).from_pretrained(tmp_path / "student").config.quantization_config is not None


def test_compressing_again_and_back_changes_no_other_either():
    teacher = architecture("GPT2LMHeadModel")[0]
    student = transformers.GPT2LMHeadModel(teacher.config)
    compress(student, budget=0.8, effort="fast", progress=False)
    specs = student.config.quantization_config.specs
    twin = transformers.GPT2LMHeadModel(student.config)
    recompress(student, {"specs": {name: spec.to_dict() for name, spec in list(specs.items())[:1]}, "effort": "fast"})
    student.dequantize()
    assert not hasattr(student.config, "quantization_config") and not hasattr(teacher.config, "quantization_config")
    assert twin.config.quantization_config.specs == specs
