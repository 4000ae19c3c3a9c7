"""Checkpoints of every kind that the native runtime reads, and the models of transformers beside them."""

from pathlib import Path

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


def compressed(model, specs, folder):
    """Saves a model as it is and with each of the specs: `{name: folder}`."""
    model.save_pretrained(folder / "dense")
    found = {"dense": folder / "dense"}
    for name, each in specs.items():
        found[name] = folder / name
        compress_checkpoint(folder / "dense", found[name], TQConfig(each, effort="fast"), progress=False)
    return found


def reference(folder):
    """The model by transformers, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
