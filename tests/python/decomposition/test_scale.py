"""Matrices and moments of any scale that float32 can hold give the results of their ratios."""

import numpy as np
import pytest
from tqcompressor import KroneckerSpec, LowRankSpec, MixedSpec, decompose, errors, find_permutation
from tqcompressor.decomposition.decompose import nearest_kronecker_sum

SPECS = {
    "kronecker": KroneckerSpec((2, 4), 3),
    "large block": KroneckerSpec((8, 8), 3),
    "low rank": LowRankSpec(4),
    "mixed": MixedSpec((LowRankSpec(3), KroneckerSpec((2, 4), 2))),
}
# Even powers of two: exact for the balanced factors of a Kronecker sum, too.
EXACT = [2.0**84, 2.0**-84, 2.0**110, 2.0**-60]
DECIMAL = [1e20, 1e25, 1e36, 1e-19, 1e-25, 1e-37]
RANDOM = np.random.default_rng(7)
W = (RANDOM.standard_normal((24, 32)) * np.exp(RANDOM.standard_normal((24, 1)))).astype(np.float32)
INPUTS = RANDOM.standard_normal((40, 24)) * np.linspace(0.2, 3, 24)
MOMENTS = {
    "none": None,
    "diagonal": (INPUTS**2).mean(0).astype(np.float32),
    "both": ((INPUTS.T @ INPUTS / 40).astype(np.float32), np.linspace(0.5, 2, 32, dtype=np.float32)),
}


def factors(decomposition):
    for term in decomposition.terms:
        yield from ((term.a, term.b) if hasattr(term, "a") else (term.left, term.right))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", SPECS)
def test_a_spec_fits_alike_at_every_scale(name, moment):
    def at(scale):
        return decompose(W * np.float32(scale), SPECS[name], moment=MOMENTS[moment], effort="fast", threads=1)

    expected = at(1)
    dense = expected.reconstruct()
    for scale in EXACT:
        found = at(scale)
        assert found.lost_energy == expected.lost_energy
        assert np.array_equal(found.reconstruct() / np.float32(scale), dense)
    for scale in DECIMAL:
        found = at(scale)
        assert found.lost_energy == pytest.approx(expected.lost_energy, rel=0.05)
        assert all(np.isfinite(factor).all() and factor.any() for factor in factors(found))


@pytest.mark.parametrize("moment", ["none", "both"])
def test_a_budget_is_spent_alike_at_every_scale(moment):
    def at(scale):
        return decompose(W * np.float32(scale), budget=0.5, moment=MOMENTS[moment], threads=1)

    expected = at(1)
    for scale in EXACT:
        found = at(scale)
        assert (repr(found), found.lost_energy) == (repr(expected), expected.lost_energy)
    for scale in DECIMAL:
        assert at(scale).lost_energy == pytest.approx(expected.lost_energy, rel=0.05)


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_permutations_do_not_depend_on_the_scale(effort):
    w, spec = W[:8, :8], KroneckerSpec((2, 4), 1)
    p, q, lost = find_permutation(w, spec, effort=effort, threads=1)
    for scale in EXACT[:2]:
        found = find_permutation(w * np.float32(scale), spec, effort=effort, threads=1)
        assert np.array_equal(found[0], p) and np.array_equal(found[1], q) and found[2] == lost
    # At the lower end, the values themselves lose digits.
    for scale in (1e25, 1e-39):
        found = find_permutation(w * np.float32(scale), spec, effort=effort, threads=1)
        assert found[2] == pytest.approx(lost, rel=0.05)


def test_the_nearest_sum_does_not_depend_on_the_scale():
    for spec in (SPECS["kronecker"], SPECS["large block"], KroneckerSpec((1, 32), 5)):
        expected = nearest_kronecker_sum(W, spec)
        for scale in EXACT:
            found = nearest_kronecker_sum(W * np.float32(scale), spec)
            assert found.lost_energy == expected.lost_energy
            assert np.array_equal(found.a / np.float32(scale**0.5), expected.a)


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100, 2.0**-140])
@pytest.mark.parametrize("name", SPECS)
def test_the_scale_of_moments_does_not_matter(name, scale):
    given = MOMENTS["both"] if scale > 2.0**-126 else tuple(np.round(each * 4096) for each in MOMENTS["both"])
    expected = decompose(W, SPECS[name], moment=tuple(each.astype(np.float32) for each in given), effort="fast")
    moment = tuple((each * np.float64(scale)).astype(np.float32) for each in given)
    found = decompose(W, SPECS[name], moment=moment, effort="fast")
    assert np.array_equal(found.reconstruct(), expected.reconstruct())


def test_one_huge_value_among_small_ones():
    w = W.copy()
    w[3, 5] = 3e38
    found = decompose(w, SPECS["low rank"], threads=1)
    assert found.lost_energy < 1e-9 and np.isfinite(found.reconstruct()).all()
    assert decompose(w, SPECS["kronecker"], effort="fast", threads=1).lost_energy < 1e-9


def test_what_float32_cannot_hold_is_refused_with_the_way_out():
    largest = float(np.finfo(np.float32).max)
    w = np.array([[largest, largest], [largest, 0]], np.float32)
    with pytest.raises(errors.NonFiniteError, match=r"a factor is beyond the range of float32: .* scale it down"):
        decompose(w, LowRankSpec(1))
    for scale in (1e-45, 1e-200, 1e-300):
        with pytest.raises(errors.NonFiniteError, match="below the range of float32: scale w up"):
            decompose(W.astype(np.float64) * scale, SPECS["kronecker"])
    with pytest.raises(errors.NonFiniteError, match="inf"):
        decompose(W.astype(np.float64) * 1e39, SPECS["kronecker"])
    assert decompose(np.zeros((24, 32)), SPECS["kronecker"]).lost_energy == 0


RAGGED = [[1.0, 2.0], [3.0]]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: decompose(RAGGED, LowRankSpec(1)), "w"),
        (lambda: find_permutation(RAGGED, SPECS["kronecker"]), "w"),
        (lambda: decompose(W, LowRankSpec(1), moment=[[1.0], [2.0, 3.0]]), "input moment"),
        (lambda: decompose(W, LowRankSpec(1), moment=(None, [[1.0], [2.0, 3.0]])), "output moment"),
        (lambda: decompose(W, LowRankSpec(1), effort="fast").apply(RAGGED), "apply: x"),
    ],
)
def test_ragged_arrays_are_refused_by_name(call, name):
    with pytest.raises(errors.ShapeError, match=f"{name}: expected rows of one length"):
        call()
