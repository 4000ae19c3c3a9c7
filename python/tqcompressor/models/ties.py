"""Which modules of a live model share one weight, and the tables by which transformers ties, loads and saves them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..modules.base import Tied
from ..modules.build import is_int8
from .matrices import KINDS, weight_owner

# The attribute of a submodel that keeps what `_tied_weights_keys` it had of its own, besides its class's.
_DENSE_KEYS = "_tied_weights_keys_while_dense"
# Rows that are compared at a time: copies in float32 stay small.
_ROWS = 4096
# What `retie` writes.
_TABLES = ("_tied_weights_keys", "all_tied_weights_keys", _DENSE_KEYS)


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """transformers' own table of tied parameters, or what `retie` made of it: target to source."""
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return tied


def ties(model: PreTrainedModel) -> dict[str, str]:
    """The modules whose weight is another's, by full names: {"lm_head": "transformer.wte"}; compressed or not.

    The other is the one that owns the weight: it is tied to none itself. Modules that the config ties and whose weights
    differ are not tied: see `untied`. Raises `ConfigError` when the model and its `config.tie_word_embeddings` disagree
    in another way, because saving and loading would then change the model.
    """
    apart = untied(model)
    tied = {target: source for target, source in _pairs(model).items() if target not in apart}
    for target, source in tied.items():
        # A composite model may tie one submodel to another, which has ties of its own.
        while source in tied and tied[source] != target:
            source = tied[source]
        tied[target] = source
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


def untied(model: PreTrainedModel) -> dict[str, str]:
    """The modules that the config ties although their weights have different values, as `ties` gives those it ties.

    A checkpoint with such weights makes such a model: transformers ties only what is equal.
    """
    pairs = _pairs(model).items()
    return {target: source for target, source in pairs if _differ(*map(model.get_submodule, (target, source)))}


def warn_of_untied(model: PreTrainedModel, stacklevel: int) -> None:
    """Warns of the modules that the config ties and that are not tied, because their weights differ."""
    apart = untied(model)
    if apart:
        pairs = ", ".join(f"{target}.weight differs from {source}.weight" for target, source in apart.items())
        warnings.warn(
            f"{pairs}, though config.tie_word_embeddings says that they are one: each is taken as a matrix of its own, "
            "as transformers takes them",
            stacklevel=stacklevel + 1,
        )


def _pairs(model: PreTrainedModel) -> dict[str, str]:
    """The modules whose weights transformers' table ties, by full names."""
    owners = ((weight_owner(target), weight_owner(source)) for target, source in tied_parameters(model).items())
    pairs = {target: source for target, source in owners if target is not None and source is not None}
    # Eight-bit integers are buffers, which the table cannot tie: the modules say themselves whose factors they have.
    names = {id(module): name for name, module in model.named_modules()}
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, Tied))
    live = {name: names[id(module.owner)] for name, module in found if is_int8(module) and id(module.owner) in names}
    # A term of a sum comes with the sum.
    outer = {name: source for name, source in live.items() if ".terms." not in name}
    return {**outer, **pairs}


def _differ(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules have plain weights of different values, in whichever dtypes."""
    a: Any
    b: Any
    a, b = (module._parameters.get("weight") for module in (left, right))
    if a is None or b is None or a is b or a.is_meta or b.is_meta:
        return False
    if a.shape != b.shape:
        return True
    with torch.no_grad():
        pieces = zip(a.split(_ROWS), b.split(_ROWS), strict=True)
        return not all(torch.equal(one.float(), other.to(one.device).float()) for one, other in pieces)


def _disagreement(model: PreTrainedModel, target: str, source: str, shared: bool) -> None:
    raise ConfigError(
        f"config.tie_word_embeddings is {getattr(model.config, 'tie_word_embeddings', False)}, but {target} and "
        f"{source} {'share' if shared else 'do not share'} one weight: set it to {shared}, or call model.tie_weights()"
    )


def tables(model: PreTrainedModel) -> list[tuple[PreTrainedModel, dict[str, Any]]]:
    """The tables of ties of a model and the models within it, to be restored."""
    return [(part, {name: vars(part)[name] for name in _TABLES if name in vars(part)}) for _, part in _parts(model)]


def restore_tables(before: Collection[tuple[PreTrainedModel, Mapping[str, Any]]]) -> None:
    """Puts tables of ties back to what they were."""
    for part, kept in before:
        for name in _TABLES:
            vars(part).pop(name, None)
        vars(part).update(kept)


def retie(model: PreTrainedModel, tied: Mapping[str, str], biases: Mapping[str, str]) -> None:
    """Makes the names of tied parameters, by which transformers ties, loads and saves, those of the modules there are.

    `tied` are modules whose weights are tied, as `ties` gives them, and `biases` the other tied parameters, by name.
    What the classes tie besides is not tied any more.
    """
    names = dict(biases)
    for target, source in tied.items():
        for name, _ in model.get_submodule(source).named_parameters():
            # An embedding may have other parameters, which the head lacks.
            if weight_owner(f"{source}.{name}") is not None:
                names[f"{target}.{name}"] = f"{source}.{name}"
    shared = any(isinstance(model.get_submodule(target), Tied) for target in tied)
    parts = _parts(model)
    for _, part in parts:
        attributes = vars(part)
        if _DENSE_KEYS in attributes:
            # Without one of its own, the class's table is found again.
            attributes.pop("_tied_weights_keys", None)
            attributes.update(attributes.pop(_DENSE_KEYS))
    dense = [None if shared else _usual_targets(part) for _, part in parts]
    # Every submodel has a table of its own, and all of them together are used.
    for (name, part), usual in zip(parts, dense, strict=True):
        prefix = f"{name}." if name else ""
        own = {
            target.removeprefix(prefix): source.removeprefix(prefix)
            for target, source in names.items()
            if target.startswith(prefix) and source.startswith(prefix)
        }
        attributes = vars(part)
        if own.keys() != usual:
            kept = {key: attributes[key] for key in ("_tied_weights_keys",) if key in attributes}
            attributes[_DENSE_KEYS] = kept
            part._tied_weights_keys = own
        part.all_tied_weights_keys = own


def _usual_targets(part: PreTrainedModel) -> Collection[str] | None:
    """What a model ties by its own table; None where that names parameters which it does not have."""
    try:
        return tied_parameters(part).keys()
    except ValueError:
        return None


def untie(model: PreTrainedModel, targets: Collection[str]) -> None:
    """Gives dense modules that the config ties weights of their own, of the same values."""
    tied = {target: source for target, source in ties(model).items() if target not in targets}
    biases = tied_biases(model)
    for target in targets:
        module: Any = model.get_submodule(target)
        module.weight = nn.Parameter(module.weight.detach().clone(), module.weight.requires_grad)
    retie(model, tied, biases)


def tied_biases(model: PreTrainedModel) -> dict[str, str]:
    """The tied parameters that are not weights of modules, by name."""
    return {name: source for name, source in tied_parameters(model).items() if weight_owner(name) is None}


def say_untied(model: PreTrainedModel) -> None:
    """Sets `tie_word_embeddings` to False in the configs of a model of whose ties `retie` left none.

    A config that ties anything else stays as it is: transformers then compares what is stored, as for dense models.
    """
    parts = [part for _, part in _parts(model) if _DENSE_KEYS in vars(part)]
    if parts and not tied_parameters(model) and not _pairs(model):
        for part in parts:
            part.config.tie_word_embeddings = False


def _parts(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """A model and the models within it, by full names."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel)]
