"""Models and JSON in the folders of a distillation; markers of complete trainer checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.loading import load_pretrained
from ..utils.atomic_io import WholeFile, storage_errors, sync_folder
from ..utils.hub import StrPath
from ..utils.portable import sync


def load_model(source: StrPath) -> PreTrainedModel:
    """The model of a folder or hub id, compressed or not, in float32."""
    return load_pretrained(source, dtype=torch.float32)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a checkpoint of the model with its tokenizer."""
    # By its class: a run has a card of its own in place of that of the compression.
    type(model).save_pretrained(model, folder)
    tokenizer.save_pretrained(folder)


def weights_digest(model: PreTrainedModel) -> str:
    """32 hexadecimal digits: equal if and only if names, dtypes, shapes and values of all tensors are equal."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes `data` atomically."""
    with WholeFile(path) as file:
        file.write(json.dumps(data, indent=2).encode())


def read_json(path: Path) -> Any:
    """Reads a file of `write_json`."""
    return json.loads(path.read_text(encoding="utf-8"))


# The first file of a run, with its settings and the scores of the teacher.
STATE = "training_state.json"
# A checkpoint folder with this file is complete.
COMPLETE = "complete"


def mark_complete(folder: Path) -> None:
    """Marks the folder as complete, once everything in it is on the disk."""
    with storage_errors(folder):
        sync_folder(folder)
        (folder / COMPLETE).touch()
        sync(folder / COMPLETE)
        sync(folder)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a `DistillTrainer`, or None."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
