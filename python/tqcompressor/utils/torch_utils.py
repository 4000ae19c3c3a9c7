"""Small helpers around torch that know nothing of this package. torch is imported where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.nn import Module


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Evaluation mode (no dropout) within the block; afterwards every module has its mode from before."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def without_autocast(like: torch.Tensor) -> AbstractContextManager[object]:
    """Disables autocast on the device of `like` within the block; the meta device has no autocast."""
    import torch

    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def move(model: Any, device: Any) -> None:
    """`model.to(device)`, in place; transformers' type stubs lack it."""
    model.to(device)


@contextmanager
def on_device(device: Any, *models: Module) -> Iterator[None]:
    """Moves models to a device for the block, and to the CPU after it."""
    try:
        for model in models:
            move(model, device)
        yield
    finally:
        for model in models:
            move(model, "cpu")
