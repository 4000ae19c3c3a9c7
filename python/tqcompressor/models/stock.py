"""The dense model that a live one is or was, without values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from .matrices import KINDS, bare_name, compressed_modules
from .ties import ties, untie


def stock_model(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model of the same config and the same ties, without values, on the meta device."""
    config = copy.deepcopy(model.config)
    if isinstance(config.dtype, str):
        # `save_pretrained` leaves the name, which not every constructor takes.
        config.dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        stock: PreTrainedModel = type(model)(config)
    apart = ties(stock).keys() - ties(model).keys()
    if apart:
        untie(stock, apart)
    return stock


def weight_tensors(model: PreTrainedModel) -> list[tuple[str, str, tuple[int, ...], str]]:
    """`(name, bare name, shape, kind)` of every weight that can be compressed, in model order.

    A bare name has no base prefix.

    A weight that is tied to another is left out. A compressed weight has its dense shape and kind.
    """
    left_out = ties(model)
    compressed = dict(compressed_modules(model))
    stock = stock_model(model) if compressed else model
    tensors = []
    for name, module in model.named_modules():
        dense: Any = stock.get_submodule(name) if name in compressed else module
        kind = KINDS.get(type(dense))
        if kind is not None and name not in left_out:
            bare = bare_name(model, name)
            tensors.append((f"{name}.weight", f"{bare}.weight", tuple(dense.weight.shape), kind))
    return tensors
