"""Distillation losses with their gradients, computed in Rust, for numpy arrays and for torch tensors.

Given numpy arrays, a function returns `(value, gradient)`; given torch tensors, a differentiable scalar. The teacher
gets no gradient. Logits are read in one fused pass: softmax, loss and gradient of a row while it is in cache.

May import `errors`, `_core`, `utils`. torch is imported with the first tensor.

>>> import numpy as np
>>> student = np.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=np.float32)
>>> value, gradient = cross_entropy(student, np.array([0, -100]))
>>> round(value, 4), gradient.shape, gradient[1].any()
(0.1698, (2, 3), np.False_)
"""

from .head import head_distillation_loss
from .hidden import hidden_state_loss
from .logits import cross_entropy, distillation_loss, kl_divergence
from .topk import topk_distillation_loss

__all__ = [
    "cross_entropy",
    "distillation_loss",
    "head_distillation_loss",
    "hidden_state_loss",
    "kl_divergence",
    "topk_distillation_loss",
]
