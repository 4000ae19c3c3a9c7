"""Swap modules of a live model for compressed ones and back, tied heads included."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import _core
from ..config.specs import MatrixSpec
from ..errors import ConfigError, ShapeError
from ..modules.base import Tied
from ..modules.build import CompressedModule, empty_embedding, empty_linear, make_int8
from ..modules.fused import FusedLinear
from ..modules.int8_dense import Int8Embedding, Int8Linear
from ..modules.mixed import FactoredEmbedding, tied_embedding, tied_head
from ..utils.torch_utils import replace_modules, take_modes
from .matrices import (
    KINDS,
    bare_name,
    by_module,
    compressed_modules,
    factor_parameters,
    linear_size,
    module_name,
)
from .stock import stock_model, weight_tensors
from .ties import restore_tables, retie, tables, tied_biases, ties


def empty_modules(
    model: PreTrainedModel, specs: Mapping[str, MatrixSpec], int8: Collection[str] | None = None
) -> dict[str, CompressedModule]:
    """Modules without values, on the meta device, for the matrices named in `specs`: full name to module.

    With `int8`, the factors are eight-bit integers, and so are the dense matrices of the modules that it names.

    Modules tied to one of them are left to `tied_modules`. Raises `ConfigError` for a name that the model does not
    have or whose tying cannot be kept, and `ShapeError` for a spec that does not fit; both name the matrix.
    """
    modules: dict[str, CompressedModule] = {}
    tied = ties(model)
    for bare, parts in by_module(specs).items():
        name = module_name(model, bare)
        dense = _find_dense(model, name, parts)
        if reason := obstacle(model, name, tied):
            raise ConfigError(reason)
        dtype = dense.weight.dtype
        try:
            if isinstance(dense, nn.Embedding):
                size = (dense.num_embeddings, dense.embedding_dim)
                modules[name] = empty_embedding(*size, specs[parts[None]], dtype)
                modules[name].padding_idx = dense.padding_idx
                continue
            has_bias = dense.bias is not None
            if None in parts:
                modules[name] = empty_linear(*linear_size(dense), specs[parts[None]], has_bias, dtype)
            else:
                width, _ = linear_size(dense)
                modules[name] = FusedLinear(
                    {
                        part: empty_linear(width, width, specs[parts[part]], False, dtype)
                        for part in _parts_of(name, dense)
                    },
                    has_bias,
                )
            modules[name].weight_is_transposed = isinstance(dense, nn.Linear)
        except ShapeError as error:
            raise ShapeError(f"{', '.join(parts.values())}: {error}") from None
    for bare in int8 or ():
        name = module_name(model, bare)
        dense = _find_dense(model, name, {None: bare}, whole=True)
        if reason := obstacle(model, name, tied):
            raise ConfigError(reason)
        dtype = dense.weight.dtype
        if isinstance(dense, nn.Embedding):
            modules[name] = Int8Embedding(dense.num_embeddings, dense.embedding_dim, "meta", dtype)
            modules[name].padding_idx = dense.padding_idx
        else:
            options: Any = (dense.bias is not None, isinstance(dense, nn.Linear), "meta", dtype)
            modules[name] = Int8Linear(*linear_size(dense), *options)
    if int8 is not None:
        for module in modules.values():
            make_int8(module)
    return modules


def int8_modules(model: PreTrainedModel, specs: Mapping[str, MatrixSpec]) -> tuple[str, ...]:
    """The modules whose dense matrices can be eight-bit integers, beside those in `specs`, without the base prefix."""
    tied, factored = ties(model), by_module(specs)
    names = ((name, bare.removesuffix(".weight")) for name, bare, shape, _ in weight_tensors(model) if len(shape) == 2)
    return tuple(
        bare
        for name, bare in names
        if bare not in factored and obstacle(model, name.removesuffix(".weight"), tied) is None
    )


def tied_modules(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The heads and embeddings tied to those of `modules` that are embeddings, sharing their factors, by full name."""
    found: dict[str, nn.Module] = {}
    for name, source in ties(model).items():
        if source in modules:
            dense: Any = model.get_submodule(name)
            embedding = modules[source]
            found[name] = (
                tied_embedding(embedding) if isinstance(dense, nn.Embedding) else tied_head(embedding, dense.bias)
            )
    return found


