"""Causal models of transformers, dense or compressed, as ONNX files with a cache of keys and values, for onnxruntime.

`write` exports the model by `torch.onnx.export` in float32: token ids and the keys and values of all earlier tokens in,
the logits of the last token and all keys and values out, for any number of tokens.
"""

import sys
from pathlib import Path
from typing import Any

FILE = "model.onnx"
CONFIG = "config.json"


def refusal(folder: Path) -> str | None:
    """Why onnxruntime has no such model: it has all that torch loads."""
    return None


def write(folder: Path, target: Path) -> None:
    """Makes the folder `target` with the config of the checkpoint, `FILE` and its weights."""
    import torch
    import tqcompressor  # noqa: F401  registers compressed checkpoints
    from transformers import AutoModelForCausalLM

    # The other implementations of attention choose by the number of tokens, of which an exported graph knows none.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = [torch.zeros(1, heads, 3, width) for _ in range(2 * config.num_hidden_layers)]
    ids = torch.zeros((1, 5), dtype=torch.int64)
    dynamic = torch.export.Dim.DYNAMIC
    target.mkdir()
    torch.onnx.export(
        _step(model).eval(),
        (ids, past),
        target / FILE,
        dynamo=True,
        dynamic_shapes=({1: dynamic}, [{2: dynamic} for _ in past]),
        external_data=True,
        verbose=False,
    )
    (target / CONFIG).write_text((folder / CONFIG).read_text(encoding="utf-8"), encoding="utf-8")


def _step(model: Any) -> Any:
    """The model as a function of tensors alone. torch is imported late, as the engines' process imports this file."""
    import torch
    from transformers import DynamicCache

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
            """`past` has keys and values in turn, `(1, heads, earlier tokens, width)`, as the result's second part."""
            cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            found = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return found.logits, [part for layer in cache.layers for part in (layer.keys, layer.values)]

    return Step()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
