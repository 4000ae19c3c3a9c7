"""Checkpoints of every kind that the native runtime reads, and the models of transformers beside them."""

from pathlib import Path

import numpy as np
import torch
import transformers
from tqcompressor import GroupedSpec, KroneckerSpec, LowRankSpec, MixedSpec, TQConfig, compress_checkpoint

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
TEXT = (TINY / "heldout.txt").read_text(encoding="utf-8")

# Of several lengths, for a vocabulary of about a hundred.
PROMPTS = [[5, 6, 7], [8], [*range(20, 37)]]

_MIXED = MixedSpec((LowRankSpec(5), KroneckerSpec((2, 4), 2), KroneckerSpec((16, 8), 2, "rows")))
# For width 32 and a vocabulary of 104; the factors of small and of large blocks are contracted in different orders.
SPECS = {
    "small blocks": {
        "wte": KroneckerSpec((2, 4), 3),
        "h.*.mlp.c_fc": KroneckerSpec((4, 2), 3),
        "h.*.mlp.c_proj": KroneckerSpec((2, 4), 3, "none"),
        "h.*.attn.c_attn.*": KroneckerSpec((2, 2), 2, "rows"),
        "h.*.attn.c_proj": KroneckerSpec((1, 4), 2, "columns"),
    },
    "large blocks": {
        "wte": KroneckerSpec((52, 8), 3),
        "wpe": KroneckerSpec((8, 16), 3),
        "h.*.mlp.c_fc": KroneckerSpec((16, 32), 3),
        "h.*.mlp.c_proj": KroneckerSpec((64, 8), 2),
        "h.*.attn.c_attn.*": KroneckerSpec((8, 16), 2, "columns"),
        "h.*.attn.c_proj": KroneckerSpec((32, 2), 2),
    },
    "low rank": {
        "wte": LowRankSpec(20),
        "wpe": LowRankSpec(9),
        "h.*.mlp.c_fc": LowRankSpec(12),
        "h.*.mlp.c_proj": LowRankSpec(13),
        "h.*.attn.c_attn.*": LowRankSpec(15),
        "h.*.attn.c_proj": LowRankSpec(11),
    },
    "groups": {"wte": GroupedSpec(((40, 20), (64, 7))), "h.*.mlp.c_proj": LowRankSpec(13)},
    "mixed": {
        "wte": MixedSpec((LowRankSpec(4), KroneckerSpec((2, 4), 1))),
        "h.0.mlp.*": _MIXED,
        "h.1.attn.c_attn.*": _MIXED,
        "h.1.attn.c_proj": _MIXED,
    },
}
# For a head of its own.
HEAD_SPECS = {"lm_head": LowRankSpec(20), "wte": KroneckerSpec((4, 4), 2)}

# For width 32, 4 query heads of 8 values, 2 heads of keys and values, 48 hidden units and a vocabulary of 104.
LLAMA_SPECS = {
    "small blocks": {
        "embed_tokens": KroneckerSpec((2, 4), 3),
        "layers.*.mlp.*_proj": KroneckerSpec((4, 2), 3),
        "layers.*.self_attn.[qko]_proj": KroneckerSpec((2, 2), 2, "rows"),
        "layers.*.self_attn.v_proj": KroneckerSpec((1, 4), 2, "columns"),
    },
    "large blocks": {
        "embed_tokens": KroneckerSpec((52, 8), 3),
        "layers.*.mlp.gate_proj": KroneckerSpec((16, 24), 3),
        "layers.*.mlp.down_proj": KroneckerSpec((12, 16), 2),
        "layers.*.self_attn.?_proj": KroneckerSpec((16, 8), 2, "columns"),
    },
    "low rank": {
        "embed_tokens": LowRankSpec(20),
        "layers.*.mlp.*": LowRankSpec(13),
        "layers.*.self_attn.*": LowRankSpec(11),
    },
    "up alone": {"layers.*.mlp.up_proj": LowRankSpec(9), "layers.1.self_attn.k_proj": LowRankSpec(5)},
    "groups": {"embed_tokens": GroupedSpec(((40, 20), (64, 7))), "layers.*.mlp.down_proj": LowRankSpec(13)},
    "mixed": {
        "embed_tokens": MixedSpec((LowRankSpec(4), KroneckerSpec((2, 4), 1))),
        "layers.0.mlp.*": _MIXED,
        "layers.1.self_attn.*": _MIXED,
    },
}


def compressed(model, specs, folder):
    """Saves a model as it is and with each of the specs: `{name: folder}`."""
    model.save_pretrained(folder / "dense")
    found = {"dense": folder / "dense"}
    for name, each in specs.items():
        found[name] = folder / name
        compress_checkpoint(folder / "dense", found[name], TQConfig(each, effort="fast"), progress=False)
    return found


def largest_difference(ours, expected):
    """The largest difference relative to the largest logit."""
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def torch_logits(model, tokens):
    """The logits of a model of transformers for one sequence."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def reference(folder):
    """The model by transformers, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
