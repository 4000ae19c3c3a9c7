"""Copies of a checkpoint that differ from it in one thing."""

import json
import shutil

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def copied(source, folder):
    """A copy of a checkpoint, without texts that lie beside it."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.txt"))
    return folder


def with_tensors(folder, change):
    """Changes the dict of the tensors in a folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def with_json(folder, name, change):
    """Changes the contents of a JSON file in a folder."""
    data = json.loads((folder / name).read_text(encoding="utf-8"))
    change(data)
    (folder / name).write_text(json.dumps(data), encoding="utf-8")
