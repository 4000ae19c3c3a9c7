"""A single layer of the native runtime: every strategy gives the dense product."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqcompressor import _core
from tqcompressor.errors import ConfigError, ShapeError

sizes = st.integers(1, 7)


def drawn(m1, n1, m2, n2, rank, seed):
    """Factors and permutations of small integers, whose sums are exact."""
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((rank, m1, n1), (rank, m2, n2)))
    return a, b, rng.permutation(m1 * m2), rng.permutation(n1 * n2)


@given(
    sizes, sizes, sizes, sizes, st.integers(1, 3), st.sampled_from([1, 2, 5, 40]), st.integers(1, 3), st.integers(0, 9)
)
def test_every_way_is_the_dense_product(m1, n1, m2, n2, rank, rows, threads, seed):
    factors = drawn(m1, n1, m2, n2, min(rank, m1 * n1, m2 * n2), seed)
    w = _core.reconstruct(*factors)
    x = np.random.default_rng(seed).integers(-3, 4, (rows, m1 * m2)).astype(np.float32)
    workers = _core.Threads(threads)
    layer = _core.Layer.kronecker(*factors)
    for way in ("factors", "matrix", "cheapest"):
        np.testing.assert_array_equal(layer.times(x, way, workers), x @ w)
    np.testing.assert_array_equal(_core.Layer.dense(w).times(x, "cheapest", workers), x @ w)


def test_what_does_not_fit_is_refused():
    a, b, p, q = drawn(3, 2, 2, 2, 1, 0)
    layer, workers = _core.Layer.kronecker(a, b, p, q), _core.Threads(1)
    with pytest.raises(ShapeError, match=r"2 rows of 6 values.*10 values"):
        layer.times(np.ones((2, 5), np.float32), "factors", workers)
    with pytest.raises(ConfigError, match="way"):
        layer.times(np.ones((2, 6), np.float32), "quickly", workers)
    with pytest.raises(ShapeError, match="6 indices"):
        _core.Layer.kronecker(a, b, q, p)
