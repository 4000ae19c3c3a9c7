"""The same input, effort and seed give the same bytes, whatever the number of threads."""

import hashlib

import pytest
from helpers.checkpoints import Checkpoint, config, listing
from tqcompressor.compression.checkpoint import compress_checkpoint

SPECS = {
    "wte": ((1, 4), 1, "columns"),
    "h.*.attn.c_attn": ((2, 4), 2, "both"),
    "h.*.mlp.c_fc": ((2, 4), 4, "both"),
    "h.*.mlp.c_proj": ((4, 2), 4, "rows"),
}


def hashes(directory):
    """Hash by file name. The report holds seconds, so it is left out."""
    names = [name for name in listing(directory) if name != "compression_report.json"]
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source") / "gpt2"
    return Checkpoint(layers=4, width=32, vocabulary=200, positions=16).write(directory)


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_threads_and_runs_do_not_show(source, tmp_path, effort):
    seen = []
    for run, threads in enumerate([1, 2, 4, 4, None]):
        destination = tmp_path / str(run)
        compress_checkpoint(source, destination, config(SPECS, effort=effort, seed=7), threads=threads)
        seen.append(hashes(destination))
    assert len(seen[0]) == 4
    assert all(other == seen[0] for other in seen)


def test_more_threads_than_matrices_do_not_show(source, tmp_path):
    one = {"h.2.mlp.c_fc": ((2, 4), 4, "both")}
    for threads in (1, 4):
        compress_checkpoint(source, tmp_path / str(threads), config(one, effort="best"), threads=threads)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "4")


def test_shards_are_deterministic_too(source, tmp_path):
    for run, threads in (("a", 1), ("b", 3)):
        compress_checkpoint(source, tmp_path / run, config(SPECS), threads=threads, max_shard_size="50kB")
    assert len(hashes(tmp_path / "a")) > 4
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_another_seed_gives_another_result(source, tmp_path):
    for seed in (0, 1):
        compress_checkpoint(source, tmp_path / str(seed), config(SPECS, effort="balanced"), seed=seed)
    assert hashes(tmp_path / "0") != hashes(tmp_path / "1")
