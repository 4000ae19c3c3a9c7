"""Llama and its relatives in the native runtime, against transformers: configs, logits, greedy tokens, refusals."""

import json
import textwrap

import numpy as np
import pytest
import torch
from helpers.models import llama_model, tiny_model
from helpers.native import LLAMA_SPECS, TEXT, compressed, largest_difference, reference, torch_logits
from helpers.processes import run_script
from helpers.tokenizer import BYTE_LEVEL_RULES, save_byte_tokenizer
from tokenizers import pre_tokenizers
from tqcompressor import (
    Calibration,
    KroneckerSpec,
    LowRankSpec,
    NativeModel,
    TQConfig,
    _core,
    compress_checkpoint,
    errors,
    evaluate,
)
from transformers import AutoTokenizer

# Of the largest logit.
CLOSE = 3e-5
TOKENS = list(range(1, 60))
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of one random Llama with a tied head, dense and with specs of every kind."""
    return compressed(llama_model(tie_word_embeddings=True), LLAMA_SPECS, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": None}),
        ("llama", {"head_dim": 10, "hidden_size": 36}),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 36}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.1}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 7, "head_dim": 6}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ],
    ids=str,
)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, model_type, changes):
    model = llama_model(model_type, **changes)
    model.save_pretrained(tmp_path)
    native = NativeModel.from_pretrained(tmp_path, threads=2)
    assert (native.parameters, native.bytes) == evaluate.model_size(model)
    for tokens in ([5], TOKENS):
        assert largest_difference(native.logits([tokens])[0], torch_logits(model, tokens)) < CLOSE
    # With the cache, as many as the context holds.
    (found,) = native.generate_tokens([TOKENS[:9]], max_new_tokens=55, eos_token_id=[])
    whole = [*TOKENS[:9], *found]
    assert found == torch_logits(model, whole[:-1]).argmax(-1)[8:].tolist()


def test_keys_of_older_configs_are_read(tmp_path):
    model = llama_model(rope_parameters={"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0})
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["rope_parameters"], config["head_dim"]
    path.write_text(json.dumps(config | {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    ours = NativeModel.from_pretrained(tmp_path).logits([TOKENS])[0]
    assert largest_difference(ours, torch_logits(reference(tmp_path), TOKENS)) < CLOSE
    assert largest_difference(ours, torch_logits(model, TOKENS)) < CLOSE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_read_as_they_are(tmp_path, dtype):
    llama_model(tie_word_embeddings=False).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    ours = NativeModel.from_pretrained(tmp_path).logits([TOKENS])[0]
    assert largest_difference(ours, torch_logits(reference(tmp_path), TOKENS)) < CLOSE


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("name", ["dense", *LLAMA_SPECS])
def test_compressed_models_compute_what_transformers_does(folders, name, dtype, tmp_path):
    folder = folders[name]
    if dtype is not None:
        folder = tmp_path / "int8"
        compress_checkpoint(folders["dense"], folder, TQConfig(LLAMA_SPECS.get(name, {}), dtype=dtype, effort="fast"))
    model, native = reference(folder), NativeModel.from_pretrained(folder, threads=2)
    assert (native.parameters, native.bytes) == evaluate.model_size(model)
    for tokens in ([5], TOKENS[:8], TOKENS):
        # Few tokens are rounded to 16 bits for products with eight-bit weights; such weights magnify it.
        close = 50 * CLOSE if dtype is not None and len(tokens) <= 8 else CLOSE
        assert largest_difference(native.logits([tokens])[0], torch_logits(model, tokens)) < close
    (found,) = native.generate_tokens([TOKENS[:9]], max_new_tokens=20, eos_token_id=[])
    assert found == torch_logits(model, [*TOKENS[:9], *found[:-1]]).argmax(-1)[8:].tolist()


def test_a_head_and_biases_beside_compressed_maps(tmp_path):
    specs = {
        "lm_head": LowRankSpec(20),
        "layers.*.self_attn.[qk]_proj": KroneckerSpec((4, 4), 2),
        "layers.*.mlp.*": LowRankSpec(9),
    }
    biases = {"attention_bias": True, "mlp_bias": True}
    for model_type, changes in (("llama", biases), ("qwen2", {}), ("mistral", {"sliding_window": 9})):
        model = llama_model(model_type, tie_word_embeddings=False, **changes)
        for name, folder in compressed(model, {"specs": specs}, tmp_path / model_type).items():
            ours = NativeModel.from_pretrained(folder).logits([TOKENS])[0]
            assert largest_difference(ours, torch_logits(reference(folder), TOKENS)) < CLOSE, (model_type, name)


def test_weights_quantized_on_loading_are_those_of_the_files(folders, tmp_path):
    compress_checkpoint(folders["dense"], tmp_path / "int8", TQConfig(LLAMA_SPECS["low rank"], dtype="int8"))
    compress_checkpoint(folders["dense"], tmp_path / "floats", TQConfig(LLAMA_SPECS["low rank"]))
    stored = NativeModel.from_pretrained(tmp_path / "int8")
    loaded = NativeModel.from_pretrained(tmp_path / "floats", dtype="int8")
    assert np.array_equal(stored.logits([TOKENS]), loaded.logits([TOKENS])) and stored.bytes == loaded.bytes


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """`(native, model)` with a context of 8,192 tokens, and its folder with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("long")
    model = llama_model(hidden_size=16, head_dim=4, intermediate_size=16, vocab_size=300, max_position_embeddings=8192)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder, pre_tokenizers.ByteLevel(add_prefix_space=False))
    return folder, model


