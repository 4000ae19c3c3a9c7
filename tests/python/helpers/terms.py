"""Random terms of every kind, in the form of decompositions, and their dense matrices by definition."""

import numpy as np
from tqcompressor._core import KroneckerTerm, LowRankTerm
from tqcompressor.config.specs import KroneckerSpec, LowRankSpec


def random_term(spec, rows, columns, rng, integers=False):
    """A term of `spec`, a Kronecker or a low-rank one; with integers every order of summation gives the same floats."""

    def draw(shape):
        return (rng.integers(-3, 4, shape) if integers else rng.standard_normal(shape)).astype(np.float32)

    if isinstance(spec, LowRankSpec):
        left, right = (draw(shape) for shape in spec.factor_shapes(rows, columns))
        return LowRankTerm(left, right, rng.permutation(min(rows, columns)))
    a, b = (draw(shape) for shape in spec.factor_shapes(rows, columns))
    p = rng.permutation(rows) if spec.permutes_rows else np.arange(rows)
    q = rng.permutation(columns) if spec.permutes_columns else np.arange(columns)
    return KroneckerTerm(a, b, p, q)


def random_terms(spec, rows, columns, rng, integers=False):
    """The terms of any spec."""
    specs = [spec] if isinstance(spec, KroneckerSpec | LowRankSpec) else spec.terms
    return [random_term(each, rows, columns, rng, integers) for each in specs]


def dense(terms, rows, columns):
    """The sum of the terms, each by its definition."""
    total = np.zeros((rows, columns), np.float32)
    for term in terms:
        w = np.empty_like(total)
        if isinstance(term, KroneckerTerm):
            # W[p][:, q] is the Kronecker sum.
            products = [np.kron(a, b) for a, b in zip(term.a, term.b, strict=True)]
            w[np.ix_(term.row_permutation, term.column_permutation)] = sum(products)
        else:
            left, right, order = term.left, term.right, term.order
            identity = np.eye(left.shape[1], dtype=np.float32)
            if rows <= columns:
                w[order] = np.concatenate([identity, left]) @ right
            else:
                w[:, order] = left @ np.concatenate([identity, right], axis=1)
        total += w
    return total
