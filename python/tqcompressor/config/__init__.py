"""What to do, as plain values and JSON: specs, configs and named recipes.

May import `errors`, `utils`.
"""

from .recipes import RECIPES, resolve_config
from .specs import KroneckerSpec, LowRankSpec, MatrixSpec, MixedSpec
from .tq_config import EFFORTS, FORMAT_VERSION, QUANT_METHOD, TQConfig

__all__ = [
    "EFFORTS",
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "RECIPES",
    "KroneckerSpec",
    "LowRankSpec",
    "MatrixSpec",
    "MixedSpec",
    "TQConfig",
    "resolve_config",
]
