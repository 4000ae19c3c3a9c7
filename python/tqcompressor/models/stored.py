"""Checks of the tensors in checkpoint files against a config."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import CheckpointError
from ..modules.int8 import SCALE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Names of tensors in files, and their shapes.
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def stored_shapes(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in safetensors files."""
    from safetensors import safe_open

    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="np") as reader:
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                stored[name] = tuple(reader.get_slice(name).get_shape())
    return stored


class _Names:
    """The names in a model of stored tensors, as `from_pretrained` finds them with some of its conversions."""

    def __init__(self, model: PreTrainedModel, conversions: Sequence[Any]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        # Conversions keep a record of what they were used for.
        conversions = copy.deepcopy(list(conversions))
        self.tensors: dict[str, Any] = model.state_dict()
        self._prefix = model.base_model_prefix
        self._renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        self._converters = [each for each in conversions if isinstance(each, WeightConverter)]

    def of(self, stored: str) -> tuple[str, bool]:
        """The name that a stored tensor gets, in the model or not, and whether it is then merged, split or reshaped."""
        from transformers.core_model_loading import rename_source_key

        name, merged = rename_source_key(stored, self._renamings, self._converters, self._prefix, self.tensors)
        if name not in self.tensors and stored in self.tensors:
            return stored, False
        return name, merged is not None


def needed_conversions(model: PreTrainedModel, stored: Shapes, conversions: Sequence[Any]) -> list[Any]:
    """`conversions`, or none of them for a checkpoint that has the model's own names, as compressed models are saved.

    Without this, a tensor would be converted twice whose name is the same in checkpoints of either kind.
    """
    own, converted = _Names(model, ()), _Names(model, conversions)
    for name, shape in stored.items():
        new_name, merged = converted.of(name)
        if (new_name, merged) != own.of(name) and new_name in own.tensors:
            live = own.tensors.get(own.of(name)[0])
            if live is None or tuple(live.shape) != shape:
                return list(conversions)
    return []


def misread_tensor(model: PreTrainedModel) -> tuple[str, str] | None:
    """A tensor that another tensor's name would be taken for when the model is loaded, and that other; None if none."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if hasattr(tensor, "shape")}
    names = _Names(model, needed_conversions(model, tensors, get_model_conversion_mapping(model)))
    for name in tensors:
        read_as, merged = names.of(name)
        if read_as != name or merged:
            return name, read_as
    return None


def stored_apart(model: PreTrainedModel, stored: Shapes) -> set[str]:
    """The modules of a dense model that it ties, and for which a compressed checkpoint has tensors of their own.

    `config.json` cannot say of each pair whether it is tied, and of T5 not of any. A tied module is stored but once.
    """
    from .matrices import bare_name, factor_owner
    from .ties import ties

    owners = set()
    for stored_name, shape in stored.items():
        name = stored_name.removeprefix(f"{model.base_model_prefix}.")
        # The guard has one byte.
        owner = name.removesuffix(".weight") if name.endswith(".weight") and shape != (1,) else factor_owner(name)
        owners.add(owner)
    return {
        target
        for target, source in ties(model).items()
        if {bare_name(model, target), bare_name(model, source)} <= owners
    }


def check_tensors(model: PreTrainedModel, stored: Shapes, conversions: Sequence[Any] = ()) -> None:
    """Compares the factors in a checkpoint, by names and shapes of its tensors, with those of its config.

    `conversions` are those that transformers reads the checkpoint with. Raises `CheckpointError` naming the first
    tensor that is missing, has another shape, or belongs to a module that the config does not compress.
    """
    from ..modules.base import Tied
    from .matrices import bare_name, compressed_modules, factor_owner
    from .ties import tied_parameters

    names = _Names(model, conversions)
    found: dict[str, tuple[int, ...]] = {}
    for stored_name, shape in stored.items():
        name, merged = names.of(stored_name)
        if not merged:
            found[name.removeprefix(f"{model.base_model_prefix}.")] = shape
    # The bias of a head that has factors of its own may still be another parameter.
    elsewhere = tied_parameters(model)
    promised = {
        bare_name(model, f"{module_name}.{name}"): tuple(tensor.shape)
        for module_name, module in compressed_modules(model)
        if not isinstance(module, Tied)
        for name, tensor in module.state_dict().items()
        if f"{module_name}.{name}" not in elsewhere
    }
    for name, shape in promised.items():
        if name not in found:
            raise CheckpointError(f"tensor {name} is missing: quantization_config in config.json has it")
        if found[name] != shape:
            raise CheckpointError(f"tensor {name}: expected shape {shape} as in config.json, got {found[name]}")
    for module_name, _ in compressed_modules(model):
        name = bare_name(model, f"{module_name}.weight")
        # The guard has one byte.
        if found.get(name, (1,)) != (1,):
            raise CheckpointError(f"tensor {name} is stored beside its factors: remove one of them")
    modules = {bare_name(model, name) for name, _ in model.named_modules()}
    own = {bare_name(model, name) for name in names.tensors}
    for name in found.keys() - own:
        # Factors of a head that this class of model lacks are ignored, as a dense head's weight is.
        if factor_owner(name) in modules:
            raise CheckpointError(f"tensor {name} is not in quantization_config of config.json")


def check_codes(files: Sequence[str]) -> None:
    """Raises `CheckpointError` for eight-bit integers in safetensors files without scales, or scales without them."""
    from safetensors import safe_open

    dtypes: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="np") as reader:
            dtypes |= {name: reader.get_slice(name).get_dtype() for name in reader.keys()}  # noqa: SIM118
    for name, dtype in dtypes.items():
        scale = name + SCALE
        if dtype == "I8" and scale not in dtypes:
            raise CheckpointError(f"tensor {scale} is missing: the scales of {name}, which is I8")
        if scale in dtypes and (dtype, dtypes[scale]) != ("I8", "BF16"):
            raise CheckpointError(
                f"tensors {name} and {scale}: expected I8 and scales in BF16, got {dtype} and {dtypes[scale]}"
            )


def check_loaded(model: PreTrainedModel) -> None:
    """Raises `CheckpointError` for a factor that is in no file, or for indices that are not a permutation."""
    import torch

    from ..modules.base import Tied
    from .matrices import compressed_modules

    for module_name, module in compressed_modules(model):
        if isinstance(module, Tied):
            continue
        for name, tensor in module.state_dict(keep_vars=True).items():
            # transformers sets it on every tensor that it reads.
            if not getattr(tensor, "_is_hf_initialized", False) and tensor.device.type != "meta":
                raise CheckpointError(f"tensor {module_name}.{name} is missing from the checkpoint")
            if name.endswith(SCALE) and tensor.device.type != "meta" and not tensor.isfinite().all():
                raise CheckpointError(f"tensor {module_name}.{name} has NaN or an infinity: expected finite scales")
            if name.endswith("_permutation") and tensor.device.type != "meta":
                order = torch.arange(len(tensor), device=tensor.device)
                if not torch.equal(tensor.sort().values, order):
                    raise CheckpointError(f"tensor {module_name}.{name} is not a permutation")
