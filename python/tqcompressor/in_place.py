"""Compressing a live GPT-2, in place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from . import _core, gpt2
from .config import TQConfig, resolve_config
from .embeddings import KroneckerEmbedding, KroneckerHead
from .errors import ConfigError, DtypeError
from .modules import FusedKroneckerLinear, KroneckerLinear
from .progress import ProgressOption, reporter
from .report import CompressionReport
from .specs import KroneckerSpec, MatrixSpec
from .transformers_integration import attach, detach


def compress(
    model: PreTrainedModel,
    config: str | os.PathLike[str] | Mapping[str, Any] | TQConfig | None = None,
    *,
    effort: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> CompressionReport:
    """Replaces the matrices of a GPT-2 that `config` names by Kronecker sums, in place, and reports what it cost.

    Every `W` in × out becomes `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`. The model keeps its device, dtype, training mode and
    `requires_grad`; biases stay the very same parameters. A head that is tied to a compressed `wte` computes logits
    from the same factors. Afterwards `model.save_pretrained` writes a compressed checkpoint, and `model.dequantize()`
    gives a stock GPT-2 back.

    Args:
        model: A GPT-2 of transformers with any head or none, not wrapped and not compressed yet.
        config: A recipe's name, the path of a JSON file, a dict or a `TQConfig`; by default the recipe "tq-81m".
        effort: "fast", "balanced" or "best", in place of the config's.
        seed: In place of the config's. Equal seeds give equal factors, whatever the number of threads.
        threads: How many threads search; by default one per core.
        progress: True or False to show a progress bar or not, None to show it in a terminal or notebook, or a function
            that is called with `(done, total)`.

    Returns:
        The report, with for every matrix its shape, spec, parameters before and after, lost energy and seconds.

    Raises:
        ConfigError: The config does not fit the model, or the model is no GPT-2, or compressed already.
        ShapeError: A block that does not divide a matrix, or a rank that is too large for it.
        NonFiniteError: A weight that holds NaN or an infinity.
        DtypeError: A weight that is neither float32 nor float16, bfloat16 or float64.

    Whatever is raised, Ctrl-C included, the model is then as it was.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("gpt2")  # doctest: +SKIP
        >>> report = tqcompressor.compress(model, "tq-81m", effort="fast")  # doctest: +SKIP
    """
    gpt2.require_gpt2(model)
    config = resolve_config(config, effort=effort, seed=seed)
    parameters = model.num_parameters()
    return _compress_planned(model, config, plan_model(model, config), {}, parameters, threads, progress)


def compress_again(
    model: PreTrainedModel,
    config: str | os.PathLike[str] | Mapping[str, Any] | TQConfig | None = None,
    *,
    effort: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> CompressionReport:
    """As `compress`, of a GPT-2 that may be compressed already: a further stage, from its weights as they are now.

    Matrices that `config` names are multiplied out where they are compressed, and decomposed as it says; compressed
    matrices that it does not name keep their factors. The report has the matrices that this call decomposed.
    Arguments and errors are those of `compress`, and whatever is raised, the model is then as it was.
    """
    gpt2.require_gpt2(model)
    config = resolve_config(config, effort=effort, seed=seed)
    if next(gpt2.compressed_modules(model), None) is None:
        return compress(model, config, threads=threads, progress=progress)
    tied = gpt2.tied_head(model) is not None
    plan = json.loads(_core.plan(gpt2.weight_tensors(gpt2.stock_model(model)), tied, config.to_json()))
    parameters = model.num_parameters()
    named = {entry["name"] for entry in plan["matrices"]}
    before: TQConfig = model.config.quantization_config
    kept = {name: spec for name, spec in before.specs.items() if name not in named}
    with gpt2.swapped(model, gpt2.dense_modules(model, {entry["module"] for entry in plan["matrices"]})):
        detach(model)
        try:
            return _compress_planned(model, config, plan, kept, parameters, threads, progress)
        except BaseException:
            attach(model, before)
            raise


def _compress_planned(
    model: PreTrainedModel,
    config: TQConfig,
    plan: Mapping[str, Any],
    kept: Mapping[str, MatrixSpec],
    parameters: int,
    threads: int | None,
    progress: ProgressOption,
) -> CompressionReport:
    """Decomposes the matrices of `plan`, all of them dense; `kept` are those that are compressed and stay so.

    `parameters` are the model's before, for the report.
    """
    started = time.perf_counter()
    planned = plan["matrices"]
    specs = {entry["name"]: KroneckerSpec(entry["block"], entry["rank"], entry["permute"]) for entry in planned}
    modules = gpt2.empty_modules(model, specs)
    with reporter(progress, "compress") as report_progress:
        results = _core.decompose_many(
            [_matrix(model, entry) for entry in planned],
            list(specs),
            [spec.block for spec in specs.values()],
            [spec.rank for spec in specs.values()],
            [spec.permute for spec in specs.values()],
            config.effort,
            config.seed,
            threads,
            report_progress,
        )
    factors = {name: result[:4] for name, result in zip(specs, results, strict=True)}
    for name, module in modules.items():
        _fill(module, model.get_submodule(name), factors, name.removeprefix(gpt2.base_prefix(model)))
    head = gpt2.tied_head(model)
    embedding = modules.get(f"{gpt2.base_prefix(model)}wte")
    if head is not None and isinstance(embedding, KroneckerEmbedding):
        modules["lm_head"] = KroneckerHead(embedding)
    try:
        with gpt2.swapped(model, modules):
            attach(model, config.replace(specs={**kept, **specs}))
    except BaseException:
        detach(model)
        raise
    return _report(model, plan, results, (parameters, model.num_parameters()), time.perf_counter() - started)


def plan_model(model: PreTrainedModel, config: TQConfig) -> dict[str, Any]:
    """What `config` would do to a live model, without touching it; raises as `compress` does."""
    gpt2.require_gpt2(model)
    if next(gpt2.compressed_modules(model), None) is not None:
        raise ConfigError("the model is compressed already: call model.dequantize() first, or start from a dense one")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError("the model is quantized already: start from a dense one")
    tied = gpt2.tied_head(model) is not None
    plan: dict[str, Any] = json.loads(_core.plan(gpt2.weight_tensors(model), tied, config.to_json()))
    return plan


def _matrix(model: PreTrainedModel, entry: Mapping[str, Any]) -> NDArray[np.float32]:
    """The planned matrix, in × out, as contiguous float32 on the CPU; a view of the weight where that is possible."""
    module: Any = model.get_submodule(gpt2.module_name(model, entry["module"]))
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


def _fill(
    module: gpt2.CompressedModule, dense: Any, factors: Mapping[str, tuple[NDArray[Any], ...]], name: str
) -> None:
    """Gives a module without values those found for it, and everything else that the dense one had."""
    if isinstance(module, FusedKroneckerLinear):
        for part_name, part in zip(module.part_names, module.parts, strict=True):
            _fill_factors(part, dense, factors[f"{name}.{part_name}"])
    else:
        _fill_factors(module, dense, factors[name])
    if isinstance(module, KroneckerLinear | FusedKroneckerLinear):
        module.bias = dense.bias


def _fill_factors(module: Any, dense: Any, factors: tuple[NDArray[Any], ...]) -> None:
    weight = dense.weight
    module.requires_grad_(weight.requires_grad)
    module.set_factors(*factors, dtype=weight.dtype, device=weight.device)


def _report(
    model: PreTrainedModel,
    plan: Mapping[str, Any],
    results: Sequence[tuple[Any, ...]],
    parameters: tuple[int, int],
    seconds: float,
) -> CompressionReport:
    matrices = [
        {**entry, "lost_energy": lost_energy, "seconds": elapsed}
        for entry, (*_, lost_energy, elapsed) in zip(plan["matrices"], results, strict=True)
    ]
    factors = {id(factor) for _, module in gpt2.compressed_modules(model) for factor in gpt2.factors(module)}
    untouched = [
        {"tensor": name, "shape": parameter.shape, "parameters": parameter.numel()}
        for name, parameter in model.named_parameters()
        if id(parameter) not in factors
    ]
    return CompressionReport.from_dict(
        {
            **plan,
            "tqcompressor": _core.__version__,
            "format_version": model.config.quantization_config.format_version,
            "source": None,
            "effort": model.config.quantization_config.effort,
            "seed": model.config.quantization_config.seed,
            "dtype": None,
            "matrices": matrices,
            "untouched": untouched,
            "parameters_before": parameters[0],
            "parameters_after": parameters[1],
            "bytes_before": None,
            "bytes_after": None,
            "seconds": seconds,
        }
    )
