"""The matrices of a live model of transformers and their names.

A *matrix* is named after its module without the base model's prefix ("transformer.", "bert.", "model."). GPT-2's fused
`c_attn` has several, named "….c_attn.q", ".k" and ".v".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import _core
from ..errors import ConfigError
from ..modules.base import Factors, Tied
from ..modules.build import CompressedModule, is_int8
from ..modules.int8 import SCALE

# Exactly these classes: a subclass may do something else with its weight.
KINDS: Mapping[type[nn.Module], str] = {Conv1D: "conv1d", nn.Linear: "linear", nn.Embedding: "embedding"}
# The names of the factors of a matrix, and of the codes of a dense one.
FACTORS = ("A", "B", "left", "right", "codes")
# Where wrappers hold a module: of torch.compile, of FSDP and checkpointing, of peft's adapters.
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")


def require_transformers_model(model: object) -> PreTrainedModel:
    """Returns `model`; raises `ConfigError` unless it is a model of transformers, whole and without wrappers.

    A wrapper, around the model or a module of it, would become a part of the names of matrices.
    """
    if not isinstance(model, PreTrainedModel):
        places = (name for name in (*_INNER, "module") if isinstance(getattr(model, name, None), PreTrainedModel))
        inner = next((f"model.{name}" for name in places), "the model")
        raise ConfigError(
            f"{type(model).__name__} is not a model of transformers: pass {inner} itself, before wrapping it "
            "(peft, torch.compile, DDP, FSDP, accelerate, sentence_transformers)"
        )
    for name, _ in model.named_modules():
        outer, _, last = name.rpartition(".")
        if last in _INNER:
            raise ConfigError(
                f"{outer} of {type(model).__name__} is wrapped in a {type(model.get_submodule(outer)).__name__}: "
                "expected the model itself, unwrap it first (torch.compile, FSDP), or merge its adapters (peft)"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise ConfigError(f"{name} is sharded over processes (FSDP, tensor parallelism): load the model whole")
    return model


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


def weight_owner(parameter: str) -> str | None:
    """The module of a parameter that is a weight or a factor of one; None for a bias."""
    return parameter.removesuffix(".weight") if parameter.endswith(".weight") else factor_owner(parameter)


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


def parameters_of(model: PreTrainedModel) -> int:
    """The number of a model's parameters, codes of eight-bit integers included, which torch does not count."""
    own = (
        part for part in model.modules() if isinstance(part, Factors) and not isinstance(part, Tied) and part.is_int8
    )
    codes = (part.weights(name) for part in own for name in part.factors)
    return model.num_parameters() + sum(values.numel() for values, scale in codes if scale is not None)


def require_trainable(model: nn.Module) -> None:
    """Raises `ConfigError` for a model whose own weights cannot be trained, since they are eight-bit integers."""
    for name, module in compressed_modules(model):
        if is_int8(module):
            raise ConfigError(
                f'{name} has eight-bit weights, which do not train: train the model before dtype="int8" is asked for, '
                "train a LoRA adapter beside it, or call model.dequantize() first"
            )


def factor_owner(name: str) -> str | None:
    """The module of a stored tensor that is a factor, by its name; None for any other tensor."""
    module, _, last = name.rpartition(".")
    if last.removesuffix(SCALE) not in FACTORS and last not in ("input_permutation", "output_permutation"):
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
