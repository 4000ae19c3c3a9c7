"""Compressing checkpoints on disk: the stored tensors, the copied files, and the report."""

import json
import re
import sys
import types

import numpy as np
import pytest
import tqcompressor
from helpers.checkpoints import Checkpoint, config, decode, encode, listing, read_safetensors
from tqcompressor import _core, errors
from tqcompressor.compression.checkpoint import compress_checkpoint, inspect
from tqcompressor.compression.report import CompressionReport
from tqcompressor.config import KroneckerSpec

CONFIG = config(
    {
        "wte": ((1, 4), 2, "columns"),
        "h.0.attn.c_attn": ((2, 4), 3, "both"),
        "h.1.mlp.c_fc": ((2, 4), 8, "rows"),
        "h.1.mlp.c_proj": ((4, 2), 4, "none"),
    }
)


def dense(tensors, module, embedding):
    """The in × out matrix that a stored module computes with, by the definition of its forward pass."""
    values = {which: decode(*tensors[f"{module}.{which}"]).astype(np.float64) for which in "AB"}
    matrix = sum(np.kron(a, b) for a, b in zip(values["A"], values["B"], strict=True))
    if f"{module}.input_permutation" in tensors:
        gathered = decode(*tensors[f"{module}.input_permutation"])
        # An embedding looks up position gathered[id]; a linear map takes x[gathered], so row gathered[i] lies at i.
        matrix = matrix[gathered] if embedding else matrix[np.argsort(gathered)]
    if f"{module}.output_permutation" in tensors:
        matrix = matrix[:, decode(*tensors[f"{module}.output_permutation"])]
    return matrix


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_factors_stand_for_their_matrices_and_the_rest_is_unchanged(tmp_path, prefix, dtype):
    source = Checkpoint(prefix, dtype)
    report = compress_checkpoint(source.write(tmp_path / "in"), tmp_path / "out", CONFIG)
    stored = read_safetensors(tmp_path / "out")
    assert [matrix.name for matrix in report.matrices] == [
        "wte",
        *(f"h.0.attn.c_attn.{part}" for part in "qkv"),
        "h.1.mlp.c_fc",
        "h.1.mlp.c_proj",
    ]
    for matrix in report.matrices:
        weight = source.values(matrix.tensor).astype(np.float64)
        part = matrix.name.rsplit(".", 1)[-1]
        if part in ("q", "k", "v"):
            weight = np.split(weight, 3, axis=1)["qkv".index(part)]
        approximation = dense(stored, prefix + matrix.name, matrix.name == "wte")
        lost = np.sum((weight - approximation) ** 2) / np.sum(weight**2)
        assert lost == pytest.approx(matrix.lost_energy, abs=1e-6 if dtype == "F32" else 2e-2)
        assert (lost < 1e-4) == (matrix.rank == matrix.block[0] * matrix.block[1])
        names = [f"{prefix}{matrix.name}.{side}_permutation" for side in ("input", "output")]
        assert [name in stored for name in names] == [
            matrix.permute in ("rows", "both"),
            matrix.permute in ("columns", "both"),
        ]
    for tensor in report.untouched:
        assert stored[tensor.tensor] == source.tensors[tensor.tensor]
    # No dense weight is left; the guard has the name of the first one.
    left = [matrix.tensor for matrix in report.matrices if matrix.tensor in stored]
    assert left == [f"{prefix}wte.weight"] and stored[left[0]] == ("U8", [1], b"\0")
    floating = [np.prod(shape) for dtype, shape, _ in stored.values() if dtype not in ("I64", "U8")]
    assert sum(floating) == report.parameters_after


def test_factors_are_those_of_decompose(tmp_path):
    source = Checkpoint()
    specs = {"h.0.mlp.c_fc": ((2, 4), 3, "both")}
    compress_checkpoint(source.write(tmp_path / "in"), tmp_path / "out", config(specs, seed=5))
    stored = read_safetensors(tmp_path / "out")
    spec = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["specs"]["h.0.mlp.c_fc"]
    assert spec == {"block": [2, 4], "rank": 3, "permute": "both"}
    weight = source.values("transformer.h.0.mlp.c_fc.weight")
    options = {"effort": "fast", "seed": 5, "threads": None, "progress": None}
    (term,) = _core.fit_many([weight], ["w"], [KroneckerSpec.from_dict(spec)], [(None, None)], **options)[0].terms
    module = "transformer.h.0.mlp.c_fc"
    orders = {"input_permutation": term.row_permutation, "output_permutation": np.argsort(term.column_permutation)}
    for which, values in {"A": term.a, "B": term.b, **orders}.items():
        assert np.array_equal(decode(*stored[f"{module}.{which}"]), values), which


