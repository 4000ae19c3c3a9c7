"""The tensors of a model in files of `torch.save`, of which no code is run."""

from __future__ import annotations

import errno
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import _core
from ..errors import CheckpointError, StorageError
from ..utils.atomic_io import storage_errors
from ..utils.utf8 import HEAD, read_json

if TYPE_CHECKING:
    import torch

# The files of a model's weights, with the tensors that an index puts in each; None where there is no index.
WeightFiles: TypeAlias = Mapping[Path, list[str] | None]
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "pytorch_model.bin.index.json"
# In the order of preference.
_USUAL = (_INDEX, "pytorch_model.bin")
# What trainers save beside a model.
_NO_MODELS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.\w+")
# Where training scripts put the tensors of the model.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net")


@dataclass(frozen=True)
class TorchModel:
    """The tensors of a model, by name."""

    tensors: Mapping[str, torch.Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The arguments that nanoGPT stores beside the tensors: `n_head` and others."""


def weight_files(path: Path) -> WeightFiles:
    """The files of the weights of `path`: a file, those that the index of shards names, or those of a folder.

    Raises:
        CheckpointError: There is none, or there are several; the index is damaged, or a shard is missing.
        StorageError: The folder cannot be read.
    """
    if path.is_dir():
        path = _only_file(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: is safetensors already, which every command reads: give the file of torch")
    return _shards(path) if path.name.endswith(".index.json") else {path: None}


def _only_file(folder: Path) -> Path:
    with storage_errors(folder):
        names = sorted(name for name in os.listdir(folder) if (folder / name).is_file())
    for usual in _USUAL:
        if usual in names:
            return folder / usual
    found = [name for name in names if name.endswith(SUFFIXES) and not _NO_MODELS.fullmatch(name)]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise CheckpointError(f"{folder}: holds several files of weights: give one of {', '.join(found)}")
    if any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"{folder}: is safetensors already, which every command reads: there is nothing to convert"
        )
    raise CheckpointError(f"{folder}: expected {' or '.join(_USUAL)}, or one file *.bin, *.pt or *.pth, found none")


def _shards(index: Path) -> WeightFiles:
    try:
        with storage_errors(index):
            places = read_json(index)["weight_map"]
        shards: dict[Path, list[str]] = {}
        for tensor, shard in places.items():
            # No path may lead elsewhere.
            if Path(shard).name != shard:
                raise ValueError(f"tensor '{tensor}' is in {shard!r}, which is no name of a file beside it")
            shards.setdefault(index.with_name(shard), []).append(tensor)
        if not shards:
            raise ValueError("it is empty")
    except StorageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{index}: expected a "weight_map" from tensors to shards: {error}') from None
    for shard, tensors in shards.items():
        if not shard.exists():
            raise CheckpointError(
                f"{shard}: this shard is missing; {index.name} puts tensor '{tensors[0]}' in it: fetch it"
            )
    return shards


def read_torch_model(files: WeightFiles) -> TorchModel:
    """The tensors of a model in files of `torch.save`, in the dict itself or under "model" or "state_dict".

    They are read by `torch.load(weights_only=True)`.

    Raises:
        CheckpointError: A file is damaged, or holds code; a shard lacks a tensor; there are no tensors.
        StorageError: A file cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    arguments: Mapping[str, Any] = {}
    for file, promised in files.items():
        found, arguments = _model_in(_load(file), file)
        for name in promised or ():
            if name not in found:
                raise CheckpointError(
                    f"{file}: tensor '{name}' is missing; the index puts it here: fetch the shard again"
                )
        for name in found:
            if name in tensors:
                raise CheckpointError(f"{file}: tensor '{name}' is also in another shard")
        tensors.update(found)
    return TorchModel(tensors, arguments)


def _load(path: Path) -> Any:
    """What `torch.save` has put into a file, as far as it is data."""
    import torch

    with storage_errors(path), open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        raise CheckpointError(f"{path}: is empty: fetch it again")
    if (words := _core.foreign_text(head)) is not None:
        raise CheckpointError(f"{path}: {words}")
    try:
        # Only archives of newer versions of torch can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # A damaged pickle may raise anything, and a truncated archive EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise StorageError(error.errno, error.strerror or str(error), str(path)) from error
        raise CheckpointError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL ([\w.]+)|(?:class|function|type) ([\w.]*\w)", str(error))
        if named and "weights_only" in str(error) and "nsupported" in str(error):
            what = named[1] or named[2]
            return (
                f"holds code ({what}), which is not run: load it with the program that wrote it, and save the tensors "
                "alone by torch.save(model.state_dict(), FILE)"
            )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"expected a file of torch.save, got one that is damaged, truncated or of another kind: {lines[0]}"


def _model_in(data: Any, path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """The tensors in what was loaded, and the arguments of the model beside them."""
    import torch

    arguments: Mapping[str, Any] = {}
    for wrapped in _layers(data):
        given = wrapped.get("model_args")
        if isinstance(given, Mapping):
            arguments = given
        odd = [name for name, value in wrapped.items() if not isinstance(value, torch.Tensor)]
        if wrapped and not odd:
            return {str(name): tensor for name, tensor in wrapped.items()}, arguments
    kind = f"one with {', '.join(map(repr, list(data)[:5]))}" if isinstance(data, Mapping) else type(data).__name__
    names = " or ".join(repr(name) for name in _WRAPPERS[:2])
    raise CheckpointError(
        f"{path}: expected a dict of the tensors of a model, itself or under {names}, got {kind}: save "
        "model.state_dict() alone"
    )


def _layers(data: Any) -> Iterator[Mapping[Any, Any]]:
    """A dict, and the dicts in it that hold a model, outermost first."""
    # A dict in a file may hold itself.
    for _ in range(4):
        if not isinstance(data, Mapping):
            return
        yield data
        data = next((data[name] for name in _WRAPPERS if isinstance(data.get(name), Mapping)), None)
