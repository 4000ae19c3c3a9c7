"""Staged recipes: which matrices each stage compresses, and its share of the training. Nothing here imports torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..config.choices import Effort
from ..config.recipes import RECIPES, resolve_config
from ..config.specs import KroneckerSpec, check_keys
from ..config.tq_config import TQConfig
from ..errors import ConfigError
from ..utils.utf8 import parsed, read_json

# The format of the recipe; its configs have their own version.
_FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """One stage: decomposition of the matrices that `config` names, in the current student, and training.

    A matrix that an earlier stage compressed may be named again. It is then made dense first. `share` is the
    stage's part of the training tokens, relative to the other stages' shares; 0 compresses without training. `name`
    is part of the name of the stage's folder.

    Raises `ConfigError` for values out of range.
    """

    name: str
    config: TQConfig
    share: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or set(self.name) & set("/\\\0"):
            raise ConfigError(f"the name of a stage must be text without slashes, got {self.name!r}")
        if not isinstance(self.config, TQConfig):
            raise ConfigError(f"stage {self.name}: config must be a TQConfig, got {type(self.config).__name__}")
        number = not isinstance(self.share, bool) and isinstance(self.share, int | float)
        if not number or not math.isfinite(self.share) or self.share < 0:
            raise ConfigError(f"stage {self.name}: share must be a number from 0 up, got {self.share!r}")

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain JSON types."""
        return {"name": self.name, "share": self.share, "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stage:
        """The inverse of `to_dict`; raises `ConfigError` for unknown or missing keys."""
        check_keys(data, "stage", known=("name", "share", "config"), required=("name", "config"))
        try:
            config = TQConfig.from_dict(data["config"])
        except ConfigError as error:
            raise ConfigError(f"stage {data['name']}: {error}") from None
        return cls(data["name"], config, data.get("share", 1.0))


@dataclass(frozen=True)
class StagedRecipe:
    """A sequence of stages. `tqcompressor distill --recipe FILE` reads its JSON form.

    >>> recipe = STAGED_RECIPES["tq-81m-staged"]
    >>> StagedRecipe.from_json(recipe.to_json()) == recipe
    True
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ConfigError("stages: expected at least one stage")
        if not any(stage.share for stage in self.stages):
            raise ConfigError("stages: every share is 0, and nothing would be trained: use compress instead")

    def samples_of_stages(self, num_samples: int) -> list[range]:
        """The consecutive samples of each stage. Together the stages have every sample once."""
        total = sum(stage.share for stage in self.stages)
        done, ends = 0.0, [0]
        for stage in self.stages:
            done += stage.share
            ends.append(round(num_samples * done / total))
        return [range(begin, end) for begin, end in pairwise(ends)]

    def replace(self, effort: Effort | None = None, seed: int | None = None) -> StagedRecipe:
        """The recipe with another effort or seed of the permutation searches, in all stages."""
        return StagedRecipe(
            tuple(Stage(s.name, s.config.replace(effort=effort, seed=seed), s.share) for s in self.stages)
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON types."""
        return {"format_version": _FORMAT, "stages": [stage.to_dict() for stage in self.stages]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StagedRecipe:
        """The inverse of `to_dict`; raises `ConfigError` for unknown keys and invalid values."""
        check_keys(data, "staged recipe", known=("format_version", "stages"), required=("stages",))
        version = data.get("format_version", _FORMAT)
        if version != _FORMAT:
            raise ConfigError(f"a staged recipe of format {version!r}, this tqcompressor reads {_FORMAT}")
        if not isinstance(data["stages"], list | tuple):
            raise ConfigError(f"stages must be a list, got {type(data['stages']).__name__}")
        return cls(tuple(Stage.from_dict(stage) for stage in data["stages"]))

    def to_json(self) -> str:
        """The recipe as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> StagedRecipe:
        """The inverse of `to_json`; raises `ConfigError` when it is not JSON."""
        try:
            data = parsed(text)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return cls.from_dict(data)


_EMBEDDING_HALVED = TQConfig({"wte": KroneckerSpec(block=(1, 2), rank=1, permute="columns")}, effort="balanced")
_ODD_FEED_FORWARD = RECIPES["tq-81m"].replace(
    specs={name: spec for name, spec in RECIPES["tq-81m"].specs.items() if name != "wte"}
)
_EMBEDDING_QUARTERED = RECIPES["tq-81m"].replace(specs={"wte": RECIPES["tq-81m"].specs["wte"]})
STAGED_RECIPES: Mapping[str, StagedRecipe] = MappingProxyType(
    {
        # The published schedule (arXiv 2401.16367): the embedding to half of its width, the feed-forward matrices of
        # every odd block, then the embedding to a quarter. It ends with the shapes of "tq-81m".
        "tq-81m-staged": StagedRecipe(
            (
                Stage("embedding-half", _EMBEDDING_HALVED),
                Stage("feed-forward", _ODD_FEED_FORWARD),
                Stage("embedding-quarter", _EMBEDDING_QUARTERED),
            )
        ),
    }
)

# One-shot: on equal text it measures better than the staged schedule.
DEFAULT_RECIPE = "tq-81m"


def resolve_staged_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | StagedRecipe | TQConfig, **changes: Any
) -> StagedRecipe:
    """The staged recipe behind the `recipe` argument: a name, the path of a JSON file, a dict or a `StagedRecipe`.

    A config of `compress` (a name in `RECIPES`, a `TQConfig`, its JSON) becomes a single stage: one-shot compression,
    then training. `changes` (`effort`, `seed`) override those of the stages, unless they are None.
    Raises `ConfigError` when the name is neither a recipe nor a file, or its contents are invalid.
    """
    if isinstance(recipe, StagedRecipe):
        resolved = recipe
    elif isinstance(recipe, str) and recipe in STAGED_RECIPES:
        resolved = STAGED_RECIPES[recipe]
    elif isinstance(recipe, TQConfig) or (isinstance(recipe, str) and recipe in RECIPES):
        resolved = _one_stage(resolve_config(recipe))
    elif isinstance(recipe, Mapping):
        resolved = _from_dict(recipe)
    elif isinstance(recipe, str | os.PathLike):
        resolved = _from_file(Path(recipe))
    else:
        raise ConfigError(f"a recipe is a name, a path, a dict or a StagedRecipe, got {type(recipe).__name__}")
    return resolved.replace(**changes)


def _one_stage(config: TQConfig) -> StagedRecipe:
    return StagedRecipe((Stage("one-shot", config),))


def _from_dict(data: Mapping[str, Any]) -> StagedRecipe:
    return _one_stage(TQConfig.from_dict(data)) if "specs" in data else StagedRecipe.from_dict(data)


def _from_file(path: Path) -> StagedRecipe:
    if not path.is_file():
        known = ", ".join((*STAGED_RECIPES, *RECIPES))
        raise ConfigError(f"{str(path)!r} is neither a recipe ({known}) nor a file")
    try:
        data = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    try:
        return _from_dict(data) if isinstance(data, Mapping) else StagedRecipe.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
