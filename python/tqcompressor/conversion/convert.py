"""The conversion of a checkpoint of another program into ours."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _core
from ..compression.checkpoint import inspect
from ..compression.report import CompressionReport, MatrixReport, UntouchedTensor
from ..config.choices import DTYPES, Dtype, dtype_name
from ..config.tq_config import TQConfig
from ..errors import CheckpointError, DtypeError, MissingDependencyError
from ..utils.hub import StrPath, local_directory
from ..utils.progress import ProgressOption, reporter
from ..utils.sizes import byte_count
from ..utils.utf8 import read_json

if TYPE_CHECKING:
    import torch

    from .gpt2_layouts import Gpt2Tensors

_GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
# Of a config: what names the code that wrote it, or says how it was stored.
_LOGGER = logging.getLogger(__name__)
_DROPPED = ("auto_map", "quantization_config", "torch_dtype", "transformers_version")
_HEAD_WIDTH = 64


def convert_checkpoint(
    source: StrPath,
    out: StrPath,
    *,
    config: StrPath | None = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: ProgressOption = None,
) -> CompressionReport:
    """Converts a checkpoint of `torch.save` into the directory `out`, in our format, with equal logits.

    It may be a GPT-2 with Kronecker factors, TQCompressedGPT-2 (`pytorch_model.bin`) or Krony-PT (`.pt`, a tensor for
    all factors or one for each), or a dense one: `pytorch_model.bin`, in shards too, or nanoGPT's `.pt`. Factors stay
    factors, under a `quantization_config`. Files are read by `torch.load(weights_only=True)`, which runs no code. The
    tensors may be under "model" or "state_dict", and may have the prefixes of `torch.compile` and of wrappers.

    The sizes are those of the tensors. The number of heads, and what else is in no tensor, is that of `config`, of the
    arguments that nanoGPT stores in the file, or of a `config.json` beside it. Without any, GPT-2's values are taken,
    and heads of width 64, with a warning. nanoGPT trains with the exact GELU: give a config that has
    `"activation_function": "gelu"`, unless its weights are from GPT-2. A published TQCompressedGPT-2 has 81,336,388
    parameters and, as its head is dense and not tied, 38,597,376 more: 119,933,764.

    Args:
        source: The file, the index of its shards, a folder that holds either, or a hub id. Tokenizer files beside it
            are copied; of a folder, all files but weights.
        out: The directory to write. It may exist if it is empty.
        config: The `config.json` of the model. Default: that beside the file.
        dtype: "float32", "float16" or "bfloat16" for every floating tensor. Default: each keeps its own.
        overwrite: Replace a checkpoint in `out`, all of it, in one step.
        max_shard_size: The size limit of a weight file, in bytes or as in "500MB" or "2GiB".
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Returns:
        The report, as `inspect(out)` reads it. Lost energies are unknown: there is no original.

    Raises:
        CheckpointError: The file is missing, damaged, in no known layout, or holds code; a tensor is missing, has
            another shape, or is no part of the model; the config contradicts the tensors.
        DtypeError: A tensor is not floating, `dtype` is not supported, or it cannot hold a value.
        NonFiniteError: A tensor has NaN or an infinity.
        DestinationError: `out` exists and is not empty, or is the source.
        StorageError: The operating system reports an error: no permission, no space.
        MissingDependencyError: torch is not installed.

    Nothing is written if anything is raised, `KeyboardInterrupt` included.

    Cost: memory for the model, which is mapped from the file where it can be.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("tests/data/tiny-gpt2")
        >>> torch.save({"model": model.state_dict()}, "model.pt")
        >>> report = convert_checkpoint("model.pt", "converted", config="tests/data/tiny-gpt2/config.json")
        >>> report.parameters_after
        5289472

    Source: the layouts are those of Abronin et al., "TQCompressor", arXiv 2401.16367, of Ben Ayad et al., "Krony-PT",
    arXiv 2412.12351, and of nanoGPT.
    """
    from .torch_files import SUFFIXES, read_torch_model, weight_files

    most = byte_count("max_shard_size", max_shard_size)
    stored = dtype_name(dtype)
    path = Path(source)
    if path.suffix not in SUFFIXES:
        path = Path(local_directory(source, [f"*{suffix}" for suffix in SUFFIXES]))
    files = weight_files(path)
    folder = path if path.is_dir() else path.parent
    origin = (folder, list(files), path.is_dir())
    # Before the longest part of the work.
    _core.check_destination(os.fspath(out), origin, overwrite)
    try:
        from .gpt2_layouts import read_gpt2

        model = read_torch_model(files)
        found = read_gpt2(model.tensors, path)
    except ImportError as error:
        raise MissingDependencyError(f'convert needs {error.name}: pip install "tqcompressor[hf]"') from error
    settings, note = _settings(_config_of(config, folder, model.arguments), found)
    tensors = {name: _as_dtype(name, tensor, stored) for name, tensor in found.tensors.items()}
    settings["dtype"] = next(_name(tensor) for tensor in tensors.values() if tensor.is_floating_point())
    report = None
    if found.matrices:
        specs = {matrix.name: matrix.spec for matrix in found.matrices}
        settings["quantization_config"] = TQConfig(specs).to_dict()
        before = sum(file.stat().st_size for file in files)
        report = report_of(found, os.fspath(source), stored, note, before)
    if note is not None:
        warnings.warn(f"{source}: {note}", stacklevel=2)
    with reporter(progress, "convert") as report_progress:
        _core.write_checkpoint(
            os.fspath(out),
            origin,
            [(name, _name(tensor), list(tensor.shape), _bytes(tensor)) for name, tensor in tensors.items()],
            json.dumps(settings, indent=2) + "\n",
            None if report is None else report.to_json(),
            overwrite=overwrite,
            max_shard_bytes=most,
            progress=report_progress,
        )
    _LOGGER.info("written to %s", os.fspath(out))
    return inspect(out)


def report_of(
    found: Gpt2Tensors,
    source: str | None = None,
    dtype: str | None = None,
    note: str | None = None,
    bytes_before: int | None = None,
) -> CompressionReport:
    """The report of a conversion: the factors as they were found, in place of dense matrices."""
    matrices = tuple(
        MatrixReport(
            name=matrix.name,
            tensor=f"transformer.{matrix.name}.weight",
            shape=(matrix.rows, matrix.columns),
            parameters_before=matrix.rows * matrix.columns,
            parameters_after=matrix.spec.parameters(matrix.rows, matrix.columns),
            block=matrix.spec.block,
            rank=matrix.spec.rank,
            permute=matrix.spec.permute,
        )
        for matrix in found.matrices
    )
    factors = {f"{matrix.tensor.removesuffix('.weight')}.{which}" for matrix in matrices for which in "AB"}
    untouched = tuple(
        UntouchedTensor(name, tuple(tensor.shape), tensor.numel())
        for name, tensor in found.tensors.items()
        if tensor.is_floating_point() and name not in factors
    )
    kept = sum(tensor.parameters for tensor in untouched)
    return CompressionReport(
        version=_core.__version__,
        format_version=TQConfig({matrix.name: matrix.spec for matrix in found.matrices}).format_version,
        source=source,
        effort=None,
        seed=None,
        dtype=dtype,
        matrices=matrices,
        untouched=untouched,
        parameters_before=kept + sum(matrix.parameters_before for matrix in matrices),
        parameters_after=kept + sum(matrix.parameters_after for matrix in matrices),
        bytes_before=bytes_before,
        note=note,
    )


def _config_of(config: StrPath | None, folder: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the model's config that were found."""
    path = folder / "config.json" if config is None else Path(config)
    found: Any = {}
    if config is not None or path.exists():
        try:
            found = read_json(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}: give the config.json of the model") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {type(found).__name__}")
        kind = found.get("model_type", "gpt2")
        if "n_head" not in found and kind != "gpt2":
            raise CheckpointError(f"{path}: expected the config of a GPT-2, got that of a {kind}: give the model's own")
    if config is None and arguments.get("n_head") is not None:
        found = {**found, "n_head": arguments["n_head"]}
    return {key: value for key, value in found.items() if key not in _DROPPED}


