"""Checkpoints of other programs become ours, with the logits of the dense products."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.foreign import dense, krony, out_by_in, prefixed, tq
from helpers.processes import run_script
from tqcompressor import NativeModel, convert_checkpoint, expand_checkpoint, inspect
from tqcompressor.cli import main as cli
from tqcompressor.conversion.convert import report_of
from tqcompressor.conversion.gpt2_layouts import read_gpt2
from tqcompressor.errors import CheckpointError, DestinationError, DtypeError, NonFiniteError, TQError

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
IDS = torch.arange(3 * 11).reshape(3, 11) * 7 % 104


def nanogpt(**changes):
    """`(tensors, dense model)` of nanoGPT, of which the maps are out × in and the head is stored."""
    model, tensors = dense(**changes)
    return prefixed(out_by_in({**tensors, "lm_head.weight": tensors["wte.weight"]})), model


def without_biases():
    tensors, model = nanogpt()
    for name, tensor in model.named_parameters():
        if name.endswith(".bias"):
            tensor.data.zero_()
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}, model


def published(**changes):
    """A plain GPT-2 as the first files of transformers have it: no prefix, causal masks, no head."""
    model, tensors = dense(**changes)
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril().byte() for layer in (0, 1)}
    return {**tensors, **masks, "h.0.attn.masked_bias": torch.tensor(-1e4)}, model


LAYOUTS = {
    "TQ": lambda: tq(),
    "TQ, other sizes": lambda: tq(
        block=(4, 2), rank=1, levels=(4,), layers=(0, 1), n_embd=48, n_layer=2, vocab_size=105
    ),
    "TQ, three levels": lambda: tq(block=(1, 8), rank=2, levels=(2, 4, 2), layers=(0, 2), n_embd=64, n_layer=3),
    "TQ, tied": lambda: tq(levels=(2, 1), tied=True),
    "TQ, rank beyond what is needed": lambda: tq(block=(1, 2), rank=5),
    "TQ, dense embedding": lambda: tq(levels=(), tied=True),
    "Krony": lambda: krony(),
    "Krony, one factor": lambda: krony(split=(16, 128), rank=1, layers=(1,)),
    "Krony, large first factors": lambda: krony(split=(32, 64), rank=2, n_embd=64, n_layer=2),
    "Krony, rank beyond what is needed": lambda: krony(split=(1, 2), rank=6),
    "old Krony": lambda: krony(old=True),
    "old Krony, other sizes": lambda: krony(split=(8, 4), rank=12, old=True, n_embd=48, n_layer=1, layers=(0,)),
    "old Krony, head left out": lambda: krony(old=True, tied_head=False),
    "nanoGPT": nanogpt,
    "nanoGPT without biases": without_biases,
    "GPT-2": published,
    "GPT-2, another inner width": lambda: published(n_inner=96),
    "GPT-2, head of its own": lambda: (lambda pair: (prefixed(pair[1]), pair[0]))(dense(tie_word_embeddings=False)),
}


def saved(folder, tensors, model, name="model.pt"):
    """A file with a config beside it that has the heads and what else is in no tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": model.config.n_head}))
    return folder / name


def logits(folder, ids=IDS):
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits.numpy()


