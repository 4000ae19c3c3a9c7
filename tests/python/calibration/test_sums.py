"""Symmetric sums in triangles: equal to float64 products, in memory and in a file."""

import re
import sys

import numpy as np
import pytest
import torch
from helpers.measured import batches, bert, gpt2, llama, same
from torch.utils.flop_counter import FlopCounterMode
from tqcompressor.calibration import sums as sums_module
from tqcompressor.calibration.calibrate import calibrate
from tqcompressor.calibration.sums import Diagonal, SumStore, Triangle
from tqcompressor.errors import ConfigError, StorageError


def rows(count, size, seed=0):
    # A large mean and very different scales: what float32 sums lose the most on.
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, size, generator=generator) + 3) * torch.logspace(-3, 3, size)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("room", [0, 1 << 30])
def test_a_triangle_is_the_product(size, room):
    triangle = Triangle(size, SumStore(torch.device("cpu"), room))
    expected = np.zeros((size, size))
    # More rows than are summed in float32, and views with strides.
    for x in (rows(5000, size), rows(7, 2 * size, 1)[:, size:], rows(size, 40, 2).t()[:, :size]):
        triangle.add(x)
        expected += x.double().numpy().T @ x.double().numpy()
    found = triangle.mean(10)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal())) / 10
    assert np.abs((found - expected / 10) / scale).max() < 1e-5
    assert np.array_equal(found, found.T) and found.dtype == np.float32
    assert isinstance(found, np.memmap) == (room == 0)


@pytest.mark.parametrize("size", [576, 1024, 1536, 3072])
def test_a_triangle_takes_little_more_than_half_of_the_products(size):
    triangle = Triangle(size, SumStore(torch.device("cpu"), 1 << 30))
    with FlopCounterMode(display=False) as counter:
        triangle.add(torch.ones(2, size))
    assert size**2 / 2 < counter.get_total_flops() / 4 < size**2 * 0.63


def test_a_sum_of_many_batches_is_as_exact_as_of_one():
    triangle, diagonal = (kind(3, SumStore(torch.device("cpu"), 1 << 20)) for kind in (Triangle, Diagonal))
    x = torch.full((1, 3), 1.1)
    triangle.add(torch.full((1, 3), 3000.0))
    diagonal.add(torch.full((1, 3), 3000.0))
    for _ in range(1000):
        triangle.add(x)
        diagonal.add(x)
    # In float32 the sum would be wrong by 1e-4: 9,000,000 has a spacing of 1.
    expected = 9e6 + 1000 * float(x[0, 0] * x[0, 0])
    for found in (triangle.mean(1), diagonal.mean(1)):
        np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_memory_is_given_out_once():
    store = SumStore(torch.device("cpu"), 8 * 10)
    kinds = [type(store.zeros(count)).__name__ for count in (6, 5, 4, 1)]
    assert kinds == ["_InMemory", "_InFile", "_InMemory", "_InFile"]


def is_mapped(moment):
    return isinstance(moment, np.memmap) or isinstance(moment.base, np.memmap)


@pytest.mark.parametrize("model", [gpt2, llama, bert])
@pytest.mark.parametrize("sensitivity", [False, True])
def test_memory_makes_no_difference_and_one_pass_is_enough(model, sensitivity):
    found = {}
    for room in (0, 9000, 1 << 30):
        calls = []
        found[room] = calibrate(
            model(),
            batches(),
            sensitivity=sensitivity,
            max_memory=room,
            progress=lambda *state, calls=calls: calls.append(state),
        )
        assert calls == [(1, 2), (2, 2)]
    assert same(found[0], found[1 << 30]) and same(found[9000], found[1 << 30])
    mapped = {room: sum(map(is_mapped, calibration.moments.values())) for room, calibration in found.items()}
    assert mapped[1 << 30] == 0 < mapped[9000] < mapped[0]


@pytest.mark.parametrize(
    ("family", "room"), [(gpt2, 0), (gpt2, 12_345), (llama, 20_000), (bert, 30_000), (bert, 31_000)]
)
def test_sums_in_memory_are_within_max_memory(family, room, monkeypatch):
    held, begin = [], sums_module._InMemory.__init__
    monkeypatch.setattr(
        sums_module._InMemory, "__init__", lambda self, *of: (begin(self, *of), held.append(self._numbers.nbytes))[0]
    )
    calibrate(family(), batches(), max_memory=room)
    within = sum(held)
    held.clear()
    calibrate(family(), batches())
    # Nearly all that is allowed, and never more.
    assert room - 8 * 16 * 17 <= within <= room < sum(held)


def test_the_file_is_gone_with_the_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(sums_module.tempfile, "tempdir", str(tmp_path))
    found = calibrate(gpt2(), batches(), max_memory=0)
    # It has no name that could be left behind, and the moments outlive it.
    assert list(tmp_path.iterdir()) == [] or sys.platform == "win32"
    assert same(found, calibrate(gpt2(), batches()))
    found.save(tmp_path / "saved")
    assert same(type(found).load(tmp_path / "saved"), found)


def test_what_has_no_room_is_refused(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sums_module.portable, "reserve", full)
    monkeypatch.setattr(sums_module.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(StorageError, match=rf"No space left.*{re.escape(str(tmp_path))}"):
        calibrate(gpt2(), batches(), max_memory=0)
    monkeypatch.setattr(sums_module.tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="none"):
        calibrate(gpt2(), batches(), max_memory=0)
    for wrong in (-1, 0.5, "1G"):
        with pytest.raises(ConfigError, match="max_memory: expected an integer from 0 up"):
            calibrate(gpt2(), batches(), max_memory=wrong)
