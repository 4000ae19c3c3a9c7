"""How a budget is best spent, on a checkpoint or on a live model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..calibration.calibration import Calibration, load_calibration
from ..config.choices import DEFAULT_EFFORT, DEFAULT_SEED, Effort, Objective
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
    max_multiplies: float | None = None,
    effort: Effort = DEFAULT_EFFORT,
    seed: int = DEFAULT_SEED,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> BudgetPlan:
    """Spends one budget of parameters over a whole model, embedding and head included, and says where it went.

    Every matrix has a curve: the energy that it loses at each rank, from a spectrum that is computed once, and the
    parameters that the rank takes. The budget goes, piece by piece, to where it saves most. Beyond the effort "fast"
    each matrix then takes the best approximation of any kind (low rank, Kronecker sums, sums of both) with no more
    parameters. With a calibration that has gradients, energies are losses of the model and compared as they are;
    without, each matrix counts by its share of lost energy times its size, since nothing says how much the model
    minds an error.

    Args:
        source: A live model of transformers, or a checkpoint: a directory, or its name on the hub.
        budget: What is kept: a share of the model's parameters, 0.65 or "65%", counted over all saved tensors; their
            number as an integer; a size of the weights such as "300MB"; or "lost_energy=0.1", as few parameters as lose
            that share of the energy of the matrices.
        calibration: What `calibrate` measured, or its file; without it the Frobenius norm is taken.
        objective: "frobenius", "diagonal", "second_moment" or "sensitivity"; "auto" is the richest that the calibration
            allows.
        matrices: Patterns of the matrices that it is spent on; by default all but embeddings of positions and kinds of
            tokens, narrow ones, and what the calibration never saw in use.
        max_multiplies: At most this share of the multiplications for one token that these matrices take dense: 0.7, or
            1.5 to let sums of Kronecker terms take half as many again. `m · n` for a dense matrix, none for a row that
            is looked up; of low rank as many as parameters. Low rank ends at whichever limit it meets first; what it
            then leaves of the cap is shared out in proportion, and the best of a matrix keeps within its part.
        effort: "fast" (low rank), "balanced" or "best", which also try sums of low rank and Kronecker terms. These lose
            less with as many parameters, but take seconds to a minute a matrix to find, and more multiplications.
        seed: With the weights, the budget and the effort all that the plan depends on.
        threads: None for all cores.
        progress: True, False, None (a bar where somebody may be watching) or a callable that takes (done, total).

    Raises:
        ConfigError: A budget or a cap that cannot be understood or kept (with the least that can be), an objective that
            the calibration cannot serve.
        ShapeError: A calibration of another model.
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
    spending = Spending(budget, load_calibration(calibration), objective, matrices, max_multiplies, effort, seed)
    if isinstance(source, str | os.PathLike):
        return plan_checkpoint(source, spending, threads=threads, progress=progress)
    from .model_plan import plan_budget

    return plan_budget(source, spending, threads=threads, progress=progress)
