"""The attributes that mark a compressed model for transformers, and the specs of its matrices."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from .. import _core
from ..config.specs import MatrixSpec
from ..config.tq_config import QUANT_METHOD, TQConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What `attach` sets on a model, and where it keeps what it replaces.
_MARKS = ("hf_quantizer", "quantization_method", "is_quantized")
_CONVERSIONS, _DENSE_CONVERSIONS = "_weight_conversions", "_dense_weight_conversions"


def attach(model: PreTrainedModel, config: TQConfig) -> None:
    """Marks `model` as compressed by `config`, which names its matrices one by one.

    The model's config becomes its own, because other models may share the object.
    """
    # From transformers' registry: this folder may not import the quantizer's class.
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)  # type: ignore[arg-type]
    _own_config(model)
    model.config.quantization_config = config
    part: Any
    # The base model too, so that it can be saved alone.
    for part in {model, model.base_model}:
        part.hf_quantizer = quantizer
        part.quantization_method = QUANT_METHOD
        # transformers refuses `.half()`, `.float()` and full training for models marked as quantized.
        part.is_quantized = False
        # transformers would save the tensors as older checkpoints name, merge or split them, which factors cannot be.
        vars(part).setdefault(_DENSE_CONVERSIONS, vars(part).get(_CONVERSIONS))
        part._weight_conversions = []


def detach(model: PreTrainedModel) -> None:
    """Undoes `attach`, except that the model has a config of its own."""
    for part in {model, model.base_model}:
        own = vars(part)
        for name in _MARKS:
            own.pop(name, None)
        if _DENSE_CONVERSIONS in own:
            conversions = own.pop(_DENSE_CONVERSIONS)
            own.pop(_CONVERSIONS)
            if conversions is not None:
                own[_CONVERSIONS] = conversions
    marks = {"quantization_config", "_is_quantized"}
    if marks & vars(model.config).keys():
        _own_config(model)
        for name in marks:
            vars(model.config).pop(name, None)


def _own_config(model: PreTrainedModel) -> None:
    """Replaces the model's config by a copy, also where its submodules refer to it or to a part of it."""
    from transformers import PreTrainedConfig

    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])


def guard_name(model: PreTrainedModel) -> str:
    """The name of the guard tensor: the first compressed module's dense weight."""
    from .matrices import compressed_modules

    return f"{next(iter(compressed_modules(model)))[0]}.weight"


def specs_of_model(model: PreTrainedModel, config: TQConfig) -> dict[str, MatrixSpec]:
    """The specs of the matrices of this class of model, as a checkpoint may have another head.

    Raises `ConfigError` for a name that holds a wildcard, since a checkpoint's config names matrices one by one.
    """
    from .matrices import in_base_model

    for name in config.specs:
        if set("*?[]") & set(name):
            raise ConfigError(f"quantization_config of a compressed checkpoint names matrices, not patterns: {name}")
    modules = {name for name, _ in model.named_modules()}
    specs = {
        name: spec
        for name, spec in config.specs.items()
        if in_base_model(model, name) or _core.split_part(name)[0] in modules
    }
    if not specs:
        raise ConfigError(f"none of the compressed matrices is in {type(model).__name__}: {', '.join(config.specs)}")
    return specs
