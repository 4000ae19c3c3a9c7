"""The options that a benchmark hands to its fresh processes are options that it has."""

import argparse
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(("module", "handed_on"), [("quality", "PASSED_ON"), ("distillation", "TRAINING")])
def test_they_exist(module, handed_on, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = import_module(module)
    parser = argparse.ArgumentParser()
    benchmark.add_options(parser)
    assert set(getattr(benchmark, handed_on)) <= set(vars(parser.parse_args([])))