def expected_of(model):
    with torch.no_grad():
        return model(IDS).logits.numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_logits_are_those_of_the_dense_product(layout, tmp_path):
    tensors, model = LAYOUTS[layout]()
    report = convert_checkpoint(saved(tmp_path, tensors, model), tmp_path / "out", progress=False)
    expected = expected_of(model)
    assert np.allclose(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    native = NativeModel.from_pretrained(tmp_path / "out")
    assert np.allclose(native.logits(IDS.numpy()), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert report.parameters_after == native.parameters
    assert report.parameters_before == sum(parameter.numel() for parameter in model.parameters())
    if report.matrices[0].spec is not None:
        assert report == inspect(tmp_path / "out") and "are left" in str(report)
        expand_checkpoint(tmp_path / "out", tmp_path / "dense", progress=False)
        assert np.allclose(logits(tmp_path / "dense"), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_fresh_process_loads_it(tmp_path):
    code = "import sys, numpy, torch, tqcompressor, transformers\nids = torch.tensor(numpy.load(sys.argv[1]))\n"
    code += "for folder in sys.argv[2:]:\n    model = transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
    code += "    numpy.save(folder + '/logits.npy', model.eval()(ids).logits.detach().numpy())\n"
    np.save(tmp_path / "ids.npy", IDS.numpy())
    models = {}
    for layout in ("TQ", "Krony", "GPT-2"):
        tensors, model = LAYOUTS[layout]()
        convert_checkpoint(saved(tmp_path / f"{layout} source", tensors, model), tmp_path / layout, progress=False)
        models[layout] = model
    folders = [tmp_path / layout for layout in models]
    run_script(code, tmp_path / "ids.npy", *folders, warm="transformers")
    for layout, model in models.items():
        expected = expected_of(model)
        assert np.allclose(np.load(tmp_path / layout / "logits.npy"), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tensors: {"model": tensors, "optimizer": {"state": {}}, "iter_num": 3},
        lambda tensors: {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}},
        lambda tensors: {"state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}, "epoch": 2},
        lambda tensors: {"model": {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}},
        lambda tensors: {"model": {"state_dict": {f"module._orig_mod.{n}": t for n, t in tensors.items()}}},
        lambda tensors: {n.replace("h.0.", "h.0._orig_mod."): t for n, t in tensors.items()},
        lambda tensors: {
            name: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        },
    ],
)
def test_wrappers_are_taken_off(wrapped, tmp_path):
    tensors, model = tq()
    convert_checkpoint(saved(tmp_path, wrapped(tensors), model), tmp_path / "out", progress=False)
    plain = read_gpt2(tensors, tmp_path)
    assert [matrix.name for matrix in plain.matrices] == [matrix.name for matrix in inspect(tmp_path / "out").matrices]
    assert np.allclose(NativeModel.from_pretrained(tmp_path / "out").logits(IDS.numpy()), expected_of(model), atol=1e-2)


def test_the_older_format_of_torch_is_read(tmp_path):
    tensors, model = published()
    path = saved(tmp_path, {}, model)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    convert_checkpoint(path, tmp_path / "out", progress=False)
    assert np.allclose(logits(tmp_path / "out"), expected_of(model), atol=1e-4)


def sharded(folder, tensors, model):
    """A folder with two shards, their index, a tokenizer and a licence."""
    saved(folder, dict(list(tensors.items())[::2]), model, "pytorch_model-00001-of-00002.bin")
    torch.save(dict(list(tensors.items())[1::2]), folder / "pytorch_model-00002-of-00002.bin")
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    places = {name: names[number % 2] for number, name in enumerate(tensors)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name in ("tokenizer.json", "LICENSE"):
        (folder / name).write_bytes((TINY / "tokenizer.json").read_bytes())
    return folder


@pytest.mark.parametrize("layout", ["GPT-2", "TQ", "old Krony"])
def test_shards_and_files_beside_them(layout, tmp_path):
    tensors, model = LAYOUTS[layout]()
    folder = sharded(tmp_path / "source", tensors, model)
    convert_checkpoint(folder, tmp_path / "out", progress=False, max_shard_size="40kB")
    expected = expected_of(model)
    assert np.allclose(logits(tmp_path / "out"), expected, atol=1e-4 * np.abs(expected).max())
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "LICENSE", "model.safetensors.index.json", "config.json"} <= files
    assert not any(name.endswith(".bin") or name.startswith("pytorch") for name in files)
    index = folder / "pytorch_model.bin.index.json"
    # Of a file, only what belongs to a checkpoint is copied.
    convert_checkpoint(index, tmp_path / "again", progress=False)
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert "tokenizer.json" in files and "LICENSE" not in files


@pytest.mark.parametrize("missing", ["shard", "tensor", "index"])
def test_an_incomplete_set_of_shards_is_refused(missing, tmp_path):
    tensors, model = published()
    folder = sharded(tmp_path / "source", tensors, model)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    if missing == "shard":
        shard.unlink()
    elif missing == "tensor":
        torch.save({name: tensor for name, tensor in tensors.items() if "h.1" in name}, shard)
    else:
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"wte.weight": "../elsewhere.bin"}}')
    named = {"shard": shard.name, "tensor": shard.name, "index": "pytorch_model.bin.index.json"}[missing]
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        convert_checkpoint(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_heads_come_from_the_config_the_file_or_the_width(tmp_path):
    def heads(out):
        return json.loads((tmp_path / out / "config.json").read_text())["n_head"]

    tensors, _ = nanogpt(n_embd=128, n_head=8)
    torch.save(tensors, tmp_path / "plain.pt")
    with pytest.warns(UserWarning, match="2 heads, which is width / 64.*gelu_new"):
        convert_checkpoint(tmp_path / "plain.pt", tmp_path / "width")
    torch.save({"model": tensors, "model_args": {"n_head": 16, "bias": True}}, tmp_path / "nano.pt")
    with pytest.warns(UserWarning, match="gelu_new"):
        convert_checkpoint(tmp_path / "nano.pt", tmp_path / "file")
    (tmp_path / "mine.json").write_text('{"n_head": 4, "activation_function": "gelu", "resid_pdrop": 0.0}')
    report = convert_checkpoint(tmp_path / "nano.pt", tmp_path / "given", config=tmp_path / "mine.json")
    assert (heads("width"), heads("file"), heads("given"), report.note) == (2, 16, 4, None)
    assert json.loads((tmp_path / "given" / "config.json").read_text())["activation_function"] == "gelu"
    (tmp_path / "config.json").write_text('{"n_head": 32}')
    with pytest.warns(UserWarning, match="gelu_new"):
        convert_checkpoint(tmp_path / "plain.pt", tmp_path / "beside")
    assert heads("beside") == 32

    narrow, _ = tq()
    torch.save(narrow, tmp_path / "narrow.pt")
    (tmp_path / "config.json").unlink()
    wrong = {
        None: "width 32 is no multiple of 64",
        '{"n_head": 5}': "n_head: expected a divisor of the width 32, got 5",
        '{"n_head": true}': "n_head",
        '{"n_head": 4, "n_layer": 12}': "n_layer: expected 2 as in the tensors",
        '{"model_type": "llama"}': "expected the config of a GPT-2, got that of a llama",
        "[]": "expected a JSON object",
        "{": "not JSON",
    }
    for text, words in wrong.items():
        path = None
        if text is not None:
            path = tmp_path / "wrong.json"
            path.write_text(text)
        with pytest.raises(CheckpointError, match=words):
            convert_checkpoint(tmp_path / "narrow.pt", tmp_path / "none", config=path)
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        convert_checkpoint(tmp_path / "narrow.pt", tmp_path / "none", config=tmp_path / "absent.json")
    assert not (tmp_path / "none").exists()


FC = "transformer.h.1.mlp.c_fc"
FAULTS = {
    "a missing factor": ("TQ", lambda t: t.pop(f"{FC}.B"), CheckpointError, r"c_fc\.B' is missing"),
    "a missing permutation": ("TQ", lambda t: t.pop(f"{FC}.q"), CheckpointError, r"c_fc\.q' is missing"),
    "a missing bias": ("TQ", lambda t: t.pop(f"{FC}.b"), CheckpointError, r"c_fc\.bias' is missing"),
    "a missing level": ("TQ", lambda t: t.pop("transformer.wte.embedding.p"), CheckpointError, r"wte\.embedding\.p"),
    "a missing side": ("Krony", lambda t: t.pop(f"{FC}_1"), CheckpointError, "c_fc_1' is missing"),
    "a missing term": ("old Krony", lambda t: t.pop(f"{FC}_1_0"), CheckpointError, "c_fc_1_0' is missing"),
    "a missing layer": ("Krony", lambda t: t.pop(f"{FC}_0") is t.pop(f"{FC}_1"), CheckpointError, r"c_fc\.weight"),
    "a missing norm": ("GPT-2", lambda t: t.pop("ln_f.weight"), CheckpointError, r"'ln_f\.weight' is missing"),
    "a layer too many": ("GPT-2", lambda t: t.update({"h.9.ln_1.weight": torch.ones(32)}), CheckpointError, r"h\.2\."),
    "a shape that does not fit": (
        "TQ",
        lambda t: t.update({f"{FC}.A": t[f"{FC}.A"][:, :3]}),
        CheckpointError,
        r"c_fc\.A' shape \(4, 3, 16\).*c_fc\.B' shape \(4, 2, 4\)",
    ),
    "a term too few": ("Krony", lambda t: t.update({f"{FC}_0": t[f"{FC}_0"][:2]}), CheckpointError, "c_fc_0.*c_fc_1"),
    "terms of several shapes": (
        "old Krony",
        lambda t: t.update({f"{FC}_1_1": torch.ones(2, 2)}),
        CheckpointError,
        r"c_fc_1_1': expected shape \(8, 16\), got shape \(2, 2\)",
    ),
    "a scalar factor": ("Krony", lambda t: t.update({f"{FC}_0": torch.tensor(1.0)}), CheckpointError, "c_fc_0"),
    "an empty tensor": ("GPT-2", lambda t: t.update({"wte.weight": torch.ones(0, 32)}), CheckpointError, "wte"),
    "two widths": ("GPT-2", lambda t: t.update({"wpe.weight": torch.ones(32, 8)}), CheckpointError, "wpe.weight"),
    "no permutation": ("TQ", lambda t: t[f"{FC}.p_inv"].fill_(0), CheckpointError, r"c_fc\.p_inv.*permutation"),
    "a permutation of floats": (
        "TQ",
        lambda t: t.update({"transformer.wte.p": t["transformer.wte.p"].float()}),
        CheckpointError,
        r"wte\.p'.*permutation",
    ),
    "an unknown tensor": ("Krony", lambda t: t.update({f"{FC}_scale": torch.ones(1)}), CheckpointError, "c_fc_scale"),
    "a weight beside its factors": (
        "TQ",
        lambda t: t.update({f"{FC}.weight": torch.ones(32, 128)}),
        CheckpointError,
        r"c_fc\.weight'.*no part",
    ),
    "two names": (
        "GPT-2",
        lambda t: t.update({"transformer.wte.weight": t["wte.weight"]}),
        CheckpointError,
        "two names",
    ),
    "another head": ("Krony", lambda t: t.update({"lm_head.weight": torch.ones(3, 32)}), CheckpointError, "lm_head"),
    "NaN": ("TQ", lambda t: t[f"{FC}.A"].fill_(float("nan")), NonFiniteError, r"c_fc\.A"),
    "integers": ("Krony", lambda t: t.update({f"{FC}_0": t[f"{FC}_0"].to(torch.int8)}), DtypeError, "c_fc_0.*int8"),
    "a sparse tensor": ("GPT-2", lambda t: t.update({"wte.weight": t["wte.weight"].to_sparse()}), DtypeError, "wte"),
    "doubles": ("GPT-2", lambda t: t.update({"wpe.weight": t["wpe.weight"].double()}), DtypeError, "wpe.*float64"),
    "another family": (
        "GPT-2",
        lambda t: (t.clear(), t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)})),
        CheckpointError,
        "expected the tensors of a GPT-2.*q_proj",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(fault, tmp_path):
    layout, spoil, error, words = FAULTS[fault]
    tensors, model = LAYOUTS[layout]()
    spoil(tensors)
    path = saved(tmp_path, tensors, model)
    with pytest.raises(error, match=words):
        convert_checkpoint(path, tmp_path / "out", progress=False)
    assert {each.name for each in tmp_path.iterdir()} == {"model.pt", "config.json"}


