"""Where NaN or an infinity first appears in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .batches import Batch


class _Found(Exception):
    """Ends the forward pass at the first value that is not finite."""


def first_nonfinite(model: nn.Module, batches: Sequence[Batch], run: Callable[[Batch], object]) -> str | None:
    """The parameter, or the layer's input or output, that is the first to hold NaN or an infinity; None without one.

    `run` is a forward pass. Layers are the modules without modules within.
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return f"the parameter {name}"
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                stack.callback(module.register_forward_hook(_checking(name), with_kwargs=True).remove)
        with torch.no_grad():
            for batch in batches:
                try:
                    run(batch)
                except _Found as found:
                    return str(found)
    return None


def _checking(name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for side, values in (("input", (*args, *kwargs.values())), ("output", (output,))):
            if not all(_is_finite(value) for value in values):
                raise _Found(f"the {side} of {name}")

    return hook


def _is_finite(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(value.isfinite().all())


def hint(model: nn.Module) -> str:
    """What to try, by the precision that a model computes in."""
    narrow = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    if not narrow:
        return "the model computes in float32 already"
    return f"the model computes in {str(narrow.pop()).removeprefix('torch.')}, and float32 may help: model.float()"
