"""Where the matrices of a live transformers model are, and how modules are put in their places.

A *matrix* is named after its module without the base model's prefix ("transformer.", "bert.", "model."); GPT-2's fused
`c_attn` holds several, named "….c_attn.q", ".k" and ".v". Everything that knows transformers' module tree is here.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import FUSED, split_part
from .errors import ConfigError, ShapeError
from .mixed import CompressedModule, FactoredEmbedding, FactoredHead, empty_embedding, empty_linear, tied_head
from .modules import FusedKroneckerLinear
from .specs import MatrixSpec

# Exactly these classes: a subclass may do something else with its weight.
_KINDS: Mapping[type[nn.Module], str] = {Conv1D: "conv1d", nn.Linear: "linear", nn.Embedding: "embedding"}
# What the parameters that stand for a matrix are called.
_FACTORS = ("A", "B", "left", "right")

# What is GPT-2's alone: this one is initialised from its parent, through a `weight` that it does not have any more when
# compressed.
_INITIALISED_BY_PARENT = "c_proj"


def require_transformers_model(model: object) -> PreTrainedModel:
    """Returns `model`; raises `ConfigError` unless it is a model of transformers."""
    if isinstance(model, PreTrainedModel):
        return model
    raise ConfigError(
        f"{type(model).__name__} is not a model of transformers: compress the model itself, before wrapping it "
        "(peft, torch.compile, accelerate, sentence_transformers)"
    )


def base_prefix(model: PreTrainedModel) -> str:
    """What the names of the base model's modules begin with in `model`: "transformer.", "bert." or nothing."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def in_base_model(model: PreTrainedModel, matrix: str) -> bool:
    """Whether a matrix belongs to the base model, which every model of the family has, and not to a head."""
    return matrix.split(".", 1)[0] in dict(model.base_model.named_children())


def module_name(model: PreTrainedModel, matrix: str) -> str:
    """The full name in `model` of a module or matrix that is given without the base prefix."""
    return base_prefix(model) + matrix if in_base_model(model, matrix) else matrix


def bare_name(model: PreTrainedModel, name: str) -> str:
    """The inverse of `module_name`."""
    return name.removeprefix(base_prefix(model))


def weight_tensors(model: PreTrainedModel) -> list[tuple[str, tuple[int, ...], str]]:
    """`(name, shape, kind)` of every weight that can be compressed, in model order, without the base prefix.

    A weight that is tied to another is left out. Weights that are compressed already count as what they were.
    """
    left_out = ties(model)
    compressed = dict(compressed_modules(model))
    stock = stock_model(model) if compressed else model
    tensors = []
    for name, module in model.named_modules():
        dense: Any = stock.get_submodule(name) if name in compressed else module
        kind = _KINDS.get(type(dense))
        if kind is not None and name not in left_out:
            tensors.append((f"{bare_name(model, name)}.weight", tuple(dense.weight.shape), kind))
    return tensors


def ties(model: PreTrainedModel) -> dict[str, str]:
    """The modules whose weight is another's, by full names: {"lm_head": "transformer.wte"}; compressed or not.

    Raises `ConfigError` when the model and its `config.tie_word_embeddings` disagree, since one of them would be lost
    by saving and loading.
    """
    tied = {}
    for target, source in _tied_parameters(model).items():
        owners = [_weight_owner(name) for name in (target, source)]
        if owners[0] is not None and owners[1] is not None:
            tied[owners[0]] = owners[1]
    first_with: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None) if type(module) in _KINDS else None
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


def _tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """transformers' own table of tied parameters, or what `retie` made of it: target to source."""
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return tied


def _weight_owner(parameter: str) -> str | None:
    """The module whose weight, or factor of it, a parameter is; None for a bias."""
    return parameter.removesuffix(".weight") if parameter.endswith(".weight") else factor_owner(parameter)


def _disagreement(model: PreTrainedModel, target: str, source: str, shared: bool) -> None:
    raise ConfigError(
        f"config.tie_word_embeddings is {getattr(model.config, 'tie_word_embeddings', False)}, but {target} and "
        f"{source} {'share' if shared else 'do not share'} one weight: set it to {shared}, or call model.tie_weights()"
    )


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, CompressedModule]]:
    """`(full name, module)` of every compressed module in model order; what these are made of is not listed apart."""
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, CompressedModule) and module not in inner:
            inner.update(module.modules())
            yield name, module


