"""Checks of the tensors in checkpoint files against a config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_tensors(model: PreTrainedModel, files: list[str]) -> None:
    """Compares the factors in the headers of a checkpoint with those of its config.

    Raises `CheckpointError` naming the first tensor that is missing, has another shape, or belongs to a module that the
    config does not compress.
    """
    from safetensors import safe_open

    from ..modules.base import Tied
    from .matrices import base_prefix, compressed_modules, factor_owner

    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="np") as reader:
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                stored[name.removeprefix(f"{model.base_model_prefix}.")] = tuple(reader.get_slice(name).get_shape())
    prefix = base_prefix(model)
    promised = {
        f"{module_name}.{name}".removeprefix(prefix): tuple(tensor.shape)
        for module_name, module in compressed_modules(model)
        if not isinstance(module, Tied)
        for name, tensor in module.state_dict().items()
    }
    for name, shape in promised.items():
        if name not in stored:
            raise CheckpointError(f"tensor {name} is missing: quantization_config in config.json has it")
        if stored[name] != shape:
            raise CheckpointError(f"tensor {name}: expected shape {shape} as in config.json, got {stored[name]}")
    modules = {name.removeprefix(prefix) for name, _ in model.named_modules()}
    for name in stored.keys() - promised.keys():
        # Factors of a head that this class of model lacks are ignored, as a dense head's weight is.
        if factor_owner(name) in modules:
            raise CheckpointError(f"tensor {name} is not in quantization_config of config.json")


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
            if name.endswith("_permutation") and tensor.device.type != "meta":
                order = torch.arange(len(tensor), device=tensor.device)
                if not torch.equal(tensor.sort().values, order):
                    raise CheckpointError(f"tensor {module_name}.{name} is not a permutation")
