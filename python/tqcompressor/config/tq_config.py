"""The config of a compression: one spec per matrix, the effort and the seed of the search.

A [`TQConfig`] is the `quantization_config` of `config.json` and the `config` argument of every entry point. It is also
the `quantization_config` that transformers takes in `from_pretrained`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, ClassVar, Final, Literal

from ..errors import ConfigError
from ..utils import validate
from ..utils.atomic_io import WholeFile
from ..utils.utf8 import parsed
from .choices import DEFAULT_EFFORT, DEFAULT_SEED, EFFORTS, OBJECTIVES, Effort, Objective, one_of
from .specs import GroupedSpec, KroneckerSpec, LowRankSpec, MatrixSpec, MixedSpec, check_keys, spec_from_dict

QUANT_METHOD = "tqcompressor"
# The newest format that is read. Configs are written in the oldest format that can hold them.
FORMAT_VERSION = 4
INT8: Final = "int8"
# Of the fields with names, those that the config of a compressed checkpoint has.
_STORED = ("dtype", "dense")
_FORMATS: dict[type[MatrixSpec], int] = {KroneckerSpec: 1, LowRankSpec: 2, MixedSpec: 2, GroupedSpec: 3}


@dataclass(frozen=True)
class TQConfig:
    """The specs of a model's matrices, and the effort and seed of the search for permutations.

    `specs` maps a glob pattern to a [`KroneckerSpec`], [`LowRankSpec`], [`GroupedSpec`] or [`MixedSpec`]. A pattern is
    matched against the name of a matrix ("wte", "h.1.mlp.c_fc", "h.0.attn.c_attn.q", "encoder.layer.0.output.dense") or
    of its module, with or without the base model's prefix ("transformer.", "bert.") before and ".weight" behind it; `*`
    crosses dots, `[13579]` is one of these characters. The first pattern that matches a matrix decides. The result
    depends on the weights, the spec, the effort ("fast", "balanced" or "best") and the seed only.

    In place of specs, `budget` is a budget as `compress` takes it, for `from_pretrained(dense,
    quantization_config=TQConfig(budget=0.65, calibration="calibration.safetensors"))`. `calibration`, `objective`,
    `matrices` and `max_macs` are the arguments of `compress` of these names. They say how a dense model is compressed
    while it is loaded. The loaded model's own config has the specs that came of it, and none of these; every other
    function takes them as its own arguments.

    With `dtype="int8"`, the weights that matrix products read are eight-bit integers with scales: the factors, of a
    Kronecker sum the larger one, and the matrices that stay dense. There need not be specs then. `dense` names the
    modules of these matrices, by default all that can be compressed; a compressed model's config names them one by one.

    Two configs are equal when their specs (in any order), effort, seed and these arguments are.

    Raises `ConfigError` for invalid values.

    >>> config = TQConfig({"h.*.mlp.c_fc": KroneckerSpec(block=(2, 4), rank=4)}, effort="fast")
    >>> TQConfig.from_json(config.to_json()) == config
    True
    """

    specs: Mapping[str, MatrixSpec] = field(default_factory=dict)
    effort: Effort = DEFAULT_EFFORT
    seed: int = DEFAULT_SEED
    _: KW_ONLY
    budget: float | int | str | None = None
    calibration: Any = None
    """A `Calibration` or the path of its file."""
    objective: Objective = "auto"
    matrices: Sequence[str] | None = None
    max_macs: float | None = None
    dtype: Literal["int8"] | None = None
    dense: Sequence[str] | None = None

    # Read by transformers, which picks the quantizer by it.
    quant_method: ClassVar[str] = QUANT_METHOD

    def __post_init__(self) -> None:
        if not isinstance(self.specs, Mapping):
            raise ConfigError(f"specs must map patterns to specs, got {type(self.specs).__name__}")
        if self.dtype not in (None, INT8):
            raise ConfigError(f'dtype: expected "int8" or none, got {self.dtype!r}')
        if not self.specs and self.budget is None and self.dtype is None:
            raise ConfigError("specs is empty: name at least one matrix to compress, or give a budget")
        if self.specs and self.budget is not None:
            raise ConfigError("expected specs or a budget, got both")
        checked = {}
        for pattern, spec in self.specs.items():
            if not isinstance(pattern, str) or not pattern or not _is_utf8(pattern):
                raise ConfigError(f"a pattern of specs must be a non-empty string, got {pattern!r}")
            try:
                checked[pattern] = spec if isinstance(spec, MatrixSpec) else spec_from_dict(spec)
            except ConfigError as error:
                raise ConfigError(f"specs[{pattern!r}]: {error}") from None
        object.__setattr__(self, "specs", checked)
        object.__setattr__(self, "dense", self._checked_dense())
        one_of("effort", self.effort, EFFORTS)
        one_of("objective", self.objective, OBJECTIVES)
        object.__setattr__(self, "seed", validate.seed(self.seed))
        object.__setattr__(self, "max_macs", validate.max_macs(self.max_macs))

    def _checked_dense(self) -> tuple[str, ...] | None:
        if self.dense is None:
            return None
        if self.dtype is None:
            raise ConfigError('dense: expected with dtype="int8" only')
        names = self.dense
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise ConfigError(f"dense: expected a list of names of modules, got {names!r}")
        return tuple(names)

    @property
    def of_loading(self) -> dict[str, Any]:
        """The arguments that `from_pretrained` alone takes from a config, those that are set."""
        defaults = {field.name: field.default for field in fields(self) if field.kw_only and field.name not in _STORED}
        return {name: value for name, default in defaults.items() if (value := getattr(self, name)) != default}

    def replace(self, **changes: Any) -> TQConfig:
        """A copy with other values; an argument that is None changes nothing."""
        unknown = changes.keys() - {field.name for field in fields(self)}
        if unknown:
            raise ConfigError(f"a config has no {', '.join(sorted(unknown))}")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    @property
    def format_version(self) -> int:
        """The oldest format that can hold it: 1 for Kronecker sums, 3 with groups of rows, 4 with int8, else 2."""
        if self.dtype is not None:
            return 4
        return max((_FORMATS[type(spec)] for spec in self.specs.values()), default=1)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types, as stored under `quantization_config` in `config.json`."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "specs": {pattern: spec.to_dict() for pattern, spec in self.specs.items()},
            "effort": self.effort,
            "seed": self.seed,
            **({} if self.dtype is None else {"dtype": self.dtype}),
            **({} if self.dense is None else {"dense": list(self.dense)}),
            **{name: _plain(value) for name, value in self.of_loading.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TQConfig:
        """The inverse of `to_dict`; a missing `effort` or `seed` takes its default.

        Raises `ConfigError` for unknown keys, another `quant_method`, or a `format_version` newer than this package.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a config must be a JSON object, got {type(data).__name__}")
        method = data.get("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ConfigError(f"quant_method is {method!r}, not {QUANT_METHOD!r}")
        # Checked before the keys, as a newer format may have other keys.
        version = validate.integer("format_version", data.get("format_version", FORMAT_VERSION), 1)
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"written by a newer tqcompressor (format {version}), this one reads up to {FORMAT_VERSION}: upgrade"
            )
        own = tuple(field.name for field in fields(cls))
        check_keys(
            data,
            "config",
            known=("quant_method", "format_version", *own),
            required=() if "budget" in data else ("specs",),
        )
        for name in _STORED:
            if name in data and data[name] is None:
                raise ConfigError(f"{name}: expected a value, or no such key, got null")
        return cls(**{name: data[name] for name in own if name in data})

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The config as JSON text, also written to `path` when that is given.

        Raises `DestinationError` or `StorageError` when the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            with WholeFile(path) as file:
                file.write(f"{text}\n".encode())
        return text

    @classmethod
    def from_json(cls, text: str) -> TQConfig:
        """The inverse of `to_json`, from the text; raises `ConfigError` when it is not JSON."""
        try:
            data = parsed(text)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return cls.from_dict(data)

    def __deepcopy__(self, memo: object) -> TQConfig:
        # It is not changed after it was made, and a calibration may fill the memory.
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of `to_dict`. transformers calls it, because a config may be a dict."""
        return self.to_dict().get(key, default)

    def update(self, **changes: Any) -> dict[str, Any]:
        """Returns all arguments as unused. transformers passes those of `from_pretrained`."""
        return changes


def _plain(value: Any) -> Any:
    """A JSON type for an argument: a path, a calibration or an infinite cap becomes text."""
    return (
        str(value)
        if value == math.inf
        else value
        if isinstance(value, int | float | str | list | tuple)
        else str(value)
    )


def _is_utf8(text: str) -> bool:
    """Whether a string has no lone surrogates, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
