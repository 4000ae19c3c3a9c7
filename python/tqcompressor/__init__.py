"""Compress transformers by Kronecker decomposition improved by permutations, by low rank, and by sums of both.

A weight `W` of shape (in, out) is replaced by a Kronecker sum `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, whose row and column
permutations `p` and `q` minimise the lost energy, by a low-rank product, or by a sum of both.

Importing this package needs numpy alone. It also registers with transformers, which then loads compressed checkpoints,
whichever of the two is imported first. Names that need torch are imported when they are first used.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._core import __version__
from .calibration.calibration import Calibration
from .compression.budget_plan import BudgetPlan
from .compression.checkpoint import compress_checkpoint, expand_checkpoint, inspect
from .compression.cost import CostEstimate, estimate_cost
from .compression.measured import calibrate_checkpoint
from .compression.plan import plan
from .compression.report import CompressionReport
from .config.recipes import RECIPES
from .config.specs import GroupedSpec, KroneckerSpec, LowRankSpec, MixedSpec
from .config.tq_config import TQConfig
from .conversion.convert import convert_checkpoint
from .decomposition.decompose import decompose, find_permutation, nearest_kronecker_sum
from .decomposition.results import (
    GroupedDecomposition,
    KroneckerDecomposition,
    LowRankDecomposition,
    MixedDecomposition,
)
from .distillation.config import DistillConfig, TrainingConfig
from .distillation.stages import STAGED_RECIPES, Stage, StagedRecipe
from .errors import MissingDependencyError, TQError
from .integrations import import_hook
from .native.model import NativeModel

if TYPE_CHECKING:
    from . import evaluate, losses, modules, plots
    from .calibration.calibrate import calibrate
    from .compression.card import record_evaluation
    from .compression.model import compress, recompress
    from .data.token_blocks import token_blocks
    from .distillation.runner import distill
    from .distillation.teacher_cache import CachedTeacher, CachedTeacherDataset, cache_teacher
    from .distillation.trainer import DistillTrainer
    from .evaluate.comparison import compare
    from .evaluate.scoring import perplexity
    from .frontier.results import SweepResult
    from .frontier.sweep import sweep
    from .integrations.peft import merge_lora, register_lora
    from .pages.page import html_report
    from .verify.results import VerificationReport
    from .verify.runner import verify_checkpoint

__all__ = [
    "RECIPES",
    "STAGED_RECIPES",
    "BudgetPlan",
    "CachedTeacher",
    "CachedTeacherDataset",
    "Calibration",
    "CompressionReport",
    "CostEstimate",
    "DistillConfig",
    "DistillTrainer",
    "GroupedDecomposition",
    "GroupedSpec",
    "KroneckerDecomposition",
    "KroneckerSpec",
    "LowRankDecomposition",
    "LowRankSpec",
    "MixedDecomposition",
    "MixedSpec",
    "NativeModel",
    "Stage",
    "StagedRecipe",
    "SweepResult",
    "TQConfig",
    "TQError",
    "TrainingConfig",
    "VerificationReport",
    "__version__",
    "cache_teacher",
    "calibrate",
    "calibrate_checkpoint",
    "compare",
    "compress",
    "compress_checkpoint",
    "convert_checkpoint",
    "decompose",
    "distill",
    "estimate_cost",
    "evaluate",
    "expand_checkpoint",
    "find_permutation",
    "html_report",
    "inspect",
    "losses",
    "merge_lora",
    "modules",
    "nearest_kronecker_sum",
    "perplexity",
    "plan",
    "plots",
    "recompress",
    "record_evaluation",
    "register_lora",
    "sweep",
    "token_blocks",
    "verify_checkpoint",
]

# Names that need torch, transformers or peft, or that few need, and the module of each.
_LAZY_NAMES = {
    "CachedTeacher": "distillation.teacher_cache",
    "CachedTeacherDataset": "distillation.teacher_cache",
    "DistillTrainer": "distillation.trainer",
    "SweepResult": "frontier.results",
    "VerificationReport": "verify.results",
    "cache_teacher": "distillation.teacher_cache",
    "calibrate": "calibration.calibrate",
    "compare": "evaluate.comparison",
    "compress": "compression.model",
    "recompress": "compression.model",
    "distill": "distillation.runner",
    "html_report": "pages.page",
    "merge_lora": "integrations.peft",
    "perplexity": "evaluate.scoring",
    "record_evaluation": "compression.card",
    "register_lora": "integrations.peft",
    "sweep": "frontier.sweep",
    "token_blocks": "data.token_blocks",
    "verify_checkpoint": "verify.runner",
}
# Folders and modules that are imported when they are first used.
_LAZY_MODULES = ("evaluate", "losses", "modules", "plots")

# What the package logs is shown where the program asks for it, and nowhere else.
logging.getLogger(__name__).addHandler(logging.NullHandler())
import_hook.install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY_NAMES and name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name in _LAZY_MODULES:
            return import_module(f".{name}", __name__)
        value = getattr(import_module(f".{_LAZY_NAMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == __name__:
            raise
        # peft is in no extra.
        wanted = missing if missing == "peft" else '"tqcompressor[hf]"'
        raise MissingDependencyError(f"tqcompressor.{name} needs {missing}: pip install {wanted}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
