"""Compress a live model of transformers, in place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import _core
from ..calibration.calibration import Calibration, load_calibration
from ..calibration.sequential import calibrate_layers
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, Effort, Objective
from ..config.recipes import ConfigOption, resolve_config
from ..config.specs import MatrixSpec, planned_spec
from ..config.tq_config import TQConfig
from ..data.token_blocks import TokenBlocks
from ..decomposition.norm import Moments
from ..errors import ConfigError
from ..models.matrices import bare_name, compressed_modules, factor_parameters, module_name, require_transformers_model
from ..models.quantization_state import attach, detach
from ..models.surgery import dense_modules, empty_modules, swapped, tied_heads
from ..modules.base import Term
from ..modules.build import CompressedModule
from ..modules.fused import FusedLinear
from ..modules.mixed import FactoredEmbedding
from ..utils.progress import ProgressOption, Report, reporter
from .budget import Budget, Spending, calibrated, check_options, moments_of
from .model_plan import matrix_of, plan_budget, plan_model, resolved_plan
from .report import CompressionReport

# The texts that `calibrate` reads: sequences, batches, or a tokenizer and a text.
Texts: TypeAlias = TokenBlocks | Iterable[Any] | tuple[PreTrainedTokenizerBase, Any]


def compress(
    model: PreTrainedModel,
    config: ConfigOption | None = None,
    *,
    budget: Budget | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    objective: Objective = "auto",
    sequential: Texts | None = None,
    matrices: Sequence[str] | None = None,
    max_multiplies: float | None = None,
    effort: Effort | None = None,
    seed: int | None = None,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> CompressionReport:
    """Compresses a model in place, by a config or a budget, and reports parameters and lost energy of every matrix.

    Every `W` (in × out) becomes a Kronecker sum `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, a low-rank product, or a sum of both. The
    model keeps its device, dtype, training mode and `requires_grad`, and the bias parameters themselves. A head that is
    tied to a compressed embedding computes logits from the same factors. `model.save_pretrained` then writes a
    compressed checkpoint, and `model.dequantize()` returns a stock model.

    Args:
        model: A dense model of transformers with any head or none. A config names its `nn.Linear`, `Conv1D` and
            `nn.Embedding` modules as `named_modules` of the base model does: "h.0.mlp.c_fc",
            "encoder.layer.0.attention.self.query", "layers.0.mlp.up_proj", "lm_head".
        config: A recipe's name, the path of a JSON file, a dict or a `TQConfig`. Either this or `budget`.
        budget: In place of a config: the share of the model's parameters to keep, such as 0.65 or "65%", counted over
            all saved tensors; their number as an integer; a size such as "300MB"; or "lost_energy=0.1". See `plan`.
        calibration: A `Calibration` or its file. Errors are then weighted by the second moments of the layers' inputs
            and of the gradients at their outputs. Nothing else improves quality as much. Default: the Frobenius norm.
        objective: The norm of errors: "frobenius", "diagonal", "second_moment" or "sensitivity". "auto" uses all that
            the calibration has.
        sequential: Experimental, with a calibration: a text on which the inputs of each transformer block are measured
            again once the blocks before it are compressed; the block is fitted to these. Batches or `TokenBlocks`, as
            for `calibrate`, or `(tokenizer, text)`, read with the defaults of `calibrate` and the calibration's seed.
            The budget is spent as without it. It costs half a forward pass for each block and gains little: at half of
            the blocks' parameters a cosine of 0.837 against 0.836 for MiniLM, and a perplexity of 74.2 with and without
            it for the GPT-2 of `tests/data`.
        matrices: Patterns of the matrices that a budget is spent on. Default: as for `plan`.
        max_multiplies: With a budget: a cap on the MACs of these matrices for one token, as a share of their MACs while
            dense. See `plan`.
        effort: "fast", "balanced" or "best". Default: the config's; with a budget "fast". See `plan`.
        seed: Of the search. Default: the config's; with a budget 0. Equal seeds give equal factors, for any number of
            threads.
        threads: Worker threads. Default: one per core.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Returns:
        The report, with for every matrix its shape, spec, parameters before and after, lost energy and seconds.

    Raises:
        ConfigError: Neither or both of `config` and `budget`; a config that does not fit the model; a budget that
            cannot be met; a model that is compressed or not of transformers; a weight shared with a module that cannot
            share factors; `sequential` without a calibration.
        TextError: `sequential` has no batch, or fewer than 128 sequences of text.
        ShapeError: A block does not divide a matrix, or a rank is too large for it.
        NonFiniteError: A weight has NaN or an infinity.
        DtypeError: A weight is not float16, bfloat16, float32 or float64.

    The model is unchanged if anything is raised, `KeyboardInterrupt` included.

    Cost: float32 copies of the matrices beside the model. With a budget, see `plan`.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("tests/data/tiny-gpt2")
        >>> report = compress(model, budget=0.65)
        >>> report.parameters_after / report.parameters_before
        0.649...
        >>> model.save_pretrained("tiny-gpt2-compressed")
    """
    require_transformers_model(model)
    known = load_calibration(calibration)
    check_options(config, budget, matrices, max_multiplies)
    if sequential is not None and not (known is not None and calibrated(known, objective)):
        raise ConfigError("sequential: expected with a calibration, and with an objective that takes it into account")
    if budget is not None:
        spending = Spending(
            budget, known, objective, matrices, max_multiplies, effort or DEFAULT_EFFORT, seed or DEFAULT_SEED
        )
        config = plan_budget(model, spending, threads=threads, progress=progress).config
    config = resolve_config(config, effort=effort, seed=seed)
    parameters = model.num_parameters()
    plan = plan_model(model, config)
    return _compress_planned(model, config, plan, {}, parameters, threads, progress, known, objective, sequential)


def recompress(
    model: PreTrainedModel,
    config: ConfigOption,
    *,
    effort: Effort | None = None,
    seed: int | None = None,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> CompressionReport:
    """Compresses a model further, in place, from its current weights: `compress` for a model that may be compressed.

    Compressed matrices that `config` names are multiplied out and decomposed by it. Those that it does not name keep
    their factors. The report has the matrices that this call decomposed. Arguments and errors are those of `compress`;
    the model is unchanged if anything is raised.
    """
    require_transformers_model(model)
    config = resolve_config(config, effort=effort, seed=seed)
    if next(compressed_modules(model), None) is None:
        return compress(model, config, threads=threads, progress=progress)
    plan = resolved_plan(model, config)
    parameters = model.num_parameters()
    named = {entry["name"] for entry in plan["matrices"]}
    before: TQConfig = model.config.quantization_config
    kept = {name: spec for name, spec in before.specs.items() if name not in named}
    with swapped(model, dense_modules(model, {entry["module"] for entry in plan["matrices"]})):
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
    objective: Objective = "auto",
    sequential: Texts | None = None,
) -> CompressionReport:
    """Decomposes the dense matrices of `plan`; `kept` are the specs of matrices that stay compressed.

    `parameters` is the number of the model's parameters before, for the report.
    """
    started = time.perf_counter()
    planned = plan["matrices"]
    specs = {entry["name"]: planned_spec(entry) for entry in planned}
    modules = empty_modules(model, specs)
    results: dict[str, Any] = {}
    try:
        with swapped(model, {}) as swap:
            with reporter(progress, "compress") as report:
                measuring, fitting = (report, report) if report is None or sequential is None else _halves(report)
                for entries, moments in _groups(model, planned, calibration, objective, sequential, measuring):
                    names = [entry["name"] for entry in entries]
                    found = _core.fit_many(
                        [matrix_of(model, entry) for entry in entries],
                        names,
                        [json.dumps(specs[name].to_dict()) for name in names],
                        [moments[name] for name in names],
                        config.effort,
                        config.seed,
                        threads,
                        _share(fitting, len(results), len(names), len(specs)),
                    )
                    results.update(zip(names, found, strict=True))
                    swap(_filled(model, modules, entries, results))
            attach(model, config.replace(specs={**kept, **specs}))
    except BaseException:
        detach(model)
        raise
    counts = parameters, model.num_parameters()
    fitted = [results[name] for name in specs]
    return _report(model, plan, fitted, counts, time.perf_counter() - started, calibrated(calibration, objective))


def _groups(
    model: PreTrainedModel,
    planned: Sequence[Mapping[str, Any]],
    calibration: Calibration | None,
    objective: Objective,
    sequential: Texts | None,
    report: Report | None,
) -> Iterator[tuple[Sequence[Mapping[str, Any]], Mapping[str, Moments]]]:
    """Yields the entries that are fitted together, and their moments, when the groups before are compressed."""
    moments = dict(moments_of(calibration, objective, planned))
    if sequential is None or calibration is None:
        yield planned, moments
        return
    source, text = sequential, None
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], PreTrainedTokenizerBase):
        source, text = source
    layers = calibrate_layers(
        model,
        source,
        text,
        original=calibration,
        matrices=moments.keys(),
        seed=calibration.seed,
        progress=report or False,
    )
    for group, measured in layers:
        entries = [entry for entry in planned if entry["name"] in group.matrices]
        # A layer that no text goes through has no moments.
        used = [entry for entry in entries if measured.input(entry["name"]) is not None]
        yield entries, moments | dict(moments_of(measured, objective, used))


def _halves(report: Report) -> tuple[Report, Report]:
    """Two callbacks for two alternating kinds of work; each is half of the total of `report`."""
    shares = [0, 0]

    def half(number: int, done: int, total: int) -> None:
        shares[number] = 1000 * done // max(total, 1)
        report(sum(shares), 2000)

    return partial(half, 0), partial(half, 1)


def _share(report: Report | None, before: int, matrices: int, total: int) -> Report | None:
    """A callback for a group of `matrices` out of `total`, of which `before` are done."""
    if report is None or matrices == total:
        return report
    return lambda done, work: report(before * work + matrices * done, total * work)


def _filled(
    model: PreTrainedModel,
    modules: Mapping[str, CompressedModule],
    entries: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
) -> dict[str, nn.Module]:
    """The modules of some matrices with their factors, and the heads tied to them, by full name."""
    terms = {name: result[0] for name, result in results.items()}
    names = dict.fromkeys(module_name(model, entry["module"]) for entry in entries)
    for name in names:
        _fill(modules[name], model.get_submodule(name), terms, bare_name(model, name))
    filled: dict[str, nn.Module] = {name: modules[name] for name in names}
    return filled | tied_heads(model, filled)


def _fill(module: CompressedModule, dense: Any, terms: Mapping[str, Sequence[Term]], name: str) -> None:
    """Sets the factors of an empty module, and the other properties of the dense one."""
    if isinstance(module, FusedLinear):
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
    factors = {id(factor) for _, module in compressed_modules(model) for factor in factor_parameters(module)}
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
