"""Where the matrices of a live GPT-2 are, and how modules are put in their places.

A *matrix* is named after its module without the base prefix "transformer."; the fused `c_attn` holds several, named
"….c_attn.q", ".k" and ".v". Everything that knows transformers' module tree is here.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .embeddings import KroneckerEmbedding, KroneckerHead
from .errors import ConfigError, ShapeError
from .modules import FusedKroneckerLinear, KroneckerLinear
from .specs import KroneckerSpec

CompressedModule = KroneckerLinear | FusedKroneckerLinear | KroneckerEmbedding | KroneckerHead

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (Conv1D, "conv1d"),
    (nn.Linear, "linear"),
    (nn.Embedding, "embedding"),
)
# The names of the base model's children, which decide whether a matrix is the base model's or a head's.
_BASE_CHILDREN = ("wte", "wpe", "h")


def require_gpt2(model: object) -> PreTrainedModel:
    """Returns `model`; raises `ConfigError` unless it is a GPT-2 of transformers, with any head or none."""
    if isinstance(model, GPT2PreTrainedModel):
        return model
    raise ConfigError(
        f"{type(model).__name__} is not a GPT-2 of transformers: compress the model itself, before wrapping it "
        "(peft, torch.compile, accelerate), and only models whose class name begins with GPT2"
    )


def base_prefix(model: PreTrainedModel) -> str:
    """What the names of the base model's modules begin with in `model`: "transformer." or nothing."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def in_base_model(matrix: str) -> bool:
    """Whether a matrix belongs to the base model, which every GPT-2 has, and not to a head."""
    return matrix.split(".", 1)[0] in _BASE_CHILDREN


def module_name(model: PreTrainedModel, matrix: str) -> str:
    """The full name in `model` of a module or matrix that is given without the base prefix."""
    return base_prefix(model) + matrix if in_base_model(matrix) else matrix


def split_part(matrix: str) -> tuple[str, str | None]:
    """A matrix's module and the part of it that it is: "h.0.attn.c_attn.q" is ("h.0.attn.c_attn", "q")."""
    module, _, part = matrix.rpartition(".")
    return (module, part) if part in ("q", "k", "v") and module.endswith("c_attn") else (matrix, None)


def weight_tensors(model: PreTrainedModel) -> list[tuple[str, tuple[int, ...], str]]:
    """`(name, shape, kind)` of every weight that can be compressed, in model order, a tied head left out."""
    tensors = []
    left_out = tied_head(model)
    module: Any
    for name, module in model.named_modules():
        kind = next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)
        if kind is not None and module is not left_out:
            tensors.append((f"{name}.weight", tuple(module.weight.shape), kind))
    return tensors


