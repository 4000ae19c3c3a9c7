"""Compressing a live model of transformers, in place."""

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

from . import _core, architecture
from .config import TQConfig, resolve_config
from .errors import ConfigError, DtypeError
from .mixed import CompressedModule, FactoredEmbedding
from .modules import FusedKroneckerLinear, Term
from .progress import ProgressOption, reporter
from .report import CompressionReport
from .specs import KroneckerSpec, MatrixSpec, spec_from_dict
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
    """Replaces the matrices of a model that `config` names by what their specs say, in place, and reports the cost.

    Every `W` in × out becomes a Kronecker sum `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, a product of low rank, or a sum of such.
    The model keeps its device, dtype, training mode and `requires_grad`; biases stay the very same parameters. A head
    that is tied to a compressed embedding computes logits from the same factors. Afterwards `model.save_pretrained`
    writes a compressed checkpoint, and `model.dequantize()` gives a stock model back.

    Args:
        model: Any model of transformers with any head or none, not wrapped and not compressed yet. Its `nn.Linear`,
            `Conv1D` and `nn.Embedding` modules can be named, by what `named_modules` of the base model calls them:
            "h.0.mlp.c_fc", "encoder.layer.0.attention.self.query", "layers.0.mlp.up_proj", "lm_head".
        config: A recipe's name, the path of a JSON file, a dict or a `TQConfig`; by default the recipe "tq-81m".
        effort: "fast", "balanced" or "best", in place of the config's.
        seed: In place of the config's. Equal seeds give equal factors, whatever the number of threads.
        threads: How many threads search; by default one per core.
        progress: True or False to show a progress bar or not, None to show it in a terminal or notebook, or a function
            that is called with `(done, total)`.

    Returns:
        The report, with for every matrix its shape, spec, parameters before and after, lost energy and seconds.

    Raises:
        ConfigError: The config does not fit the model, or the model is not transformers' own, or compressed
            already, or a weight is shared with what cannot share factors.
        ShapeError: A block that does not divide a matrix, or a rank that is too large for it.
        NonFiniteError: A weight that holds NaN or an infinity.
        DtypeError: A weight that is neither float32 nor float16, bfloat16 or float64.

    Whatever is raised, Ctrl-C included, the model is then as it was.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("gpt2")  # doctest: +SKIP
        >>> report = tqcompressor.compress(model, "tq-81m", effort="fast")  # doctest: +SKIP
    """
    architecture.require_transformers_model(model)
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
    """As `compress`, of a model that may be compressed already: a further stage, from its weights as they are now.

    Matrices that `config` names are multiplied out where they are compressed, and decomposed as it says; compressed
    matrices that it does not name keep their factors. The report has the matrices that this call decomposed.
    Arguments and errors are those of `compress`, and whatever is raised, the model is then as it was.
    """
    architecture.require_transformers_model(model)
    config = resolve_config(config, effort=effort, seed=seed)
    if next(architecture.compressed_modules(model), None) is None:
        return compress(model, config, threads=threads, progress=progress)
    plan = _resolved(model, config)
    parameters = model.num_parameters()
    named = {entry["name"] for entry in plan["matrices"]}
    before: TQConfig = model.config.quantization_config
    kept = {name: spec for name, spec in before.specs.items() if name not in named}
    with architecture.swapped(
        model, architecture.dense_modules(model, {entry["module"] for entry in plan["matrices"]})
    ):
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
    specs = {entry["name"]: planned_spec(entry) for entry in planned}
    modules = architecture.empty_modules(model, specs)
    with reporter(progress, "compress") as report_progress:
        matrices = [_matrix(model, entry) for entry in planned]
        results = _fit(matrices, specs, config.effort, config.seed, threads, report_progress)
    terms = {name: result[0] for name, result in zip(specs, results, strict=True)}
    for name, module in modules.items():
        _fill(module, model.get_submodule(name), terms, architecture.bare_name(model, name))
    modules |= architecture.heads(model, modules)
    try:
        with architecture.swapped(model, modules):
            attach(model, config.replace(specs={**kept, **specs}))
    except BaseException:
        detach(model)
        raise
    return _report(model, plan, results, (parameters, model.num_parameters()), time.perf_counter() - started)


