"""Checkpoints of every family with a description: on disk and live, the same matrices and the same factors."""

import pytest
import torch
import tqcompressor
import transformers as tf
from tqcompressor import _core
from tqcompressor.models.stock import weight_tensors

_SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "vocab_size": 120,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_T5 = {
    "vocab_size": 120,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_OPT = {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 24}
_NEO = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_DISTIL = {"vocab_size": 120, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

# Name: (class, config).
FAMILIES = {
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(**_GPT)),
    "gpt2, two labels": (tf.GPT2ForSequenceClassification, tf.GPT2Config(**_GPT, pad_token_id=0)),
    "openai-gpt": (tf.OpenAIGPTLMHeadModel, tf.OpenAIGPTConfig(**_GPT)),
    "gpt_neo": (tf.GPTNeoForCausalLM, tf.GPTNeoConfig(**_NEO)),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**_SIZES)),
    "opt": (tf.OPTForCausalLM, tf.OPTConfig(**_OPT)),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**_GROUPED)),
    "llama, tied": (tf.LlamaForCausalLM, tf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "llama, no head": (tf.LlamaModel, tf.LlamaConfig(**_GROUPED)),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**_GROUPED)),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**_SIZES, num_key_value_heads=2)),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**_GROUPED)),
    "gemma": (tf.GemmaForCausalLM, tf.GemmaConfig(**_GROUPED)),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config(**_GROUPED)),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**_GROUPED)),
    "phi": (tf.PhiForCausalLM, tf.PhiConfig(**_SIZES)),
    "smollm3": (tf.SmolLM3ForCausalLM, tf.SmolLM3Config(**_SIZES, num_key_value_heads=2)),
    "bert": (tf.BertForMaskedLM, tf.BertConfig(**_SIZES)),
    "bert, no head": (tf.BertModel, tf.BertConfig(**_SIZES)),
    "bert, two labels": (tf.BertForSequenceClassification, tf.BertConfig(**_SIZES)),
    "roberta": (tf.RobertaForMaskedLM, tf.RobertaConfig(**_SIZES)),
    "roberta, two labels": (tf.RobertaForSequenceClassification, tf.RobertaConfig(**_SIZES)),
    "xlm-roberta": (tf.XLMRobertaForMaskedLM, tf.XLMRobertaConfig(**_SIZES)),
    "distilbert": (tf.DistilBertForMaskedLM, tf.DistilBertConfig(**_DISTIL)),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config(**_T5)),
    "t5, gated and untied": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "t5, encoder": (tf.T5EncoderModel, tf.T5Config(**_T5)),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig(**_VIT)),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def model_of(name):
    kind, config = FAMILIES[name]
    torch.manual_seed(0)
    return kind(config).eval()


def output(model):
    ids = torch.arange(3, 12)[None]
    if isinstance(model, tf.ViTForImageClassification):
        images = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
        return model(pixel_values=images)[0]
    extra = {"decoder_input_ids": ids[:, :4]} if isinstance(model, tf.T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra)[0]


@every_family
def test_the_matrices_on_disk_are_those_of_the_live_model(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path)
    live = [(bare.removesuffix(".weight"), shape, kind) for _, bare, shape, kind in weight_tensors(model)]
    checkpoint = _core.Checkpoint.open(str(tmp_path))
    found = {}
    for matrix in checkpoint.list_matrices(None):
        found.setdefault(matrix.module, []).append(matrix)
    assert found.keys() == {module for module, _, _ in live}
    for module, shape, kind in live:
        parts = found[module]
        assert {part.kind for part in parts} == {kind}
        rows, columns = (shape[1], shape[0]) if kind == "linear" else shape
        assert (parts[0].shape[0], sum(part.shape[1] for part in parts)) == (rows, columns)
    assert checkpoint.parameters == model.num_parameters()


@every_family
def test_the_factors_on_disk_are_those_of_the_live_model(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path / "dense")
    live = tqcompressor.compress(model, budget=0.7, progress=False)
    disk = tqcompressor.compress_checkpoint(tmp_path / "dense", tmp_path / "small", budget=0.7, progress=False)
    assert disk.parameters_after == live.parameters_after == model.num_parameters()
    specs = [{matrix.name: matrix.spec for matrix in report.matrices} for report in (disk, live)]
    assert specs[0] == specs[1]
    loaded, info = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert torch.equal(output(loaded.eval()), output(model))
