"""The benchmark of losses: its cold calls write the gradients that they are said to write."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is restarted by /proc")


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield import_module("losses")


def test_cold_calls_are_in_place_or_not_and_the_same_loss(benchmark, monkeypatch):
    kept = []
    grad = torch.Tensor.backward

    def backward(loss):
        kept.append(loss.item())
        grad(loss)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for method in benchmark.CASES["cold logits"]:
        torch.manual_seed(0)
        measured = benchmark.cold_logits(method, torch.get_num_threads(), True)
        assert measured.keys() == {"cpu ms", "wall ms", "extra MB"} and measured["wall ms"] > 0
    # A tiny call and the one that is timed, for each method.
    assert len(kept) == 6 and kept[::2] == pytest.approx(kept[:1] * 3) and kept[1::2] == pytest.approx(kept[1:2] * 3)


def test_a_first_loss_and_a_training_step_are_timed(benchmark):
    threads = torch.get_num_threads()
    assert benchmark.first_loss(benchmark.OURS, threads, True)["wall ms"] > 0
    assert benchmark.training_step(benchmark.IN_PLACE, threads, True)["wall ms"] > 0
