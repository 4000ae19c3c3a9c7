"""The attributes that mark a compressed model for transformers, and the specs of its matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import _core
from ..config.specs import MatrixSpec
from ..config.tq_config import QUANT_METHOD, TQConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, config: TQConfig) -> None:
    """Marks `model` as compressed by `config`, which names its matrices one by one."""
    # From transformers' registry: this folder may not import the quantizer's class.
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)  # type: ignore[arg-type]
    model.config.quantization_config = config
    part: Any
    # The base model too, so that it can be saved alone.
    for part in (model, model.base_model):
        part.hf_quantizer = quantizer
        part.quantization_method = QUANT_METHOD
        # transformers refuses `.half()`, `.float()` and full training for models marked as quantized.
        part.is_quantized = False


def detach(model: PreTrainedModel) -> None:
    """Undoes `attach`."""
    for part in (model, model.base_model):
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(part).pop(name, None)
    for name in ("quantization_config", "_is_quantized"):
        vars(model.config).pop(name, None)


def guard_name(model: PreTrainedModel) -> str:
    """The name of the guard tensor: the dense weight of the first compressed module that owns its factors."""
    from ..modules.base import Tied
    from .matrices import compressed_modules

    return f"{next(name for name, module in compressed_modules(model) if not isinstance(module, Tied))}.weight"


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
