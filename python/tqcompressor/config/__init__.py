"""Specs, configs and named recipes, as plain values and JSON.

May import `errors`, `utils`.
"""

from .choices import DTYPES, EFFORTS, ENGINES, OBJECTIVES, PERMUTES, Dtype, Effort, Engine, Objective, Permute
from .recipes import RECIPES, resolve_config
from .specs import GroupedSpec, KroneckerSpec, LowRankSpec, MatrixSpec, MixedSpec
from .tq_config import FORMAT_VERSION, QUANT_METHOD, TQConfig

__all__ = [
    "DTYPES",
    "EFFORTS",
    "ENGINES",
    "FORMAT_VERSION",
    "OBJECTIVES",
    "PERMUTES",
    "QUANT_METHOD",
    "RECIPES",
    "Dtype",
    "Effort",
    "Engine",
    "GroupedSpec",
    "KroneckerSpec",
    "LowRankSpec",
    "MatrixSpec",
    "MixedSpec",
    "Objective",
    "Permute",
    "TQConfig",
    "resolve_config",
]
