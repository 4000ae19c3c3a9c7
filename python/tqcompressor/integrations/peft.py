"""LoRA on compressed modules with peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear

from ..modules.fused import FusedLinear
from ..modules.kronecker import KroneckerLinear
from ..modules.low_rank import LowRankLinear
from ..modules.mixed import MixedLinear

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

# Initialisations of LoRA that read or change the dense weight.
_NEED_NO_WEIGHT = (True, False, "gaussian")


class LoraKroneckerLinear(LoraLinear):
    """LoRA beside a factored matrix: `y = base(x) + scaling · x Aᵀ Bᵀ`, with peft's `lora_A` and `lora_B`.

    The sum of the two has no factors of the same shapes, so merging is refused: see `merge_lora`.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA only: the variants (DoRA, …) compute with the dense weight."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """As peft's, for initialisations that do not use the base weight."""
        if config.init_lora_weights not in _NEED_NO_WEIGHT:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} needs the dense weight, which a factored module does "
                'not have: use True, False or "gaussian"'
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[Any, Any]:
        # peft warns of unknown layer types.
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(
        self, base_layer: torch.nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # peft reads them from a weight.
        factor = next(base_layer.parameters())
        return factor.device, factor.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raises `NotImplementedError`. Outputs stay correct if peft has merged dense layers before."""
        raise NotImplementedError(
            "a LoRA adapter cannot be merged into factors without making the matrix dense: keep the adapter, "
            "or call tqcompressor.merge_lora(model), which returns a stock model with both in it"
        )


def register_lora(config: LoraConfig) -> LoraConfig:
    """Makes a `LoraConfig` apply to compressed modules, and returns it.

    Call it on the config of `get_peft_model` and on that of `PeftModel.from_pretrained`:

    >>> import tqcompressor
    >>> from peft import LoraConfig, PeftModel, get_peft_model
    >>> from transformers import AutoModelForCausalLM
    >>> report = tqcompressor.compress_checkpoint("tests/data/tiny-gpt2", "compressed", "tq-81m", effort="fast")
    >>> base = AutoModelForCausalLM.from_pretrained("compressed")
    >>> model = get_peft_model(base, register_lora(LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)))
    >>> model.save_pretrained("adapter")
    >>> base = AutoModelForCausalLM.from_pretrained("compressed")
    >>> config = register_lora(LoraConfig.from_pretrained("adapter"))
    >>> model = PeftModel.from_pretrained(base, "adapter", config=config)
    """
    factored = (KroneckerLinear, LowRankLinear, MixedLinear, FusedLinear)
    config._register_custom_module(dict.fromkeys(factored, LoraKroneckerLinear))
    return config


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Merges the active LoRA adapter into the dense equivalent of its compressed base model.

    Returns a stock model, as large as the uncompressed one, with the outputs of `model`. It is made of the base model
    inside `model`, which must not be used afterwards.
    """
    name = model.active_adapter
    config = model.peft_config[name]
    adapter = get_peft_model_state_dict(model, adapter_name=name)
    base: Any = model.unload()
    merged: Any = get_peft_model(base.dequantize(), config)
    set_peft_model_state_dict(merged, adapter)
    dense: PreTrainedModel = merged.merge_and_unload()
    return dense
