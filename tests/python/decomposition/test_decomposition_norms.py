"""Low rank, sums of several kinds, and budgets for one matrix, in every norm, against oracles in plain numpy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqcompressor import KroneckerSpec, LowRankDecomposition, LowRankSpec, MixedDecomposition, MixedSpec, decompose
from tqcompressor.errors import ConfigError, DtypeError, NonFiniteError, ShapeError, TQError

KINDS = ["none", "diagonal", "full", "rank one", "dead inputs", "zero"]


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def decaying(shape, seed=0):
    """A matrix whose singular values fall by a tenth each, like the leading ones of trained weights."""
    u, _, v = np.linalg.svd(noise(shape, seed), full_matrices=False)
    return u * 0.9 ** np.arange(min(shape)) @ v


def moment_of(kind, side, seed):
    samples = noise((3 * side, side), seed) * np.exp(noise(side, seed + 1))
    if kind == "none":
        return None
    if kind == "zero":
        return np.zeros((side, side))
    if kind == "diagonal":
        return (samples**2).mean(0)
    if kind == "rank one":
        samples = samples[:1]
    if kind == "dead inputs":
        samples[:, ::2] = 0
    return samples.T @ samples / len(samples)


def weight(moment, side):
    """The weight of a side for a moment: its mean diagonal is 1, of which the identity adds a hundredth."""
    if moment is None or not np.any(moment):
        return np.eye(side)
    full = np.diag(moment) if moment.ndim == 1 else moment
    return 0.99 * full * side / np.trace(full) + 0.01 * np.eye(side)


def energy(error, moments):
    left, right = (weight(moment, side) for moment, side in zip(moments, error.shape, strict=True))
    return np.trace(left @ error @ right @ error.T)


def root(matrix, power):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * values**power @ vectors.T


def whitened_svd(w, rank, moments):
    """`(Ŵ, lost energy)` of the truncated singular value decomposition between the roots of the weights."""
    left, right = (weight(moment, side) for moment, side in zip(moments, w.shape, strict=True))
    u, values, v = np.linalg.svd(root(left, 0.5) @ w @ root(right, 0.5), full_matrices=False)
    nearest = root(left, -0.5) @ (u[:, :rank] * values[:rank]) @ v[:rank] @ root(right, -0.5)
    return nearest, (values[rank:] ** 2).sum() / (values**2).sum()


@st.composite
def cases(draw):
    m, n = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    rank = draw(st.integers(1, min(m, n) - 1))
    seed = draw(st.integers(0, 2**16))
    moments = tuple(moment_of(draw(st.sampled_from(KINDS)), side, seed + side) for side in (m, n))
    return noise((m, n), seed), rank, moments


@settings(max_examples=150)
@given(cases())
def test_low_rank_loses_what_the_whitened_truncated_svd_loses(case):
    w, rank, moments = case
    found = decompose(w, LowRankSpec(rank), moment=moments)
    _, least = whitened_svd(w, rank, moments)
    assert found.lost_energy == pytest.approx(least, rel=1e-5, abs=1e-7)
    dense = found.reconstruct().astype(np.float64)
    assert energy(w - dense, moments) / energy(w, moments) == pytest.approx(least, rel=1e-4, abs=1e-6)
    m, n = found.shape
    assert (m, n) == w.shape and found.parameters == rank * (m + n - rank) == found.spec.parameters(m, n)
    assert sorted(found.order) == list(range(min(m, n)))
    x = noise((2, 3, m), 5)
    expected = x @ dense
    np.testing.assert_allclose(found.apply(x), expected, atol=1e-4 * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
@pytest.mark.parametrize("kinds", [("none", "none"), ("full", "none"), ("none", "full"), ("full", "full")], ids=str)
def test_low_rank_is_the_whitened_truncated_svd(shape, kinds):
    w = decaying(shape)
    moments = tuple(moment_of(kind, side, 3) for kind, side in zip(kinds, shape, strict=True))
    nearest, least = whitened_svd(w, 9, moments)
    found = decompose(w, LowRankSpec(9), moment=moments)
    np.testing.assert_allclose(found.reconstruct(), nearest, atol=2e-5 * np.abs(nearest).max())
    assert isinstance(found, LowRankDecomposition) and found.terms == (found,)
    # The picked rows, or columns, are stored as they are in Ŵ.
    picked = nearest[found.order[:9]] if shape[0] <= shape[1] else nearest[:, found.order[:9]]
    stored = found.right if shape[0] <= shape[1] else found.left
    np.testing.assert_allclose(stored, picked, atol=2e-5 * np.abs(nearest).max())
    assert 0 < least < 0.5


def test_the_norm_decides():
    # The matrix whitened by its own moment loses less in that norm, and more in the other.
    w, moment = decaying((32, 48)), moment_of("full", 32, 1)
    plain, weighted = (decompose(w, LowRankSpec(8), moment=given).reconstruct() for given in (None, moment))
    assert energy(w - weighted, (moment, None)) < 0.8 * energy(w - plain, (moment, None))
    assert energy(w - plain, (None, None)) < energy(w - weighted, (None, None))


def test_transposing_exchanges_the_sides():
    w = decaying((20, 30))
    moments = moment_of("full", 20, 1), moment_of("diagonal", 30, 2)
    one = decompose(w, LowRankSpec(6), moment=moments)
    other = decompose(w.T, LowRankSpec(6), moment=moments[::-1])
    assert one.lost_energy == pytest.approx(other.lost_energy, rel=1e-6)
    np.testing.assert_allclose(one.reconstruct(), other.reconstruct().T, atol=1e-5)


def same(one, other):
    return one.left.tobytes() == other.left.tobytes() and one.right.tobytes() == other.right.tobytes()


def test_objectives_say_which_moments_count():
    w, spec = noise((16, 24)), LowRankSpec(5)
    inputs, outputs = moment_of("full", 16, 1), moment_of("full", 24, 2)
    expected = {
        "frobenius": None,
        "diagonal": np.diagonal(inputs),
        "second_moment": inputs,
        "sensitivity": (inputs, outputs),
        "auto": (inputs, outputs),
    }
    found = {name: decompose(w, spec, moment=(inputs, outputs), objective=name) for name in expected}
    for name, moment in expected.items():
        assert same(found[name], decompose(w, spec, moment=moment))
    assert len({found[name].left.tobytes() for name in expected}) == 4
    assert same(
        decompose(w, spec, moment=(None, outputs)), decompose(w, spec, moment=(None, outputs), objective="auto")
    )
    for objective, moment in [
        ("diagonal", None),
        ("second_moment", (None, outputs)),
        ("sensitivity", inputs),
        ("sensitivity", (None, outputs)),
    ]:
        with pytest.raises(ConfigError, match=f"{objective!r} needs the input"):
            decompose(w, spec, moment=moment, objective=objective)
    with pytest.raises(ConfigError, match='objective: expected "auto"'):
        decompose(w, spec, objective="happiness")


@pytest.mark.parametrize("scale", [1e-300, 1e-45, 1e-6, 1.0, 1e6, 1e38, 1e45, 1e300])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_the_scale_of_a_moment_does_not_matter(scale, kind):
    w, spec = noise((16, 24)), LowRankSpec(5)
    moments = moment_of(kind, 16, 1), moment_of(kind, 24, 2)
    expected = decompose(w, spec, moment=moments)
    found = decompose(w, spec, moment=tuple(moment * scale for moment in moments))
    assert found.lost_energy == pytest.approx(expected.lost_energy, rel=1e-5)
    np.testing.assert_allclose(found.reconstruct(), expected.reconstruct(), atol=1e-4)


def test_diagonal_zero_and_half_precision_moments():
    w, spec = noise((16, 24)), LowRankSpec(5)
    diagonal = moment_of("diagonal", 16, 1)
    one, other = decompose(w, spec, moment=diagonal), decompose(w, spec, moment=np.diag(diagonal))
    assert one.lost_energy == pytest.approx(other.lost_energy, rel=1e-6)
    np.testing.assert_allclose(one.reconstruct(), other.reconstruct(), atol=1e-5)
    # A layer without inputs has the Frobenius norm.
    for zero in (np.zeros(16), np.zeros((16, 16)), (np.zeros(16), np.zeros((24, 24)))):
        assert same(decompose(w, spec, moment=zero), decompose(w, spec))
    half = decompose(w, spec, moment=diagonal.astype(np.float16))
    assert half.lost_energy == pytest.approx(one.lost_energy, rel=1e-2)


@pytest.mark.parametrize(
    ("moment", "kind", "words"),
    [
        (np.eye(15), ShapeError, "input moment: expected shape (16, 16)"),
        ((None, np.eye(16)), ShapeError, "output moment: expected shape (24, 24)"),
        (np.ones((16, 1)), ShapeError, "(16, 1)"),
        (np.ones(16, np.int64), DtypeError, "int64"),
        (np.full(16, np.nan), TQError, "finite"),
        (np.diag([np.inf] + 15 * [1e300]), TQError, "finite"),
        (-np.eye(16), ConfigError, "negative"),
        (-np.ones(16), ConfigError, "negative"),
    ],
)
def test_moments_that_are_none_are_refused(moment, kind, words):
    with pytest.raises(kind) as caught:
        decompose(noise((16, 24)), LowRankSpec(3), moment=moment)
    assert words in str(caught.value)


def test_a_low_rank_matrix_of_zeros_and_of_its_own_rank():
    zero = decompose(np.zeros((8, 12), np.float32), LowRankSpec(3))
    assert zero.lost_energy == 0 and not zero.reconstruct().any()
    w = noise((20, 3), 1) @ noise((3, 30), 2)
    found = decompose(w, LowRankSpec(3), moment=moment_of("dead inputs", 20, 3))
    assert found.lost_energy < 1e-9
    np.testing.assert_allclose(found.reconstruct(), w, atol=1e-5)
    for rank in (8, 9):
        with pytest.raises(ShapeError, match="rank"):
            decompose(noise((8, 12)), LowRankSpec(rank))
    with pytest.raises(NonFiniteError, match="row 0"):
        decompose(np.full((8, 12), np.nan), LowRankSpec(3))
    with pytest.raises(ShapeError, match=r"\(\.\.\., 20\)"):
        found.apply(noise((2, 19)))


def test_threads_and_seeds_make_no_difference_to_low_rank():
    w, moment = noise((48, 64)), moment_of("full", 48, 1)
    runs = [decompose(w, LowRankSpec(9), moment=moment, threads=n, seed=n) for n in (1, 2, 3)]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


# Budgets.


def test_either_a_spec_or_a_budget():
    w = noise((16, 24))
    for arguments in ({}, {"spec": LowRankSpec(3), "budget": 0.5}):
        with pytest.raises(ConfigError, match="either a spec or a budget"):
            decompose(w, **arguments)


@settings(max_examples=40)
@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.05, 0.99), st.sampled_from(["fast", "balanced"]))
def test_a_budget_for_one_matrix_is_kept_and_spent(m, n, share, effort):
    w, moment = noise((m, n)), moment_of("full", m, 1)
    allowed = int(share * m * n)
    ranks = [rank for rank in range(1, min(m, n)) if rank * (m + n - rank) <= allowed]
    if not ranks:
        with pytest.raises(ConfigError, match="rank 1"):
            decompose(w, budget=share, moment=moment, effort=effort)
        return
    found = decompose(w, budget=share, moment=moment, effort=effort)
    low_rank = decompose(w, LowRankSpec(ranks[-1]), moment=moment)
    assert found.parameters <= allowed
    assert found.lost_energy <= low_rank.lost_energy * (1 + 1e-9)
    if effort == "fast":
        assert found.spec == low_rank.spec and same(found, low_rank)
    assert repr(decompose(w, budget=allowed, moment=moment, effort=effort)) == repr(found)
    dense = found.reconstruct().astype(np.float64)
    lost = energy(w - dense, (moment, None)) / energy(w, (moment, None))
    assert lost == pytest.approx(found.lost_energy, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("budget", [0.0, 1.0, 1.5, -0.1, np.nan, np.inf, 0, -5, True, "0.5", [0.5]], ids=repr)
def test_nonsense_is_no_budget(budget):
    with pytest.raises(ConfigError, match="budget must be a share"):
        decompose(noise((16, 24)), budget=budget)


def test_budgets_of_numpy_and_budgets_that_leave_nothing_to_do():
    w = noise((16, 24))
    expected = repr(decompose(w, budget=0.5, effort="fast"))
    assert repr(decompose(w, budget=np.float32(0.5), effort="fast")) == expected
    assert repr(decompose(w, budget=np.int64(192), effort="fast")) == expected
    for everything in (16 * 24, 10**30):
        with pytest.raises(ConfigError, match="nothing to save for a 16 × 24 matrix"):
            decompose(w, budget=everything)
    with pytest.raises(ConfigError, match="rank 1"):
        decompose(w, budget=38)


# Sums of several terms, and Kronecker sums in a weighted norm.

KRONECKER = KroneckerSpec((2, 4), 2)
MIXED = MixedSpec((LowRankSpec(3), KRONECKER, KroneckerSpec((4, 4), 1, "rows")))


@pytest.mark.parametrize("kinds", [("none", "none"), ("full", "none"), ("full", "full"), ("rank one", "zero")], ids=str)
def test_a_sum_is_no_worse_than_each_of_its_terms(kinds):
    w = decaying((32, 48)) + 0.1 * np.kron(noise((16, 12), 1), noise((2, 4), 2))
    moments = tuple(moment_of(kind, side, 3) for kind, side in zip(kinds, w.shape, strict=True))
    found = decompose(w, MIXED, moment=moments, effort="fast", seed=2)
    assert isinstance(found, MixedDecomposition) and found.spec == MIXED and found.shape == (32, 48)
    assert found.parameters == MIXED.parameters(32, 48) == sum(term.parameters for term in found.terms)
    assert [term.spec for term in found.terms] == list(MIXED.terms)
    for term in MIXED.terms:
        alone = decompose(w, term, moment=moments, effort="fast", seed=2)
        assert found.lost_energy <= alone.lost_energy * (1 + 1e-6)
    dense = found.reconstruct().astype(np.float64)
    assert energy(w - dense, moments) / energy(w, moments) == pytest.approx(found.lost_energy, rel=1e-3, abs=1e-6)
    x = noise((5, 32), 4)
    np.testing.assert_allclose(found.apply(x), x @ dense, atol=1e-4 * np.abs(x @ dense).max())
    again = decompose(w, MIXED, moment=moments, effort="fast", seed=2, threads=1)
    assert again.reconstruct().tobytes() == found.reconstruct().tobytes()


def test_a_sum_of_a_zero_matrix_loses_nothing():
    found = decompose(np.zeros((16, 24)), MIXED, effort="fast")
    assert found.lost_energy == 0 and not found.reconstruct().any()


@pytest.mark.parametrize("permute", ["none", "both"])
@pytest.mark.parametrize("kinds", [("full", "none"), ("diagonal", "full"), ("rank one", "dead inputs")], ids=str)
def test_a_kronecker_sum_is_fitted_in_the_norm_it_is_given(kinds, permute):
    w = noise((32, 48)) * np.exp(noise((32, 1), 8))
    moments = tuple(moment_of(kind, side, 3) for kind, side in zip(kinds, w.shape, strict=True))
    spec = KroneckerSpec((2, 4), 2, permute)
    plain, found = (decompose(w, spec, moment=given, effort="fast") for given in (None, moments))
    errors = [energy(w - each.reconstruct().astype(np.float64), moments) for each in (plain, found)]
    assert errors[1] <= errors[0] * (1 + 1e-6)
    assert errors[1] / energy(w, moments) == pytest.approx(found.lost_energy, rel=1e-3, abs=1e-6)


def macs(spec, m, n):
    total = 0
    for term in spec.terms if isinstance(spec, MixedSpec) else (spec,):
        if isinstance(term, LowRankSpec):
            total += term.rank * (m + n - term.rank)
        else:
            m2, n2 = term.block
            total += term.rank * min(m * n // n2 + n * m2, m * n // m2 + m * n2)
    return total


@pytest.mark.parametrize(("m", "n"), [(24, 32), (48, 24), (32, 32)])
@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_a_budget_takes_no_more_macs_than_the_matrix_unless_the_cap_is_lifted(m, n, effort):
    w = noise((m, n))
    options = {"budget": 0.85, "effort": effort}
    own, half, free = (decompose(w, max_macs=cap, **options) for cap in (None, 0.5, math.inf))
    assert macs(own.spec, m, n) <= m * n and macs(half.spec, m, n) <= 0.5 * m * n
    assert isinstance(free.spec, MixedSpec) and macs(free.spec, m, n) > m * n
    assert free.lost_energy < own.lost_energy < half.lost_energy


def test_a_cap_of_a_spec_or_of_nonsense_is_refused():
    with pytest.raises(ConfigError, match="max_macs: expected with a budget only"):
        decompose(noise((16, 24)), LowRankSpec(3), max_macs=1.0)
    for cap in (0, -1.0, math.nan, True, "many"):
        with pytest.raises(ConfigError, match="max_macs must be a positive share"):
            decompose(noise((16, 24)), budget=0.5, max_macs=cap)
