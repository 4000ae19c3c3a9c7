"""Tiny random models of several families, and configs that give their matrices every kind of spec."""

import copy

import torch
import transformers
from tqcompressor.config import TQConfig
from tqcompressor.config.specs import KroneckerSpec, LowRankSpec, MixedSpec

from .models import VOCABULARY, tiny_config

KRONECKER = KroneckerSpec((2, 2), 2)
LOW_RANK = LowRankSpec(6)
MIXED = MixedSpec((LowRankSpec(3), KroneckerSpec((2, 4), 1), KroneckerSpec((4, 2), 1, "rows")))

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def bert_config(**changes):
    """The config of a BERT of two small layers."""
    return transformers.BertConfig(**{**_SIZES, "intermediate_size": 64, "initializer_range": 0.3, **changes})


def _opt(**changes):
    return transformers.OPTConfig(**{**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3, **changes})


def _llama(**changes):
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3}
    return transformers.LlamaConfig(**{**_SIZES, **sizes, **changes})


def _distilbert(**changes):
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "initializer_range": 0.3}
    return transformers.DistilBertConfig(**{**_SIZES, **sizes, **changes})


def _gpt2(**changes):
    return tiny_config(initializer_range=0.3, **changes)


_BERT = {
    "embeddings.word_embeddings": MIXED,
    "bert.encoder.*.query": LOW_RANK,
    "encoder.layer.1.attention.self.key": KRONECKER,
    "encoder.layer.*.intermediate.dense": MIXED,
    "encoder.layer.*.output.dense": LOW_RANK,
}
_OPT = {
    "decoder.embed_tokens": LOW_RANK,
    "model.decoder.layers.*.[qk]_proj": KRONECKER,
    "*.v_proj": MIXED,
    "*.fc?": LOW_RANK,
}
_LLAMA = {"embed_tokens": KRONECKER, "layers.0.self_attn.*": LOW_RANK, "layers.*.mlp.*": MIXED}

# Name: (class, the Auto class that loads it, config, specs).
FAMILIES = {
    "bert": ("BertModel", "AutoModel", bert_config(), _BERT),
    "bert-tied": ("BertForMaskedLM", "AutoModelForMaskedLM", bert_config(), _BERT),
    "bert-untied": (
        "BertForMaskedLM",
        "AutoModelForMaskedLM",
        bert_config(tie_word_embeddings=False),
        {**_BERT, "cls.predictions.decoder": LOW_RANK},
    ),
    "opt-tied": ("OPTForCausalLM", "AutoModelForCausalLM", _opt(), _OPT),
    "opt-untied": (
        "OPTForCausalLM",
        "AutoModelForCausalLM",
        _opt(tie_word_embeddings=False),
        {**_OPT, "lm_head": MIXED},
    ),
    "llama-tied": ("LlamaForCausalLM", "AutoModelForCausalLM", _llama(tie_word_embeddings=True), _LLAMA),
    "llama-untied": ("LlamaForCausalLM", "AutoModelForCausalLM", _llama(), {**_LLAMA, "lm_head": LOW_RANK}),
    # Its base model has a child with the name of GPT-2's base model.
    "distilbert": (
        "DistilBertForMaskedLM",
        "AutoModelForMaskedLM",
        _distilbert(),
        {"embeddings.word_embeddings": LOW_RANK, "transformer.layer.*.q_lin": KRONECKER, "*.lin?": MIXED},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "AutoModelForCausalLM",
        _gpt2(),
        {"wte": MIXED, "h.0.attn.c_attn.q": LOW_RANK, "h.*.c_attn.*": MIXED, "h.*.mlp.c_proj": LOW_RANK},
    ),
}


def family_model(name, seed=0):
    """The dense model, with values large enough that no output is near another by chance, in evaluation mode."""
    class_name, _, config, _ = FAMILIES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(copy.deepcopy(config))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def family_config(name):
    """Its config with specs of all kinds."""
    return TQConfig(FAMILIES[name][3], effort="fast", seed=3)
