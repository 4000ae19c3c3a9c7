"""The plan of a config or a budget for a live model, which stays unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from .. import _core
from .._core import MatrixInfo, ModelPlan, SpentBudget
from ..config.tq_config import TQConfig
from ..errors import ConfigError, DtypeError
from ..models.matrices import (
    bare_name,
    compressed_modules,
    module_name,
    require_transformers_model,
)
from ..models.quantization_state import packed_tensor
from ..models.stock import weight_tensors
from ..models.surgery import obstacle
from ..models.ties import ties
from ..models.trial import refused
from ..utils.progress import ProgressOption, reporter
from .budget import Spending, eligible, matrix_patterns, stored_sizes
from .budget_plan import BudgetPlan, BudgetRequest


def plan_model(model: PreTrainedModel, config: TQConfig) -> ModelPlan:
    """The plan of `config` for a live model; raises as `compress` does."""
    require_dense(model)
    return resolved_plan(model, config)


def require_dense(model: PreTrainedModel) -> None:
    """Raises `ConfigError` unless this is a model of transformers with plain weights, neither compressed nor packed."""
    require_transformers_model(model)
    if next(compressed_modules(model), None) is not None:
        raise ConfigError("the model is compressed already: call model.dequantize() first, or start from a dense one")
    if getattr(model, "hf_quantizer", None) is not None and (packed := packed_tensor(model)) is not None:
        raise ConfigError(
            f"the model is quantized already, as {packed} shows: start from a dense one, or call model.dequantize()"
        )


def resolved_plan(model: PreTrainedModel, config: TQConfig) -> ModelPlan:
    """`config` resolved against the matrices of a model, compressed or not: the matrices are in the model's order."""
    return _core.plan(*_listing(model), config)


def _listing(model: PreTrainedModel) -> tuple[list[tuple[str, str, tuple[int, ...], str]], str, list[tuple[str, str]]]:
    """How the boundary takes a model: its weights, the base model's prefix, and its ties by bare names."""
    tied = [(bare_name(model, head), bare_name(model, source)) for head, source in ties(model).items()]
    return weight_tensors(model), f"{model.base_model_prefix}.", tied


def matrix_of(model: PreTrainedModel, matrix: MatrixInfo) -> NDArray[np.float32]:
    """The values of a matrix, in × out, as contiguous float32 on the CPU; a view of the weight where possible."""
    module: Any = model.get_submodule(module_name(model, matrix.module))
    weight: torch.Tensor = module.weight.detach()
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise DtypeError(f"{matrix.tensor} is {weight.dtype}, expected a floating dtype")
    if weight.device.type == "meta":
        raise ConfigError(f"{matrix.tensor} has no values: it is on the meta device, or offloaded to disk")
    if isinstance(module, nn.Linear):
        weight = weight.t()
    rows, columns = matrix.shape
    first = matrix.first_column
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
    request, spent = spend_budget(model, spending, keep=False, threads=threads, progress=progress)
    return request.plan(spent.choices)


def spend_budget(
    model: PreTrainedModel,
    spending: Spending,
    *,
    keep: bool,
    threads: int | None,
    progress: ProgressOption,
) -> tuple[BudgetRequest, SpentBudget]:
    """Spends a budget on a live model, without touching it; with `keep`, what was spent can be fitted."""
    request = budget_request(model, spending)
    with reporter(progress, "plan") as report_progress:
        spent = _core.spend_budget(
            [matrix_of(model, matrix) for matrix in request.matrices],
            request.names,
            [matrix.module for matrix in request.matrices],
            usages(model, request.matrices),
            request.moments,
            **request.limits,
            keep=keep,
            threads=threads,
            progress=report_progress,
        )
    return request, spent


def budget_request(model: PreTrainedModel, spending: Spending) -> BudgetRequest:
    """The request for a budget on a live model, which need have no values yet; raises `ConfigError` where it cannot be.

    That is where the budget is too small, or the calibration is of another model.
    """
    require_dense(model)
    every = _core.list_matrices(*_listing(model), matrix_patterns(spending.matrices))
    reasons = _obstacles(model, every, spending)
    listed = [matrix for matrix in every if matrix.name not in reasons]
    before = model.num_parameters()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    matrices = _core.list_matrices(*_listing(model), None)
    sizes = stored_sizes(matrices, before, size / max(before, 1), spending.dtype)
    return BudgetRequest.of(listed, sizes, spending, reasons)


def _obstacles(model: PreTrainedModel, listed: Sequence[MatrixInfo], spending: Spending) -> dict[str, str]:
    """The matrices of a listing that `compress` cannot swap, with the reasons: they stay dense.

    Raises `ConfigError` where the caller names one of them, or where there is nothing else.
    """
    tied = ties(model)
    found = {matrix.name: obstacle(model, module_name(model, matrix.module), tied) for matrix in listed}
    reasons = {name: reason for name, reason in found.items() if reason is not None}
    if len(reasons) < len(listed):
        left = eligible([matrix for matrix in listed if matrix.name not in reasons], spending)
        reasons |= refused(model, list(left))
        if reasons.keys() >= left.keys():
            raise ConfigError(reasons[next(iter(left))])
    named = matrix_patterns(spending.matrices) or ()
    for name, reason in reasons.items():
        if name in named or len(reasons) == len(listed):
            raise ConfigError(reason)
    return reasons


def usages(model: PreTrainedModel, matrices: Sequence[MatrixInfo]) -> list[str]:
    """The usage of each matrix for a token, by its name at the boundary."""
    tied = {
        bare_name(model, source)
        for head, source in ties(model).items()
        if isinstance(model.get_submodule(head), nn.Linear)
    }
    return [
        "map" if matrix.kind != "embedding" else "tied_lookup" if matrix.module in tied else "lookup"
        for matrix in matrices
    ]
