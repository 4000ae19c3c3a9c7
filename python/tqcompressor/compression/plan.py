"""Spend a budget on a checkpoint or on a live model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..calibration.calibration import Calibration, load_calibration
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, Effort, Objective, StoredDtype, stored_dtype
from ..utils import validate
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption
from .budget import Budget, Spending
from .budget_plan import BudgetPlan
from .checkpoint import plan_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan(
    source: PreTrainedModel | StrPath,
    budget: Budget,
    *,
    calibration: Calibration | StrPath | None = None,
    objective: Objective = "auto",
    matrices: Sequence[str] | None = None,
    max_macs: float | None = None,
    effort: Effort = DEFAULT_EFFORT,
    seed: int = DEFAULT_SEED,
    dtype: StoredDtype | None = None,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> BudgetPlan:
    """Spends one budget of parameters over a whole model, embedding and head included, and returns the plan.

    The spectrum of each matrix gives the energy that it loses at each rank. Parameters go, one rank at a time, to the
    matrix where they save the most energy. Beyond the effort "fast", each matrix then gets the best approximation of
    any kind (low rank, or a sum of it and permuted Kronecker terms) with no more parameters. With a calibration that
    has gradients, energies are second-order losses of the model and are compared as they are. Without, a matrix counts
    by its share of lost energy times its size. With one, the rows of an embedding are cut into groups by the
    frequencies of its tokens, and each group gets a rank of its own.

    Args:
        source: A live model of transformers, or a checkpoint: a directory, or its name on the hub.
        budget: The share of the model's parameters to keep, such as 0.65 or "65%", counted over all saved tensors;
            their number as an integer; a size of the weights such as "300MB"; or "lost_energy=0.1", the fewest
            parameters that lose that share of the energy of the matrices.
        calibration: A `Calibration` or its file. Default: the Frobenius norm.
        objective: The norm of errors: "frobenius", "diagonal", "second_moment" or "sensitivity". "auto" uses all that
            the calibration has.
        matrices: Patterns of the matrices that the budget is spent on. Default: all but embeddings of positions and of
            token types, matrices narrower than 16, those that the calibration text did not use, and those of a live
            model that other modules share which cannot share factors, such as scaled embeddings.
        max_macs: A cap on the MACs of these matrices for one token, as a share of their MACs while dense: 0.7, or
            1.5 for half as many again. A dense matrix has `m · n`, a low-rank one as many as parameters, and a row
            that is looked up none. Ranks grow until the budget or the cap is reached. What is left of the cap then is
            divided in proportion, and the best approximation of a matrix stays within its part. Default: a sum takes
            no more MACs than its matrix while dense. `math.inf` lifts that, too.
        effort: "fast" (low rank), "balanced" or "best" (for all but embeddings in groups also sums of low rank and
            permuted Kronecker terms, which lose less with as many parameters, take up to some seconds a matrix to find,
            and have more MACs).
        seed: Of the search. The plan depends on the weights, the budget, the effort and the seed alone.
        dtype: Of the result, as for `compress_checkpoint`, which a budget in bytes depends on.
        threads: Worker threads. Default: one per core.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Raises:
        ConfigError: A budget or a cap is invalid or cannot be met (the message has the smallest that can), or the
            calibration lacks the moments of the objective.
        ShapeError: The calibration is of another model.
        CheckpointError, NonFiniteError, DtypeError: As `compress` and `compress_checkpoint`.

    Cost: for each matrix one or two eigendecompositions of its shorter side; GPT-2 small takes some tens of seconds
    on two cores with the effort "fast".

    Example:
        >>> found = plan("tests/data/tiny-gpt2", 0.65)
        >>> found.matrices[0].name, found.matrices[0].shape, found.matrices[0].spec
        ('wte', (8192, 256), LowRankSpec(rank=...))
        >>> found.parameters_after / found.parameters_before
        0.649...
    """
    threads = validate.threads(threads)
    spending = Spending(
        budget, load_calibration(calibration), objective, matrices, max_macs, effort, seed, stored_dtype(dtype)
    )
    if isinstance(source, str | os.PathLike):
        return plan_checkpoint(source, spending, threads=threads, progress=progress)
    from ..models.matrices import require_transformers_model
    from ..models.ties import warn_of_untied
    from .model_plan import plan_budget

    warn_of_untied(require_transformers_model(source), stacklevel=2)
    return plan_budget(source, spending, threads=threads, progress=progress)