def test_heads_of_every_kind_are_stored_out_by_in(tmp_path):
    source = Checkpoint()
    source.config["tie_word_embeddings"] = False
    source.add("lm_head.weight", (20, 8), prefix="")
    source.add("score.weight", (4, 8), prefix="")
    specs = {"lm_head": ((2, 4), 8, "both"), "score": ((8, 1), 4, "none")}
    report = compress_checkpoint(source.write(tmp_path / "in"), tmp_path / "out", config(specs))
    assert [(matrix.name, matrix.shape) for matrix in report.matrices] == [("lm_head", (8, 20)), ("score", (8, 4))]
    stored = read_safetensors(tmp_path / "out")
    for name in ("lm_head", "score"):
        assert dense(stored, name, False) == pytest.approx(source.values(f"{name}.weight").T, abs=1e-5)


def test_a_stored_tied_head_goes_with_the_embedding(tmp_path):
    source = Checkpoint()
    source.tensors["lm_head.weight"] = source.tensors["transformer.wte.weight"]
    report = compress_checkpoint(source.write(tmp_path / "in"), tmp_path / "out", CONFIG)
    assert "lm_head.weight" not in read_safetensors(tmp_path / "out")
    assert report.parameters_before == sum(np.prod(shape) for _, shape, _ in Checkpoint().tensors.values())


def test_old_causal_masks_are_not_carried_along(tmp_path):
    source = Checkpoint(prefix="")
    expected = inspect(source.write(tmp_path / "in"), CONFIG)
    source.add("h.0.attn.bias", (1, 1, 6, 6))
    report = compress_checkpoint(source.write(tmp_path / "in"), tmp_path / "out", CONFIG)
    assert report.parameters_before == expected.parameters_before
    assert report.parameters_after == expected.parameters_after
    assert "h.0.attn.bias" not in read_safetensors(tmp_path / "out")


