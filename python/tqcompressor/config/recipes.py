"""Named configs, and the reader of every `config` argument."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from ..errors import ConfigError
from ..utils.utf8 import read_json
from .specs import KroneckerSpec
from .tq_config import TQConfig

# What every entry point takes as its config.
ConfigOption: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | TQConfig
CONFIG_FORMS = 'a recipe such as "tq-81m", the path of a JSON file, a dict or a TQConfig'
RECIPES: Mapping[str, TQConfig] = MappingProxyType(
    {
        # The published 81M model (arXiv 2401.16367) in one shot: the embedding in a quarter of its width, and the
        # feed-forward matrices of every odd block with half of their parameters.
        "tq-81m": TQConfig(
            {
                "wte": KroneckerSpec(block=(1, 4), rank=1, permute="columns"),
                "h.*[13579].mlp.c_fc": KroneckerSpec(block=(2, 4), rank=4),
                "h.*[13579].mlp.c_proj": KroneckerSpec(block=(4, 2), rank=4),
            },
            effort="balanced",
        ),
    }
)


def recipe(name: str) -> TQConfig:
    """The recipe of that name in `RECIPES`; raises `ConfigError` for another name."""
    try:
        return RECIPES[name]
    except KeyError:
        raise ConfigError(f"no recipe is called {name!r}; there is {', '.join(RECIPES)}") from None


def resolve_config(config: ConfigOption | None, **changes: Any) -> TQConfig:
    """The `TQConfig` of a `config` argument: a recipe's name, the path of a JSON file, a dict or a `TQConfig`.

    `changes` (`effort`, `seed`) replace the config's own, unless they are None. Raises `ConfigError` for None, for
    a name that is neither a recipe nor a file, for contents that cannot be followed, and for a budget or calibration.
    """
    resolved = read_config(config)
    if given := resolved.of_loading:
        raise ConfigError(
            f"config: {', '.join(given)} of a TQConfig count in from_pretrained(…, quantization_config=…) only: give "
            "them here as arguments"
        )
    return resolved.replace(**changes)


def read_config(config: ConfigOption | None) -> TQConfig:
    """As `resolve_config`, also for a config with a budget or a calibration, which only loading takes."""
    if isinstance(config, TQConfig):
        resolved = config
    elif isinstance(config, Mapping):
        resolved = TQConfig.from_dict(config)
    elif isinstance(config, str | os.PathLike):
        resolved = _named_config(config)
    else:
        raise ConfigError(f"config: expected {CONFIG_FORMS}, got {type(config).__name__}")
    return resolved


def _named_config(name: str | os.PathLike[str]) -> TQConfig:
    if isinstance(name, str) and name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"{os.fspath(name)!r} is neither a recipe ({', '.join(RECIPES)}) nor a file")
    try:
        return TQConfig.from_dict(read_json(path))
    except ValueError as error:  # of which ConfigError is one
        raise ConfigError(f"{path}: {error}") from None
