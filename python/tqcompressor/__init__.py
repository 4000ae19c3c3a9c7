"""Compress GPT-2 checkpoints by Kronecker decomposition improved by permutations.

A weight `W` of shape (in, out) is replaced by `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, with row and column permutations `p` and `q`
searched so that little energy is lost.
"""

from ._core import __version__
from .decomposition import KroneckerDecomposition, decompose, find_permutation, nearest_kronecker_sum

__all__ = [
    "KroneckerDecomposition",
    "__version__",
    "decompose",
    "find_permutation",
    "nearest_kronecker_sum",
]
