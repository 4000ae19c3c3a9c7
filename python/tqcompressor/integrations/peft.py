"""LoRA on compressed modules with peft."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils import PeftType, TaskType
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..models.matrices import compressed_modules
from ..modules.base import Tied
from ..modules.build import CompressedModule
from ..modules.fused import FusedLinear
from ..modules.mixed import FactoredLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Initialisations of LoRA that do not read or change the dense weight.
_NEED_NO_WEIGHT = (True, False, "gaussian")


class LoraKroneckerLinear(LoraLinear):
    """LoRA beside a factored matrix: `y = base(x) + scaling · x Aᵀ Bᵀ`, with peft's `lora_A` and `lora_B`.

    The sum of the two has no factors of the same shapes, so merging is refused: see `merge_lora`.
    """

    # Set by `merge_lora`, which adds the adapter to the dense weight later.
    added_later = False

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA only: the variants (DoRA, …) compute with the dense weight."""
        return {(): None}

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[Any, Any]:
        # peft warns of unknown layer types.
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        # peft reads them from a weight.
        factor = base_layer._a_factor()
        return factor.device, factor.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises `NotImplementedError`. Outputs stay correct if peft has merged dense layers before."""
        if not self.added_later:
            raise NotImplementedError(
                "a LoRA adapter cannot be merged into factors without making the matrix dense: keep the adapter, "
                "or call tqcompressor.merge_lora(model), which returns a stock model with both in it"
            )

    def in_dense(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the active adapters add to the dense matrix (in × out) and to the bias."""
        weight = torch.zeros(())
        bias: torch.Tensor | None = None
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            delta = self.get_delta_weight(adapter)
            weight = weight.to(delta.device) + (delta if self.fan_in_fan_out else delta.t())
            if self.lora_bias[adapter]:
                own = self.lora_B[adapter].bias * self.scaling[adapter]
                bias = own if bias is None else bias + own
        return weight, bias


def register_lora(config: LoraConfig) -> LoraConfig:
    """Makes a `LoraConfig` apply to compressed modules, and returns it.

    peft calls it by itself once this package has been imported, for `get_peft_model` and `PeftModel.from_pretrained`:

    >>> import tqcompressor
    >>> from peft import LoraConfig, PeftModel, get_peft_model
    >>> from transformers import AutoModelForCausalLM
    >>> report = tqcompressor.compress_checkpoint("tests/data/tiny-gpt2", "compressed", "tq-81m", effort="fast")
    >>> base = AutoModelForCausalLM.from_pretrained("compressed")
    >>> model = get_peft_model(base, LoraConfig(target_modules="all-linear", fan_in_fan_out=True))
    >>> model.save_pretrained("adapter")
    >>> base = AutoModelForCausalLM.from_pretrained("compressed")
    >>> model = PeftModel.from_pretrained(base, "adapter")
    """
    factored = (*FactoredLinear.__args__, FusedLinear)
    config._register_custom_module(dict.fromkeys(factored, LoraKroneckerLinear))
    return config


def prepare_adapter(tuner: Any, model: nn.Module, adapter_name: str) -> None:
    """Prepares the config of an adapter for a model that may be compressed, before peft changes the model.

    "all-linear" then includes the compressed linear layers. Raises `ConfigError` where the adapter targets a compressed
    module and is not plain LoRA on a linear layer.
    """
    if next(compressed_modules(model), None) is None:
        return
    config = tuner._prepare_adapter_config(tuner.peft_config[adapter_name], tuner.get_model_config(model))
    plain = config.peft_type == PeftType.LORA
    if plain:
        _include_all_linear(config, model)
    targets = [
        (name, module) for name, module in _compressed_bases(model) if tuner._check_target_module_exists(config, name)
    ]
    if not targets:
        return
    name, module = targets[0]
    if not plain:
        raise ConfigError(
            f"{name} is compressed, and {config.peft_type.value} adapters need its dense weight: use LoRA, or call "
            "model.dequantize() first"
        )
    for name, module in targets:
        if not isinstance(module, FactoredLinear | FusedLinear):
            raise ConfigError(
                f"{name} is a compressed {'output layer' if hasattr(module, 'in_features') else 'embedding'}, and LoRA "
                "adapts compressed linear layers: leave it out of target_modules, or call model.dequantize() first"
            )
    variants = [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]
    if config.init_lora_weights not in _NEED_NO_WEIGHT:
        variants.append("init_lora_weights")
    if variants:
        options = ", ".join(f"{option}={getattr(config, option)!r}" for option in variants)
        raise ConfigError(
            f"{targets[0][0]} is compressed, and {options} needs its dense weight: use plain LoRA, with "
            'init_lora_weights True, False or "gaussian", or call model.dequantize() first'
        )
    register_lora(config)


