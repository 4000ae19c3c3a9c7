"""Tiny random GPT-2 models and configs for the tests that need torch and transformers."""

import torch
import transformers
from tqcompressor.config import KroneckerSpec, TQConfig

VOCABULARY = 104

# One of everything: an embedding with rows permuted, a fused matrix, two orientations, a matrix without permutations.
SPECS = {
    "wte": KroneckerSpec((2, 4), 2),
    "h.0.attn.c_attn.*": KroneckerSpec((2, 2), 2, "rows"),
    "h.1.mlp.c_fc": KroneckerSpec((2, 4), 4),
    "h.*.mlp.c_proj": KroneckerSpec((4, 2), 3, "none"),
}
CONFIG = TQConfig(SPECS, effort="fast", seed=3)


def tiny_config(**changes):
    return transformers.GPT2Config(
        **{
            "n_layer": 2,
            "n_embd": 32,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **changes,
        }
    )


def tiny_model(class_name="GPT2LMHeadModel", seed=0, **changes):
    """A model with values large enough that no logit is near another by chance, in evaluation mode."""
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(tiny_config(initializer_range=0.3, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def llama_model(model_type="llama", seed=0, **changes):
    """A small model of Llama's family, with weights as large as those of `tiny_model`, in evaluation mode."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **tokens, "initializer_range": 0.3, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, float("norm" in name), 0.5)
    return model.eval()


def some_ids(seed=0):
    return torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))


def first_output(model, ids):
    """The first output of a model with any head."""
    with torch.no_grad():
        return model(ids)[0]


def agree(outputs, expected):
    """Whether outputs are equal up to rounding, which depends on the memory alignment of the weights."""
    return torch.allclose(outputs.float(), expected.float(), rtol=0, atol=1e-5 * expected.abs().max().item())
