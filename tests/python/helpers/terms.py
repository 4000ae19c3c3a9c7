"""Random terms of every kind, in the form of decompositions, and their dense matrices by definition."""

import numpy as np
from tqcompressor._core import GroupedTerm, KroneckerTerm, LowRankTerm
from tqcompressor.config.specs import GroupedSpec, LowRankSpec


def random_term(spec, rows, columns, rng, integers=False):
    """A term of `spec`, which is no sum; with integers every order of summation gives the same floats."""

    def draw(shape):
        return (rng.integers(-3, 4, shape) if integers else rng.standard_normal(shape)).astype(np.float32)

    if isinstance(spec, LowRankSpec):
        left, right = (draw(shape) for shape in spec.factor_shapes(rows, columns))
        return LowRankTerm(left, right, rng.permutation(min(rows, columns)))
    if isinstance(spec, GroupedSpec):
        left, right = (draw(shape) for shape in spec.factor_shapes(rows, columns))
        orders = [g * columns + rng.permutation(columns) for g in range(len(spec.groups))]
        return GroupedTerm(left, right, rng.permutation(rows), np.concatenate(orders))
    a, b = (draw(shape) for shape in spec.factor_shapes(rows, columns))
    p = rng.permutation(rows) if spec.permutes_rows else np.arange(rows)
    q = rng.permutation(columns) if spec.permutes_columns else np.arange(columns)
    return KroneckerTerm(a, b, p, q)


def random_terms(spec, rows, columns, rng, integers=False):
    """The terms of any spec."""
    specs = list(getattr(spec, "terms", [spec]))
    return [random_term(each, rows, columns, rng, integers) for each in specs]


def dense(terms, rows, columns):
    """The sum of Kronecker and low-rank terms, each by its definition."""
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


def dense_table(spec, term):
    """The table of a `GroupedTerm`, by its definition."""
    columns, left, right, groups = len(term.column_order) // len(spec.groups), term.left, term.right, []
    for number, (rows, rank) in enumerate(spec.groups):
        own_left, left = left[: rows * rank].reshape(rows, rank), left[rows * rank :]
        own_right, right = right[: rank * (columns - rank)].reshape(rank, -1), right[rank * (columns - rank) :]
        order = term.column_order[number * columns :][:columns] - number * columns
        group = np.empty((rows, columns), np.float32)
        group[:, order] = own_left @ np.concatenate([np.eye(rank, dtype=np.float32), own_right], axis=1)
        groups.append(group)
    table = np.empty((len(term.row_order), columns), np.float32)
    table[term.row_order] = np.concatenate(groups)
    return table
