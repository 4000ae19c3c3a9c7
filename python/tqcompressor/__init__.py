"""Compress GPT-2 checkpoints by Kronecker decomposition improved by permutations.

A weight `W` of shape (in, out) is replaced by `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, with row and column permutations `p` and
`q` searched so that little energy is lost.

Importing this package needs numpy alone. It also makes transformers load compressed checkpoints, whichever of the two
is imported first. What needs torch is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _import_hook
from ._core import __version__
from .budget_plan import BudgetPlan
from .calibration import Calibration
from .checkpoint import compress_checkpoint, inspect
from .config import RECIPES, TQConfig
from .decomposed import KroneckerDecomposition, LowRankDecomposition, MixedDecomposition
from .decomposition import decompose, find_permutation, nearest_kronecker_sum
from .errors import TQError
from .plans import plan
from .report import CompressionReport
from .runtime import NativeModel
from .specs import KroneckerSpec, LowRankSpec, MixedSpec
from .stages import STAGED_RECIPES, Stage, StagedRecipe
from .training_config import DistillConfig, TrainingConfig

if TYPE_CHECKING:
    from .corpus import token_blocks
    from .embeddings import KroneckerEmbedding, KroneckerHead
    from .in_place import compress, compress_again
    from .low_rank import LowRankLinear
    from .low_rank_embedding import LowRankEmbedding, LowRankHead
    from .mixed import MixedEmbedding, MixedHead, MixedLinear
    from .modules import FusedKroneckerLinear, KroneckerLinear
    from .moment_hooks import calibrate
    from .peft_integration import merge_lora, register_lora
    from .staged_distillation import distill
    from .trainer import DistillTrainer

__all__ = [
    "RECIPES",
    "STAGED_RECIPES",
    "BudgetPlan",
    "Calibration",
    "CompressionReport",
    "DistillConfig",
    "DistillTrainer",
    "FusedKroneckerLinear",
    "KroneckerDecomposition",
    "KroneckerEmbedding",
    "KroneckerHead",
    "KroneckerLinear",
    "KroneckerSpec",
    "LowRankDecomposition",
    "LowRankEmbedding",
    "LowRankHead",
    "LowRankLinear",
    "LowRankSpec",
    "MixedDecomposition",
    "MixedEmbedding",
    "MixedHead",
    "MixedLinear",
    "MixedSpec",
    "NativeModel",
    "Stage",
    "StagedRecipe",
    "TQConfig",
    "TQError",
    "TrainingConfig",
    "__version__",
    "calibrate",
    "compress",
    "compress_again",
    "compress_checkpoint",
    "decompose",
    "distill",
    "find_permutation",
    "inspect",
    "merge_lora",
    "nearest_kronecker_sum",
    "plan",
    "register_lora",
    "token_blocks",
]

# What needs torch, transformers or peft, or serves only with them, and the module that has it.
_ON_DEMAND = {
    "DistillTrainer": "trainer",
    "FusedKroneckerLinear": "modules",
    "KroneckerEmbedding": "embeddings",
    "KroneckerHead": "embeddings",
    "KroneckerLinear": "modules",
    "LowRankEmbedding": "low_rank_embedding",
    "LowRankHead": "low_rank_embedding",
    "LowRankLinear": "low_rank",
    "MixedEmbedding": "mixed",
    "MixedHead": "mixed",
    "MixedLinear": "mixed",
    "calibrate": "moment_hooks",
    "compress": "in_place",
    "compress_again": "in_place",
    "distill": "staged_distillation",
    "merge_lora": "peft_integration",
    "register_lora": "peft_integration",
    "token_blocks": "corpus",
}

_import_hook.install()


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"tqcompressor.{name} needs {error.name}: pip install 'tqcompressor[hf]'") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
