"""The checkpoint that is verified, with all that several checks read of it; each thing is read once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.choices import DTYPES, Dtype, one_of
from ..config.tq_config import QUANT_METHOD, TQConfig
from ..data.text import check_text
from ..errors import CheckpointError, ConfigError, MissingDependencyError
from ..utils.hub import local_directory
from ..utils.utf8 import read_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"


@dataclass(frozen=True)
class Settings:
    """What a checkpoint is verified with, checked; the fields are the arguments of `verify_checkpoint`.

    The command line and the pytest plugin have an option for each.
    """

    source: str | PathLike[str]
    teacher: str | PathLike[str] | None = None
    text: str | PathLike[str] | None = None
    max_perplexity_ratio: float = 1.1
    min_cosine: float = 0.9
    context: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    dtype: Dtype = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        limits = {"max_perplexity_ratio": (0.0, math.inf), "min_cosine": (-1.0, 1.0)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{name}: expected a number from {low:g} to {high:g}, got {value!r}")
        one_of("dtype", self.dtype, DTYPES)
        for name in ("torch", "transformers"):
            if find_spec(name) is None:
                raise MissingDependencyError(f'verify needs {name}: pip install "tqcompressor[hf]"')
        for name in ("source", "teacher"):
            value = getattr(self, name)
            if value is None:
                continue
            directory = local_directory(value)
            if not os.path.isdir(directory):
                raise CheckpointError(f"{directory}: no such directory")
            object.__setattr__(self, name, directory)
        if self.text is not None:
            check_text(self.text)


@dataclass(frozen=True)
class Loaded:
    """A model as `from_pretrained` gives it, and what it says of the tensors in the files."""

    model: PreTrainedModel
    missing: list[str]
    mismatched: list[str]
    """With the shapes in the file and in the model."""
    unused: list[str]


class Subject:
    """The checkpoint of `settings`, loaded where a check first needs it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.directory = Path(settings.source)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The contents of `config.json`; raises `CheckpointError` where there are none."""
        config = self._json("config.json")
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.directory / 'config.json'}: expected an object")
        return config

    @property
    def compression(self) -> TQConfig | None:
        """The specs of the compressed matrices; None for a checkpoint that this package has not compressed."""
        found = self.config.get("quantization_config")
        if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
            return None
        return TQConfig.from_dict(found)

    @cached_property
    def weight_files(self) -> dict[Path, list[str] | None]:
        """The weight files, each with its tensors by the index; None where one file holds all tensors."""
        if (self.directory / _WEIGHTS).exists():
            return {self.directory / _WEIGHTS: None}
        if not (self.directory / _INDEX).exists():
            raise CheckpointError(f"{self.directory}: expected {_WEIGHTS} or {_INDEX}, got neither")
        index = self._json(_INDEX)
        weights = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
            raise CheckpointError(f"{self.directory / _INDEX}: expected a weight_map of tensors to files")
        files: dict[Path, list[str] | None] = {}
        for name in dict.fromkeys(weights.values()):
            files[self.directory / name] = [tensor for tensor, file in weights.items() if file == name]
        return files

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """`(name, tensor)` of all stored tensors, one in memory at a time."""
        from safetensors import safe_open

        for file in self.weight_files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    yield name, opened.get_tensor(name)

    @cached_property
    def loaded(self) -> Loaded:
        """The model in the dtype and on the device of the settings."""
        return load(self.settings.source, self.settings.dtype, self.settings.device)

    @property
    def model(self) -> PreTrainedModel:
        """The model of `loaded`."""
        return self.loaded.model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own tokenizer."""
        return _tokenizer(self.settings.source)

    def load_teacher(self) -> PreTrainedModel:
        """The teacher, loaded as the model is, and not kept: few need it, and none for long."""
        source = self.settings.teacher
        assert source is not None
        return load_whole(source, self.settings.dtype, self.settings.device)

    @cached_property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's own tokenizer."""
        assert self.settings.teacher is not None
        return _tokenizer(self.settings.teacher)

    @cached_property
    def is_causal(self) -> bool:
        """Whether the model predicts the next token of a text."""
        from ..distillation.tasks import kind_of

        return kind_of(self.model) == "causal"

    def _json(self, name: str) -> Any:
        path = self.directory / name
        try:
            return read_json(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _tokenizer(source: str | PathLike[str]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    return tokenizer


def load(source: str | PathLike[str], dtype: str, device: str) -> Loaded:
    """Loads the checkpoint in `source` by the class that saved it; `dtype` is a name or "auto", the stored one."""
    from ..models.loading import model_class

    model, info = model_class(source).from_pretrained(
        source,
        dtype=dtype,
        output_loading_info=True,
        # Mismatches are in the result, so that a message can name them.
        ignore_mismatched_sizes=True,
    )
    mismatched = [
        f"{name}: expected {tuple(wanted)}, got {tuple(stored)}" for name, stored, wanted in info["mismatched_keys"]
    ]
    return Loaded(
        model.to(device).eval(), sorted(info["missing_keys"]), sorted(mismatched), sorted(info["unexpected_keys"])
    )


def load_whole(source: str | PathLike[str], dtype: str, device: str) -> PreTrainedModel:
    """The model of `load`; raises `CheckpointError` where the files lack a part of it."""
    loaded = load(source, dtype, device)
    faults = [*loaded.missing, *loaded.mismatched]
    if faults:
        raise CheckpointError(f"{source}: missing or of another shape: {', '.join(faults)}")
    return loaded.model


def predicts_next_token(source: str | PathLike[str]) -> bool:
    """Whether a checkpoint is of a causal language model, so that its perplexity means something.

    A base model that was saved without its head is one if the head is its embedding.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..distillation.tasks import kind_of
    from ..models.loading import model_class

    # The class says most. Without values, making a model takes no time.
    with torch.device("meta"):
        kind = kind_of(model_class(source)._from_config(AutoConfig.from_pretrained(source)))
    if kind != "embedding":
        return kind == "causal"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    except ValueError:
        # No causal language model has this config.
        return False
    _, info = loaded
    return not info["missing_keys"]
