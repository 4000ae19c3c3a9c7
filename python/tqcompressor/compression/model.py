"""Compress a live model of transformers, in place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import _core
from .._core import Fitted, MatrixInfo, ModelPlan, SpentBudget
from ..calibration.batches import Batch, batches_of
from ..calibration.calibrate import calibrate
from ..calibration.calibration import Calibration, load_calibration
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, Effort, Objective, stored_dtype
from ..config.recipes import ConfigOption, resolve_config
from ..config.specs import MatrixSpec
from ..config.tq_config import INT8, TQConfig
from ..data.text import TextOption
from ..data.token_blocks import TokenBlocks
from ..decomposition.norm import Moments
from ..errors import ConfigError, NonFiniteError
from ..models.matrices import (
    bare_name,
    compressed_modules,
    factor_parameters,
    module_name,
    parameters_of,
    require_transformers_model,
)
from ..models.quantization_state import attach, detach, marks, restore
from ..models.surgery import dense_modules, empty_modules, int8_modules, swapped, tied_modules
from ..models.ties import warn_of_untied
from ..models.trial import try_out
from ..modules.base import Term
from ..modules.build import CompressedModule, is_int8
from ..modules.fused import FusedLinear
from ..modules.mixed import FactoredEmbedding
from ..utils import validate
from ..utils.progress import ProgressOption, reporter
from .budget import Budget, Spending, calibrated, check_options, meaning, moments_of
from .budget_plan import BudgetRequest
from .live_card import keep_report
from .model_plan import matrix_of, plan_model, resolved_plan, spend_budget, usages
from .refine import EPOCHS
from .refine import refine as refine_blocks
from .report import CalibrationRecord, CompressionReport, MatrixReport, UntouchedTensor
from .reproduce import python_call, versions

# The texts that `calibrate` reads: sequences, batches, or a tokenizer and a text.
Texts: TypeAlias = TokenBlocks | Iterable[Any] | tuple[PreTrainedTokenizerBase, Any]


# From matrices, their names, their specs and their moments to their fits, in that order.
Fits: TypeAlias = Callable[..., Sequence[Fitted]]


def compress(
    model: PreTrainedModel,
    config: ConfigOption | None = None,
    *,
    budget: Budget | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    text: TextOption | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_samples: int = 128,
    seq_len: int | None = None,
    objective: Objective = "auto",
    refine: bool | Texts = False,
    refine_epochs: int = EPOCHS,
    matrices: Sequence[str] | None = None,
    max_macs: float | None = None,
    effort: Effort | None = None,
    seed: int | None = None,
    dtype: Literal["int8"] | None = None,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> CompressionReport:
    """Compresses a model in place, by a config or a budget, and reports parameters and lost energy of every matrix.

    Every `W` (in × out) becomes a Kronecker sum `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, a low-rank product, or a sum of both. The
    model keeps its device, dtype, training mode and `requires_grad`, and the bias parameters themselves. All users of
    one matrix get the same factors: a head that is tied to an embedding, and the embeddings of an encoder and a
    decoder. `model.save_pretrained` then writes a compressed checkpoint with its model card, `model.push_to_hub`
    uploads both, and `model.dequantize()` returns a stock model.

    Args:
        model: A dense model of transformers with any head or none. A config names its `nn.Linear`, `Conv1D` and
            `nn.Embedding` modules as `named_modules` of the base model does: "h.0.mlp.c_fc",
            "encoder.layer.0.attention.self.query", "layers.0.mlp.up_proj", "lm_head".
        config: A recipe's name, the path of a JSON file, a dict or a `TQConfig`. Either this or `budget`.
        budget: In place of a config: the share of the model's parameters to keep, such as 0.65 or "65%", counted over
            all saved tensors; their number as an integer; a size such as "300MB"; or "lost_energy=0.1". See `plan`.
        calibration: A `Calibration` or its file. Errors are then weighted by the second moments of the layers' inputs
            and of the gradients at their outputs. Nothing else improves quality as much. Default: the Frobenius norm.
        text: In place of a calibration: the text to calibrate on, as for `calibrate`, with a `tokenizer`.
        tokenizer: The model's tokenizer, for `text`.
        num_samples, seq_len: Of calibrating on `text`, as for `calibrate`.
        objective: The norm of errors: "frobenius", "diagonal", "second_moment" or "sensitivity". "auto" uses all that
            the calibration has.
        refine: Whether the factors are trained afterwards to give what the dense model gives: two neighbouring
            transformer blocks at a time the outputs of the dense ones, from the inputs that reach them in the
            compressed model, in the norm of the gradients at the outputs if there is a calibration; and where tokens
            are predicted, the last quarter of the blocks, at most four, the predictions, by the Kullback-Leibler
            divergence. The blocks' biases and the gains of their norms are trained with them. Nothing else changes, and
            blocks that get worse on an eighth of the batches are trained again with a smaller learning rate, or put
            back. True reads `text`; or batches or `TokenBlocks`, as for `calibrate`, or `(tokenizer, text)`. It needs
            no labels, and helps a model whose errors add up from block to block. With half of the blocks' parameters,
            SmolLM2-135M has a perplexity of 44.5 instead of 72.2, MiniLM a cosine of 0.846 instead of 0.836, and the
            GPT-2 of `tests/data` 74.1 instead of 74.2. Lost energies in the report are those of before.
        refine_epochs: How often `refine` reads its text.
        matrices: Patterns of the matrices that a budget is spent on. Default: as for `plan`.
        max_macs: With a budget: a cap on the MACs of these matrices for one token, as a share of their MACs while
            dense; `math.inf` for none. Default: that of each matrix while dense. See `plan`.
        effort: "fast", "balanced" or "best". Default: the config's; with a budget "fast". See `plan`.
        seed: Of the search, and of the calibration on `text`. Default: the config's; with a budget 0. Equal seeds give
            equal factors, for any number of threads.
        dtype: "int8": the weights that matrix products read become eight-bit integers with scales, also those of the
            matrices that stay dense. They are buffers, which do not train; `model.dequantize()` makes them parameters
            again, and LoRA trains beside them. Neither `config` nor `budget` is needed then: everything stays dense.
            Default: the config's, or the dtype of each weight.
        threads: Worker threads. Default: one per core.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Returns:
        The report, with for every matrix its shape, spec, parameters before and after, lost energy and seconds.

    Raises:
        ConfigError: Neither or both of `config` and `budget`; a config that does not fit the model; a budget that
            cannot be met; a model that is compressed or not of transformers; a weight shared with a module that cannot
            share factors; a matrix that the model's own code writes, or with which it cannot run once compressed;
            `refine` for eight-bit weights, or for a model whose blocks do not each read the output of the one before.
        TextError: A text has fewer than `num_samples` sequences; `refine` has no batch.
        ShapeError: A block does not divide a matrix, or a rank is too large for it.
        NonFiniteError: A weight has NaN or an infinity, or the model computes one in `refine`.
        DtypeError: A weight is not float16, bfloat16, float32 or float64.

    The model is unchanged if anything is raised, `KeyboardInterrupt` included. Before anything is changed, the
    compression is tried out on a model of the same config without values; a warning says where that is not possible.
    `model.config` is a copy afterwards, so that no model that shares it is changed.

    Cost: float32 copies of the matrices beside the model. With a budget, see `plan`. `refine` takes two forward passes
    of the model, `6·refine_epochs` of its blocks and `3·refine_epochs` of its head; it keeps the hidden states of all
    tokens, twice, the dense matrices until it is done, and of two blocks, at the end four, float32 factors with their
    gradients and two moments.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("tests/data/tiny-gpt2")
        >>> report = compress(model, budget=0.65)
        >>> report.parameters_after / report.parameters_before
        0.649...
        >>> model.save_pretrained("tiny-gpt2-compressed")
    """
    # The arguments as they were given, for the call in the card.
    given = dict(locals())
    require_transformers_model(model)
    warn_of_untied(model, stacklevel=2)
    threads = validate.threads(threads)
    stored = stored_dtype(dtype)
    if stored not in (None, INT8):
        raise ConfigError(f'dtype: expected "int8" or none, got {dtype!r}: call model.to(dtype) for another')
    check_options(config, budget, matrices, max_macs, calibration, text, stored)
    refine_epochs = validate.integer("refine_epochs", refine_epochs, 1)
    reading: dict[str, Any] = {"num_samples": num_samples, "seq_len": seq_len}
    drawn = DEFAULT_SEED if seed is None else seed
    batches = _batches(model, refine, text, tokenizer, drawn, **reading)
    if config is None and budget is None:
        config = TQConfig({}, dtype=INT8)
    if batches is not None and INT8 in (stored, None if config is None else resolve_config(config).dtype):
        raise ConfigError(
            "refine: expected float weights, got dtype int8, which do not train: leave refine out, or load what was "
            'refined and saved with dtype="int8"'
        )
    if text is None and tokenizer is None:
        known = load_calibration(calibration)
    elif text is not None and tokenizer is not None:
        # Before the longest part of the work.
        if budget is None:
            plan_model(model, resolve_config(config, effort=effort, seed=seed))
        else:
            meaning(budget)
        known = calibrate(model, tokenizer, text, seed=drawn, progress=progress, **reading)
    else:
        raise ConfigError("expected a text to calibrate on and its tokenizer, got only one of them")
    fits: Fits | None = None
    note: str | None = None
    if budget is not None:
        seed = DEFAULT_SEED if seed is None else seed
        spending = Spending(budget, known, objective, matrices, max_macs, effort or DEFAULT_EFFORT, seed, stored)
        request, spent = spend_budget(model, spending, keep=True, threads=threads, progress=progress)
        planned = request.plan(spent.choices)
        config, note = planned.config, planned.note
        fits = partial(_planned_fits, spent, request)
    config = resolve_config(config, effort=effort, seed=seed, dtype=stored)
    report = _compress_planned(
        model,
        config,
        plan_model(model, config),
        fits=fits,
        norm=_Norm(known, objective),
        refining=None if batches is None else _Refining(batches, refine_epochs, drawn),
        threads=threads,
        progress=progress,
    )
    arguments = {name: value for name, value in given.items() if name not in ("model", "threads", "progress")}
    report = replace(
        report,
        note=note,
        budget=budget,
        objective=None if objective == "auto" else objective,
        command=python_call(compress, arguments),
        versions=versions("torch", "transformers"),
    )
    keep_report(model, report)
    return report


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
    warn_of_untied(model, stacklevel=2)
    threads = validate.threads(threads)
    config = resolve_config(config, effort=effort, seed=seed)
    plan = plan_model if next(compressed_modules(model), None) is None else resolved_plan
    return recompress_planned(model, config, plan(model, config), threads=threads, progress=progress)


def recompress_planned(
    model: PreTrainedModel,
    config: TQConfig,
    plan: ModelPlan,
    *,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> CompressionReport:
    """`recompress` with the plan of `config` for this model, or for the dense model that it was made from."""
    if next(compressed_modules(model), None) is None:
        return _compress_planned(model, config, plan, threads=threads, progress=progress)
    if any(is_int8(module) for _, module in compressed_modules(model)):
        raise ConfigError("the model has eight-bit weights: call model.dequantize() first, and compress the result")
    parameters = model.num_parameters()
    named = {matrix.name for matrix in plan.matrices}
    before: TQConfig = model.config.quantization_config
    kept = {name: spec for name, spec in before.specs.items() if name not in named}
    with swapped(model, dense_modules(model, {matrix.module for matrix in plan.matrices})):
        detach(model)
        try:
            return _compress_planned(
                model, config, plan, threads=threads, progress=progress, kept=kept, parameters=parameters
            )
        except BaseException:
            attach(model, before)
            raise


def _planned_fits(
    spent: SpentBudget,
    request: BudgetRequest,
    matrices: Sequence[NDArray[np.float32]],
    names: Sequence[str],
    specs: Sequence[MatrixSpec],
    moments: Sequence[Moments],
    **options: Any,
) -> Sequence[Fitted]:
    """What planning found for the matrices, and the low ranks that it only chose; `specs` are those of the plan."""
    order = [request.names.index(name) for name in names]
    return spent.fit(order, matrices, names, moments, **options)


@dataclass(frozen=True)
class _Norm:
    """The norm that errors are measured in."""

    calibration: Calibration | None = None
    objective: Objective = "auto"

    @property
    def used(self) -> Calibration | None:
        """The calibration, if the objective takes it into account."""
        return self.calibration if calibrated(self.calibration, self.objective) else None


@dataclass(frozen=True)
class _Refining:
    """What the factors are trained on, a few blocks at a time."""

    batches: Sequence[Batch]
    epochs: int
    seed: int


def _batches(
    model: PreTrainedModel,
    refine: bool | Texts,
    text: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    **reading: Any,
) -> list[Batch] | None:
    """The batches that `refine` stands for; None without it."""
    if refine is False:
        return None
    if refine is True:
        if text is None or tokenizer is None:
            raise ConfigError("refine: expected a text and its tokenizer with True, or (tokenizer, text), or batches")
        return batches_of(model, tokenizer, text, seed=seed, **reading)
    if isinstance(refine, tuple) and len(refine) == 2 and isinstance(refine[0], PreTrainedTokenizerBase):
        return batches_of(model, *refine, seed=seed, **reading)
    return batches_of(model, refine, None, seed=seed, **reading)


def _compress_planned(
    model: PreTrainedModel,
    config: TQConfig,
    plan: ModelPlan,
    *,
    threads: int | None,
    progress: ProgressOption,
    fits: Fits | None = None,
    norm: _Norm | None = None,
    refining: _Refining | None = None,
    kept: Mapping[str, MatrixSpec] | None = None,
    parameters: int | None = None,
) -> CompressionReport:
    """Decomposes the matrices of `plan`, all of them dense, and swaps their modules.

    `fits` is where the fits come from, by default made as `config` says; `kept` are matrices that are compressed and
    stay so; `parameters` are the model's before, for the report, by default those that it has now.
    """
    norm = norm or _Norm()
    if fits is None:
        fits = partial(_core.fit_many, effort=config.effort, seed=config.seed)
    started = time.perf_counter()
    parameters = model.num_parameters() if parameters is None else parameters
    specs = {matrix.name: matrix.spec for matrix in plan.matrices if matrix.spec is not None}
    # The dense matrices that become eight-bit integers.
    dense = None if config.dtype is None else int8_modules(model, specs) if config.dense is None else config.dense
    modules = empty_modules(model, specs, dense)
    used_as = dict(zip(specs, usages(model, [each for each in plan.matrices if each.spec is not None]), strict=True))
    try_out(model, {**(kept or {}), **specs}, dense)
    before = marks(model)
    try:
        with swapped(model, {}) as swap:
            moments = dict(moments_of(norm.calibration, norm.objective, plan.matrices))
            names = [matrix.name for matrix in plan.matrices]
            with reporter(progress, "compress") as report:
                found = fits(
                    [matrix_of(model, matrix) for matrix in plan.matrices],
                    names,
                    [specs[name] for name in names],
                    [moments[name] for name in names],
                    threads=threads,
                    progress=report,
                )
            results = dict(zip(names, found, strict=True))
            filled = _filled(model, modules, plan.matrices, results)
            replaced = {name: model.get_submodule(name) for name in filled}
            swap(filled)
            swap(_int8(model, modules, dense or ()))
            if refining is not None:
                with reporter(progress, "refine") as report:
                    options: Any = {"epochs": refining.epochs, "seed": refining.seed, "report": report}
                    refine_blocks(model, replaced, refining.batches, norm.used, **options)
            attach(model, replace(config, specs={**(kept or {}), **specs}, dense=dense))
    except BaseException:
        restore(model, before)
        raise
    return _report(model, plan, results, used_as, parameters, time.perf_counter() - started, norm.used)


def _filled(
    model: PreTrainedModel,
    modules: Mapping[str, CompressedModule],
    matrices: Sequence[MatrixInfo],
    results: Mapping[str, Fitted],
) -> dict[str, nn.Module]:
    """The modules of some matrices with their factors, and the modules tied to them, by full name."""
    names = dict.fromkeys(module_name(model, matrix.module) for matrix in matrices)
    for name in names:
        _fill(modules[name], model.get_submodule(name), results, bare_name(model, name))
    filled: dict[str, nn.Module] = {name: modules[name] for name in names}
    return filled | tied_modules(model, filled)


def _int8(
    model: PreTrainedModel, modules: Mapping[str, CompressedModule], names: Sequence[str]
) -> dict[str, nn.Module]:
    """The modules of dense matrices as eight-bit integers, and the modules tied to them, by full name."""
    filled: dict[str, nn.Module] = {}
    for name in (module_name(model, bare) for bare in names):
        module: Any = modules[name]
        dense: Any = model.get_submodule(name)
        try:
            module.set_weight(dense.weight)
        except NonFiniteError as error:
            raise NonFiniteError(f"tensor '{name}.weight': {error}") from None
        if not isinstance(module, FactoredEmbedding):
            module.bias = dense.bias
        filled[name] = module
    return filled | tied_modules(model, filled)


def _fill(module: CompressedModule, dense: Any, results: Mapping[str, Fitted], name: str) -> None:
    """Sets the factors of an empty module, and the other properties of the dense one."""
    if isinstance(module, FusedLinear):
        for part_name, part in zip(module.part_names, module.parts, strict=True):
            _fill_terms(part, dense, results[f"{name}.{part_name}"].terms)
    else:
        _fill_terms(module, dense, results[name].terms)
    if not isinstance(module, FactoredEmbedding):
        module.bias = dense.bias


def _fill_terms(module: Any, dense: Any, terms: Sequence[Term]) -> None:
    weight = dense.weight
    module.requires_grad_(weight.requires_grad)
    module.set_terms(terms, dtype=weight.dtype, device=weight.device)


def _report(
    model: PreTrainedModel,
    plan: ModelPlan,
    results: Mapping[str, Fitted],
    used_as: Mapping[str, str],
    parameters: int,
    seconds: float,
    calibration: Calibration | None,
) -> CompressionReport:
    config: TQConfig = model.config.quantization_config
    factors = {id(factor) for _, module in compressed_modules(model) for factor in factor_parameters(module)}
    return CompressionReport(
        version=_core.__version__,
        format_version=config.format_version,
        source=None,
        effort=config.effort,
        seed=config.seed,
        dtype=config.dtype,
        matrices=tuple(MatrixReport.of(matrix, results[matrix.name], used_as[matrix.name]) for matrix in plan.matrices),
        untouched=tuple(
            UntouchedTensor(name, tuple(parameter.shape), parameter.numel())
            for name, parameter in model.named_parameters()
            if id(parameter) not in factors
        ),
        parameters_before=parameters,
        parameters_after=parameters_of(model),
        seconds=seconds,
        calibrated=True if calibration else None,
        calibration=CalibrationRecord.of(calibration) if calibration else None,
    )