def factors(module: nn.Module) -> list[nn.Parameter]:
    """The factors of a compressed module, which its bias is not one of."""
    return [parameter for name, parameter in module.named_parameters() if name.split(".")[-1] in _FACTORS]


def factor_owner(name: str) -> str | None:
    """The module whose matrix a stored tensor is a factor of, by its name; None for any other tensor."""
    module, _, last = name.rpartition(".")
    if last not in (*_FACTORS, "input_permutation", "output_permutation"):
        return None
    outer, _, number = module.rpartition(".")
    if number.isdigit() and outer.endswith(".terms"):
        module = outer.removesuffix(".terms")
    return split_part(module)[0]


def by_module(matrices: Iterable[str]) -> dict[str, dict[str | None, str]]:
    """Groups matrix names by their module: {"h.0.attn.c_attn": {"q": "h.0.attn.c_attn.q", …}, "wte": {None: "wte"}}."""
    groups: dict[str, dict[str | None, str]] = defaultdict(dict)
    for matrix in matrices:
        module, part = split_part(matrix)
        groups[module][part] = matrix
    return dict(groups)


def empty_modules(model: PreTrainedModel, specs: Mapping[str, MatrixSpec]) -> dict[str, CompressedModule]:
    """Modules without values, on the meta device, for the matrices named in `specs`: full name to module.

    Output layers tied to one of them are not among them: see `heads`. Raises `ConfigError` for a name that the model
    does not have or whose tying cannot be kept, and `ShapeError` for a spec that does not fit; both name the matrix.
    """
    modules: dict[str, CompressedModule] = {}
    tied = ties(model)
    for bare, parts in by_module(specs).items():
        name = module_name(model, bare)
        dense = _find_dense(model, name, parts)
        _check_ties(model, name, tied)
        dtype = dense.weight.dtype
        try:
            if isinstance(dense, nn.Embedding):
                size = (dense.num_embeddings, dense.embedding_dim)
                modules[name] = empty_embedding(*size, specs[parts[None]], dtype)
                continue
            has_bias = dense.bias is not None
            if None in parts:
                modules[name] = empty_linear(*linear_size(dense), specs[parts[None]], has_bias, dtype)
            else:
                width, _ = linear_size(dense)
                modules[name] = FusedKroneckerLinear(
                    {part: empty_linear(width, width, specs[parts[part]], False, dtype) for part in _parts_of(dense)},
                    has_bias,
                )
        except ShapeError as error:
            raise ShapeError(f"{', '.join(parts.values())}: {error}") from None
    return modules


def heads(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, FactoredHead]:
    """The output layers tied to those of `modules` that are embeddings, sharing their factors: full name to module."""
    found = {}
    for name, source in ties(model).items():
        if source in modules:
            dense: Any = model.get_submodule(name)
            found[name] = tied_head(modules[source], dense.bias)
    return found


def tie_heads(model: PreTrainedModel) -> None:
    """Gives every compressed tied head the factors and permutations that its embedding has now."""
    for name, source in ties(model).items():
        head, embedding = model.get_submodule(name), model.get_submodule(source)
        if isinstance(head, FactoredHead) and isinstance(embedding, FactoredEmbedding):
            tie: Any = head.tie
            tie(embedding)


def linear_size(dense: Conv1D | nn.Linear) -> tuple[int, int]:
    """`(in_features, out_features)` of a `Conv1D` or an `nn.Linear`."""
    rows, columns = dense.weight.shape
    return (columns, rows) if isinstance(dense, nn.Linear) else (rows, columns)


def _parts_of(fused: Conv1D | nn.Linear) -> tuple[str, ...]:
    """q, k and v of a fused `c_attn`; in cross-attention, whose query comes from elsewhere, k and v."""
    rows, columns = linear_size(fused)
    return ("q", "k", "v") if columns == 3 * rows else ("k", "v")


