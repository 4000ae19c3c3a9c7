"""What makes transformers load, save and undo compressed checkpoints: a quantizer registered under "tqcompressor".

transformers' quantizer API is how a checkpoint of a stock architecture gets other modules: `config.json` keeps
its `model_type`, and its `quantization_config.quant_method` picks the class below, whose hooks run within
`from_pretrained` and `save_pretrained`. torch is imported inside the hooks: registering must not need it.

A compressed checkpoint has one tensor more than the model, the *guard*: one byte under the name of the first compressed
module's dense weight. Without this package transformers would ignore the config that it does not know and start from
random weights with no more than a warning; the guard's shape makes it raise.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import QUANT_METHOD, TQConfig, resolve_config, split_part
from .errors import CheckpointError, ConfigError
from .specs import MatrixSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def register() -> None:
    """Makes transformers know the quantization method "tqcompressor". Calling it again does nothing."""
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
    """Puts the modules of a compressed model in place before its weights are loaded, or compresses it afterwards.

    With `pre_quantized` the checkpoint holds factors and the config says which; without, it is a dense one that
    `from_pretrained(..., quantization_config=TQConfig(...))` compresses on the fly.
    """

    quantization_config: Any  # a TQConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        config: Any = resolve_config(quantization_config)
        super().__init__(config, **kwargs)

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
        from . import architecture
        from .planning import plan_model

        architecture.require_transformers_model(model)
        if not self.pre_quantized:
            # Nothing is done yet, but a config that does not fit should fail before a large checkpoint is read.
            plan_model(model, self.quantization_config)
            return
        specs = specs_of_model(model, self.quantization_config)
        modules: dict[str, Any] = dict(architecture.empty_modules(model, specs))
        modules |= architecture.heads(model, modules)
        with architecture.swapped(model, modules):
            guard = guard_name(model)
        # Stored with or without the base prefix, depending on the class that was saved.
        prefix = f"{model.base_model_prefix}."
        names = {guard, guard.removeprefix(prefix), prefix + guard}
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {f"^{re.escape(name)}$" for name in names}
        if checkpoint_files and all(file.endswith(".safetensors") for file in checkpoint_files):
            check_tensors(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> None:
        from . import architecture
        from .in_place import compress

        if not self.pre_quantized:
            # `compress` sets what this hook is expected to: it starts from a model that was never quantized.
            detach(model)
            compress(model, self.quantization_config)
            return
        # The permutations of tied heads are not in the checkpoint.
        architecture.tie_heads(model)
        check_loaded(model)
        specs = specs_of_model(model, self.quantization_config)
        attach(model, self.quantization_config.replace(specs=specs))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors to save: the model's and the guard. No metadata, so that equal models make equal files."""
        import torch

        state = dict(model.state_dict())
        state[guard_name(model)] = torch.zeros(1, dtype=torch.uint8)
        return state, {}

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replaces every compressed module by the stock one with the dense weight that the factors stand for.

        The weights keep the dtype of the factors unless `dtype` is given, which then becomes that of the whole model.
        """
        model = self._dequantize(model, dtype=dtype)
        detach(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from . import architecture

        with architecture.swapped(model, architecture.dense_modules(model)):
            model.tie_weights()
        if dtype is not None:
            model.to(dtype=dtype)  # type: ignore[call-arg]
        return model


def attach(model: PreTrainedModel, config: TQConfig) -> None:
    """Tells transformers that `model` is compressed as `config`, which names its matrices one by one, says."""
    quantizer = TQQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    part: Any
    # The base model too, so that it can be saved by itself.
    for part in (model, model.base_model):
        part.hf_quantizer = quantizer
        part.quantization_method = QUANT_METHOD
        # transformers refuses `.half()`, `.float()` and full training for models that say they are quantized.
        part.is_quantized = False


def detach(model: PreTrainedModel) -> None:
    """Undoes `attach`."""
    for part in (model, model.base_model):
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(part).pop(name, None)
    for name in ("quantization_config", "_is_quantized"):
        vars(model.config).pop(name, None)


def guard_name(model: PreTrainedModel) -> str:
    """The name of the guard tensor: the first compressed module's dense weight."""
    from .architecture import compressed_modules

    return f"{next(iter(compressed_modules(model)))[0]}.weight"


def specs_of_model(model: PreTrainedModel, config: TQConfig) -> dict[str, MatrixSpec]:
    """The specs of those matrices that this class of model has: a checkpoint's head may be another's.

    Raises `ConfigError` for a name that holds a wildcard, since a checkpoint's config names matrices one by one.
    """
    from .architecture import in_base_model

    for name in config.specs:
        if set("*?[]") & set(name):
            raise ConfigError(f"quantization_config of a compressed checkpoint names matrices, not patterns: {name}")
    modules = {name for name, _ in model.named_modules()}
    specs = {
        name: spec
        for name, spec in config.specs.items()
        if in_base_model(model, name) or split_part(name)[0] in modules
    }
    if not specs:
        raise ConfigError(f"none of the compressed matrices is in {type(model).__name__}: {', '.join(config.specs)}")
    return specs


def check_tensors(model: PreTrainedModel, files: list[str]) -> None:
    """Compares the factors that a checkpoint's headers list with those that its config promises.

    Raises `CheckpointError` naming the first tensor that is missing, has another shape, or belongs to a module that the
    config does not compress.
    """
    from safetensors import safe_open

    from .architecture import base_prefix, compressed_modules, factor_owner
    from .mixed import FactoredHead

    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="np") as reader:
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                stored[name.removeprefix(f"{model.base_model_prefix}.")] = tuple(reader.get_slice(name).get_shape())
    prefix = base_prefix(model)
    promised = {
        f"{module_name}.{name}".removeprefix(prefix): tuple(tensor.shape)
        for module_name, module in compressed_modules(model)
        if not isinstance(module, FactoredHead)
        for name, tensor in module.state_dict().items()
    }
    for name, shape in promised.items():
        if name not in stored:
            raise CheckpointError(f"tensor {name} is missing, though quantization_config in config.json asks for it")
        if stored[name] != shape:
            raise CheckpointError(f"tensor {name} has shape {stored[name]}, but config.json asks for {shape}")
    modules = {name.removeprefix(prefix) for name, _ in model.named_modules()}
    for name in stored.keys() - promised.keys():
        # A factor of a head that this class of model lacks is as superfluous as a dense head's weight would be.
        if factor_owner(name) in modules:
            raise CheckpointError(f"tensor {name} is there, but quantization_config in config.json does not ask for it")


def check_loaded(model: PreTrainedModel) -> None:
    """Raises `CheckpointError` for a factor that no file had, or for indices that are not a permutation."""
    import torch

    from .architecture import compressed_modules
    from .mixed import FactoredHead

    for module_name, module in compressed_modules(model):
        if isinstance(module, FactoredHead):
            continue
        for name, tensor in module.state_dict(keep_vars=True).items():
            # Set by transformers on everything that it read.
            if not getattr(tensor, "_is_hf_initialized", False) and tensor.device.type != "meta":
                raise CheckpointError(f"tensor {module_name}.{name} is missing from the checkpoint")
            if name.endswith("_permutation") and tensor.device.type != "meta":
                order = torch.arange(len(tensor), device=tensor.device)
                if not torch.equal(tensor.sort().values, order):
                    raise CheckpointError(f"tensor {module_name}.{name} is not a permutation")


register()
