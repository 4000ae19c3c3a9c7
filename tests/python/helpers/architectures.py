"""Tiny random models of many architectures of transformers, with inputs for each."""

import dataclasses
import inspect

import torch
import transformers
from tqcompressor.config import LowRankSpec

VOCABULARY = 120
# The names that configs have for the sizes of a model. Each config takes those that it has.
_SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "initializer_range": 0.2,
    "num_labels": 4,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner", "d_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
}


def _ids(length=9):
    return torch.arange(3, 3 + length)[None]


def _text(**more):
    return {"input_ids": _ids(), **more}


def _seq2seq():
    return _text(decoder_input_ids=_ids(4))


def _picture(size=16):
    return {"pixel_values": torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)}


def _sound(length=800):
    return {"input_values": torch.linspace(-1, 1, length)[None].sin()}


_LAYER = {key: _SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
# The parts of a composite config.
_TOWER = {**_LAYER, "image_size": 16, "patch_size": 8}
_GEMMA = {**_LAYER, "vocab_size": VOCABULARY, "head_dim": 16, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GEMMA |= {"layer_types": ["full_attention"]}
# Embeddings that an encoder and a decoder share are left as they are.
_LAYERS = ["*.layers.*"]
_BLOCKS = ["*.block.*"]

# Architecture: (changes of the config, inputs, patterns of matrices to compress, by default all that a budget picks).
ARCHITECTURES = {
    # Encoders.
    "AlbertForMaskedLM": ({}, _text),
    "BertForMaskedLM": ({}, _text),
    "BigBirdForMaskedLM": ({"attention_type": "original_full"}, _text),
    "CamembertForMaskedLM": ({}, _text),
    "ConvBertForMaskedLM": ({"embedding_size": 32}, _text),
    "DebertaModel": ({"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}, _text),
    "DebertaV2ForMaskedLM": ({"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, _text),
    "DistilBertForMaskedLM": ({}, _text),
    "ElectraForPreTraining": ({}, _text),
    "ErnieForMaskedLM": ({}, _text),
    "EsmForMaskedLM": ({"token_dropout": False, "mask_token_id": 4}, _text),
    "EuroBertForMaskedLM": ({}, _text),
    "FNetForMaskedLM": ({}, _text),
    "FunnelModel": ({"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 16}, _text),
    "LayoutLMForMaskedLM": ({"max_2d_position_embeddings": 64}, _text),
    "MPNetForMaskedLM": ({}, _text),
    "MegatronBertForMaskedLM": ({}, _text),
    "MobileBertForMaskedLM": ({"intra_bottleneck_size": 32, "true_hidden_size": 32}, _text),
    "ModernBertForMaskedLM": ({"global_attn_every_n_layers": 2, "local_attention": 8}, _text),
    "NomicBertModel": ({}, _text),
    "NystromformerForMaskedLM": ({"segment_means_seq_len": 9, "num_landmarks": 3}, _text),
    "RemBertForMaskedLM": ({"input_embedding_size": 32, "output_embedding_size": 32}, _text),
    "RoFormerForMaskedLM": ({}, _text),
    "RobertaForMaskedLM": ({}, _text),
    "RobertaPreLayerNormForMaskedLM": ({}, _text),
    "SqueezeBertForMaskedLM": ({"q_groups": 1}, _text),
    "XLMRobertaForSequenceClassification": ({}, _text),
    "XLMWithLMHeadModel": ({"emb_dim": 32}, _text),
    "XLNetLMHeadModel": ({}, _text),
    "XmodForMaskedLM": ({"default_language": "en_XX"}, _text),
    "YosoForMaskedLM": ({}, _text),
    # Decoders.
    "ApertusForCausalLM": ({}, _text),
    "BioGptForCausalLM": ({}, _text),
    "BloomForCausalLM": ({}, _text),
    "CTRLLMHeadModel": ({"dff": 64}, _text),
    "CodeGenForCausalLM": ({"rotary_dim": 8, "n_head": 4}, _text),
    "CohereForCausalLM": ({}, _text),
    # Its attention has a parameter with the name of a factor.
    "DogeForCausalLM": ({}, _text),
    "FalconForCausalLM": ({}, _text),
    "GPT2LMHeadModel": ({}, _text),
    "GPTBigCodeForCausalLM": ({}, _text),
    "GPTJForCausalLM": ({"rotary_dim": 8}, _text),
    "GPTNeoForCausalLM": ({"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8}, _text),
    "GPTNeoXForCausalLM": ({}, _text),
    "GPTNeoXJapaneseForCausalLM": ({}, _text),
    "Gemma2ForCausalLM": ({}, _text),
    "Gemma3ForCausalLM": ({"sliding_window": 8}, _text),
    "GemmaForCausalLM": ({}, _text),
    "Glm4ForCausalLM": ({}, _text),
    "GraniteForCausalLM": ({}, _text),
    "HeliumForCausalLM": ({}, _text),
    "LlamaForCausalLM": ({}, _text),
    "MistralForCausalLM": ({}, _text),
    "MptForCausalLM": ({}, _text),
    "NemotronForCausalLM": ({}, _text),
    "OPTForCausalLM": ({"word_embed_proj_dim": 32}, _text),
    "Olmo2ForCausalLM": ({}, _text),
    "OlmoForCausalLM": ({}, _text),
    "OpenAIGPTLMHeadModel": ({}, _text),
    "PersimmonForCausalLM": ({}, _text),
    "Phi3ForCausalLM": ({}, _text),
    "PhiForCausalLM": ({}, _text),
    "Qwen2ForCausalLM": ({}, _text),
    "Qwen3ForCausalLM": ({}, _text),
    "SmolLM3ForCausalLM": ({}, _text),
    "StableLmForCausalLM": ({}, _text),
    "Starcoder2ForCausalLM": ({}, _text),
    "XGLMForCausalLM": ({"attention_heads": 2}, _text),
    # Mixtures of experts.
    "DeepseekV2ForCausalLM": (
        {
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
        },
        _text,
    ),
    "DeepseekV3ForCausalLM": (
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
        },
        _text,
    ),
    "GptOssForCausalLM": ({}, _text),
    "GraniteMoeForCausalLM": ({}, _text),
    "JetMoeForCausalLM": ({"kv_channels": 16, "num_local_experts": 2, "vocab_size": 240}, _text),
    "MixtralForCausalLM": ({}, _text),
    "OlmoeForCausalLM": ({}, _text),
    "PhimoeForCausalLM": ({}, _text),
    "Qwen2MoeForCausalLM": ({"shared_expert_intermediate_size": 32}, _text),
    "Qwen3MoeForCausalLM": ({}, _text),
    # State spaces and other recurrences.
    "FalconMambaForCausalLM": ({"state_size": 4}, _text),
    "JambaForCausalLM": (
        {
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
        },
        _text,
    ),
    "Mamba2ForCausalLM": ({"state_size": 8, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 8}, _text),
    "MambaForCausalLM": ({"state_size": 4}, _text),
    "RecurrentGemmaForCausalLM": ({"lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 8}, _text),
    "RwkvForCausalLM": ({"attention_hidden_size": 32, "num_hidden_layers": 2}, _text),
    # Encoders with decoders.
    "BartForConditionalGeneration": ({}, _seq2seq),
    "BlenderbotForConditionalGeneration": ({}, _seq2seq),
    "LEDForConditionalGeneration": (
        {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        _seq2seq,
        _LAYERS,
    ),
    "LongT5ForConditionalGeneration": ({"d_kv": 16}, _seq2seq, _BLOCKS),
    "M2M100ForConditionalGeneration": ({}, _seq2seq),
    "MarianMTModel": ({"decoder_start_token_id": 0}, _seq2seq, _LAYERS),
    "MBartForConditionalGeneration": ({}, _seq2seq),
    "MvpForConditionalGeneration": ({}, _seq2seq, _LAYERS),
    "PegasusForConditionalGeneration": ({}, _seq2seq, _LAYERS),
    "PLBartForConditionalGeneration": ({}, _seq2seq),
    "ProphetNetForConditionalGeneration": (
        {
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_encoder_attention_heads": 2,
            "num_decoder_attention_heads": 2,
        },
        _seq2seq,
        _LAYERS,
    ),
    "SwitchTransformersForConditionalGeneration": (
        {"d_kv": 16, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0},
        _seq2seq,
        _BLOCKS,
    ),
    # Its embeddings have a parameter that its head, tied to them, lacks.
    "T5Gemma2ForConditionalGeneration": (
        {"encoder": {"text_config": _GEMMA, "vision_config": _TOWER}, "decoder": _GEMMA},
        _seq2seq,
        _LAYERS,
    ),
    "T5ForConditionalGeneration": ({"d_kv": 16, "decoder_start_token_id": 0}, _seq2seq, _BLOCKS),
    "UMT5ForConditionalGeneration": ({"d_kv": 16}, _seq2seq, _BLOCKS),
    # Vision.
    "BeitForImageClassification": ({}, _picture),
    "CLIPVisionModel": ({}, _picture),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [32, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        _picture,
    ),
    "DeiTForImageClassification": ({}, _picture),
    "Dinov2ForImageClassification": ({}, _picture),
    "Dinov2WithRegistersForImageClassification": ({}, _picture),
    "DINOv3ViTModel": ({}, _picture),
    "IJepaForImageClassification": ({}, _picture),
    "SegformerForImageClassification": (
        {
            "num_encoder_blocks": 1,
            "hidden_sizes": [32],
            "depths": [1],
            "sr_ratios": [1],
            "num_attention_heads": [2],
            "mlp_ratios": [2],
            "patch_sizes": [3],
            "strides": [2],
        },
        _picture,
    ),
    "SiglipVisionModel": ({}, _picture),
    "SwinForImageClassification": (
        {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 2, "num_layers": 2},
        _picture,
    ),
    "Swinv2ForImageClassification": (
        {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 2, "num_layers": 2},
        _picture,
    ),
    "ViTForImageClassification": ({}, _picture),
    "ViTMSNForImageClassification": ({}, _picture),
    "YolosForObjectDetection": ({"image_size": [16, 16], "num_detection_tokens": 4}, _picture),
    # Audio.
    "ASTForAudioClassification": (
        {"num_mel_bins": 16, "max_length": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
        lambda: {"input_values": torch.linspace(-1, 1, 512).reshape(1, 32, 16)},
    ),
    "Data2VecAudioForCTC": (
        {
            "conv_dim": [32],
            "conv_stride": [8],
            "conv_kernel": [8],
            "num_conv_pos_embeddings": 2,
            "num_conv_pos_embedding_groups": 2,
            "conv_pos_kernel_size": 3,
        },
        _sound,
    ),
    "HubertForCTC": (
        {
            "conv_dim": [32],
            "conv_stride": [8],
            "conv_kernel": [8],
            "num_feat_extract_layers": 1,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        _sound,
    ),
    "WavLMForCTC": (
        {
            "conv_dim": [32],
            "conv_stride": [8],
            "conv_kernel": [8],
            "num_feat_extract_layers": 1,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        _sound,
    ),
    "Wav2Vec2ForCTC": (
        {
            "conv_dim": [32],
            "conv_stride": [8],
            "conv_kernel": [8],
            "num_feat_extract_layers": 1,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        _sound,
    ),
    "WhisperForConditionalGeneration": (
        {
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        lambda: {"input_features": torch.linspace(-1, 1, 160).reshape(1, 8, 20), "decoder_input_ids": _ids(4)},
    ),
    "Speech2TextForConditionalGeneration": (
        {
            "num_conv_layers": 1,
            "conv_kernel_sizes": (3,),
            "conv_channels": 32,
            "input_feat_per_channel": 8,
            "max_source_positions": 40,
            "max_target_positions": 16,
        },
        lambda: {"input_features": torch.linspace(-1, 1, 160).reshape(1, 20, 8), "decoder_input_ids": _ids(4)},
    ),
}


def architecture(name):
    """The dense model in evaluation mode, its inputs and the patterns of the matrices to compress."""
    changes, inputs, *patterns = ARCHITECTURES[name]
    cls = getattr(transformers, name)
    config_class = cls.config_class
    aliases = getattr(config_class, "attribute_map", {})
    known = {*inspect.signature(config_class.__init__).parameters, *aliases}
    if dataclasses.is_dataclass(config_class):
        known |= {field.name for field in dataclasses.fields(config_class)}
    sizes = {key: size for key, size in _SIZES.items() if key in known and aliases.get(key) not in changes}
    torch.manual_seed(0)
    model = cls(config_class(**{**sizes, **changes})).eval()
    return model, inputs(), patterns[0] if patterns else None


def all_outputs(model, inputs):
    """The tensors that a model returns."""
    with torch.no_grad():
        outputs = model(**inputs)
    return [output for output in outputs.to_tuple() if isinstance(output, torch.Tensor)]


# `compress` has no example of their inputs, and says so.
UNTRIED = {"NystromformerForMaskedLM"}
# The dense model cannot be trained without its CUDA kernel.
UNTRAINABLE = {"RwkvForCausalLM"}


def _ibert():
    return transformers.IBertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )


def _rwkv():
    return architecture("RwkvForCausalLM")[0].config


def _gemma3n():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    layer = {"layer_types": ["full_attention"], "activation_sparsity_pattern": [0.0], "num_kv_shared_layers": 0}
    heads = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY}
    return transformers.Gemma3nTextConfig(**sizes, **more, **layer, **heads)


# Name: (class, config, specs, why they are refused).
REFUSED = {
    # It divides the weights of the output layers by powers of two in the first forward pass.
    "rwkv": ("RwkvForCausalLM", _rwkv, {"*attention.output": LowRankSpec(4)}, "attention.output: ReadOnlyError: div_"),
    # It clips the weight in place while it is trained.
    "gemma3n": ("Gemma3nForCausalLM", _gemma3n, {"*prediction_coefs": LowRankSpec(2)}, "prediction_coefs: .*clamp_"),
    # Its linear layers are of a class of its own.
    "ibert": ("IBertModel", _ibert, {"*query": LowRankSpec(4)}, "matches no matrix"),
}
