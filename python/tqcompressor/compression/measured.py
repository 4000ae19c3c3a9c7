"""The calibration of a checkpoint on disk, by either engine."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import _core
from ..calibration.calibration import Calibration
from ..config.choices import DEFAULT_SEED, DTYPES, ENGINES, Dtype, Engine, one_of
from ..data.text import TextOption
from ..errors import CheckpointError, DestinationError, MissingDependencyError
from ..utils import validate
from ..utils.atomic_io import sole_run
from ..utils.engines import is_native
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption
from ..utils.torch_utils import torch_threads
from ..utils.utf8 import read_json

_LOGGER = logging.getLogger(__name__)


def calibrate_checkpoint(
    source: StrPath,
    text: TextOption,
    *,
    engine: Engine = "auto",
    num_samples: int = 128,
    seq_len: int | None = None,
    sensitivity: bool = True,
    samples: int | None = None,
    seed: int = DEFAULT_SEED,
    dtype: Dtype = "float32",
    device: str = "cpu",
    partial: StrPath | None = None,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> Calibration:
    """Measures the second moments of the checkpoint in `source` on a text: `calibrate` without a live model.

    The class that saved the checkpoint is loaded, with its own tokenizer.

    Args:
        source: A checkpoint directory, dense or compressed, or a hub id.
        text: As for `calibrate`: a str is the text itself, a `pathlib.Path` is a file or a glob pattern, a list holds
            either.
        engine: "torch"; "native", which needs no torch, computes the models that `NativeModel` does and measures no
            gradients; or "auto", which is torch where it is installed.
        num_samples: How many sequences are drawn.
        seq_len: Tokens of a sequence. Default: 128, or the model's longest input if that is shorter.
        sensitivity: Whether gradients are measured. The native engine warns that it cannot: half of the GPT-2 of
            `tests/data` has a perplexity of 79.6 with them and of 93.2 without (`run.py calibration --tokens 4096`).
        samples: Random gradients for each text, as for `calibrate`. Torch only.
        seed: The seed of the sequences that are drawn, and of the gradients.
        dtype: The dtype to compute in; the native engine has float32 only.
        device: The torch device.
        partial: A file for the sums so far, as for `calibrate`: a run that was stopped goes on with them. Torch only.
        threads: Worker threads. Default: one per core.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Raises:
        ConfigError: An argument is out of its range, or the engine does not have it.
        MissingDependencyError: The engine is "torch", and torch or transformers is not installed.
        TextError, NonFiniteError: As `calibrate`.
        CheckpointError: As `NativeModel.from_pretrained`.

    Cost: the memory of the model, and that of `calibrate`.

    Example:
        >>> from pathlib import Path
        >>> text = Path("tests/data/tiny-gpt2/heldout.txt")
        >>> calibrate_checkpoint("tests/data/tiny-gpt2", text, num_samples=2, seq_len=64)
        Calibration(44 moments of inputs and output gradients of a gpt2, over 128 tokens)
    """
    one_of("engine", engine, ENGINES)
    one_of("dtype", dtype, DTYPES)
    threads = validate.threads(threads)
    limits = {
        "device": (device, "cpu"),
        "dtype": (dtype, "float32"),
        "samples": (samples, None),
        "partial": (partial, None),
    }
    options: dict[str, Any] = {"num_samples": num_samples, "seq_len": seq_len, "seed": seed, "progress": progress}
    if is_native(engine, limits):
        from ..native.model import NativeModel

        if sensitivity:
            warnings.warn(
                "the native engine measures no gradients: with them (engine torch) a compressed model is better",
                stacklevel=2,
            )
        return NativeModel.from_pretrained(source, threads=threads).calibrate(text, **options)
    try:
        from transformers import AutoTokenizer

        from ..calibration.calibrate import calibrate
        from ..models.loading import load_pretrained
    except ImportError as error:
        raise MissingDependencyError(f'engine torch needs {error.name}: pip install "tqcompressor[hf]"') from error
    check_files(source)
    with torch_threads(threads):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = load_pretrained(source, dtype=dtype)
        model.to(device)
        return calibrate(model, tokenizer, text, sensitivity=sensitivity, samples=samples, partial=partial, **options)


def measure_and_save(source: StrPath, text: TextOption, out: StrPath | None, **options: Any) -> Calibration:
    """`calibrate_checkpoint`, saved to the file `out`; None saves it nowhere.

    The file is checked and locked from the beginning: the second of two runs is refused before it reads a text.
    """
    with sole_file(out):
        found = calibrate_checkpoint(source, text, **options)
        if out is not None:
            found.save(out)
            _LOGGER.info("written to %s", os.fspath(out))
    return found


@contextmanager
def sole_file(out: StrPath | None) -> Iterator[None]:
    """Holds the lock of a run that writes the calibration `out`, which is no folder; nothing for None."""
    if out is None:
        yield
        return
    if Path(out).is_dir():
        raise DestinationError(f"{out} is a folder: expected the name of a file")
    with sole_run(Path(out)):
        yield


def check_files(source: StrPath) -> None:
    """Raises `CheckpointError` for faults of a dense checkpoint in a directory that transformers does not name.

    It loads random weights for names that a wrapper has prefixed, for example. Other sources, and families that have no
    description, are left to it.
    """
    path = Path(source, "config.json")
    try:
        config = read_json(path)
    except OSError:
        return
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    weights = any(Path(source, name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))
    known = isinstance(config, dict) and config.get("model_type") in (None, *_core.MODEL_TYPES)
    if weights and known and not config.get("quantization_config"):
        _core.Checkpoint.open(os.fspath(source), weights=False)
