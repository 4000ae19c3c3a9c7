"""Very small models of several families, batches to calibrate them on, and state that must not change."""

import numpy as np
import torch
import transformers

from .models import tiny_model

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
SMALL |= {"max_position_embeddings": 24, "initializer_range": 0.3}


def gpt2(cls="GPT2LMHeadModel", **changes):
    return tiny_model(cls, n_embd=16, n_head=2, vocab_size=60, n_positions=24, **changes)


def bert(cls="BertModel", **changes):
    config = transformers.BertConfig(**SMALL | {"intermediate_size": 32, "pad_token_id": 0} | changes)
    return built(cls, config)


def opt(**changes):
    config = transformers.OPTConfig(**SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 16} | changes)
    return built("OPTForCausalLM", config)


def llama(**changes):
    config = transformers.LlamaConfig(**SMALL | {"intermediate_size": 32, "num_key_value_heads": 1} | changes)
    return built("LlamaForCausalLM", config)


def built(cls, config):
    torch.manual_seed(0)
    return getattr(transformers, cls)(config).eval()


FAMILIES = {
    "gpt2": gpt2,
    "gpt2 base": lambda: gpt2("GPT2Model"),
    "bert": bert,
    "bert masked": lambda: bert("BertForMaskedLM"),
    "bert classes": lambda: bert("BertForSequenceClassification", num_labels=3),
    "opt": opt,
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
}


def batches(padded=True, seed=0):
    """Two batches of 3 rows of 9 tokens, some of them padding on the right."""
    random = np.random.default_rng(seed)
    found = []
    for lengths in ((9, 5, 7), (2, 9, 9)):
        ids = torch.tensor(random.integers(3, 60, (3, 9)))
        mask = torch.tensor([[int(position < length) for position in range(9)] for length in lengths])
        found.append({"input_ids": ids * mask, "attention_mask": mask} if padded else {"input_ids": ids})
    return found


def same(one, other):
    return one.moments.keys() == other.moments.keys() and all(
        np.array_equal(one.moments[name], other.moments[name]) for name in one.moments
    )


def state(model):
    return {
        "training": [module.training for module in model.modules()],
        "required": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        "weights": [parameter.clone() for parameter in model.parameters()],
    }
