"""The benchmark of inference: its engines do the same work, and its counts and comparisons are as documented."""

import argparse
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import llama_model
from safetensors.torch import load_file
from tqcompressor import compress_checkpoint

TESTS = Path(__file__).resolve().parents[2]
DENSE = TESTS / "data" / "tiny-gpt2"
SPECS = {"wte": {"block": [1, 4], "rank": 1}, "h.1.mlp.c_fc": {"block": [2, 4], "rank": 4}}


@pytest.fixture(scope="module")
def benchmark():
    """Imports a module of the benchmarks by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS / "benchmarks"))
        yield import_module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    compressed = tmp_path_factory.mktemp("inference") / "compressed"
    compress_checkpoint(DENSE, compressed, {"specs": SPECS}, effort="fast")
    return {"dense": DENSE, "compressed": compressed}


def own(engines):
    """The engines that run a checkpoint as it is."""
    return [(name, engine) for name, engine in engines.ENGINES.items() if name.split(" ")[0] not in engines.PACKAGES]


def test_engines_score_a_llama_alike(benchmark, tmp_path, monkeypatch):
    engines = benchmark("inference_engines")
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    llama_model(head_dim=6).save_pretrained(tmp_path)
    text, scores, tokens = list(range(1, 40)), {}, {}
    for name, engine in own(engines):
        loaded = engine(tmp_path, torch.get_num_threads(), engines.Lengths(prompt=5, new=12, prefill=39))
        scores[name], tokens[name] = loaded.score(text), loaded.generate(text[:5], 12)
    assert scores.pop("native int8") == pytest.approx(scores["native"], rel=0.1)
    assert list(scores.values()) == pytest.approx([scores["native"]] * len(scores), rel=1e-5)
    assert tokens["native"] == tokens["torch eager"] == tokens["torch compiled"] == tokens["torch as stored"]


@pytest.mark.parametrize("model", ["dense", "compressed"])
def test_engines_generate_and_read_alike(benchmark, folders, monkeypatch, model):
    engines = benchmark("inference_engines")
    # Compilation itself is not tested, but the caches of fixed sizes, which are filled twice, are.
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    text = np.random.default_rng(1).integers(8192, size=20).tolist()
    generated, read = {}, {}
    for name, engine in own(engines):
        loaded = engine(folders[model], torch.get_num_threads(), engines.Lengths(prompt=5, new=12, prefill=20))
        generated[name] = [loaded.generate(text[:5], 12) for _ in range(2)]
        read[name] = [loaded.prefill(text) for _ in range(2)]
    assert generated["native"] == generated["torch eager"] == generated["torch compiled"]
    assert {len(tokens) for tokens in generated["native"]} == {12}
    (following,) = engines.ENGINES["native"](folders[model], 1, None).generate(text, 1)
    assert read["torch eager"] == read["torch compiled"] == [following] * 2


@pytest.mark.long
@pytest.mark.parametrize("model", ["dense", "compressed", "llama"])
def test_onnxruntime_generates_as_torch_does(benchmark, folders, tmp_path, model):
    pytest.importorskip("onnxscript", reason="onnxscript, of the dev extra, is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime, of the dev extra, is not installed")
    engines = benchmark("inference_engines")
    if model == "llama":
        llama_model(head_dim=6).save_pretrained(source := tmp_path / "model")
    else:
        source = folders[model]
    benchmark("onnx_models").write(source, tmp_path / "onnx")
    lengths = engines.Lengths(prompt=5, new=12, prefill=20)
    torch_s = engines.ENGINES["torch eager"](source, 1, lengths)
    found = engines.ENGINES["onnxruntime"](tmp_path / "onnx", 1, lengths)
    text = list(range(3, 43, 2))
    # Twice: the first run leaves nothing behind.
    for prompt in (text[:5], text[:5], text):
        assert found.generate(prompt, 12) == torch_s.generate(prompt, 12)
    assert found.prefill(text) == torch_s.prefill(text)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama of wide heads"])
def test_gguf_files_hold_the_weights(benchmark, tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    source, heads = DENSE, None
    if kind != "gpt2":
        heads = 8 if "wide" in kind else 4
        model = llama_model(hidden_size=64, num_attention_heads=heads, intermediate_size=96, head_dim=16)
        model.save_pretrained(source := tmp_path / "model")
    benchmark("gguf_models").write(source, tmp_path / "gguf")
    weights = {name: values.float() for name, values in load_file(source / "model.safetensors").items()}
    files = {name: gguf.GGUFReader(tmp_path / "gguf" / f"{name}.gguf") for name in ("float16", "Q8_0")}
    for name, file in files.items():
        assert len(file.tensors) == len(weights)
        found = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in file.tensors}
        if kind == "gpt2":
            pairs = [("blk.1.attn_qkv.weight", weights["transformer.h.1.attn.c_attn.weight"].T)]
            pairs += [("token_embd.weight", weights["transformer.wte.weight"])]
            pairs += [("blk.0.ffn_up.bias", weights["transformer.h.0.mlp.c_fc.bias"])]
        else:
            rotated = weights["model.layers.1.self_attn.k_proj.weight"].reshape(2, 2, 8, 64).transpose(1, 2)
            pairs = [("blk.1.attn_k.weight", rotated.reshape(32, 64))]
            pairs += [("blk.0.ffn_gate.weight", weights["model.layers.0.mlp.gate_proj.weight"])]
        for tensor, expected in pairs:
            largest = expected.abs().max().item()
            error = np.abs(found[tensor] - expected.numpy()).max()
            assert error <= largest * (0.0005 if name == "float16" else 0.005)


def test_what_llama_cpp_cannot_run_is_left_out_with_a_line(benchmark, folders, tmp_path, monkeypatch, capsys):
    inference, engines = benchmark("inference"), benchmark("inference_engines")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    models = {"compressed": folders["compressed"], "other": other, "6 layers": tmp_path / "not made"}
    assert inference.rewritten(benchmark("gguf_models"), tmp_path, models) == {}
    printed = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in printed] == ["compressed", "other"]
    assert "factored" in printed[0] and "bert" in printed[1]
    monkeypatch.setitem(engines.PACKAGES, "llama.cpp", "no_such_package")
    assert engines.missing("llama.cpp Q8_0") == "no_such_package" and engines.missing("native int8") is None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_llama_cpp_runs_the_same_model(benchmark, tmp_path, kind):
    pytest.importorskip("llama_cpp", exc_type=ImportError)
    engines, source = benchmark("inference_engines"), DENSE
    if kind == "llama":
        llama_model(hidden_size=64, head_dim=16, intermediate_size=96).save_pretrained(source := tmp_path / "model")
    benchmark("gguf_models").write(source, tmp_path / "gguf")
    text, lengths = list(range(1, 40)), engines.Lengths(prompt=5, new=12, prefill=39, score=39)
    native = engines.ENGINES["native"](source, 2, lengths)
    theirs = engines.ENGINES["llama.cpp float16"](tmp_path / "gguf", 2, lengths)
    assert theirs.score(text) == pytest.approx(native.score(text), rel=2e-3)
    assert theirs.generate(text[:5], 12) == native.generate(text[:5], 12) == theirs.generate(text[:5], 12)
    assert [theirs.prefill(text)] == native.generate(text, 1)
    eight = engines.ENGINES["llama.cpp Q8_0"](tmp_path / "gguf", 2, lengths)
    assert eight.score(text) == pytest.approx(native.score(text), rel=0.05)


def test_a_token_reads_all_weights_but_the_positions(benchmark, folders):
    inference = benchmark("inference")
    # 4 layers of width 256, a vocabulary of 8192 and 128 positions, in two bytes each.
    block = 12 * 256**2 + 13 * 256
    dense = 8192 * 256 + 4 * block + 2 * 256
    assert inference.weights_read(folders["dense"]) == 2 * dense
    embedding, layer = 8192 * 64 + 4, 4 * (128 * 256 + 2 * 4)
    compressed = dense - 8192 * 256 + embedding - 256 * 1024 + layer
    assert inference.weights_read(folders["compressed"]) == 2 * compressed
    assert inference.weights_read(folders["dense"], 1) == dense


def measured(decode, prefill, memory=1.0, read=1.0):
    times = {"decode seconds": decode, "prefill seconds": prefill, "first calls seconds": 0.0}
    times["bandwidth"] = {"read": read, "copy": 2 * read}
    return times | {"decode MB": memory, "prefill MB": memory, "generated": [1, 2]}


def test_median_times_and_the_largest_memory_are_kept(benchmark):
    inference = benchmark("inference")
    summary = inference.summary_of([measured(2.0, 3.0, 5.0), measured(1.0, 4.0, 4.0), measured(4.0, 1.0, 4.5)])
    assert (summary["decode seconds"], summary["prefill seconds"], summary["decode MB"]) == (2.0, 3.0, 5.0)
    assert inference.summary_of([measured(2.0, 3.0), {"failed": "so"}]) == {"failed": "so"}
    with pytest.raises(SystemExit, match="differ"):
        inference.summary_of([measured(1.0, 1.0), measured(1.0, 1.0) | {"generated": [1, 3]}])


def test_what_memory_gives_is_compared_run_by_run(benchmark, folders):
    inference = benchmark("inference")
    needed = inference.weights_read(folders["dense"])
    # Slow while memory is slow: 0.5, 0.8 and 0.4 of what it reads then.
    runs = [measured(2.0, 1.0, read=needed), measured(1.25, 1.0, read=needed), measured(0.5, 1.0, read=5 * needed)]
    row = inference.row("dense", "native", inference.summary_of(runs), folders["dense"], 32)
    assert row["ms/token"] == 1250 and row["of read"] == pytest.approx(0.5) and row["of limit"] == pytest.approx(0.25)


def test_ratios_are_of_speeds_and_leave_failures_out(benchmark):
    best = {
        ("dense", "native"): measured(2.0, 2.0),
        ("compressed", "native"): measured(1.0, 4.0),
        ("compressed", "torch eager"): measured(3.0, 2.0),
        ("compressed", "torch compiled"): {"failed": "so"},
    }
    rows = list(benchmark("inference").ratios(best))
    assert [(row["tokens/s of"], row["over"], row["decode"], row["prefill"]) for row in rows] == [
        ("compressed, native", "dense, native", 2.0, 0.5),
        ("compressed, native", "compressed, torch eager", 3.0, 0.5),
    ]


def test_instruction_sets_and_dtypes_are_compared_with_their_own(benchmark):
    inference = benchmark("inference")
    engines = [*inference.with_isa("native", ["avx2", "baseline"]), *inference.with_isa("torch eager", ["avx2"])]
    assert engines == ["native at avx2", "native at baseline", "torch eager"]
    assert inference.with_isa("native int8", []) == ["native int8"]
    models = ["dense, float32", "65% budget, float32", "dense, float16"]
    speeds = {"native at avx2": 4.0, "native at baseline": 1.0, "torch eager": 2.0}
    best = {
        (model, engine): measured(1 / (speed * factor), 1.0)
        for model, factor in zip(models, (1.0, 3.0, 5.0), strict=True)
        for engine, speed in speeds.items()
    }
    rows = {(row["tokens/s of"], row["over"]): row["decode"] for row in inference.ratios(best, models, engines)}
    assert rows["65% budget, float32, native at avx2", "dense, float32, native at avx2"] == pytest.approx(3)
    assert rows["dense, float16, native at avx2", "dense, float32, native at avx2"] == pytest.approx(5)
    assert rows["dense, float16, native at avx2", "dense, float16, native at baseline"] == pytest.approx(4)
    assert rows["dense, float32, native at baseline", "dense, float32, torch eager"] == pytest.approx(0.5)


def test_layers_and_bandwidth_are_measured(benchmark):
    layers = benchmark("inference_layers")
    rows = list(layers.measure_layers(list(layers.LAYERS), 1, torch.get_num_threads(), True))
    assert len(rows) == 2 * (3 + 3 + 2)
    dense = {(row["layer"], row["rows"]): row for row in rows if row["method"] == "dense"}
    for row in rows:
        own = dense[row["layer"], row["rows"]]
        assert row["dense / method"] == pytest.approx(own["milliseconds"] / row["milliseconds"])
        # A half, and the bias; a quarter of the head.
        share = row["weights MB"] / own["weights MB"]
        assert share == 1 if row is own else share == pytest.approx(0.25 if "head" in row["layer"] else 0.5, rel=0.02)
    assert all(math.isfinite(speed) and speed > 0 for speed in layers.measure_bandwidth(2, True).values())


@pytest.mark.long
def test_it_runs_in_fresh_processes(benchmark):
    inference = benchmark("inference")
    parser = argparse.ArgumentParser()
    inference.add_options(parser)
    arguments = "--quick --repetitions 2 --passes 1 --new-tokens 8 --engines native --models dense compressed --layers"
    rows = list(inference.run(parser.parse_args(arguments.split())))
    assert [row.get("bandwidth") for row in rows[:2]] == ["read", "copy"]
    assert all(0 < row["least"] <= row["GB/s"] <= row["most"] for row in rows[:2])
    assert [(row["model"], row["engine"]) for row in rows[2:4]] == [("dense", "native"), ("compressed", "native")]
    assert all(row["prefill tokens/s"] == pytest.approx(32 / row["prefill seconds"]) for row in rows[2:4])
    assert [row["over"] for row in rows[4:]] == ["dense, native"]
