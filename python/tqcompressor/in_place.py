"""Compressing a live model of transformers, in place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from . import _core, architecture
from .budget import Budget, calibrated, check_options, moments_of
from .calibration import Calibration, load_calibration
from .config import TQConfig, resolve_config
from .mixed import CompressedModule, FactoredEmbedding
from .modules import FusedKroneckerLinear, Term
from .planning import matrix_of, plan_budget, plan_model, planned_spec, resolved_plan
from .progress import ProgressOption, reporter
from .report import CompressionReport
from .specs import MatrixSpec
from .transformers_integration import attach, detach


def compress(
    model: PreTrainedModel,
    config: str | os.PathLike[str] | Mapping[str, Any] | TQConfig | None = None,
    *,
    budget: Budget | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    objective: str = "auto",
    matrices: Sequence[str] | None = None,
    effort: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> CompressionReport:
    """Replaces matrices of a model, as `config` says or a budget allows, in place, and reports the cost.

    Every `W` in × out becomes a Kronecker sum `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, a product of low rank, or a sum of such.
    The model keeps its device, dtype, training mode and `requires_grad`; biases stay the very same parameters. A head
    that is tied to a compressed embedding computes logits from the same factors. Afterwards `model.save_pretrained`
    writes a compressed checkpoint, and `model.dequantize()` gives a stock model back.

    Args:
        model: Any model of transformers with any head or none, not wrapped and not compressed yet. Its `nn.Linear`,
            `Conv1D` and `nn.Embedding` modules can be named, by what `named_modules` of the base model calls them:
            "h.0.mlp.c_fc", "encoder.layer.0.attention.self.query", "layers.0.mlp.up_proj", "lm_head".
        config: A recipe's name, the path of a JSON file, a dict or a `TQConfig`; by default the recipe "tq-81m".
        budget: In place of a config: a share of the model's parameters that is kept, 0.65 or "65%", all saved tensors
            counted; their number as an integer; a size such as "300MB"; or "lost_energy=0.1". See `plan`.
        calibration: What `calibrate` measured, or its file: errors then count by what the layers' inputs look like and
            how much the model minds them, which is the largest lever on quality there is.
        objective: "frobenius", "diagonal", "second_moment" or "sensitivity"; "auto" is the richest that the calibration
            allows.
        matrices: Patterns of the matrices that a budget is spent on; by default all that are worth it.
        effort: "fast", "balanced" or "best", in place of the config's; for a budget by default "fast", see `plan`.
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
    known = load_calibration(calibration)
    check_options(config, budget, matrices)
    if budget is not None:
        options = {"effort": effort or "fast", "seed": seed or 0, "threads": threads, "progress": progress}
        found = plan_budget(
            model,
            budget,
            calibration=known,
            objective=objective,
            matrices=matrices,
            **options,  # type: ignore[arg-type]
        )
        config = found.config
    config = resolve_config(config, effort=effort, seed=seed)
    parameters = model.num_parameters()
    plan = plan_model(model, config)
    return _compress_planned(model, config, plan, {}, parameters, threads, progress, known, objective)


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
    plan = resolved_plan(model, config)
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
    calibration: Calibration | None = None,
    objective: str = "auto",
) -> CompressionReport:
    """Decomposes the matrices of `plan`, all of them dense; `kept` are those that are compressed and stay so.

    `parameters` are the model's before, for the report.
    """
    started = time.perf_counter()
    planned = plan["matrices"]
    specs = {entry["name"]: planned_spec(entry) for entry in planned}
    modules = architecture.empty_modules(model, specs)
    with reporter(progress, "compress") as report_progress:
        results = _core.fit_many(
            [matrix_of(model, entry) for entry in planned],
            list(specs),
            [json.dumps(spec.to_dict()) for spec in specs.values()],
            [moments for _, moments in moments_of(calibration, objective, planned)],
            config.effort,
            config.seed,
            threads,
            report_progress,
        )
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
    counts = parameters, model.num_parameters()
    return _report(model, plan, results, counts, time.perf_counter() - started, calibrated(calibration, objective))


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
    calibrated: bool,
) -> CompressionReport:
    matrices = [
        {**entry, "lost_energy": lost_energy, "seconds": elapsed}
        for entry, (_, lost_energy, elapsed) in zip(plan["matrices"], results, strict=True)
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
            "calibrated": calibrated or None,
            "matrices": matrices,
            "untouched": untouched,
            "parameters_before": parameters[0],
            "parameters_after": parameters[1],
            "bytes_before": None,
            "bytes_after": None,
            "seconds": seconds,
        }
    )