def test_shards_in_and_out(tmp_path):
    source = Checkpoint()
    one, three = source.write(tmp_path / "one"), source.write(tmp_path / "three", shards=3)
    compress_checkpoint(one, tmp_path / "from one", CONFIG)
    compress_checkpoint(three, tmp_path / "from three", CONFIG, max_shard_size="2kB")
    files = listing(tmp_path / "from three")
    count = sum(name.endswith(".safetensors") for name in files)
    assert count > 1 and f"model-00001-of-{count:05}.safetensors" in files
    assert read_safetensors(tmp_path / "from three") == read_safetensors(tmp_path / "from one")
    index = json.loads((tmp_path / "from three" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in read_safetensors(tmp_path / "from three" / file)
    assert set(index["weight_map"]) == set(read_safetensors(tmp_path / "from three"))


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_dtype_converts_every_floating_tensor_and_the_config(tmp_path, dtype, stored):
    source = Checkpoint()
    source.config["dtype"] = "float32"
    compress_checkpoint(source.write(tmp_path / "in"), tmp_path / "out", CONFIG, dtype=dtype)
    tensors = read_safetensors(tmp_path / "out")
    assert {entry[0] for entry in tensors.values()} == {stored, "I64", "U8"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    name = "transformer.h.0.mlp.c_fc.weight"
    assert decode(*tensors[name]) == pytest.approx(source.values(name), rel=1e-2)


def test_other_files_go_along_and_weights_do_not(tmp_path):
    source = Checkpoint().write(tmp_path / "in")
    carried = ["tokenizer.json", "vocab.json", "generation_config.json"]
    left = ["pytorch_model.bin", "optimizer.pt", "README.md"]
    for name in carried + left:
        (source / name).write_text(f"---\nlicense: mit\n---\n{name}")
    (source / "onnx").mkdir()
    compress_checkpoint(source, tmp_path / "out", CONFIG)
    assert listing(tmp_path / "out") == [
        "README.md",
        "compression_report.json",
        "config.json",
        "generation_config.json",
        "lost_energy.svg",
        "model.safetensors",
        "tokenizer.json",
        "vocab.json",
    ]
    assert (tmp_path / "out" / "vocab.json").read_bytes() == (source / "vocab.json").read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    front = set(card.split("---\n")[1].splitlines())
    assert {"library_name: transformers", "license: mit", "- tqcompressor", "pipeline_tag: text-generation"} <= front
    assert "import tqcompressor" in card and "| `h.1.mlp.c_fc` | 8 × 32 | block 2×4, rank 8, permute rows |" in card
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_the_folders_of_a_sentence_transformers_model_go_along(tmp_path):
    source = Checkpoint().write(tmp_path / "in")
    files = {"1_Pooling/config.json": "{}", "2_Dense/model.safetensors": "its own weights", "other/notes.txt": "mine"}
    for name, text in files.items():
        (source / name).parent.mkdir()
        (source / name).write_text(text)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]
    (source / "modules.json").write_text(json.dumps(modules))
    kept = {"1_Pooling/config.json", "2_Dense/model.safetensors"}
    # Twice: what was carried may be overwritten.
    for _ in range(2):
        report = compress_checkpoint(source, tmp_path / "out", CONFIG, overwrite=True)
        assert kept | {"modules.json"} <= set(report.carried) and not (tmp_path / "out" / "other").exists()
        assert all((tmp_path / "out" / name).read_text() == files[name] for name in kept)
    for _ in range(2):
        tqcompressor.expand_checkpoint(tmp_path / "out", tmp_path / "dense", overwrite=True)
        assert all((tmp_path / "dense" / name).read_text() == files[name] for name in kept)
    # Someone else's file among them is not removed.
    (tmp_path / "out" / "1_Pooling" / "mine").mkdir()
    with pytest.raises(errors.DestinationError, match="mine"):
        compress_checkpoint(source, tmp_path / "out", CONFIG, overwrite=True)


def test_the_report_is_what_is_written_and_prints_as_a_table(tmp_path):
    source = Checkpoint().write(tmp_path / "in")
    report = compress_checkpoint(source, tmp_path / "out", CONFIG, seed=3)
    written = json.loads((tmp_path / "out" / "compression_report.json").read_text())
    assert report.to_dict() == written and json.loads(report.to_json()) == written
    assert CompressionReport.from_dict(written) == report
    assert (report.seed, report.effort, report.source) == (3, "fast", "in")
    # Neither names a folder of the machine that made them: they are published with the model.
    for name in ("compression_report.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    assert report.version == tqcompressor.__version__
    assert report.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size
    lines = str(report).splitlines()
    assert lines[0].split()[-3:] == ["lost", "energy", "seconds"]
    assert any(line.startswith("h.1.mlp.c_fc ") and " 8×32 " in line and " block 2×4, " in line for line in lines)
    assert f"{report.parameters_after:,}" in lines[-2] and "% of the parameters" in lines[-1]


def test_inspect_shows_the_plan_and_later_what_was_done(tmp_path):
    source = Checkpoint().write(tmp_path / "in")
    plan = inspect(source, CONFIG)
    assert listing(tmp_path) == ["in", "in/config.json", "in/model.safetensors"]
    report = compress_checkpoint(source, tmp_path / "out", CONFIG)
    assert (plan.parameters_before, plan.parameters_after) == (report.parameters_before, report.parameters_after)
    assert plan.untouched == report.untouched and plan.seconds is None
    assert [(m.name, m.parameters_after, m.lost_energy) for m in plan.matrices] == [
        (m.name, m.parameters_after, None) for m in report.matrices
    ]
    assert "lost energy" not in str(plan)
    assert inspect(tmp_path / "out") == report
    (tmp_path / "out" / "compression_report.json").unlink()
    with pytest.raises(errors.CheckpointError, match="compressed already"):
        inspect(tmp_path / "out")


def test_progress_ends_at_its_total(tmp_path):
    seen = []
    source = Checkpoint(width=64).write(tmp_path / "in")
    compress_checkpoint(source, tmp_path / "out", CONFIG, progress=lambda *counts: seen.append(counts))
    totals = {total for _, total in seen if total}
    assert len(totals) == 1, "the total is known from the start"
    assert sorted(seen) == seen and seen[-1] == (max(totals), max(totals))


def test_an_exception_in_progress_stops_the_job_and_nothing_is_left(tmp_path):
    source = Checkpoint().write(tmp_path / "in")

    def fail(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        compress_checkpoint(source, tmp_path / "out", CONFIG, progress=fail)
    # The job either ended before the cancellation or cleaned up after it.
    assert [name for name in listing(tmp_path) if ".tqcompressor" in name] == []


def test_overwrite_replaces_the_whole_directory(tmp_path):
    source = Checkpoint().write(tmp_path / "in")
    # Copied along, so that it belongs to the result.
    (source / "LICENCE.txt").write_text("free")
    compress_checkpoint(source, tmp_path / "out", CONFIG)
    (tmp_path / "out" / "pytorch_model.bin").write_text("old")
    with pytest.raises(errors.DestinationError, match="not empty"):
        compress_checkpoint(source, tmp_path / "out", CONFIG)
    assert (tmp_path / "out" / "pytorch_model.bin").exists()
    report = compress_checkpoint(source, tmp_path / "out", CONFIG, overwrite=True)
    assert report.carried == ("LICENCE.txt",)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("foreign", "named"),
    [
        ("thesis.tex", "thesis.tex"),
        (".git/HEAD", ".git"),
        ("data/model.safetensors", "data"),
        ("results.npz", "results.npz"),
        ("stages/1-one-shot/trained/plot.png", "stages/1-one-shot/trained/plot.png"),
        ("final/config.json", "final"),
    ],
)
def test_overwrite_replaces_nothing_but_a_checkpoint(tmp_path, foreign, named):
    """A compressed checkpoint, a dense one of transformers and a distillation may be replaced, with nothing else."""
    source = Checkpoint().write(tmp_path / "in")
    compress_checkpoint(source, tmp_path / "out", CONFIG)
    path = tmp_path / "out" / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(errors.DestinationError, match=f"holds '{re.escape(named)}'.*another directory"):
        compress_checkpoint(source, tmp_path / "out", CONFIG, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_destinations_in_missing_and_empty_directories(tmp_path):
    source = Checkpoint().write(tmp_path / "in")
    compress_checkpoint(source, tmp_path / "a" / "b", CONFIG)
    (tmp_path / "empty").mkdir()
    compress_checkpoint(source, tmp_path / "empty", CONFIG)
    assert listing(tmp_path / "a" / "b") == listing(tmp_path / "empty")


def test_a_hub_id_is_fetched_by_huggingface_hub(tmp_path, monkeypatch):
    snapshot = Checkpoint().write(tmp_path / "models--me--gpt2" / "snapshots" / "0123")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(snapshot)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    report = compress_checkpoint("me/gpt2", tmp_path / "out", CONFIG)
    assert asked[0][0] == "me/gpt2" and "*.safetensors" in asked[0][1] and "*.bin" not in asked[0][1]
    assert report.source == "me/gpt2" and "base_model: me/gpt2" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("source", ["./none", "/none/such", "none/such/thing", "~/none", "none\\such"])
def test_a_path_that_does_not_exist_is_never_looked_up_on_the_hub(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.ModuleType("huggingface_hub"))
    with pytest.raises(errors.CheckpointError, match=r"no such directory$"):
        inspect(source)


def test_without_huggingface_hub_a_missing_directory_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(errors.CheckpointError, match=r"none-such: no such directory .*install huggingface_hub"):
        inspect("none-such")


@pytest.mark.parametrize("size", ["", "5 apples", "-1GB", "0", 0, -5, True, "1e400GB"])
def test_shard_sizes_that_make_no_sense(tmp_path, size):
    with pytest.raises(errors.ConfigError, match="max_shard_size"):
        compress_checkpoint("in", tmp_path / "out", CONFIG, max_shard_size=size)


def test_a_zero_matrix_loses_nothing(tmp_path):
    source = Checkpoint()
    source.tensors["transformer.h.1.mlp.c_fc.weight"] = encode(np.zeros((8, 32)))
    report = compress_checkpoint(source.write(tmp_path / "in"), tmp_path / "out", CONFIG)
    assert {matrix.name: matrix.lost_energy for matrix in report.matrices}["h.1.mlp.c_fc"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"tqcompressor": None},
        {"parameters_before": "many"},
        {"matrices": [None]},
        {"matrices": [{"name": 1, "tensor": 2, "shape": 3, "parameters_before": 4, "parameters_after": 5, "rank": 6}]},
        {"untouched": [{"tensor": "a", "shape": [1], "parameters": None}]},
    ],
    ids=range(5),
)
def test_a_report_with_values_of_other_types_is_refused(tmp_path, change):
    compress_checkpoint(Checkpoint().write(tmp_path / "in"), tmp_path / "out", CONFIG)
    path = tmp_path / "out" / "compression_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(errors.CheckpointError, match=r"compression_report\.json: not a compression report"):
        inspect(tmp_path / "out")
