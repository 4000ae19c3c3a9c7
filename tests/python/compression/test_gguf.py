"""Expanded checkpoints leave for llama.cpp: to GGUF under its names of tensors, and back by transformers."""

import numpy as np
import pytest
import torch
import transformers
from helpers.families import family_config, family_model
from safetensors.torch import load_file
from tqcompressor import KroneckerSpec, LowRankSpec, TQConfig, compress, expand_checkpoint

gguf = pytest.importorskip("gguf", reason="gguf, of the dev extra, is not installed")

TIED_BY_FACTORS = TQConfig({"wte": KroneckerSpec((1, 4), 2, "columns"), "h.*.mlp.*": LowRankSpec(6)}, effort="fast")
# Name: (family, config, class of llama.cpp's names).
MODELS = {
    "gpt2": ("gpt2", family_config("gpt2"), gguf.MODEL_ARCH.GPT2),
    "gpt2, Kronecker": ("gpt2", TIED_BY_FACTORS, gguf.MODEL_ARCH.GPT2),
    "llama-untied": ("llama-untied", family_config("llama-untied"), gguf.MODEL_ARCH.LLAMA),
    "llama-tied": ("llama-tied", family_config("llama-tied"), gguf.MODEL_ARCH.LLAMA),
}


def as_llama_cpp(name, tensor, config):
    """The layout of a tensor in GGUF: GPT-2's maps are out × in there, and the rotated pairs of Llama lie together."""
    if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)
    return tensor


def write_gguf(path, tensors, config, kind):
    """Writes tensors of transformers as GGUF; returns what was written, by llama.cpp's names."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if kind == gguf.MODEL_ARCH.GPT2:
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    written = {}
    for name, tensor in tensors.items():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert place is not None, name
        written[place] = as_llama_cpp(name, tensor, config).contiguous().numpy()
        writer.add_tensor(place, written[place])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.mark.parametrize("name", MODELS)
def test_an_expanded_checkpoint_goes_to_gguf_and_back(name, tmp_path):
    family, config, kind = MODELS[name]
    model = family_model(family)
    compress(model, config, progress=False)
    model.save_pretrained(tmp_path / "compressed")
    expand_checkpoint(tmp_path / "compressed", tmp_path / "dense", progress=False)
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    written = write_gguf(tmp_path / "model.gguf", tensors, model.config, kind)

    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert read.keys() == written.keys()
    for place, values in written.items():
        assert np.array_equal(read[place], values), place

    ids = torch.arange(2 * 9).reshape(2, 9) * 5 % 104
    # The file has no tokenizer, from which transformers takes the size of the vocabulary.
    shape = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    back = type(model).from_pretrained(tmp_path, gguf_file="model.gguf", config=shape, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.allclose(back(ids).logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
