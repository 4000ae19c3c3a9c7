"""The native runtime with faulty checkpoints, invalid arguments and signals: typed errors, never a panic."""

import copy
import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from helpers.checkpoints import Checkpoint, config, decode, encode, read_safetensors, write_safetensors
from helpers.native import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from tqcompressor import NativeModel, compress_checkpoint, errors

C_FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Width 8, 20 tokens, a context of 6, no tokenizer."""
    return NativeModel.from_pretrained(Checkpoint().write(tmp_path_factory.mktemp("native") / "model"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """`(config, tensors)` of a checkpoint with factors of both kinds."""
    folder = tmp_path_factory.mktemp("native")
    specs = {"wte": {"rank": 2}, "h.0.mlp.c_fc": {"block": [2, 4], "rank": 2, "permute": "both"}}
    compress_checkpoint(Checkpoint().write(folder / "in"), folder / "out", config({}) | {"specs": specs})
    text = (folder / "out" / "config.json").read_text(encoding="utf-8")
    return json.loads(text), read_safetensors(folder / "out")


def write(folder, configuration, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_head: expected a number that divides n_embd = 8, got 3"),
        ({"n_head": 0}, "n_head"),
        ({"n_layer": 3}, "h.2"),
        ({"n_layer": 1}, "1 layers"),
        ({"n_layer": 10**18}, "asks for 1000000000000000000 layers"),
        ({"n_layer": "two"}, "n_layer"),
        ({"n_embd": 16, "n_head": 2}, "shape"),
        ({"n_positions": 7}, "wpe"),
        ({"vocab_size": 21}, "wte"),
        ({"n_inner": 33}, "c_fc"),
        ({"activation_function": "sine"}, "activation_function: expected one of gelu_new"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"add_cross_attention": True}, "cross"),
        ({"model_type": "llama"}, "'embed_tokens.weight' is missing"),
        ({"model_type": "gptj"}, "gptj"),
        ({"model_type": "opt"}, 'got model_type "opt"'),
        ({"quantization_config": {"quant_method": "other"}}, "quantization_config"),
        ({"quantization_config": config({"h.0.mlp.c_fc": ((2, 4), 2, "both")})}, "h.0.mlp.c_fc.A"),
        ({"quantization_config": config({"h.7.mlp.c_fc": ((2, 4), 2, "both")})}, "h.7.mlp.c_fc"),
        ({"quantization_config": config({"nothing": ((2, 4), 2, "both")})}, "nothing"),
        ({"quantization_config": config({"h.0.attn.c_attn.q": ((2, 4), 2, "both")})}, "h.0.attn.c_attn"),
        ({"quantization_config": config({"h.0.mlp.c_fc": ((3, 5), 2, "both")})}, "block"),
    ],
    ids=str,
)
def test_a_config_that_lies(tmp_path, changes, message):
    source = Checkpoint()
    source.config |= changes
    with pytest.raises(errors.TQError) as caught:
        NativeModel.from_pretrained(source.write(tmp_path / "in"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "expected a JSON object"), ('{"eos_token_id": "x"}', "eos_token_id: expected a token")]
)
def test_a_generation_config_that_is_none(tmp_path, text, message):
    folder = Checkpoint().write(tmp_path / "in")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(errors.CheckpointError, match=rf"generation_config\.json: {message}"):
        NativeModel.from_pretrained(folder)


def without(source):
    del source.tensors[C_FC]


def misshapen(source):
    source.tensors[C_FC] = encode(np.ones((8, 31)))


def doubled(source):
    source.tensors["h.1.mlp.c_fc.weight"] = source.tensors[C_FC]


def not_a_number(source):
    values = decode(*source.tensors[C_FC]).copy()
    values[5, 30] = math.nan
    source.tensors[C_FC] = encode(values)


def double_precision(source):
    source.tensors[C_FC] = encode(np.ones((8, 32)), "F64")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without, errors.CheckpointError, "is missing"),
        (misshapen, errors.CheckpointError, "[8, 31]"),
        (doubled, errors.CheckpointError, "under two names"),
        (not_a_number, errors.NonFiniteError, "NaN"),
        (double_precision, errors.DtypeError, "F64"),
    ],
)
def test_tensors_that_cannot_be(tmp_path, change, error, message):
    source = Checkpoint()
    change(source)
    with pytest.raises(error) as caught:
        NativeModel.from_pretrained(source.write(tmp_path / "in"))
    assert message in str(caught.value) and "h.1.mlp.c_fc.weight" in str(caught.value)


def test_files_that_are_not_there_or_not_whole(tmp_path):
    folder = Checkpoint().write(tmp_path / "in")
    content = (folder / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(errors.CheckpointError, match=r"model\.safetensors"):
            NativeModel.from_pretrained(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(errors.TQError):
            NativeModel.from_pretrained(folder)
    with pytest.raises(errors.CheckpointError, match="none-such: no such directory"):
        NativeModel.from_pretrained(str(tmp_path / "none-such"))


VALUES = st.sampled_from([None, True, 0, -1, 1, 2, 3, 5, 2**31, 2**63, 1e400, 0.5, "x", [], [0], {}, {"rank": 1}])


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_is_changed_there_is_a_model_or_a_typed_error(compressed, data, tmp_path_factory):
    configuration, tensors = copy.deepcopy(compressed[0]), dict(compressed[1])
    keys = [
        "n_head",
        "n_layer",
        "n_embd",
        "n_inner",
        "vocab_size",
        "n_positions",
        "quantization_config",
        "bos_token_id",
    ]
    for key in data.draw(st.lists(st.sampled_from([*keys, "eos_token_id", "tie_word_embeddings"]), max_size=2)):
        configuration[key] = data.draw(VALUES)
    found = configuration.get("quantization_config")
    specs = found.get("specs") if isinstance(found, dict) else None
    if isinstance(specs, dict) and specs and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(specs)))
        spec = specs.pop(name)
        if isinstance(spec, dict) and spec:
            spec[data.draw(st.sampled_from(sorted(spec)))] = data.draw(VALUES)
        specs[data.draw(st.sampled_from([name, "wpe", "h.1.mlp.c_fc", "h.0.attn.c_attn", "h.0.attn.c_attn.q"]))] = spec
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        dtype, shape, stored = tensors.pop(name)
        change = data.draw(st.sampled_from(["drop", "rename", "dtype", "transpose", "flatten", "bytes"]))
        if change == "rename":
            tensors[name + "s"] = dtype, shape, stored
        elif change == "dtype" and dtype == "F32":
            tensors[name] = "I64" if len(stored) % 8 else "F16", [len(stored) // 2], stored
        elif change == "transpose":
            tensors[name] = dtype, shape[::-1], stored
        elif change == "flatten":
            tensors[name] = dtype, [math.prod(shape)], stored
        elif change == "bytes":
            tensors[name] = dtype, shape, data.draw(st.binary(min_size=len(stored), max_size=len(stored)))
    folder = write(tmp_path_factory.mktemp("changed"), configuration, tensors)
    try:
        native = NativeModel.from_pretrained(folder, threads=2)
        assert native.logits([[0]]).shape == (1, 1, native.vocab_size)
        native.generate_tokens([[0]], max_new_tokens=1)
    except errors.TQError:
        pass


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([[20]], {}, errors.ConfigError, "tokens: expected 0 to 19, got 20"),
        ([[-1]], {}, errors.ConfigError, "got -1"),
        ([[2**70]], {}, errors.TQError, "tokens"),
        ([[1.5]], {}, errors.DtypeError, "expected integers, got float64"),
        ([[[1]]], {}, errors.ShapeError, "one dimension"),
        ([[[1, 2], [3]]], {}, errors.ShapeError, "tokens: expected rows of one length"),
        ([[1]], {"eos_token_id": [[1, 2], [3]]}, errors.ShapeError, "rows of one length"),
        ([[]], {}, errors.ConfigError, "at least one token"),
        ([[1] * 7], {}, errors.ConfigError, "context of 6, got 7"),
        ([[1]], {"max_new_tokens": 6}, errors.ConfigError, "expected at most 0 tokens"),
        ([[1]], {"max_new_tokens": 2**62}, errors.ConfigError, "context of 6"),
        ([[1]], {"max_new_tokens": -1}, errors.ConfigError, "max_new_tokens"),
        ([[1]], {"max_new_tokens": 1.5}, errors.ConfigError, "max_new_tokens"),
        ([[1]], {"temperature": -1.0}, errors.ConfigError, "temperature"),
        ([[1]], {"temperature": math.nan}, errors.ConfigError, "temperature"),
        ([[1]], {"temperature": math.inf}, errors.ConfigError, "temperature"),
        ([[1]], {"top_p": 0.0}, errors.ConfigError, "top_p"),
        ([[1]], {"top_p": 1.1}, errors.ConfigError, "top_p"),
        ([[1]], {"top_k": -1}, errors.ConfigError, "top_k"),
        ([[1]], {"seed": -1}, errors.ConfigError, "seed"),
        ([[1]], {"seed": 2**64}, errors.ConfigError, "seed"),
        ([[1]], {"eos_token_id": [20]}, errors.ConfigError, "got 20"),
    ],
    ids=str,
)
def test_generation_refuses(model, prompts, options, error, message):
    with pytest.raises(error) as caught:
        model.generate_tokens(prompts, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[20]],), errors.ConfigError, "got 20"),
        (([[1] * 7],), errors.ConfigError, "at most 6"),
        (([1, 2],), errors.ShapeError, r"\(rows, positions\), got shape \(2,\)"),
        (([[1.0]],), errors.DtypeError, "float64"),
        (([[1, 2]], [[1]]), errors.ShapeError, "shape of input_ids"),
        (([[1, 2], [3]],), errors.ShapeError, "input_ids: expected rows of one length"),
        (([[[1], [2]], [3]],), errors.ShapeError, "input_ids: expected rows of one length"),
        (([[1, 2], [3, 4]], [[1, 1], [1]]), errors.ShapeError, "attention_mask: expected rows of one length"),
        (([["a"]],), errors.DtypeError, "input_ids: expected integers"),
        (([[1]], [["a"]]), errors.DtypeError, "attention_mask: expected numbers"),
        (([[1, 2, 3]], [[1, 0, 1]]), errors.ShapeError, "side by side"),
    ],
)
def test_logits_refuse(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.logits(*arguments)


def test_no_rows_have_no_logits(model):
    assert model.logits(np.zeros((0, 4), int)).shape == (0, 4, 20)
    assert model.logits(np.zeros((2, 0), int)).shape == (2, 0, 20)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_are_a_positive_number(tmp_path, threads):
    with pytest.raises(errors.ConfigError, match="threads"):
        NativeModel.from_pretrained(Checkpoint().write(tmp_path / "in"), threads=threads)


SCRIPT = """
    import os, signal, sys, threading, time
    from tqcompressor import NativeModel

    def interrupt():
        # The thread runs only because the GIL is released.
        time.sleep(0.3)
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    def on_tokens(tokens):
        if not sent and not thread.is_alive():
            thread.start()

    sent = []
    thread = threading.Thread(target=interrupt, daemon=True)
    model = NativeModel.from_pretrained(sys.argv[1])
    try:
        if sys.argv[2] == "generate":
            model.generate_tokens([[1]], max_new_tokens=3_999, eos_token_id=[], on_tokens=on_tokens)
        elif sys.argv[2] == "encode":
            thread.start()
            # Enough for some seconds of work.
            model.encode("The old man looked at it. " * 200_000)
        else:
            thread.start()
            for _ in range(100):
                model.logits([[1] * 1000])
    except KeyboardInterrupt:
        print(time.process_time() - sent[0])
        sys.exit(130)
"""


@pytest.mark.parametrize("action", ["generate", "logits", "encode"])
def test_ctrl_c_acts_soon(tmp_path, action):
    source = Checkpoint(width=256, vocabulary=20_000, positions=4_000)
    folder = TINY if action == "encode" else source.write(tmp_path / "in")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), action]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 130, run.stderr
    # Seconds of CPU time, of all threads: a loaded machine does not change them.
    assert float(run.stdout) < 1
