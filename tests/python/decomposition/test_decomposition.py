"""One matrix at a time, against oracles in plain numpy."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqcompressor import KroneckerSpec, decompose, find_permutation, nearest_kronecker_sum
from tqcompressor.errors import ConfigError, DtypeError, NonFiniteError, ShapeError, TQError


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def uneven(shape, seed=0):
    """Noise whose rows and columns differ in scale, like those of trained weights."""
    scales = np.random.default_rng(seed + 1).standard_normal(sum(shape)).astype(np.float32)
    rows, columns = np.exp(scales[: shape[0]]), np.exp(scales[shape[0] :])
    return noise(shape, seed) * rows[:, None] * columns


def rearranged(w, block):
    (m, n), (m2, n2) = w.shape, block
    return w.reshape(m // m2, m2, n // n2, n2).transpose(0, 2, 1, 3).reshape(-1, m2 * n2).astype(np.float64)


def least_lost(w, spec):
    energies = np.linalg.svd(rearranged(w, spec.block), compute_uv=False) ** 2
    return energies[spec.rank :].sum() / energies.sum()


def lost(w, approximation):
    w = w.astype(np.float64)
    return ((w - approximation) ** 2).sum() / (w**2).sum()


@st.composite
def cases(draw):
    m1, n1, m2, n2 = (draw(st.integers(1, 6)) for _ in range(4))
    rank = draw(st.integers(1, min(m1 * n1, m2 * n2)))
    permute = draw(st.sampled_from(["none", "rows", "columns", "both"]))
    spec = KroneckerSpec(block=(m2, n2), rank=rank, permute=permute)
    return uneven((m1 * m2, n1 * n2), draw(st.integers(0, 2**16))), spec


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_the_nearest_sum_is_the_truncated_svd_of_the_blocks(case):
    w, spec = case
    found = nearest_kronecker_sum(w, spec)
    assert found.lost_energy == pytest.approx(least_lost(w, spec), abs=1e-9)
    dense = sum(np.kron(a.astype(np.float64), b) for a, b in zip(found.a, found.b, strict=True))
    np.testing.assert_allclose(found.reconstruct(), dense, rtol=1e-5, atol=1e-6 * np.abs(w).max())
    assert lost(w, dense) == pytest.approx(found.lost_energy, abs=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(["fast", "balanced"]))
def test_a_decomposition_keeps_its_promises(case, effort):
    w, spec = case
    found = decompose(w, spec, effort=effort, seed=3)
    p, q = found.row_permutation, found.column_permutation
    assert sorted(p) == list(range(w.shape[0])) and sorted(q) == list(range(w.shape[1]))
    assert spec.permutes_rows or (p == np.arange(len(p))).all()
    assert spec.permutes_columns or (q == np.arange(len(q))).all()
    # Its lost energy is the best for these permutations, and no worse than without any.
    assert found.lost_energy == pytest.approx(least_lost(w[p][:, q], spec), abs=1e-9)
    assert found.lost_energy <= least_lost(w, spec) + 1e-9
    dense = found.reconstruct()
    assert lost(w, dense) == pytest.approx(found.lost_energy, abs=1e-6)
    assert found.parameters == spec.parameters(*w.shape) == found.a.size + found.b.size
    x = noise((2, 3, w.shape[0]), 5)
    expected = x.astype(np.float64) @ dense
    np.testing.assert_allclose(found.apply(x), expected, atol=1e-4 * (1 + np.abs(expected).max()))
    searched = find_permutation(w, spec, effort=effort, seed=3)
    assert (searched[0] == p).all() and (searched[1] == q).all()


@pytest.mark.parametrize("block", [(1, 96), (64, 1), (64, 96), (1, 1), (32, 48)])
def test_every_kind_of_block(block):
    # Rows and columns as blocks, the whole matrix as one block, and a block larger than the grid of blocks.
    w = noise((64, 96))
    blocks, entries = 64 * 96 // (block[0] * block[1]), block[0] * block[1]
    spec = KroneckerSpec(block=block, rank=min(3, blocks, entries))
    found = decompose(w, spec, effort="fast")
    assert found.lost_energy <= least_lost(w, spec) + 1e-9
    assert lost(w, found.reconstruct()) == pytest.approx(found.lost_energy, abs=1e-6)


def test_exact_sums_are_recovered_and_a_full_rank_loses_nothing():
    a, b = noise((3, 8, 6), 1), noise((3, 4, 5), 2)
    w = sum(np.kron(a[k], b[k]) for k in range(3))
    found = nearest_kronecker_sum(w, KroneckerSpec(block=(4, 5), rank=3))
    assert found.lost_energy < 1e-12
    np.testing.assert_allclose(found.reconstruct(), w, atol=1e-5)
    assert decompose(noise((8, 8)), KroneckerSpec(block=(2, 2), rank=4), effort="fast").lost_energy < 1e-12


def test_a_zero_matrix_loses_nothing():
    found = decompose(np.zeros((8, 12), np.float32), KroneckerSpec(block=(2, 4), rank=2))
    assert found.lost_energy == 0 and not found.reconstruct().any()


@pytest.mark.parametrize("permute", ["none", "rows", "columns", "both"])
def test_balanced_effort_undoes_a_shuffle(permute):
    # A matrix of uneven rows and columns: shuffling hardly changes the quality of the order that the search finds.
    w = uneven((96, 128), 7)
    random = np.random.default_rng(0)
    shuffled = w[random.permutation(96)][:, random.permutation(128)]
    spec = KroneckerSpec(block=(2, 4), rank=2, permute=permute)
    straight, mixed = decompose(w, spec).lost_energy, decompose(shuffled, spec).lost_energy
    if permute == "both":
        assert mixed == pytest.approx(straight, rel=0.1) and mixed < 0.5 * least_lost(w, spec)
    else:
        assert mixed <= least_lost(shuffled, spec)


def test_a_seed_decides_and_threads_do_not():
    w, spec = uneven((96, 128), 3), KroneckerSpec(block=(2, 4), rank=3)
    runs = [decompose(w, spec, seed=5, threads=threads) for threads in (1, 2, 4, None)]
    for run in runs[1:]:
        assert run.a.tobytes() == runs[0].a.tobytes() and run.b.tobytes() == runs[0].b.tobytes()
        assert (run.row_permutation == runs[0].row_permutation).all()
    other = decompose(w, spec, seed=6)
    assert (other.row_permutation != runs[0].row_permutation).any()


def test_dtypes_and_layouts():
    w, spec = noise((16, 24)), KroneckerSpec(block=(2, 4), rank=2)
    expected = decompose(w, spec, effort="fast")
    for same in (w.astype(np.float64), np.asfortranarray(w), np.repeat(w, 2, axis=0)[::2], w.tolist()):
        assert decompose(same, spec, effort="fast").a.tobytes() == expected.a.tobytes()
    assert decompose(w.astype(np.float16), spec, effort="fast").a.dtype == np.float32


@pytest.mark.parametrize(
    ("w", "spec", "kind", "words"),
    [
        (noise((16, 24)), KroneckerSpec((5, 4), 1), ShapeError, "(5, 4)"),
        (noise((16, 24)), KroneckerSpec((2, 4), 9), ShapeError, "1 to 8"),
        (noise(16), KroneckerSpec((2, 4), 1), ShapeError, "1 dimensions"),
        (np.zeros((0, 4), np.float32), KroneckerSpec((1, 1), 1), ShapeError, "at least one row"),
        (np.arange(16).reshape(4, 4), KroneckerSpec((2, 2), 1), DtypeError, "int64"),
        (np.zeros((4, 4), complex), KroneckerSpec((2, 2), 1), DtypeError, "complex128"),
        (np.full((4, 4), np.nan), KroneckerSpec((2, 2), 1), NonFiniteError, "row 0, column 0"),
        (np.diag([1.0, 1.0, np.inf, 1.0]), KroneckerSpec((2, 2), 1), NonFiniteError, "inf at row 2, column 2"),
        (np.full((4, 4), 1e300), KroneckerSpec((2, 2), 1), NonFiniteError, "inf"),
    ],
)
@pytest.mark.parametrize("function", [decompose, find_permutation, nearest_kronecker_sum])
def test_bad_input_is_refused_with_what_was_expected(function, w, spec, kind, words):
    with pytest.raises(kind) as caught:
        function(w, spec)
    assert isinstance(caught.value, TQError) and words in str(caught.value)


def test_bad_options_are_refused():
    w, spec = noise((4, 4)), KroneckerSpec((2, 2), 1)
    with pytest.raises(ConfigError, match="heroic"):
        decompose(w, spec, effort="heroic")
    with pytest.raises(ShapeError, match=r"\(\.\.\., 4\)"):
        decompose(w, spec, effort="fast").apply(noise((2, 3)))


def test_progress_runs_to_its_end_and_may_stop_the_job():
    w, spec = uneven((256, 256)), KroneckerSpec((2, 4), 2)
    seen = []
    decompose(w, spec, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert all(before[0] <= after[0] for before, after in pairwise(seen))
    assert len({total for done, total in seen if done}) == 1

    class Enough(Exception):
        pass

    def stop(done, total):
        raise Enough

    with pytest.raises(Enough):
        decompose(w, spec, effort="best", progress=stop)


def test_other_threads_run_meanwhile():
    # If the search held the GIL, this thread could not count until the search ended.
    counted = []
    done = threading.Event()
    started = threading.Event()

    def count():
        started.set()
        while not done.is_set():
            counted.append(time.perf_counter())
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    started.wait()
    first = len(counted)
    decompose(uneven((256, 256)), KroneckerSpec((2, 4), 4), threads=1)
    during = len(counted) - first
    done.set()
    counter.join()
    assert during > 20


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_interrupts_at_once():
    code = """
import numpy as np
from tqcompressor import KroneckerSpec, decompose
w = np.random.default_rng(0).standard_normal((768, 3072), dtype=np.float32)
def report(done, total):
    if done:
        print("working", flush=True)
try:
    decompose(w, KroneckerSpec((2, 4), 4), effort="best", progress=report)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    # Without an interrupt, it runs for minutes.
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "interrupted"