def output_layer(model: PreTrainedModel) -> nn.Module | None:
    """`lm_head`, where the model has one."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def tied_head(model: PreTrainedModel) -> nn.Module | None:
    """The output layer that shares the token embedding's weight, or None.

    Raises `ConfigError` when the model and its `config.tie_word_embeddings` disagree, since one of them would be lost
    by saving and loading.
    """
    head: Any = output_layer(model)
    embedding: Any = model.get_input_embeddings()
    if head is None or isinstance(embedding, KroneckerEmbedding):
        return head if isinstance(head, KroneckerHead) else None
    tied = bool(model.config.tie_word_embeddings)
    # Within `from_pretrained`, weights are tied only once they have values.
    shared = tied if head.weight.device.type == "meta" else head.weight is embedding.weight
    if shared != tied:
        raise ConfigError(
            f"config.tie_word_embeddings is {tied}, but lm_head and wte "
            f"{'share' if shared else 'do not share'} one weight: set it to {shared}, or call model.tie_weights()"
        )
    return head if shared else None


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, CompressedModule]]:
    """`(full name, module)` of every compressed module in model order; parts of a fused one are not listed apart."""
    fused: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, CompressedModule) and module not in fused:
            if isinstance(module, FusedKroneckerLinear):
                fused.update(module.parts)
            yield name, module


def factors(module: CompressedModule) -> list[nn.Parameter]:
    """The factors of a compressed module, which its bias is not one of."""
    return [parameter for name, parameter in module.named_parameters() if name.split(".")[-1] in ("A", "B")]


def by_module(matrices: Iterable[str]) -> dict[str, dict[str | None, str]]:
    """Groups matrix names by their module: {"h.0.attn.c_attn": {"q": "h.0.attn.c_attn.q", …}, "wte": {None: "wte"}}."""
    groups: dict[str, dict[str | None, str]] = defaultdict(dict)
    for matrix in matrices:
        module, part = split_part(matrix)
        groups[module][part] = matrix
    return dict(groups)


def empty_modules(model: PreTrainedModel, specs: Mapping[str, KroneckerSpec]) -> dict[str, CompressedModule]:
    """Modules without values, on the meta device, for the matrices named in `specs`: full name to module.

    Raises `ConfigError` for a name that the model does not have, and `ShapeError` for a spec that does not fit; both
    name the matrix.
    """
    modules: dict[str, CompressedModule] = {}
    for bare, parts in by_module(specs).items():
        name = module_name(model, bare)
        dense = _find_dense(model, name, parts)
        dtype = dense.weight.dtype
        try:
            if isinstance(dense, nn.Embedding):
                spec = specs[parts[None]]
                modules[name] = KroneckerEmbedding(
                    dense.num_embeddings,
                    dense.embedding_dim,
                    spec.block,
                    spec.rank,
                    spec.permutes_rows,
                    spec.permutes_columns,
                    device="meta",
                    dtype=dtype,
                )
                continue
            has_bias = dense.bias is not None
            if None in parts:
                modules[name] = _empty_linear(*linear_size(dense), specs[parts[None]], has_bias, dtype)
            else:
                width, _ = linear_size(dense)
                modules[name] = FusedKroneckerLinear(
                    {part: _empty_linear(width, width, specs[parts[part]], False, dtype) for part in _parts_of(dense)},
                    has_bias,
                )
        except ShapeError as error:
            raise ShapeError(f"{', '.join(parts.values())}: {error}") from None
    return modules


def linear_size(dense: Conv1D | nn.Linear) -> tuple[int, int]:
    """`(in_features, out_features)` of a `Conv1D` or an `nn.Linear`."""
    rows, columns = dense.weight.shape
    return (columns, rows) if isinstance(dense, nn.Linear) else (rows, columns)


def _empty_linear(rows: int, columns: int, spec: KroneckerSpec, bias: bool, dtype: torch.dtype) -> KroneckerLinear:
    return KroneckerLinear(
        rows,
        columns,
        spec.block,
        spec.rank,
        bias,
        spec.permutes_rows,
        spec.permutes_columns,
        device="meta",
        dtype=dtype,
    )


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
    if not isinstance(dense, Conv1D | nn.Linear | nn.Embedding):
        raise ConfigError(f"{matrices} is a {type(dense).__name__}, which cannot be compressed")
    expected: list[str | None] = [None]
    if isinstance(dense, Conv1D) and name.endswith("c_attn"):
        expected = list(_parts_of(dense))
    if set(parts) != set(expected):
        wanted = ", ".join(name if part is None else f"{name}.{part}" for part in expected)
        raise ConfigError(f"{wanted} must be compressed all or none, got {matrices}")
    return dense


@contextmanager
def swapped(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts modules in the places of those with the same full names; an exception in the body puts the old ones back."""
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, module in modules.items():
            parent_name, _, child = name.rpartition(".")
            parent: Any = model.get_submodule(parent_name)
            old = getattr(parent, child)
            undo.append((parent, child, old))
            module.train(old.training)
            setattr(parent, child, module)
            if child == "c_proj":
                # GPT-2 initialises it from its parent, through a `weight` that it does not have any more.
                parent._is_hf_initialized = True
        retie(model)
        yield
    except BaseException:
        for parent, child, old in reversed(undo):
            setattr(parent, child, old)
        retie(model)
        raise


def retie(model: PreTrainedModel) -> None:
    """Makes the names of tied parameters, by which transformers ties, loads and saves, those of the head there is."""
    if isinstance(output_layer(model), KroneckerHead):
        embedding = f"{base_prefix(model)}wte"
        model._tied_weights_keys = {f"lm_head.{factor}": f"{embedding}.{factor}" for factor in ("A", "B")}
    elif "_tied_weights_keys" in vars(model):
        del model._tied_weights_keys
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


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
    modules: dict[str, nn.Module] = {}
    for name, compressed in compressed_modules(model):
        bare = "wte" if isinstance(compressed, KroneckerHead) else name.removeprefix(base_prefix(model))
        if matrices is not None and bare not in matrices:
            continue
        dense: Any = stock.get_submodule(name)
        if isinstance(compressed, KroneckerHead):
            # Tied anew by the caller: its weight is the embedding's.
            dense.weight = modules[f"{base_prefix(model)}wte"].weight
        else:
            with torch.no_grad():
                weight = compressed.dense_weight()
            weight = weight.t() if isinstance(dense, nn.Linear) else weight
            trainable = next(compressed.parameters()).requires_grad
            dense.weight = nn.Parameter(weight.contiguous(), trainable)
            if not isinstance(compressed, KroneckerEmbedding):
                dense.bias = compressed.bias
        modules[name] = dense
    return modules
