"""The attributes that mark a compressed model for transformers, and the specs of its matrices."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import _core
from ..config.specs import MatrixSpec
from ..config.tq_config import QUANT_METHOD, TQConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_MODEL = ("hf_quantizer", "quantization_method", "is_quantized", "resize_token_embeddings")
_OF_CONFIG = ("quantization_config", "_is_quantized")
# The objects that have marks, each with its own.
Marks: TypeAlias = list[tuple[Any, dict[str, Any]]]


def attach(model: PreTrainedModel, config: TQConfig) -> None:
    """Marks `model` as compressed by `config`, which names its matrices one by one."""
    # From transformers' registry: this folder may not import the quantizer's class.
    from transformers.quantizers.auto import AutoHfQuantizer

    from .resizing import resize_token_embeddings

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)  # type: ignore[arg-type]
    model.config.quantization_config = config
    part: Any
    # The base model too, so that it can be saved alone.
    for part in (model, model.base_model):
        part.hf_quantizer = quantizer
        part.quantization_method = QUANT_METHOD
        # transformers refuses `.half()`, `.float()` and full training for models marked as quantized.
        part.is_quantized = False
        part.resize_token_embeddings = MethodType(resize_token_embeddings, part)


def detach(model: PreTrainedModel) -> None:
    """Undoes `attach`."""
    restore([(part, {}) for part, _ in marks(model)])


def marks(model: PreTrainedModel) -> Marks:
    """The marks of any quantization method that a model has, to be restored."""
    parts = ((model, _OF_MODEL), (model.base_model, _OF_MODEL), (model.config, _OF_CONFIG))
    return [(part, {name: vars(part)[name] for name in names if name in vars(part)}) for part, names in parts]


def restore(before: Marks) -> None:
    """Puts the marks of a model back to what they were."""
    for part, kept in before:
        for name in (*_OF_MODEL, *_OF_CONFIG):
            part.__dict__.pop(name, None)
        part.__dict__.update(kept)


def packed_tensor(model: PreTrainedModel) -> str | None:
    """The first tensor of a model marked as quantized that is not the plain one of its class; None without one.

    A model read from GGUF, for example, keeps its mark although transformers has unpacked its weights.
    """
    import torch

    from .matrices import stock_model

    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    stock = stock_model(model)
    plain = {name: tensor.shape for name, tensor in stock.named_parameters()}
    for name, tensor in model.named_parameters():
        if plain.pop(name, None) != tensor.shape or tensor.dtype not in floats:
            return name
    types = {name: type(module) for name, module in stock.named_modules()}
    changed = (name for name, module in model.named_modules() if types.get(name) is not type(module))
    return next(iter(plain), None) or next(changed, None)


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
