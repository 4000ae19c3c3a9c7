"""Low-rank modules for training: the plain product of two factors that are equally scaled in the norm of a calibration.

The interpolative form stores the fewest parameters, but its factors learn unevenly: one has entries of the matrix, the
other mixing weights near 1. Here `W = P Q`, with `P (m, k)` and `Q (k, n)`, and going back to the interpolative form
is exact up to rounding, since the rank is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .base import add_bias, inverse
from .dense_weight import CompressedBase, Lookup
from .grouped import GroupedEmbedding, rows_in_groups
from .low_rank import LowRankEmbedding, LowRankFactors, LowRankLinear

# A moment as `Calibration` has it: a matrix, its diagonal, or none.
Moment = NDArray[Any] | None
# Added to a moment, as a share of its mean: directions that the calibration hardly saw are not scaled up without limit.
_DAMPING = 1e-3


class BalancedFactors(CompressedBase):
    """The factors `P (rows, k)` and `Q (k, columns)` of a low-rank module, which `restore` puts back into it."""

    def __init__(self, module: LowRankFactors, input_moment: Moment, output_moment: Moment) -> None:
        super().__init__()
        # In a tuple: a submodule's factors would be trained and saved beside these.
        self._replaced = (module,)
        self.weight_is_transposed = module.weight_is_transposed
        p, q = balanced_factors(*_plain_factors(module), input_moment, output_moment)
        like = module.left
        self.P = nn.Parameter(p.to(like.device, like.dtype), like.requires_grad)
        self.Q = nn.Parameter(q.to(like.device, like.dtype), like.requires_grad)

    @property
    def replaced(self) -> Any:
        """The module that this one stands for."""
        return self._replaced[0]

    def _a_factor(self) -> torch.Tensor:
        return self.P

    def _dense_shape(self) -> tuple[int, int]:
        return self.P.shape[0], self.Q.shape[1]

    def dense_weight(self) -> torch.Tensor:
        """The dense matrix `W (rows, columns)`."""
        return self.P @ self.Q

    def restore(self) -> None:
        """Gives the replaced module the factors of `P Q`, in its interpolative form."""
        module = self.replaced
        rank = self.P.shape[1]
        with torch.no_grad():
            # Training may have moved the factors, and not the module that they stand for.
            p, q = (factor.to(module.left.device, torch.float64) for factor in (self.P, self.Q))
            if module.input_permutation is not None:
                order = _row_order(module)
                p = p.index_select(0, order)
                left, right = torch.linalg.solve(p[:rank], p[rank:], left=False), p[:rank] @ q
            else:
                order = torch.argsort(module.output_permutation)
                q = q.index_select(1, order)
                left, right = p @ q[:, :rank], torch.linalg.solve(q[:, :rank], q[:, rank:])
            module.left.copy_(left)
            module.right.copy_(right)


class BalancedLinear(BalancedFactors):
    """`y = x P Q + bias` in place of a `LowRankLinear`, with the same bias."""

    def __init__(self, module: LowRankLinear, input_moment: Moment, output_moment: Moment) -> None:
        super().__init__(module, input_moment, output_moment)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.bias = module.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return add_bias((x @ self.P.to(x.dtype)) @ self.Q.to(x.dtype), self.bias)


class BalancedEmbedding(Lookup, BalancedFactors):
    """Rows of `P Q` in place of a `LowRankEmbedding`."""

    def __init__(self, module: LowRankEmbedding, input_moment: Moment, output_moment: Moment) -> None:
        super().__init__(module, input_moment, output_moment)
        self.weight_is_transposed = False
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.padding_idx = module.padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` token ids to `(..., embedding_dim)`."""
        return nn.functional.embedding(ids, self.P) @ self.Q

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`h Wᵀ`, `(..., embedding_dim)` to `(..., num_embeddings)`."""
        return _logits(hidden, self.P, self.Q)


class BalancedGroups(Lookup):
    """Rows of `P_g Q_g` in place of a `GroupedEmbedding`: each group is a `BalancedEmbedding` by itself."""

    places: torch.Tensor

    def __init__(self, module: GroupedEmbedding, input_moment: Moment, output_moment: Moment) -> None:
        super().__init__()
        self._replaced, self._parts = (module,), tuple(module.split())
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.padding_idx = module.padding_idx
        self.sizes = [size for size, _ in module.groups]
        assert module.input_permutation is not None
        # A copy, which moves with this module; the replaced one stays where it is.
        self.register_buffer("places", module.input_permutation.clone(), persistent=False)
        rows = np.split(np.argsort(module.input_permutation.cpu().numpy()), np.cumsum(self.sizes)[:-1])
        moments = [None if input_moment is None else input_moment[own] for own in rows]
        parts = zip(self._parts, moments, strict=True)
        self.groups = nn.ModuleList(BalancedEmbedding(part, moment, output_moment) for part, moment in parts)

    @property
    def replaced(self) -> Any:
        """The module that this one stands for."""
        return self._replaced[0]

    def _a_factor(self) -> torch.Tensor:
        first: Any = self.groups[0]
        factor: torch.Tensor = first.P
        return factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` token ids to `(..., embedding_dim)`."""
        places = self.places.index_select(0, ids.reshape(-1))
        return rows_in_groups(places, self.sizes, list(self.groups)).reshape(*ids.shape, self.embedding_dim)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`h Wᵀ`, `(..., embedding_dim)` to `(..., num_embeddings)`."""
        each: Any = self.groups
        logits = [_logits(hidden, group.P, group.Q) for group in each]
        return torch.cat(logits, dim=-1).index_select(-1, self.places)

    def dense_weight(self) -> torch.Tensor:
        """The dense matrix `W (rows, columns)`."""
        each: Any = self.groups
        return torch.cat([group.dense_weight() for group in each]).index_select(0, self.places)

    def restore(self) -> None:
        """Gives the replaced module the factors of all groups, in their interpolative form."""
        each: Any = self.groups
        for group in each:
            group.restore()
        self.replaced.join(self._parts)


class _Tied(CompressedBase):
    """A module that uses the factors of an embedding, which alone has them as parameters."""

    def __init__(self, embedding: BalancedEmbedding | BalancedGroups) -> None:
        super().__init__()
        self._embedding = (embedding,)

    @property
    def embedding(self) -> BalancedEmbedding | BalancedGroups:
        """The owner of the factors."""
        return self._embedding[0]

    def _a_factor(self) -> torch.Tensor:
        return self.embedding._a_factor()


class BalancedTiedEmbedding(Lookup, _Tied):
    """A second embedding with the factors of a `BalancedEmbedding` or `BalancedGroups`."""

    def __init__(self, module: Any, embedding: BalancedEmbedding | BalancedGroups) -> None:
        super().__init__(embedding)
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` token ids to `(..., embedding_dim)`."""
        found: torch.Tensor = self.embedding(ids)
        return found

    def dense_weight(self) -> torch.Tensor:
        """The embedding's matrix."""
        return self.embedding.dense_weight()


