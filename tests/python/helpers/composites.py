"""Tiny random models with an encoder and a decoder, whose embeddings share one weight or whose head is tied within."""

import torch
import transformers

from .models import VOCABULARY

_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
_LONGEST = {"max_position_embeddings": 32}
_LED = {"max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32, "attention_window": 4}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "eos_token_id": 0}
_PROPHETNET = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}


def _joined(decoder):
    encoder = transformers.BertConfig(**_BERT)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.pad_token_id, config.decoder_start_token_id = 0, 2
    return transformers.EncoderDecoderModel(config)


def _two_berts():
    return _joined(transformers.BertConfig(**_BERT, is_decoder=True, add_cross_attention=True))


def _bert_and_gpt2():
    return _joined(transformers.GPT2Config(**_GPT2, bos_token_id=0, is_decoder=True, add_cross_attention=True))


# Name: the model, the matrix that owns the shared weight, and its other users. One embedding serves both sides.
SHARED = {
    "marian": (
        lambda: transformers.MarianMTModel(transformers.MarianConfig(**_SEQ2SEQ, **_LONGEST)),
        "shared",
        ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    ),
    "pegasus": (
        lambda: transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**_SEQ2SEQ, **_LONGEST)),
        "shared",
        ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    ),
    "led": (
        lambda: transformers.LEDForConditionalGeneration(transformers.LEDConfig(**_SEQ2SEQ, **_LED)),
        "shared",
        ("led.encoder.embed_tokens", "led.decoder.embed_tokens", "lm_head"),
    ),
    "prophetnet": (
        lambda: transformers.ProphetNetForConditionalGeneration(transformers.ProphetNetConfig(**_PROPHETNET)),
        "word_embeddings",
        ("prophetnet.encoder.word_embeddings", "prophetnet.decoder.word_embeddings", "lm_head"),
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5, decoder_start_token_id=0)),
        "shared",
        ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
    ),
    "two-berts": (_two_berts, "decoder.bert.embeddings.word_embeddings", ("decoder.cls.predictions.decoder",)),
    "bert-and-gpt2": (_bert_and_gpt2, "decoder.transformer.wte", ("decoder.lm_head",)),
}
# Their encoders and decoders look up in subclasses of `nn.Embedding`, which scale the rows.
SCALED = {
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**_SEQ2SEQ, **_LONGEST)),
    "mbart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**_SEQ2SEQ, **_LONGEST)),
    "m2m": lambda: transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**_SEQ2SEQ, **_LONGEST)),
}


def composite(name, seed=0):
    """A dense model of `SHARED` or `SCALED`, in evaluation mode."""
    torch.manual_seed(seed)
    model = (SCALED[name] if name in SCALED else SHARED[name][0])()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Sinusoidal positions are computed again when a model is loaded.
            if "embed_positions" not in parameter_name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def two_sides(seed=0):
    """Ids of an encoder and a decoder, not equally long."""
    generator = torch.Generator().manual_seed(seed)
    sides = {"input_ids": 8, "decoder_input_ids": 5}
    return {name: torch.randint(3, VOCABULARY, (2, length), generator=generator) for name, length in sides.items()}


def logits(model):
    """Its logits for `two_sides`."""
    with torch.no_grad():
        return model(**two_sides()).logits
