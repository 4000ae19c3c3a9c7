"""The quantizer "tqcompressor" of transformers, which loads, saves and dequantizes compressed checkpoints.

transformers' quantizer API replaces modules of a stock architecture: `config.json` keeps its `model_type`, and
`quantization_config.quant_method` selects the class below. Its hooks run within `from_pretrained` and
`save_pretrained`. torch is imported inside the hooks, so registering does not need it.

A compressed checkpoint has one tensor more than the model, the *guard*: one byte under the name of the first compressed
module's dense weight. Without this package, transformers would ignore the unknown config and start from random weights
with a mere warning; the shape of the guard makes it raise.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..calibration.calibration import load_calibration
from ..compression.budget import Spending, matrix_patterns, meaning, moments_of
from ..config.recipes import read_config
from ..config.tq_config import QUANT_METHOD, TQConfig
from ..errors import ConfigError
from ..models.quantization_state import attach, detach, guard_name, int8_of_model, specs_of_model
from ..models.stored import (
    Shapes,
    check_codes,
    check_loaded,
    check_tensors,
    needed_conversions,
    stored_apart,
    stored_shapes,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def register() -> None:
    """Registers the quantization method "tqcompressor" with transformers. A second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(_ConfigReader)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(TQQuantizer)


class _ConfigReader(QuantizationConfigMixin):
    """Reads the `quantization_config` of a `config.json`.

    transformers registers only subclasses of its own mixin, and `TQConfig` must work without transformers.
    """

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: Any = False, **kwargs: Any) -> Any:
        config = TQConfig.from_dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


class TQQuantizer(HfQuantizer):
    """Swaps in compressed modules before weights are loaded, or compresses a dense model afterwards.

    With `pre_quantized` the checkpoint has the factors that the config names. Without, it is a dense checkpoint that
    `from_pretrained(..., quantization_config=TQConfig(...))` compresses as `compress` does, by specs or by a budget.
    """

    quantization_config: Any  # a TQConfig
    # The model that a compressed checkpoint is loaded into, and the tensors in its files, until they are checked.
    _unchecked: tuple[PreTrainedModel, Shapes] | None = None

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        config: Any = read_config(quantization_config)
        super().__init__(config, **kwargs)
        if self.pre_quantized and config.of_loading:
            given = ", ".join(config.of_loading)
            raise ConfigError(
                f"quantization_config: {given}: these compress a dense checkpoint on loading, this one is compressed"
            )
        if config.budget is not None:
            meaning(config.budget)
            matrix_patterns(config.matrices)
        elif config.matrices is not None or config.max_macs is not None:
            raise ConfigError("quantization_config: matrices and max_macs go with a budget")
        self._calibration = load_calibration(config.calibration)

    def is_serializable(self) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are plain parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The modules compile without graph breaks."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> None:
        from ..compression.model_plan import budget_request, plan_model
        from ..models.matrices import require_transformers_model
        from ..models.surgery import empty_modules, swapped, tied_modules
        from ..models.ties import untie

        require_transformers_model(model)
        stored: Shapes | None = None
        apart: set[str] = set()
        if checkpoint_files and all(file.endswith(".safetensors") for file in checkpoint_files):
            stored = stored_shapes(checkpoint_files)
            if self.pre_quantized:
                check_codes(checkpoint_files)
            apart = stored_apart(model, stored)
        if not self.pre_quantized:
            # Check the config and the calibration before a large checkpoint is read. Whether a head that is stored
            # beside its embedding has the same values shows only then.
            if apart:
                return
            config: TQConfig = self.quantization_config
            if config.budget is None:
                moments_of(self._calibration, config.objective, plan_model(model, config).matrices)
            else:
                budget_request(
                    model, Spending(config.budget, self._calibration, dtype=config.dtype, **self._spending())
                )
            return
        if apart:
            untie(model, apart)
        specs, int8 = specs_of_model(model, self.quantization_config), int8_of_model(model, self.quantization_config)
        modules: dict[str, Any] = dict(empty_modules(model, specs, int8))
        modules |= tied_modules(model, modules)
        with swapped(model, modules):
            pass
        # The guard is one of these: the first in the order of whoever wrote the checkpoint. It is stored with or
        # without the base prefix, depending on the class that was saved.
        prefix = f"{model.base_model_prefix}."
        guards = [f"{name}.weight" for name in modules]
        names = {form for name in guards for form in (name, name.removeprefix(prefix), prefix + name)}
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {f"^{re.escape(name)}$" for name in names}
        if stored is not None:
            self._unchecked = (model, stored)

    def update_weight_conversions(self, weight_conversions: list[Any], _model: object = None) -> list[Any]:
        """The conversions that the checkpoint needs; the first hook that has all of them, those of the caller too.

        transformers 5.20 does not pass the model, newer versions do.
        """
        if self._unchecked is None:
            return weight_conversions
        (model, stored), self._unchecked = self._unchecked, None
        needed = needed_conversions(model, stored, weight_conversions)
        check_tensors(model, stored, needed)
        return needed

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> None:
        from ..compression.model import compress
        from ..models.surgery import tie_modules

        if not self.pre_quantized:
            config: TQConfig = self.quantization_config
            # `compress` starts from a model without a quantizer, and attaches one with the specs of every matrix.
            detach(model)
            if config.budget is None:
                plain = TQConfig(config.specs, config.effort, config.seed, dtype=config.dtype, dense=config.dense)
                compress(model, plain, calibration=self._calibration, objective=config.objective)
            else:
                compress(
                    model,
                    budget=config.budget,
                    calibration=self._calibration,
                    dtype=config.dtype,
                    **self._spending(),
                )
            self._calibration = None
            return
        # The permutations of tied modules are not in the checkpoint.
        tie_modules(model)
        check_loaded(model)
        specs = specs_of_model(model, self.quantization_config)
        int8 = int8_of_model(model, self.quantization_config)
        attach(model, replace(self.quantization_config, specs=specs, dense=int8))

    def _spending(self) -> dict[str, Any]:
        """The options of a budget, as `compress` takes them."""
        names = ("objective", "matrices", "max_macs", "effort", "seed")
        return {name: getattr(self.quantization_config, name) for name in names}

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors to save: the model's and the guard. No metadata, so that equal models make equal files."""
        import torch

        state = dict(model.state_dict())
        if (guard := guard_name(model)) is not None:
            state[guard] = torch.zeros(1, dtype=torch.uint8)
        return state, {}

    def write_card(self, model: PreTrainedModel, folder: Path) -> None:
        """Writes the report, the model card and its figure beside the weights that `model` was saved to."""
        from ..compression.live_card import write_live_card

        write_live_card(model, folder)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replaces every compressed module by the stock one with the product of its factors.

        The weights keep the dtype of the factors unless `dtype` is given, which then becomes that of the whole model.
        """
        model = self._dequantize(model, dtype=dtype)
        detach(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from ..models.surgery import dense_modules, swapped

        with swapped(model, dense_modules(model)):
            model.tie_weights()
        if dtype is not None:
            model.to(dtype=dtype)  # type: ignore[call-arg]
        return model


register()
