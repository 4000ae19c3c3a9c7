"""Estimates of time and memory: their order, and what they say."""

import json

import pytest
from helpers.checkpoints import Checkpoint, config
from tqcompressor import CostEstimate, compress_checkpoint, estimate_cost
from tqcompressor.cli import main as cli
from tqcompressor.errors import ConfigError

RECIPE = config({"h.*.mlp.*": ((2, 4), 2, "both")}, effort="fast")
WORK = {
    "budget": {"budget": 0.6},
    "recipe": {"config": RECIPE},
    "ranks": {"config": {"specs": {"h.*.mlp.*": {"rank": 2}}}},
}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    shapes = ((1, 32), (2, 64), (4, 128))
    return [Checkpoint(layers=n, width=w, vocabulary=300).write(folder / str(n)) for n, w in shapes]


@pytest.mark.parametrize("name", WORK)
def test_more_work_takes_more(name, sizes):
    one = [estimate_cost(source, **WORK[name], threads=1) for source in sizes]
    assert one[0].seconds < one[1].seconds < one[2].seconds
    assert one[0].peak_bytes < one[1].peak_bytes < one[2].peak_bytes
    two = estimate_cost(sizes[2], **WORK[name], threads=2)
    assert two.seconds < one[2].seconds and two.peak_bytes > one[2].peak_bytes
    if name != "recipe":
        known = estimate_cost(sizes[2], **WORK[name], threads=1, calibrated=True)
        assert known.seconds > one[2].seconds and known.peak_bytes > one[2].peak_bytes
        assert estimate_cost(sizes[2], **WORK[name], threads=1, tokens=10**6).seconds > known.seconds


@pytest.mark.parametrize("name", ["budget", "recipe"])
def test_efforts_and_fewer_matrices(name, sizes):
    efforts = [estimate_cost(sizes[2], **WORK[name], effort=effort).seconds for effort in ("fast", "balanced", "best")]
    assert efforts == sorted(set(efforts))
    few = estimate_cost(sizes[2], budget=0.9, matrices=["h.0.mlp.*"])
    assert few.seconds < estimate_cost(sizes[2], budget=0.9).seconds


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (CostEstimate(3, 120_000_000, 1), "about some seconds and 120 MB of memory on 1 thread"),
        (CostEstimate(44, 999_000_000, 2), "about 40 seconds and 1.0 GB of memory on 2 threads"),
        (CostEstimate(8000, 2_340_000_000, 16), "about 2.2 hours and 2.3 GB of memory on 16 threads"),
    ],
)
def test_in_words(estimate, words):
    assert str(estimate) == words


def test_neither_and_both_are_refused(sizes):
    for options in ({}, {"config": RECIPE, "budget": 0.5}):
        with pytest.raises(ConfigError, match="a config or budget"):
            estimate_cost(sizes[0], **options)


@pytest.mark.parametrize("name", ["budget", "recipe", "none"])
def test_inspect_says_it_too(name, sizes, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(RECIPE))
    more = {"budget": ["--budget", "0.6"], "recipe": ["--config", str(tmp_path / "config.json")], "none": []}[name]
    assert cli.main(["inspect", str(sizes[1]), *more]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("give --budget or --recipe" if name == "none" else "compressing takes about ")
    assert cli.main(["inspect", str(sizes[1]), *more, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    options = WORK.get(name)
    assert found.get("estimate") == (None if options is None else estimate_cost(sizes[1], **options).to_dict())


@pytest.mark.parametrize("name", ["budget", "recipe"])
def test_compress_says_it_before_it_begins(name, sizes, tmp_path, capsys):
    compress_checkpoint(sizes[1], tmp_path / "out", **WORK[name], threads=1, progress=True)
    expected = estimate_cost(sizes[1], **WORK[name], threads=1)
    said = capsys.readouterr().err
    assert said.startswith(f"compressing takes {expected}\n")
    # A phase that ends within a tick may not be shown.
    assert "write:" in said and ("plan:" in said) == (name == "budget")
