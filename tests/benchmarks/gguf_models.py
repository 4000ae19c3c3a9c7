"""Checkpoints of GPT-2 and Llama as GGUF files for llama.cpp, in float16 or Q8_0, as its own converter writes them.

Matrices get the file's type, vectors and positions are float32. There is no tokenizer: the benchmark has tokens.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FILES = {"float16": "F16", "Q8_0": "Q8_0"}
ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama"}
CONFIG = "config.json"


def refusal(folder: Path) -> str | None:
    """Why llama.cpp has no such model; None if it has."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config["model_type"] not in ARCHITECTURES:
        return f"no writer for {config['model_type']}"
    return "it has no factored layers" if "quantization_config" in config else None


def write(folder: Path, target: Path) -> None:
    """Makes the folder `target` with the config of the checkpoint and a file for each of `FILES`."""
    from gguf import GGUFWriter, LlamaFileType

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    target.mkdir()
    (target / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    for name, kind in FILES.items():
        writer = GGUFWriter(target / f"{name}.gguf", ARCHITECTURES[config["model_type"]])
        writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
        _add_config(writer, config)
        for tensor, values in _tensors(folder, config):
            _add_tensor(writer, tensor, values, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_config(writer: Any, config: dict[str, Any]) -> None:
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "gpt2":
        width, heads = config["n_embd"], config["n_head"]
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(width)
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * width)
        writer.add_head_count(heads)
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values as llama.cpp has them."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from safetensors.torch import load_file

    gpt2 = config["model_type"] == "gpt2"
    architecture = MODEL_ARCH.GPT2 if gpt2 else MODEL_ARCH.LLAMA
    names = get_tensor_name_map(architecture, config["n_layer" if gpt2 else "num_hidden_layers"])
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            values = tensor.float().numpy()
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue
            if gpt2 and values.ndim == 2 and ".h." in name:
                values = values.T
            if not gpt2 and name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
                # The two halves of a head's rotation become neighbours.
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise SystemExit(f"{name}: llama.cpp has no such tensor")
            yield found, np.ascontiguousarray(values)


def _add_tensor(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    from gguf import GGMLQuantizationType, quants

    if values.ndim == 1 or name.startswith("position_embd") or values.shape[-1] % 32:
        writer.add_tensor(name, values)
    elif kind == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        blocks = quants.quantize(values, GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType.Q8_0)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
