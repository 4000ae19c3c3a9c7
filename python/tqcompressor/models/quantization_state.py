"""The attributes that mark a compressed model for transformers, and the specs of its matrices."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import _core
from ..config.specs import MatrixSpec
from ..config.tq_config import QUANT_METHOD, TQConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What `attach` sets: on a model and its base model, where transformers keeps conversions of names, and on the config.
_CONVERSIONS, _DENSE_CONVERSIONS = "_weight_conversions", "_dense_weight_conversions"
_OF_MODEL = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "resize_token_embeddings",
    "save_pretrained",
    "_upload_modified_files",
    _CONVERSIONS,
    _DENSE_CONVERSIONS,
)
_OF_CONFIG = ("quantization_config", "_is_quantized")
# The marks of a model, of its base model, of its config and of the models within it.
Marks: TypeAlias = list[dict[str, Any]]


def attach(model: PreTrainedModel, config: TQConfig) -> None:
    """Marks `model` as compressed by `config`, which names its matrices one by one.

    The model's config becomes its own, because other models may share the object.
    """
    # From transformers' registry: this folder may not import the quantizer's class.
    from transformers.quantizers.auto import AutoHfQuantizer

    from .matrices import compressed_modules
    from .resizing import resize_token_embeddings
    from .ties import say_untied

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
        part.resize_token_embeddings = MethodType(resize_token_embeddings, part)
        part.save_pretrained = MethodType(save_pretrained, part)
        part._upload_modified_files = MethodType(_upload_modified_files, part)
    for part in _submodels(model):
        if next(compressed_modules(part), None) is not None:
            part.save_pretrained = MethodType(_refuse_to_save, part)
    say_untied(model)


def detach(model: PreTrainedModel) -> None:
    """Undoes `attach`, except that the model has a config of its own."""
    if not vars(model.config).keys().isdisjoint(_OF_CONFIG):
        _own_config(model)
    before = []
    for kept in marks(model):
        own = kept.get(_DENSE_CONVERSIONS if _DENSE_CONVERSIONS in kept else _CONVERSIONS)
        before.append({} if own is None else {_CONVERSIONS: own})
    restore(model, before)


def marks(model: PreTrainedModel) -> Marks:
    """The marks of any quantization method that a model has, to be restored."""
    return [{name: vars(part)[name] for name in names if name in vars(part)} for part, names in _parts(model)]


def restore(model: PreTrainedModel, before: Marks) -> None:
    """Puts the marks of a model back to what they were."""
    for (part, names), kept in zip(_parts(model), before, strict=True):
        for name in names:
            vars(part).pop(name, None)
        vars(part).update(kept)


def _parts(model: PreTrainedModel) -> Sequence[tuple[Any, Sequence[str]]]:
    """What has marks, with their names. The base model has its own, so that it can be saved alone."""
    submodels = ((part, ("save_pretrained",)) for part in _submodels(model))
    return [(model, _OF_MODEL), (model.base_model, _OF_MODEL), (model.config, _OF_CONFIG), *submodels]


def _submodels(model: PreTrainedModel) -> list[Any]:
    """The models of transformers within `model`, such as an encoder, without its base model."""
    from transformers import PreTrainedModel

    inner = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in inner if part is not model and part is not model.base_model]


def save_pretrained(part: Any, save_directory: str | PathLike[str], *arguments: Any, **options: Any) -> None:
    """`save_pretrained` of a compressed model: that of its class, and the model card beside the weights."""
    type(part).save_pretrained(part, save_directory, *arguments, **options)
    # The first argument behind the folder.
    if arguments[0] if arguments else options.get("is_main_process", True):
        part.hf_quantizer.write_card(part, Path(save_directory))


def _upload_modified_files(part: Any, working_dir: str | PathLike[str], *arguments: Any, **options: Any) -> Any:
    """`_upload_modified_files` of a compressed model, which `push_to_hub` ends with.

    Before it, transformers puts the card of the repository in the place of ours, or an empty one where there is none.
    """
    part.hf_quantizer.write_card(part, Path(working_dir))
    return type(part)._upload_modified_files(part, working_dir, *arguments, **options)


def _refuse_to_save(part: Any, *_: object, **__: object) -> None:
    """`save_pretrained` of a part of a compressed model: nothing in the part's config names its factors."""
    raise ConfigError(
        f"a {type(part).__name__} within a compressed model cannot be saved alone, since it could not be loaded: save "
        "the whole model, or call its dequantize() first"
    )


def packed_tensor(model: PreTrainedModel) -> str | None:
    """The first tensor of a model marked as quantized that is not the plain one of its class; None without one.

    A model read from GGUF, for example, keeps its mark although transformers has unpacked its weights.
    """
    import torch

    from .stock import stock_model

    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    stock = stock_model(model)
    plain = {name: tensor.shape for name, tensor in stock.named_parameters()}
    for name, tensor in model.named_parameters():
        if plain.pop(name, None) != tensor.shape or tensor.dtype not in floats:
            return name
    types = {name: type(module) for name, module in stock.named_modules()}
    changed = (name for name, module in model.named_modules() if types.get(name) is not type(module))
    return next(iter(plain), None) or next(changed, None)


def _own_config(model: PreTrainedModel) -> None:
    """Replaces the model's config by a copy, also where its submodules refer to it or to a part of it."""
    from transformers import PreTrainedConfig

    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])


def guard_name(model: PreTrainedModel) -> str | None:
    """The name of the guard tensor: the dense weight of the first compressed module that owns its factors.

    None while all of them are balanced products, for the time of a training.
    """
    from ..modules.base import Tied
    from .matrices import compressed_modules

    owners = (name for name, module in compressed_modules(model) if not isinstance(module, Tied))
    return next((f"{name}.weight" for name in owners), None)


def int8_of_model(model: PreTrainedModel, config: TQConfig) -> tuple[str, ...] | None:
    """The modules of this class of model whose dense matrices are eight-bit integers; None where no weights are."""
    from .matrices import in_base_model

    if config.dtype is None:
        return None
    modules = {name for name, _ in model.named_modules()}
    return tuple(name for name in config.dense or () if in_base_model(model, name) or name in modules)


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
    if not specs and not int8_of_model(model, config):
        raise ConfigError(f"none of the compressed matrices is in {type(model).__name__}: {', '.join(config.specs)}")
    return specs
