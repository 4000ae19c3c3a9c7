"""The matrices of a live model of transformers, their names and their ties.

A *matrix* is named after its module without the base model's prefix ("transformer.", "bert.", "model."). GPT-2's fused
`c_attn` has several, named "….c_attn.q", ".k" and ".v".
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import _core
from ..errors import ConfigError
from ..modules.build import CompressedModule

# Exactly these classes: a subclass may do something else with its weight.
KINDS: Mapping[type[nn.Module], str] = {Conv1D: "conv1d", nn.Linear: "linear", nn.Embedding: "embedding"}
# The names of the parameters of a factored matrix.
FACTORS = ("A", "B", "left", "right")


def require_transformers_model(model: object) -> PreTrainedModel:
    """Returns `model`; raises `ConfigError` unless it is a model of transformers."""
    if isinstance(model, PreTrainedModel):
        return model
    raise ConfigError(
        f"{type(model).__name__} is not a model of transformers: compress the model itself, before wrapping it "
        "(peft, torch.compile, accelerate, sentence_transformers)"
    )


def base_prefix(model: PreTrainedModel) -> str:
    """The prefix of the base model's modules in `model`: "transformer.", "bert." or none."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def in_base_model(model: PreTrainedModel, matrix: str) -> bool:
    """Whether a matrix belongs to the base model, and not to a head."""
    return matrix.split(".", 1)[0] in dict(model.base_model.named_children())


def module_name(model: PreTrainedModel, matrix: str) -> str:
    """The full name in `model` of a module or matrix named without the base prefix."""
    return base_prefix(model) + matrix if in_base_model(model, matrix) else matrix


def bare_name(model: PreTrainedModel, name: str) -> str:
    """The inverse of `module_name`."""
    return name.removeprefix(base_prefix(model))


def weight_tensors(model: PreTrainedModel) -> list[tuple[str, str, tuple[int, ...], str]]:
    """`(name, bare name, shape, kind)` of every weight that can be compressed, in model order.

    A bare name has no base prefix.

    A weight that is tied to another is left out. A compressed weight has its dense shape and kind.
    """
    left_out = ties(model)
    compressed = dict(compressed_modules(model))
    stock = stock_model(model) if compressed else model
    tensors = []
    for name, module in model.named_modules():
        dense: Any = stock.get_submodule(name) if name in compressed else module
        kind = KINDS.get(type(dense))
        if kind is not None and name not in left_out:
            bare = bare_name(model, name)
            tensors.append((f"{name}.weight", f"{bare}.weight", tuple(dense.weight.shape), kind))
    return tensors


def ties(model: PreTrainedModel) -> dict[str, str]:
    """The modules whose weight is another's, by full names: {"lm_head": "transformer.wte"}; compressed or not.

    Raises `ConfigError` when the model and its `config.tie_word_embeddings` disagree, because saving and loading would
    then change the model.
    """
    tied = {}
    for target, source in tied_parameters(model).items():
        owners = [weight_owner(name) for name in (target, source)]
        if owners[0] is not None and owners[1] is not None:
            tied[owners[0]] = owners[1]
    first_with: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None) if type(module) in KINDS else None
        # Within `from_pretrained`, weights are tied only once they have values.
        if weight is None or weight.is_meta:
            continue
        first = first_with.setdefault(id(weight), name)
        if name in tied:
            if getattr(model.get_submodule(tied[name]), "weight", None) is not weight:
                _disagreement(model, name, tied[name], shared=False)
        elif first != name and first not in tied:
            _disagreement(model, name, first, shared=True)
    return tied


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """transformers' own table of tied parameters, or what `retie` made of it: target to source."""
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return tied


def weight_owner(parameter: str) -> str | None:
    """The module of a parameter that is a weight or a factor of one; None for a bias."""
    return parameter.removesuffix(".weight") if parameter.endswith(".weight") else factor_owner(parameter)


def _disagreement(model: PreTrainedModel, target: str, source: str, shared: bool) -> None:
    raise ConfigError(
        f"config.tie_word_embeddings is {getattr(model.config, 'tie_word_embeddings', False)}, but {target} and "
        f"{source} {'share' if shared else 'do not share'} one weight: set it to {shared}, or call model.tie_weights()"
    )


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, CompressedModule]]:
    """`(full name, module)` of every compressed module in model order, without the modules within it."""
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, CompressedModule) and module not in inner:
            inner.update(module.modules())
            yield name, module


def factor_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The factors of a compressed module, without its bias."""
    return [parameter for name, parameter in module.named_parameters() if name.split(".")[-1] in FACTORS]


def factor_owner(name: str) -> str | None:
    """The module of a stored tensor that is a factor, by its name; None for any other tensor."""
    module, _, last = name.rpartition(".")
    if last not in (*FACTORS, "input_permutation", "output_permutation"):
        return None
    outer, _, number = module.rpartition(".")
    if number.isdigit() and outer.endswith(".terms"):
        module = outer.removesuffix(".terms")
    return _core.split_part(module)[0]


def by_module(matrices: Iterable[str]) -> dict[str, dict[str | None, str]]:
    """Groups matrix names by their module: {"h.0.attn.c_attn": {"q": "h.0.attn.c_attn.q", …}, "wte": {None: "wte"}}."""
    groups: dict[str, dict[str | None, str]] = defaultdict(dict)
    for matrix in matrices:
        module, part = _core.split_part(matrix)
        groups[module][part] = matrix
    return dict(groups)


def linear_size(dense: Conv1D | nn.Linear) -> tuple[int, int]:
    """`(in_features, out_features)` of a `Conv1D` or an `nn.Linear`."""
    rows, columns = dense.weight.shape
    return (columns, rows) if isinstance(dense, nn.Linear) else (rows, columns)


def stock_model(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model of the same config, without values, on the meta device."""
    config = copy.deepcopy(model.config)
    if isinstance(config.dtype, str):
        # `save_pretrained` leaves the name, which not every constructor takes.
        config.dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        return type(model)(config)