def plan_model(model: PreTrainedModel, config: TQConfig) -> dict[str, Any]:
    """What `config` would do to a live model, without touching it; raises as `compress` does."""
    architecture.require_transformers_model(model)
    if next(architecture.compressed_modules(model), None) is not None:
        raise ConfigError("the model is compressed already: call model.dequantize() first, or start from a dense one")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError("the model is quantized already: start from a dense one")
    return _resolved(model, config)


def _resolved(model: PreTrainedModel, config: TQConfig) -> dict[str, Any]:
    """`config` resolved against the matrices of a model, compressed or not: the entries are in the model's order."""
    prefix = f"{model.base_model_prefix}."
    tensors = architecture.weight_tensors(model)
    # Patterns may have the base model's prefix, which names of matrices have not; the first of two equal ones decides.
    specs: dict[str, MatrixSpec] = {}
    for pattern, spec in config.specs.items():
        specs.setdefault(pattern.removeprefix(prefix), spec)
    tied = architecture.ties(model)
    for head, source in tied.items():
        if head in specs:
            source = architecture.bare_name(model, source)
            raise ConfigError(f"{head} is tied to {source}: compressing {source} compresses both")
    plan: dict[str, Any] = json.loads(_core.plan(tensors, "lm_head" in tied, config.replace(specs=specs).to_json()))
    order = {name: number for number, (name, _, _) in enumerate(tensors)}
    for entry in plan["matrices"]:
        part = entry["name"][len(entry["module"]) :]
        # A name that begins like GPT-2's base model keeps its beginning.
        entry["module"] = entry["tensor"].removesuffix(".weight")
        entry["name"] = entry["module"] + part
    plan["matrices"].sort(key=lambda entry: order[entry["tensor"]])
    for entry in (*plan["matrices"], *plan["untouched"]):
        entry["tensor"] = architecture.module_name(model, entry["tensor"])
    return plan


def planned_spec(entry: Mapping[str, Any]) -> MatrixSpec:
    """The spec of a plan's or a report's entry for one matrix."""
    return spec_from_dict({name: entry[name] for name in ("block", "rank", "permute", "terms") if name in entry})


def _fit(
    matrices: Sequence[NDArray[np.float32]],
    specs: Mapping[str, MatrixSpec],
    effort: str,
    seed: int,
    threads: int | None,
    progress: Any,
) -> list[tuple[list[Term], float, float]]:
    """`(terms, lost energy, seconds)` of each matrix, in parallel; `specs` are by the names of the matrices."""
    kronecker = [spec for spec in specs.values() if isinstance(spec, KroneckerSpec)]
    results = _core.decompose_many(
        matrices,
        list(specs),
        [spec.block for spec in kronecker],
        [spec.rank for spec in kronecker],
        [spec.permute for spec in kronecker],
        effort,
        seed,
        threads,
        progress,
    )
    return [([("kronecker", a, b, p, q)], lost_energy, seconds) for a, b, p, q, lost_energy, seconds in results]


def _matrix(model: PreTrainedModel, entry: Mapping[str, Any]) -> NDArray[np.float32]:
    """The planned matrix, in × out, as contiguous float32 on the CPU; a view of the weight where that is possible."""
    module: Any = model.get_submodule(architecture.module_name(model, entry["module"]))
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


def _fill(module: CompressedModule, dense: Any, terms: Mapping[str, Sequence[Term]], name: str) -> None:
    """Gives a module without values those found for it, and everything else that the dense one had."""
    if isinstance(module, FusedKroneckerLinear):
        for part_name, part in zip(module.part_names, module.parts, strict=True):
            _fill_terms(part, dense, terms[f"{name}.{part_name}"])
    else:
        _fill_terms(module, dense, terms[name])
    if not isinstance(module, FactoredEmbedding):
        module.bias = dense.bias


def _fill_terms(module: Any, dense: Any, terms: Sequence[Term]) -> None:
    weight = dense.weight
    module.requires_grad_(weight.requires_grad)
    module.set_terms(terms, dtype=weight.dtype, device=weight.device)


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
    factors = {
        id(factor) for _, module in architecture.compressed_modules(model) for factor in architecture.factors(module)
    }
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