def test_perplexity_and_last_words_are_those_of_torch(long):
    folder, model = long
    native, tokenizer = NativeModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for options in ({}, {"context": 100, "stride": 30}):
        ours = native.perplexity(TEXT[:3000], **options)
        theirs = evaluate.perplexity(model, tokenizer, TEXT[:3000], **options)
        assert ours.negative_log_likelihood == pytest.approx(theirs.negative_log_likelihood, rel=1e-5)
        assert (ours.tokens, ours.context, ours.stride) == (theirs.tokens, theirs.context, theirs.stride)
    passages = [" ".join(TEXT.split()[at : at + 9]) for at in range(0, 90, 10)]
    ours, theirs = native.last_word_accuracy(passages), evaluate.last_word_accuracy(model, tokenizer, passages)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-4) and ours.accuracy == theirs.accuracy


def test_the_whole_context_is_read_in_memory_that_grows_with_it(long, tmp_path):
    folder, model = long
    tokens = np.random.default_rng(0).integers(300, size=8192).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), logits_to_keep=64).logits[0].numpy()
    script = f"""
        import resource, numpy as np
        from tqcompressor import _core
        tokens = np.random.default_rng(0).integers(300, size=8192).tolist()
        runtime = _core.Runtime.load({str(folder)!r}, 2, None)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        np.save({str(tmp_path / "logits.npy")!r}, runtime.logits([tokens])[-64:])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    kilobytes = int(run_script(textwrap.dedent(script)))
    # The scores of one head would take 256 MiB.
    assert kilobytes < 100 << 10
    assert largest_difference(np.load(tmp_path / "logits.npy"), expected) < CLOSE
    native = NativeModel.from_pretrained(folder)
    (found,) = native.generate_tokens([tokens[:-3]], max_new_tokens=3, eos_token_id=[])
    assert len(found) == 3
    with pytest.raises(errors.ConfigError, match="context of 8192"):
        native.generate_tokens([tokens], max_new_tokens=1)
    with pytest.raises(errors.ConfigError, match="at most 8192"):
        native.logits([[*tokens, 1]])


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_keys_and_values_may_be_halves(tmp_path, kind, kv_dtype):
    changes = {"sliding_window": 9} if kind == "mistral" else {}
    model = tiny_model(n_positions=64) if kind == "gpt2" else llama_model(kind, **changes)
    # Smaller weights, whose attention a rounded key does not turn.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.3
    model.save_pretrained(tmp_path)
    whole, halves = NativeModel.from_pretrained(tmp_path), NativeModel.from_pretrained(tmp_path, kv_dtype=kv_dtype)
    expected = whole.logits([TOKENS])[0]
    difference = largest_difference(halves.logits([TOKENS])[0], expected)
    assert 0 < difference < (2e-3 if kv_dtype == "float16" else 2e-2)
    # One by one as at once.
    (found,) = halves.generate_tokens([TOKENS[:9]], max_new_tokens=30, eos_token_id=[])
    assert found == halves.logits([[*TOKENS[:9], *found[:-1]]])[0, 8:].argmax(-1).tolist()


def test_a_key_beyond_a_half_is_refused(tmp_path):
    model = llama_model(attention_bias=True)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias += 1e5
    model.save_pretrained(tmp_path)
    with pytest.raises(errors.ConfigError, match=r"kv_dtype float16: a key or value of 1\.0e5 .* kv_dtype float32"):
        NativeModel.from_pretrained(tmp_path, kv_dtype="float16").logits([TOKENS])
    assert np.isfinite(NativeModel.from_pretrained(tmp_path).logits([TOKENS])).all()
    with pytest.raises(errors.DtypeError, match="kv_dtype: expected float32, float16 or bfloat16, got 'float64'"):
        NativeModel.from_pretrained(tmp_path, kv_dtype="float64")


@pytest.mark.parametrize("rule", BYTE_LEVEL_RULES)
def test_byte_level_tokenizers_give_the_tokens_of_their_library(tmp_path, rule):
    theirs = save_byte_tokenizer(tmp_path, BYTE_LEVEL_RULES[rule])
    ours = _core.Tokenizer.load(tmp_path)
    for text in (
        TEXT[:5000],
        "1234567 3.14 it's  \n\n  naïve 世界😀\t",
        "<|im_start|>user\nHi 42<|im_end|> <|im_end|>",
        "",
    ):
        tokens = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == tokens
        for skip in (False, True):
            expected = theirs.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(tokens, skip) == expected


def test_the_command_line_needs_no_torch(long, tmp_path):
    folder, _ = long
    (tmp_path / "text.txt").write_text(TEXT[:2000], encoding="utf-8")
    text, calibration, out = (str(tmp_path / name) for name in ("text.txt", "calibration.safetensors", "out"))
    commands = [
        ["calibrate", str(folder), "--text", text, "--out", calibration, "--num-samples", "4", "--seq-len", "32"],
        ["compress", str(folder), "--budget", "0.8", "--calibration", calibration, "--out", out],
        ["evaluate", out, "--teacher", str(folder), "--text", text, "--context", "64"],
        ["generate", out, "--prompt", "He", "--max-new-tokens", "5", "--kv-dtype", "float16"],
    ]
    script = f"""
        import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'tokenizers']))
        from tqcompressor.cli.main import main
        assert [main(command) for command in {commands!r}] == [0, 0, 0, 0]
    """
    run_script(textwrap.dedent(script))
    assert Calibration.load(calibration).model_type == "llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads: expected a number that divides num_attention_heads = 4, got 3",
        ),
        ({"head_dim": 7}, "head_dim: expected an even number"),
        ({"head_dim": 16}, "q_proj"),
        ({"hidden_act": "mish"}, "hidden_act: expected one of gelu_new"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters.rope_type: expected default, linear",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type: expected default, linear"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"attention_bias": True}, "self_attn.q_proj.bias' is missing"),
        ({"mlp_bias": 3}, "mlp_bias: expected true or false, got 3"),
        ({"tie_word_embeddings": False}, "lm_head.weight' is missing"),
        ({"num_hidden_layers": 3}, "layers.2."),
        ({"model_type": "qwen3"}, 'types "gpt2", "llama", "mistral", "qwen2", got model_type "qwen3"'),
        ({"model_type": "gemma"}, 'got model_type "gemma"'),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "layer_types"),
        (
            {"quantization_config": {"quant_method": "tqcompressor", "specs": {"wte": {"rank": 2}}}},
            "'wte' is no matrix",
        ),
    ],
    ids=str,
)
def test_what_the_runtime_does_not_compute_is_refused_by_name(folders, tmp_path, changes, message):
    config = json.loads((folders["dense"] / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "model.safetensors").write_bytes((folders["dense"] / "model.safetensors").read_bytes())
    with pytest.raises(errors.CheckpointError) as caught:
        NativeModel.from_pretrained(tmp_path)
    assert message in str(caught.value)
