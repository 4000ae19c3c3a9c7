"""The torch modules that hold factors in place of a dense weight.

Parameters `A (rank, m1, n1)` and `B (rank, m2, n2)`, or `left` and `right`, and persistent integer buffers
`input_permutation` and `output_permutation` (gather indices of the forward pass; None where a side is not permuted).
With eight-bit weights, factors are buffers of codes beside buffers of scales: see `int8`.
`dense_weight()` is the matrix, and `weight` the same for code that reads the module's weight: see `dense_weight`.

May import torch, `errors`, `_core`, `utils` and `config`; never transformers.
"""

from .fused import FusedLinear
from .grouped import GroupedEmbedding, GroupedHead
from .int8_dense import Int8Embedding, Int8Head, Int8Linear
from .kronecker import KroneckerEmbedding, KroneckerHead, KroneckerLinear
from .low_rank import LowRankEmbedding, LowRankHead, LowRankLinear
from .mixed import MixedEmbedding, MixedHead, MixedLinear

__all__ = [
    "FusedLinear",
    "GroupedEmbedding",
    "GroupedHead",
    "Int8Embedding",
    "Int8Head",
    "Int8Linear",
    "KroneckerEmbedding",
    "KroneckerHead",
    "KroneckerLinear",
    "LowRankEmbedding",
    "LowRankHead",
    "LowRankLinear",
    "MixedEmbedding",
    "MixedHead",
    "MixedLinear",
]
