"""A compression tried out on a model without values: what cannot work is refused before anything is changed."""

from __future__ import annotations

import inspect
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .. import _core
from ..config.specs import LowRankSpec, MatrixSpec
from ..errors import ConfigError, ReadOnlyError, TQError
from .stock import stock_model
from .stored import misread_tensor
from .surgery import empty_modules, swapped, tied_modules

_TOKENS = 8


def try_out(model: PreTrainedModel, specs: Mapping[str, MatrixSpec], int8: Sequence[str] | None = None) -> None:
    """Raises `ConfigError` if a model of this class cannot be run, saved or loaded with these matrices compressed.

    A model of the same config is compressed without values, initialised as when it is loaded, and run on a few tokens.
    Where the dense model cannot be tried out so, a warning says that the forward pass is untested. No weights are
    copied, and no random numbers drawn. `int8` is as for `empty_modules`.
    """
    why = _tried(model, specs, int8)
    if why is not None:
        warnings.warn(
            f"{type(model).__name__} {why}: whether it runs with these matrices compressed is untested", stacklevel=2
        )


def refused(model: PreTrainedModel, matrices: Sequence[str]) -> dict[str, str]:
    """Which of these matrices `try_out` refuses in any compression, with its reasons; none where it tells no cause.

    Modules of the same name in all layers are tried together, since most layers are alike.
    """
    # The parts of a fused module can only be compressed together.
    modules: dict[str, list[str]] = defaultdict(list)
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    for name in matrices:
        module, _ = _core.split_part(name)
        modules[module].append(name)
        groups[re.sub(r"\d+", "*", module)][module] = None
    found: dict[str, str] = {}

    def reason_for(names: Iterable[str]) -> str | None:
        return _refusal_of(model, [matrix for name in names for matrix in modules[name]])

    if reason_for(modules) is None:
        return found
    for group in groups.values():
        reason = reason_for(group)
        if reason is None:
            continue
        ends = {name: reason_for([name]) for name in (next(iter(group)), next(reversed(group)))}
        for name in group:
            own = reason if None not in ends.values() else reason_for([name])
            if own is not None:
                found |= dict.fromkeys(modules[name], own)
    return found


def _refusal_of(model: PreTrainedModel, matrices: Sequence[str]) -> str | None:
    """The message with which `try_out` refuses the least that these matrices can be compressed to, if it does."""
    try:
        _tried(model, dict.fromkeys(matrices, LowRankSpec(1)))
    except ConfigError as error:
        return str(error)
    return None


def _tried(model: PreTrainedModel, specs: Mapping[str, MatrixSpec], int8: Sequence[str] | None = None) -> str | None:
    """Tries the compression out, as `try_out`; returns why the forward pass is untested, if it is."""
    with torch.random.fork_rng(devices=[]):
        try:
            trial = stock_model(model)
        except Exception as error:
            return f"cannot be made from its config alone ({_text(error)})"
        _compress(trial, specs, int8)
        misread = misread_tensor(trial)
        if misread is not None:
            raise ConfigError(
                f"{type(model).__name__}: from_pretrained would read the tensor {misread[0]} as {misread[1]}, "
                "so that the compressed model could not be loaded"
            )
        try:
            _initialize(trial)
        except Exception as error:
            raise _refusal(trial, "initialised, as from_pretrained does,", error) from error
        why = f"takes {model.main_input_name}, for which no example is at hand"
        for inputs in example_inputs(trial):
            fault = _run(trial, model, inputs)
            if fault is None:
                return None
            why = fault
        return why