class BalancedHead(_Tied):
    """`logits = h Qᵀ Pᵀ + bias` from the factors of a balanced embedding, in place of its tied head."""

    def __init__(self, module: Any, embedding: BalancedEmbedding | BalancedGroups) -> None:
        super().__init__(embedding)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.bias = module.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., embedding_dim)` hidden states to `(..., num_embeddings)` logits."""
        return add_bias(self.embedding.logits(hidden), self.bias)

    def dense_weight(self) -> torch.Tensor:
        """The matrix `(embedding_dim, num_embeddings)`, in × out."""
        return self.embedding.dense_weight().transpose(0, 1)


def _logits(hidden: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (hidden @ q.to(hidden.dtype).transpose(0, 1)) @ p.to(hidden.dtype).transpose(0, 1)


def balanced_factors(
    left: torch.Tensor, right: torch.Tensor, input_moment: Moment, output_moment: Moment
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of `left right` whose scale is equal in the norm `‖A W B‖`, in float64: `(m, k)` and `(k, n)`.

    With `AᵀA` and `B Bᵀ` the moments, and `A W B = U S Vᵀ`, they are `A⁻¹ U √S` and `√S Vᵀ B⁻¹`, then scaled to equal
    Frobenius norms. Cost: `m³ + n³` for the moments, `(m + n) k²` beside.
    """
    a, b = _root(input_moment), _root(output_moment)
    scaled_left = left if a is None else a[:, None] * left if a.ndim == 1 else a.T @ left
    scaled_right = right if b is None else right * b if b.ndim == 1 else right @ b
    q1, r1 = torch.linalg.qr(scaled_left)
    q2, r2 = torch.linalg.qr(scaled_right.T)
    u, s, vt = torch.linalg.svd(r1 @ r2.T)
    root = s.clamp(min=0).sqrt()
    p, q = (q1 @ u) * root, root[:, None] * (vt @ q2.T)
    if a is not None:
        p = p / a[:, None] if a.ndim == 1 else torch.linalg.solve_triangular(a.T, p, upper=True)
    if b is not None:
        q = q / b if b.ndim == 1 else torch.linalg.solve_triangular(b, q, upper=False, left=False)
    scale = (q.norm() / p.norm().clamp(min=torch.finfo(p.dtype).tiny)).sqrt()
    return (p * scale, q / scale) if scale.isfinite() and scale > 0 else (p, q)


def _root(moment: Moment) -> torch.Tensor | None:
    """The Cholesky factor of a damped moment, or the root of a diagonal; None for a moment that is zero or missing."""
    if moment is None:
        return None
    exact = torch.from_numpy(np.array(moment, dtype=np.float64))
    mean = (exact if exact.ndim == 1 else exact.diagonal()).mean()
    if not mean > 0:
        return None
    if exact.ndim == 1:
        return (exact + _DAMPING * mean).sqrt()
    factor, failed = torch.linalg.cholesky_ex(exact + _DAMPING * mean * torch.eye(len(exact), dtype=exact.dtype))
    return None if failed else factor


def _row_order(module: LowRankFactors) -> torch.Tensor:
    """`p` of `W[p] = [I; left] right`: an embedding has its inverse."""
    order = module.input_permutation
    found = inverse(order) if isinstance(module, Lookup) else order
    assert found is not None
    return found


def _plain_factors(module: LowRankFactors) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors with the identity written out and the permutation undone, in float64 on the CPU."""
    left, right = module.left.detach().cpu().double(), module.right.detach().cpu().double()
    identity = torch.eye(module.rank, dtype=torch.float64)
    if module.input_permutation is not None:
        back = torch.argsort(_row_order(module).cpu())
        return torch.cat([identity, left]).index_select(0, back), right
    columns = module.output_permutation
    assert columns is not None
    return left, torch.cat([identity, right], dim=1).index_select(1, columns.cpu())
