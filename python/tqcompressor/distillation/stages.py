"""Staged recipes: which matrices each stage compresses, and its share of the training. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..compression.budget import Budget, meaning
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, EFFORTS, Effort, one_of
from ..config.recipes import RECIPES, resolve_config
from ..config.specs import KroneckerSpec, check_keys
from ..config.tq_config import TQConfig
from ..errors import ConfigError
from ..utils import validate
from ..utils.utf8 import parsed, read_json

# The format of the recipe; its configs have their own version.
_FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """One stage: compression of the current student by a config or by a budget, and training.

    A config decomposes the matrices that it names; one that an earlier stage compressed is made dense first. A budget
    is a share of the teacher's size, as for `compress`: the student is made dense, calibrated on the training text as
    it is now, and compressed as a whole, with `effort` and `seed`. A stage with neither trains the student as it is.

    `share` is the stage's part of the training tokens, relative to the other stages' shares; 0 compresses without
    training. `name` is part of the name of the stage's folder.

    Raises `ConfigError` for values out of range.
    """

    name: str
    config: TQConfig | None = None
    share: float = 1.0
    budget: Budget | None = None
    effort: Effort = DEFAULT_EFFORT
    """Of a budget; a config has its own."""
    seed: int = DEFAULT_SEED
    """Of a budget and its calibration; a config has its own."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or set(self.name) & set("/\\\0"):
            raise ConfigError(f"the name of a stage must be text without slashes, got {self.name!r}")
        try:
            self._check_compression()
        except ConfigError as error:
            raise ConfigError(f"stage {self.name}: {error}") from None
        number = not isinstance(self.share, bool) and isinstance(self.share, int | float)
        if not number or not math.isfinite(self.share) or self.share < 0:
            raise ConfigError(f"stage {self.name}: share must be a number from 0 up, got {self.share!r}")

    def _check_compression(self) -> None:
        if self.config is not None and not isinstance(self.config, TQConfig):
            raise ConfigError(f"config must be a TQConfig, got {type(self.config).__name__}")
        if self.config is not None and self.budget is not None:
            raise ConfigError("expected a config or a budget, got both")
        if self.budget is not None:
            meaning(self.budget)
        one_of("effort", self.effort, EFFORTS)
        validate.seed(self.seed)

    def replace(self, effort: Effort | None = None, seed: int | None = None) -> Stage:
        """The stage with another effort or seed of its compression; None keeps what it has."""
        config = None if self.config is None else self.config.replace(effort=effort, seed=seed)
        changes: dict[str, Any] = {"effort": effort, "seed": seed}
        given = {name: value for name, value in changes.items() if value is not None and self.budget is not None}
        return dataclasses.replace(self, config=config, **given)

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain JSON types."""
        data: dict[str, Any] = {"name": self.name, "share": self.share}
        if self.config is not None:
            data["config"] = self.config.to_dict()
        if self.budget is not None:
            data |= {"budget": self.budget, "effort": self.effort, "seed": self.seed}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stage:
        """The inverse of `to_dict`; raises `ConfigError` for unknown or missing keys."""
        check_keys(data, "stage", known=("name", "share", "config", "budget", "effort", "seed"), required=("name",))
        fields = dict(data)
        if fields.get("config") is not None:
            try:
                fields["config"] = TQConfig.from_dict(fields["config"])
            except ConfigError as error:
                raise ConfigError(f"stage {data['name']}: {error}") from None
        return cls(**fields)


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
        if any(stage.config is not None for stage in self.stages) and self.budgets:
            raise ConfigError("stages: expected configs or budgets, got both")

    @classmethod
    def of_budgets(cls, *budgets: Budget, effort: Effort = DEFAULT_EFFORT, seed: int = DEFAULT_SEED) -> StagedRecipe:
        """A stage for each budget, the largest first by custom, with equal shares of the tokens.

        >>> [stage.budget for stage in StagedRecipe.of_budgets(0.85, 0.75, 0.65).stages]
        [0.85, 0.75, 0.65]
        """
        return cls(tuple(Stage(f"budget-{budget}", budget=budget, effort=effort, seed=seed) for budget in budgets))

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets of the stages that have one."""
        return tuple(stage.budget for stage in self.stages if stage.budget is not None)

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
        return StagedRecipe(tuple(stage.replace(effort, seed) for stage in self.stages))

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

# What `distill` does without a recipe, a budget or a student: of all it measures best.
DEFAULT_BUDGET = 0.65


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
