"""Every command names what is wrong with a file or a destination, and writes nothing."""

import json
from pathlib import Path

import pytest
from helpers.checkpoints import Checkpoint, encode, listing
from tqcompressor.cli import main as cli

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
TEXT = str(TINY / "heldout.txt")


def prefixed(folder):
    source = Checkpoint()
    source.tensors = {f"_orig_mod.{name}": tensor for name, tensor in source.tensors.items()}
    source.write(folder)


def transposed(folder):
    source = Checkpoint()
    source.tensors["transformer.h.0.mlp.c_fc.weight"] = encode(source.values("transformer.h.0.mlp.c_fc.weight").T)
    source.write(folder)


def pointer(folder):
    Checkpoint().write(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")


def marked(folder):
    source = Checkpoint().write(folder)
    (source / "config.json").write_text(json.dumps(Checkpoint().config), encoding="utf-8-sig")


def nameless(folder):
    source = Checkpoint()
    del source.config["model_type"]
    source.write(folder)


FAULTS = {
    prefixed: "names begin with '_orig_mod.'",
    transposed: "the orientation of nn.Linear",
    pointer: "a Git LFS pointer",
    marked: "byte order mark",
    nameless: 'add the line "model_type": "gpt2"',
}
READERS = {
    "compress": ["compress", "SOURCE", "--recipe", "tq-81m", "--out", "OUT"],
    "inspect": ["inspect", "SOURCE"],
    "evaluate": ["evaluate", "SOURCE", "--text", TEXT, "--engine", "native"],
    "evaluate in torch": ["evaluate", "SOURCE", "--text", TEXT, "--engine", "torch"],
    "calibrate in torch": ["calibrate", "SOURCE", "--text", TEXT, "--out", "OUT", "--engine", "torch"],
    "generate": ["generate", "SOURCE", "--prompt", "He"],
}


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_checkpoint(tmp_path, capsys, command, fault):
    fault(tmp_path / "in")
    before = listing(tmp_path)
    places = {"SOURCE": str(tmp_path / "in"), "OUT": str(tmp_path / "out")}
    assert cli.main([places.get(word, word) for word in READERS[command]]) == 2
    assert FAULTS[fault] in capsys.readouterr().err
    assert listing(tmp_path) == before


WRITERS = {
    "compress": ["compress", str(TINY), "--recipe", "tq-81m", "--out", "OUT"],
    "calibrate": ["calibrate", str(TINY), "--text", TEXT, "--engine", "native", "--out", "OUT"],
    "distill": ["distill", "--teacher", str(TINY), "--text", TEXT, "--out", "OUT", "--device", "cpu"],
}
NOWHERE = {
    "broken": "is a symbolic link to a place that does not exist",
    "broken/below": "is a symbolic link to a place that does not exist",
    "missing/../out": "before '..'",
}


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("destination", NOWHERE)
def test_a_destination_that_leads_nowhere(tmp_path, capsys, command, destination):
    (tmp_path / "broken").symlink_to("none-such")
    before = listing(tmp_path)
    assert cli.main([str(tmp_path / destination) if word == "OUT" else word for word in WRITERS[command]]) == 2
    assert NOWHERE[destination] in capsys.readouterr().err
    assert listing(tmp_path) == before


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_a_text_in_utf16(tmp_path, capsys, command, encoding):
    path = tmp_path / "text.txt"
    path.write_text("The old man looked at it.\n" * 500, encoding=encoding)
    options = ["--out", str(tmp_path / "out")] if command == "calibrate" else []
    assert cli.main([command, str(TINY), "--text", str(path), "--engine", "native", *options]) == 2
    assert f"{path}: UTF-16 text: save it as UTF-8" in capsys.readouterr().err
    assert listing(tmp_path) == ["text.txt"]