def _find_dense(
    model: PreTrainedModel, name: str, parts: Mapping[str | None, str]
) -> Conv1D | nn.Linear | nn.Embedding:
    matrices = ", ".join(parts.values())
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"{type(model).__name__} has no matrix {matrices}") from None
    if not isinstance(dense, Conv1D | nn.Linear | nn.Embedding) or type(dense) not in _KINDS:
        raise ConfigError(f"{matrices} is a {type(dense).__name__}, which cannot be compressed")
    others = [other for other, module in model.named_modules(remove_duplicate=False) if module is dense]
    if len(others) > 1:
        raise ConfigError(f"{matrices} is one module under several names, {', '.join(others)}: leave it as it is")
    expected: list[str | None] = [None]
    if isinstance(dense, Conv1D) and name.endswith(FUSED):
        expected = list(_parts_of(dense))
    if set(parts) != set(expected):
        wanted = ", ".join(name if part is None else f"{name}.{part}" for part in expected)
        raise ConfigError(f"{wanted} must be compressed all or none, got {matrices}")
    return dense


def _check_ties(model: PreTrainedModel, name: str, tied: Mapping[str, str]) -> None:
    """Raises `ConfigError` unless whatever is tied to the module can be tied to its factors."""
    if name in tied:
        raise ConfigError(f"{name} is tied to {tied[name]}: compressing that compresses both")
    for target, source in tied.items():
        other: Any = model.get_submodule(target)
        followed = type(other) is nn.Linear and isinstance(model.get_submodule(name), nn.Embedding)
        if source == name and not followed:
            raise ConfigError(
                f"{name} shares its weight with {target}, a {type(other).__name__}: "
                "only an output layer can share factors, leave it as it is"
            )


@contextmanager
def swapped(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[Callable[..., None]]:
    """Puts modules in the places of those with the same full names, and yields a function that swaps more of them.

    An exception in the body puts all the old ones back.
    """
    tied = ties(model)
    biases = {name: source for name, source in _tied_parameters(model).items() if _weight_owner(name) is None}
    undo: list[tuple[nn.Module, str, nn.Module]] = []

    def swap(more: Mapping[str, nn.Module]) -> None:
        for name, module in more.items():
            parent_name, _, child = name.rpartition(".")
            parent: Any = model.get_submodule(parent_name)
            undo.append((parent, child, getattr(parent, child)))
            module.train(getattr(parent, child).training)
            setattr(parent, child, module)
            if child == _INITIALISED_BY_PARENT:
                parent._is_hf_initialized = True
        if more:
            retie(model, tied, biases)

    try:
        swap(modules)
        yield swap
    except BaseException:
        for parent, child, old in reversed(undo):
            setattr(parent, child, old)
        if undo:
            retie(model, tied, biases)
        raise


def retie(model: PreTrainedModel, tied: Mapping[str, str], biases: Mapping[str, str]) -> None:
    """Makes the names of tied parameters, by which transformers ties, loads and saves, those of the heads there are.

    `tied` are modules whose weights are tied, as `ties` gives them, and `biases` the other tied parameters, by name.
    """
    names = dict(biases)
    for head, embedding in tied.items():
        for name, _ in model.get_submodule(embedding).named_parameters():
            names[f"{head}.{name}"] = f"{embedding}.{name}"
    if any(isinstance(model.get_submodule(head), FactoredHead) for head in tied):
        model._tied_weights_keys = names
    else:
        # The class has the same.
        vars(model).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = names


def stock_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is before any compression, without values, on the meta device."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def dense_modules(model: PreTrainedModel, matrices: Container[str] | None = None) -> dict[str, nn.Module]:
    """The stock modules, holding dense weights, for the compressed ones: full name to module.

    `matrices` are the modules that are wanted, named without the base prefix; None stands for all. A head that is tied
    to the embedding comes with it.
    """
    # Tells which class each had: Conv1D and nn.Linear are laid out differently.
    stock = stock_model(model)
    tied = ties(model)
    modules: dict[str, nn.Module] = {}
    for name, compressed in compressed_modules(model):
        source = tied.get(name, name)
        if matrices is not None and bare_name(model, source) not in matrices:
            continue
        dense: Any = stock.get_submodule(name)
        if not isinstance(compressed, FactoredHead):
            with torch.no_grad():
                weight = compressed.dense_weight()
            weight = weight.t() if isinstance(dense, nn.Linear) else weight
            dense.weight = nn.Parameter(weight.contiguous(), factors(compressed)[0].requires_grad)
        if not isinstance(compressed, FactoredEmbedding):
            dense.bias = compressed.bias
        modules[name] = dense
    for name, source in tied.items():
        if name in modules and source in modules:
            # The very parameter, as `tie_weights` would have it.
            modules[name].weight = modules[source].weight
    return modules