def tie_modules(model: PreTrainedModel) -> None:
    """Ties every module that shares factors to the current factors and permutations of its embedding."""
    for name, source in ties(model).items():
        tied, embedding = model.get_submodule(name), model.get_submodule(source)
        if isinstance(tied, Tied) and isinstance(embedding, FactoredEmbedding):
            tie: Any = tied.tie
            tie(embedding)


def _parts_of(name: str, dense: nn.Module) -> tuple[str, ...]:
    """The parts of a fused module, such as q, k and v of a `c_attn`; none for any other."""
    if not isinstance(dense, Conv1D | nn.Linear):
        return ()
    return tuple(_core.fused_parts(name, KINDS[type(dense)], *linear_size(dense)) or ())


def _find_dense(
    model: PreTrainedModel, name: str, parts: Mapping[str | None, str], whole: bool = False
) -> Conv1D | nn.Linear | nn.Embedding:
    matrices = ", ".join(parts.values())
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"{type(model).__name__} has no matrix {matrices}") from None
    if not isinstance(dense, Conv1D | nn.Linear | nn.Embedding) or type(dense) not in KINDS:
        raise ConfigError(f"{matrices} is a {type(dense).__name__}, which cannot be compressed")
    expected: Sequence[str | None] = (() if whole else _parts_of(name, dense)) or [None]
    if set(parts) != set(expected):
        wanted = ", ".join(name if part is None else f"{name}.{part}" for part in expected)
        raise ConfigError(f"{wanted} must be compressed all or none, got {matrices}")
    return dense


def obstacle(model: PreTrainedModel, name: str, tied: Mapping[str, str]) -> str | None:
    """Why the module with this full name cannot be swapped with all users of its weight, `tied` to it; else None."""
    if name in tied:
        return f"{name} is tied to {tied[name]}: compressing that compresses both"
    dense = model.get_submodule(name)
    names = [other for other, module in model.named_modules(remove_duplicate=False) if module is dense]
    if len(names) > 1:
        return f"{name} is one module under several names, {', '.join(names)}: leave it as it is"
    for target, source in tied.items():
        if source != name:
            continue
        other = model.get_submodule(target)
        # A subclass may compute something else, such as Bart's scaled embeddings.
        if not isinstance(dense, nn.Embedding) or type(other) not in (nn.Linear, nn.Embedding):
            return (
                f"{name} shares its weight with {target}, a {type(other).__name__}: only an nn.Linear and an "
                "nn.Embedding can share the factors of an embedding, leave it as it is"
            )
    return None


@contextmanager
def swapped(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[Callable[..., None]]:
    """Puts modules in the places of those with the same full names, and yields a function that swaps more of them.

    An exception in the body puts all the old ones back.
    """
    tied, biases, before = ties(model), tied_biases(model), tables(model)
    undo: list[dict[str, nn.Module]] = []

    def swap(more: Mapping[str, nn.Module]) -> None:
        undo.append(replace_modules(model, more))
        take_modes(more, undo[-1])
        if more:
            retie(model, tied, biases)

    try:
        swap(modules)
        yield swap
    except BaseException:
        for old in reversed(undo):
            replace_modules(model, old)
        restore_tables(before)
        raise


def dense_modules(model: PreTrainedModel, matrices: Container[str] | None = None) -> dict[str, nn.Module]:
    """The stock modules, with dense weights, in place of the compressed ones: full name to module.

    `matrices` are the names of the modules, without the base prefix; the default is all. Modules that are tied to an
    embedding come with it.
    """
    # The stock model has the class of each: Conv1D and nn.Linear are laid out differently.
    stock = stock_model(model)
    tied = ties(model)
    modules: dict[str, nn.Module] = {}
    for name, compressed in compressed_modules(model):
        source = tied.get(name, name)
        if matrices is not None and bare_name(model, source) not in matrices:
            continue
        dense: Any = stock.get_submodule(name)
        if not isinstance(compressed, Tied):
            with torch.no_grad():
                weight = compressed.dense_weight()
            weight = weight.t() if isinstance(dense, nn.Linear) else weight
            # Eight-bit integers do not train; what they become does.
            factors = factor_parameters(compressed)
            dense.weight = nn.Parameter(weight.contiguous(), not factors or factors[0].requires_grad)
        if not isinstance(compressed, FactoredEmbedding):
            dense.bias = compressed.bias
        modules[name] = dense
    for name, source in tied.items():
        if name in modules and source in modules:
            # The same parameter, as `tie_weights` does.
            modules[name].weight = modules[source].weight
    return modules
