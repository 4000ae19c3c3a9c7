"""The plan of a config or a budget for a live model, which stays unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from .. import _core
from ..config.specs import MatrixSpec
from ..config.tq_config import TQConfig
from ..decomposition.norm import Moments
from ..errors import ConfigError, DtypeError
from ..models.matrices import (
    bare_name,
    compressed_modules,
    module_name,
    require_transformers_model,
    ties,
    weight_tensors,
)
from ..utils.progress import ProgressOption, reporter
from .budget import Spending, every_matrix
from .budget_plan import BudgetPlan, Choice, plan_with


def plan_model(model: PreTrainedModel, config: TQConfig) -> dict[str, Any]:
    """The plan of `config` for a live model; raises as `compress` does."""
    require_transformers_model(model)
    if next(compressed_modules(model), None) is not None:
        raise ConfigError("the model is compressed already: call model.dequantize() first, or start from a dense one")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError("the model is quantized already: start from a dense one")
    return resolved_plan(model, config)


def resolved_plan(model: PreTrainedModel, config: TQConfig) -> dict[str, Any]:
    """`config` resolved against the matrices of a model, compressed or not: the entries are in the model's order."""
    prefix = f"{model.base_model_prefix}."
    tensors = weight_tensors(model)
    # Patterns may have the base model's prefix; names of matrices do not. The first of two equal patterns decides.
    specs: dict[str, MatrixSpec] = {}
    for pattern, spec in config.specs.items():
        specs.setdefault(pattern.removeprefix(prefix), spec)
    tied = ties(model)
    for head, source in tied.items():
        if head in specs:
            source = bare_name(model, source)
            raise ConfigError(f"{head} is tied to {source}: compressing {source} compresses both")
    plan: dict[str, Any] = json.loads(_core.plan(tensors, "lm_head" in tied, config.replace(specs=specs).to_json()))
    order = {name: number for number, (name, _, _) in enumerate(tensors)}
    for entry in plan["matrices"]:
        part = entry["name"][len(entry["module"]) :]
        # Restore a name that begins like the prefix of GPT-2's base model.
        entry["module"] = entry["tensor"].removesuffix(".weight")
        entry["name"] = entry["module"] + part
    plan["matrices"].sort(key=lambda entry: order[entry["tensor"]])
    for entry in (*plan["matrices"], *plan["untouched"]):
        entry["tensor"] = module_name(model, entry["tensor"])
    return plan


def matrix_of(model: PreTrainedModel, entry: Mapping[str, Any]) -> NDArray[np.float32]:
    """The planned matrix, in × out, as contiguous float32 on the CPU; a view of the weight where that is possible."""
    module: Any = model.get_submodule(module_name(model, entry["module"]))
    weight: torch.Tensor = module.weight.detach()
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise DtypeError(f"{entry['tensor']} is {weight.dtype}, expected a floating dtype")
    if weight.device.type == "meta":
        raise ConfigError(f"{entry['tensor']} has no values: it is on the meta device, or offloaded to disk")
    if isinstance(module, nn.Linear):
        weight = weight.t()
    rows, columns = entry["shape"]
    first = entry["first_column"]
    weight = weight[:rows, first : first + columns]
    return np.ascontiguousarray(weight.to("cpu", torch.float32).numpy())


def plan_budget(
    model: PreTrainedModel,
    spending: Spending,
    *,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> BudgetPlan:
    """`plan` for a live model."""

    def choose(
        entries: Sequence[Mapping[str, Any]],
        moments: Mapping[str, Moments],
        target: tuple[str, float],
        cap: float | None,
    ) -> list[Choice]:
        with reporter(progress, "plan") as report_progress:
            return _core.choose_specs(
                [matrix_of(model, entry) for entry in entries],
                list(moments),
                _usages(model, entries),
                list(moments.values()),
                target,
                cap,
                spending.effort,
                spending.seed,
                threads,
                report_progress,
            )

    listed = plan_model(model, TQConfig.from_json(every_matrix(spending.matrices)))["matrices"]
    before = model.num_parameters()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return plan_with(choose, listed, (before, size / max(before, 1)), spending)


def _usages(model: PreTrainedModel, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The usage of each matrix for a token, by its name at the boundary."""
    tied = {
        bare_name(model, source)
        for head, source in ties(model).items()
        if isinstance(model.get_submodule(head), nn.Linear)
    }
    return [
        "map" if entry["kind"] != "embedding" else "tied_lookup" if entry["module"] in tied else "lookup"
        for entry in entries
    ]