def _compressed_bases(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every compressed module that an adapter may target, parts of fused ones included, beneath adapters it has."""
    adapters: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(adapters):
            continue
        if isinstance(module, tuners_utils.BaseTunerLayer):
            adapters += (f"{name}.",)
            module = module.get_base_layer()
        if isinstance(module, CompressedModule):
            yield name, module


def _include_all_linear(config: Any, model: nn.Module) -> None:
    """Resolves "all-linear" as peft does, with the compressed linear layers; heads are left out."""
    asked = config.target_modules
    if not isinstance(asked, str) or asked.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    tuners_utils._maybe_include_all_linear_layers(config, model)
    heads = [_head(model)]
    if heads == [None] and config.task_type == TaskType.SEQ_CLS:
        heads = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    compressed = dict(compressed_modules(model))
    config.target_modules = set(config.target_modules) | {
        name
        for name, module in _compressed_bases(model)
        if name in compressed and isinstance(module, FactoredLinear | FusedLinear) and module not in heads
    }


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Merges the active LoRA adapters into the dense equivalent of their compressed base model.

    Returns a stock model, as large as the uncompressed one, with the outputs of `model`. It is made of the base model
    inside `model`, which must not be used afterwards.

    Raises `ConfigError` for what is not a `PeftModel` with LoRA, and for a bias of an adapter (`lora_bias`) on a layer
    without one; the model is then unchanged.
    """
    if not isinstance(model, PeftModel) or model.peft_type != PeftType.LORA:
        raise ConfigError(f"merge_lora: expected a PeftModel with a LoRA adapter, got {_description(model)}")
    base: Any = model.get_base_model()
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraKroneckerLinear)}
    added: list[tuple[str, int, torch.Tensor, torch.Tensor | None]] = []
    for name, layer in layers.items():
        place, first = _place(base, name)
        with torch.no_grad():
            weight, bias = layer.in_dense()
        owner = base.get_submodule(place)
        owner = owner.get_base_layer() if isinstance(owner, LoraKroneckerLinear) else owner
        if bias is not None and owner.bias is None:
            raise ConfigError(
                f"{name}: the adapter has a bias (lora_bias=True), but {place} has none: it cannot be merged, keep it"
            )
        added.append((place, first, weight, bias))
    tied = isinstance(_head(base), Tied)
    says_tied = getattr(base.config, "tie_word_embeddings", None)
    for layer in layers.values():
        layer.added_later = True
    try:
        with warnings.catch_warnings():
            if tied:
                # peft compares dense weights, and takes a head that shares factors for an untied one.
                warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            merged: Any = model.merge_and_unload()
    finally:
        for layer in layers.values():
            layer.added_later = False
    if tied:
        merged.config.tie_word_embeddings = says_tied
    dense: PreTrainedModel = merged.dequantize() if next(compressed_modules(merged), None) is not None else merged
    with torch.no_grad():
        for place, first, weight, bias in added:
            _add(dense.get_submodule(place), first, weight, bias)
    return dense


def _description(model: Any) -> str:
    kind = getattr(model, "peft_type", None)
    return f"a {type(model).__name__}" + (f" with {kind.value}" if isinstance(model, PeftModel) and kind else "")


def _place(model: nn.Module, name: str) -> tuple[str, int]:
    """The dense module that the module `name` becomes a part of, and its first output there."""
    outer, _, last = name.rpartition(".")
    if outer.endswith(".terms"):
        # A term of a sum: all of the matrix.
        return _place(model, outer.removesuffix(".terms"))
    parent = model.get_submodule(outer)
    if not isinstance(parent, FusedLinear):
        return name, 0
    before = parent.part_names[: parent.part_names.index(last)]
    return outer, sum(getattr(parent, part).out_features for part in before)


def _add(dense: Any, first: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Adds a matrix (in × out) and a bias to a dense module, from its output `first` on."""
    if weight.ndim == 2:
        matrix = dense.weight if isinstance(dense, Conv1D) else dense.weight.t()
        matrix[:, first : first + weight.shape[1]] += weight.to(matrix)
    if bias is not None:
        dense.bias[first : first + len(bias)] += bias.to(dense.bias)