class Code:
    def __reduce__(self):
        return (os.mkdir, ("was run",))


def test_files_that_hold_no_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors, _ = published()
    torch.save({"model": tensors, "config": Code()}, "code.pt")
    torch.save(tensors, "whole.pt")
    whole = Path("whole.pt").read_bytes()
    Path("truncated.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("hello")
    Path("empty.pt").write_bytes(b"")
    Path("pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    torch.save([1, 2], "list.pt")
    torch.save({"epoch": 3, "weights": 4}, "numbers.pt")
    itself = {}
    itself["model"] = itself
    torch.save(itself, "itself.pt")
    Path("model.safetensors").write_bytes(b"")
    wrong = {
        "code.pt": "holds code.*which is not run",
        "truncated.pt": "damaged, truncated",
        "text.pt": "damaged, truncated",
        "empty.pt": "is empty",
        "pointer.pt": "git lfs pull",
        "list.pt": "expected a dict of the tensors of a model.*got list",
        "numbers.pt": "'epoch', 'weights'",
        "itself.pt": "expected a dict of the tensors",
        "model.safetensors": "is safetensors already",
        "absent.pt": "no such file",
        "./absent": "no such directory",
        ".": "holds several files of weights: give one of code.pt",
    }
    for name, words in wrong.items():
        with pytest.raises(CheckpointError, match=words) as caught:
            convert_checkpoint(name, "out", progress=False)
        assert name in str(caught.value)
    assert not Path("out").exists() and not Path("was run").exists()


@pytest.mark.parametrize("archive", [True, False])
def test_damaged_files_are_refused_or_read(archive, tmp_path):
    tensors, model = tq()
    path = saved(tmp_path, {}, model)
    torch.save(tensors, path, _use_new_zipfile_serialization=archive)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for trial in range(24):
        damaged = bytearray(whole)
        if trial % 2:
            damaged = damaged[: rng.integers(len(whole))]
        else:
            damaged[rng.integers(3000)] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            convert_checkpoint(path, tmp_path / f"out{trial}", progress=False)
        except TQError:
            assert not (tmp_path / f"out{trial}").exists()


def test_a_folder_is_searched_for_the_file(tmp_path):
    tensors, model = krony()
    path = saved(tmp_path / "source", tensors, model, "ckpt.pt")
    torch.save({}, path.with_name("optimizer.pt"))
    torch.save({}, path.with_name("training_args.bin"))
    convert_checkpoint(path.parent, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").glob("*.pt"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="found none"):
        convert_checkpoint(empty, tmp_path / "none")
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert_checkpoint(TINY, tmp_path / "none")


def test_a_hub_id_is_fetched_by_huggingface_hub(tmp_path, monkeypatch):
    tensors, model = tq()
    snapshot = saved(tmp_path / "snapshot", tensors, model, "pytorch_model.bin").parent
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(snapshot)
    )
    monkeypatch.chdir(tmp_path)
    assert convert_checkpoint("me/tq", tmp_path / "out", progress=False).source == "me/tq"
    assert "*.bin" in asked[0] and "*.safetensors" not in asked[0]


def test_a_taken_destination_is_refused(tmp_path):
    tensors, model = tq()
    path = saved(tmp_path / "source", tensors, model)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    for out, overwrite in ((mine, False), (mine, True), (path.parent, False), (path.parent, True), (path, True)):
        with pytest.raises(DestinationError):
            convert_checkpoint(path, out, overwrite=overwrite)
    convert_checkpoint(path, tmp_path / "out", progress=False)
    with pytest.raises(DestinationError, match="not empty"):
        convert_checkpoint(path, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    report = convert_checkpoint(path, tmp_path / "out", dtype="float16", overwrite=True, progress=False)
    assert report.dtype == "float16" and len((tmp_path / "out" / "model.safetensors").read_bytes()) < len(before)
    assert (mine / "thesis.tex").read_text() == "mine" and path.exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_each_dtype_is_kept_or_made(dtype, tmp_path):
    tensors, model = tq()
    floats = {
        name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    convert_checkpoint(saved(tmp_path / "own", floats, model), tmp_path / "kept", progress=False)
    convert_checkpoint(saved(tmp_path / "wide", tensors, model), tmp_path / "made", dtype=dtype, progress=False)
    kept, made = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "made"))
    # The product of the embedding's factors is rounded once, and not twice.
    assert len(kept) == len(made)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "kept").dtype == getattr(torch, dtype)
    if dtype == "float16":
        tensors["transformer.wpe.weight"][0, 0] = 1e6
        with pytest.raises(DtypeError, match=r"wpe\.weight.*float16 can hold"):
            convert_checkpoint(saved(tmp_path, tensors, model), tmp_path / "none", dtype=dtype)
    with pytest.raises(TQError, match="int8"):
        convert_checkpoint(tmp_path / "own", tmp_path / "none", dtype="int8")


def test_on_the_command_line(tmp_path, capsys):
    tensors, model = tq()
    path = saved(tmp_path, tensors, model)
    assert cli.main(["convert", str(path), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "written to" in shown and "h.1.mlp.c_fc" in shown and "lost energy" not in shown
    assert cli.main(["convert", str(path), "--out", str(tmp_path / "json"), "--json", "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters_after"] == inspect(tmp_path / "out").parameters_after
    assert cli.main(["convert", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_the_published_sizes_have_the_published_parameters():
    """81,336,388 parameters, and those of the head, 50257 · 768, which is dense and untied."""

    def zeros(*shape):
        return torch.zeros(1).expand(shape)

    width, inner = 768, 3072
    tensors = {"wte.embedding.embedding.weight": zeros(50257, 192), "wpe.weight": zeros(1024, width)}
    tensors |= {"wte.embedding.B": zeros(1, 2), "wte.embedding.p": torch.arange(384)}
    tensors |= {"wte.B": zeros(1, 2), "wte.p": torch.arange(width)}
    for layer in range(12):
        block = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        if layer % 2 == 0:
            block |= {"mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}
        else:
            for name, (rows, columns), (m2, n2) in (
                ("c_fc", (width, inner), (2, 4)),
                ("c_proj", (inner, width), (4, 2)),
            ):
                factors = {"A": zeros(4, columns // n2, rows // m2), "B": zeros(4, m2, n2), "b": zeros(columns)}
                factors |= {"p_inv": torch.arange(rows), "q": torch.arange(columns)}
                tensors |= {f"h.{layer}.mlp.{name}.{which}": tensor for which, tensor in factors.items()}
        for name, shape in block.items():
            tensors |= {f"h.{layer}.{name}.weight": zeros(*shape), f"h.{layer}.{name}.bias": zeros(shape[1])}
        for name in ("ln_1", "ln_2"):
            tensors |= {f"h.{layer}.{name}.{which}": zeros(width) for which in ("weight", "bias")}
    tensors |= {f"ln_f.{which}": zeros(width) for which in ("weight", "bias")}
    tensors = prefixed(tensors)
    assert report_of(read_gpt2(tensors, Path("tied"))).parameters_after == 81_336_388
    tensors["lm_head.weight"] = zeros(50257, width)
    report = report_of(read_gpt2(tensors, Path("published")))
    assert report.parameters_after == 81_336_388 + 50257 * 768 == 119_933_764
