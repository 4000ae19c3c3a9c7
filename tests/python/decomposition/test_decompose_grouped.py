"""Tables in groups of rows: the groups are the low-rank fits of their rows, the most frequent first."""

import numpy as np
import pytest
from tqcompressor import GroupedSpec, LowRankSpec, decompose
from tqcompressor.decomposition.results import GroupedDecomposition
from tqcompressor.errors import ShapeError

SPEC = GroupedSpec(((20, 6), (30, 3), (50, 1)))
ROWS, COLUMNS = 100, 8


@pytest.fixture
def table():
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def test_each_group_is_the_nearest_matrix_to_its_rows(table):
    found = decompose(table, SPEC)
    assert isinstance(found, GroupedDecomposition) and found.spec == SPEC and found.shape == table.shape
    assert found.parameters == SPEC.parameters(*table.shape) and found.terms == (found,)
    # Without a calibration, the longest rows come first.
    lengths = np.linalg.norm(table[found.row_order], axis=1)
    assert (np.diff(lengths) <= 0).all()
    dense, first, lost = found.reconstruct(), 0, 0.0
    for rows, rank in SPEC.groups:
        own = found.row_order[first : first + rows]
        expected = decompose(table[own], LowRankSpec(rank)).reconstruct()
        np.testing.assert_allclose(dense[own], expected, atol=1e-5)
        lost += float(np.sum((table[own].astype(np.float64) - expected) ** 2))
        first += rows
    assert found.lost_energy == pytest.approx(lost / np.sum(table.astype(np.float64) ** 2), abs=1e-6)
    x = np.random.default_rng(1).standard_normal((2, 3, ROWS)).astype(np.float32)
    np.testing.assert_allclose(found.apply(x), x @ dense, atol=1e-4)
    assert "rank 6/3/1" in repr(found)


def test_with_a_calibration_the_frequent_rows_come_first(table):
    frequencies = np.random.default_rng(2).permutation(ROWS).astype(np.float32)
    found = decompose(table, SPEC, moment=frequencies)
    assert (np.diff(frequencies[found.row_order]) < 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_it_does_not_depend_on_the_scale(table, scale):
    one, other = decompose(table, SPEC), decompose(table * np.float32(scale), SPEC)
    assert np.array_equal(one.row_order, other.row_order)
    np.testing.assert_allclose(other.reconstruct() / scale, one.reconstruct(), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(table):
    with pytest.raises(ShapeError, match="99"):
        decompose(table[:99], SPEC)