def _run(trial: PreTrainedModel, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> str | None:
    """Runs the trial, evaluated and trained; returns why that shows nothing, as where the dense model fails, too."""
    for training in (False, True):
        of_trial = _error_of(trial, model, inputs, training)
        if of_trial is None:
            continue
        of_dense = None
        if not isinstance(of_trial, ReadOnlyError):
            of_dense = _error_of(stock_model(model), model, inputs, training)
        if of_dense is None:
            raise _refusal(trial, "run", of_trial) from of_trial
        if not training:
            return f"does not run on an example ({_text(of_dense)})"
    return None


def _compress(trial: PreTrainedModel, specs: Mapping[str, MatrixSpec], int8: Sequence[str] | None) -> None:
    try:
        modules: dict[str, Any] = dict(empty_modules(trial, specs, int8))
        modules |= tied_modules(trial, modules)
    except TQError as error:
        raise ConfigError(
            f"the model is not what its config says, and could not be loaded once it is compressed: {error}"
        ) from error
    with swapped(trial, modules):
        pass


def _initialize(trial: PreTrainedModel) -> None:
    """Calls `_init_weights` for all modules, as for a loaded model."""
    for module in trial.modules():
        vars(module).pop("_is_hf_initialized", None)
    initialize: Any = trial.initialize_weights
    with torch.device("meta"):
        initialize()


def _error_of(
    trial: PreTrainedModel, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], training: bool
) -> Exception | None:
    """What the forward pass raises, or None, with buffers of `model` and parameters of zeros."""
    try:
        _fill(trial, dict(model.named_buffers()))
        with torch.device("cpu"), torch.no_grad():
            trial.train(training)(**inputs)
    except Exception as error:
        return error
    return None


def _fill(trial: PreTrainedModel, values: Mapping[str, torch.Tensor]) -> None:
    """Gives a model without values copies of the buffers in `values`, and zeros."""
    for name, module in trial.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[own] = torch.nn.Parameter(_zeros(parameter), requires_grad=False)
        for own, buffer in module._buffers.items():
            value = values.get(f"{name}.{own}" if name else own)
            if buffer is not None:
                known = value is not None and value.shape == buffer.shape and not value.is_meta
                like: Any = value if known else _zeros(buffer)
                module._buffers[own] = like.to("cpu", buffer.dtype, copy=True)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """Zeros on the CPU. The system maps one page of zeros for all that is not written, so they take no memory."""
    zeros = torch.from_numpy(np.zeros(max(1, like.numel()) * like.element_size(), np.uint8))
    return zeros.view(like.dtype)[: like.numel()].view(like.shape)


def example_inputs(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Small inputs of the forward pass: the main one, and all whose shape is known; none without the main one."""
    config: Any = model.config
    vision: Any = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    tokens = torch.ones((1, _TOKENS), dtype=torch.int64, device="cpu")
    known = {
        "input_ids": tokens,
        "pixel_values": torch.zeros((1, getattr(vision, "num_channels", 3), height, width), device="cpu"),
    }
    bins = getattr(config, "num_mel_bins", None)
    if bins is None:
        known["input_values"] = torch.zeros((1, 16000), device="cpu")
    elif hasattr(config, "max_source_positions"):
        known["input_features"] = torch.zeros((1, bins, 2 * config.max_source_positions), device="cpu")
    elif hasattr(config, "max_length"):
        known["input_values"] = torch.zeros((1, config.max_length, bins), device="cpu")
    if hasattr(config, "input_feat_per_channel"):
        known["input_features"] = torch.zeros((1, 4 * _TOKENS, config.input_feat_per_channel), device="cpu")
    if getattr(config, "is_encoder_decoder", False):
        known["decoder_input_ids"] = tokens
    main = model.main_input_name
    if main not in known:
        return []
    parameters = {main, *inspect.signature(model.forward).parameters}
    taken = {name: value for name, value in known.items() if name in parameters}
    first = {name: value for name, value in taken.items() if name in (main, "decoder_input_ids")}
    return [first] if first.keys() == taken.keys() else [first, taken]


def _refusal(trial: PreTrainedModel, what: str, error: Exception) -> ConfigError:
    """The refusal of a compression, which names the module in which the trial failed."""
    names = {module: name for name, module in trial.named_modules()}
    where = ""
    traceback = error.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module):
            where = names.get(module) or where
        traceback = traceback.tb_next
    if isinstance(error, ReadOnlyError):
        where = names.get(error.module, where)
    return ConfigError(
        f"{type(trial).__name__} cannot be {what} with these matrices compressed, because of {where or 'itself'}: "
        f"{_text(error)}. Leave the matrices there as they are"
    )


def _text(error: Exception) -> str:
    first, *_ = [*str(error).splitlines(), ""]
    return f"{type(error).__name__}: {first}"