def _settings(given: Mapping[str, Any], found: Gpt2Tensors) -> tuple[dict[str, Any], str | None]:
    """The `config.json` of the result, and what its user must know of it."""
    for key, size in (("n_embd", found.width), ("n_layer", found.layers)):
        if given.get(key, size) != size:
            raise CheckpointError(
                f"{key}: expected {size} as in the tensors, config.json has {given[key]!r}: give the model's own config"
            )
    heads, notes = given.get("n_head"), []
    if heads is None:
        heads, rest = divmod(found.width, _HEAD_WIDTH)
        if rest:
            raise CheckpointError(
                f"n_head: no config has the number of heads, and the width {found.width} is no multiple of "
                f"{_HEAD_WIDTH}: give a config.json that has n_head"
            )
        notes.append(f"{heads} heads, which is width / {_HEAD_WIDTH}")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or found.width % heads:
        raise CheckpointError(
            f"n_head: expected a divisor of the width {found.width}, got {heads!r}: correct the config"
        )
    if found.out_by_in and not given.keys() - {"n_head"}:
        notes.append(f"the activation of GPT-2, {_GPT2['activation_function']}")
    settings = {**_GPT2, **given}
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(settings[key], int) and settings[key] >= found.vocab_size:
            settings[key] = None
    if "n_ctx" in settings:
        settings["n_ctx"] = found.positions
    settings |= {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": found.width,
        "n_head": heads,
        "n_inner": None if found.inner == 4 * found.width else found.inner,
        "n_layer": found.layers,
        "n_positions": found.positions,
        "tie_word_embeddings": found.tied,
        "vocab_size": found.vocab_size,
    }
    return settings, f"no config says otherwise: {', '.join(notes)}" if notes else None


def _as_dtype(name: str, tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """The tensor in a dtype that our format has."""
    import torch

    if not tensor.is_floating_point():
        return tensor
    if dtype is None:
        if _name(tensor) not in DTYPES:
            raise DtypeError(f"tensor '{name}': expected {', '.join(DTYPES)}, got {_name(tensor)}: give a dtype")
        return tensor
    converted = tensor.to(getattr(torch, dtype))
    if not torch.isfinite(converted).all():
        raise DtypeError(f"tensor '{name}': expected values that {dtype} can hold, got {tensor.abs().max():g}")
    return converted


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: torch.Tensor) -> Any:
    """The values of a tensor as the bytes of a numpy array, without a copy where it is contiguous."""
    import torch

    return tensor.detach().contiguous().reshape(math.prod(tensor.shape)).view(torch.uint8).numpy()
