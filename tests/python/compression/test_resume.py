"""A run that was stopped goes on where it was, and ends with the bytes of a run that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers.checkpoints import Checkpoint, config
from helpers.processes import environment, forked
from tqcompressor import Calibration, compress_checkpoint
from tqcompressor.cli import main as cli
from tqcompressor.compression import checkpoint as on_disk
from tqcompressor.errors import ConfigError, DestinationError

# Each fit takes long enough for a run to be stopped between two.
RECIPE = {"config": config({"h.*.mlp.*": ((2, 4), 4, "both"), "h.*.attn.*": ((2, 4), 4, "both")}, effort="balanced")}
BUDGETS = {"budget": {"budget": 0.6, "effort": "balanced"}, "fast budget": {"budget": 0.6, "max_macs": 0.8}}
WORK = {"recipe": RECIPE, **BUDGETS}


class StoppedError(Exception):
    pass


class Stop:
    """A progress callback that stops its run once so many files of a kind are finished."""

    def __init__(self, out, finished, kind="fit"):
        self.folder, self.finished, self.kind = kept(out), finished, kind

    def __call__(self, done, total):
        if len(list(self.folder.glob(f"{self.kind}-*[0-9]"))) >= self.finished:
            raise StoppedError


def kept(out):
    return out.with_name(f".{out.name}.tqcompressor-resume")


def files(folder):
    """The contents of the files of a folder, but for the times in the report."""
    texts = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    texts.pop("compression_report.json", None)
    return texts


def seconds(path):
    """The seconds that a finished fit took."""
    data = path.read_bytes()
    return round(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["seconds"], 9)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Checkpoint(layers=3, width=64, vocabulary=300).write(tmp_path_factory.mktemp("source") / "dense")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The files of runs that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    for name, options in WORK.items():
        compress_checkpoint(source, folder / name, **options, threads=1, progress=False)
    return {name: files(folder / name) for name in WORK}


def killed(source, out, options, finished, threads):
    """A run that kills itself once so many fits are finished."""

    def kill():
        while len(list(kept(out).glob("fit-*[0-9]"))) < finished:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    compress_checkpoint(source, out, **options, threads=threads, progress=False)


def stopped(source, out, options, finished, kind="fit", **more):
    """Stops a run that may be resumed after so many finished files."""
    with pytest.raises(StoppedError):
        compress_checkpoint(source, out, **options, resume=True, progress=Stop(out, finished, kind), **more)
    assert not out.exists()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["recipe", "budget"])
def test_killed_again_and_again_it_ends_with_the_same_bytes(name, threads, source, whole, tmp_path):
    out = tmp_path / "out"
    # The first runs do not ask to be resumed: a kill leaves no choice.
    for finished, resume in ((1, False), (6, True)):
        options = {**WORK[name], "resume": resume}
        process = forked(killed, source, out, options, finished, threads)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL and not out.exists()
        assert len(list(kept(out).glob("fit-*[0-9]"))) >= finished
    before = {seconds(path) for path in kept(out).glob("fit-*[0-9]")}
    report = compress_checkpoint(source, out, **WORK[name], resume=True, threads=3 - threads, progress=False)
    assert files(out) == whole[name]
    # What was finished was not made again.
    assert before <= {round(matrix.seconds, 9) for matrix in report.matrices}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_budget_by_effort_fast_goes_on_from_spectra_and_from_fits(source, whole, tmp_path):
    out, options = tmp_path / "out", {**BUDGETS["fast budget"], "resume": True}
    stopped(source, out, BUDGETS["fast budget"], 3, "energies")

    def fill(done, total):
        out.mkdir(exist_ok=True)
        (out / "someone's").touch()

    with pytest.raises(DestinationError, match="was filled"):
        compress_checkpoint(source, out, **options, progress=fill)
    shutil.rmtree(out)
    fits = sorted(kept(out).glob("fit-*[0-9]"))
    for path in [*fits[::2], *sorted(kept(out).glob("energies-*"))[::3]]:
        path.unlink()
    before = {seconds(path) for path in fits[1::2]}
    report = compress_checkpoint(source, out, **options, progress=False)
    assert files(out) == whole["fast budget"] and not kept(out).exists()
    assert before and before <= {round(matrix.seconds, 9) for matrix in report.matrices}


def test_a_damaged_file_is_made_again(source, whole, tmp_path):
    out = tmp_path / "out"
    stopped(source, out, BUDGETS["budget"], 4)
    first, second, *_ = kept(out).glob("fit-*[0-9]")
    first.write_bytes(first.read_bytes()[:-9])
    second.write_bytes(bytes(second.stat().st_size))
    (kept(out) / "fit-99.partial").write_bytes(b"half")
    compress_checkpoint(source, out, **BUDGETS["budget"], resume=True, progress=False)
    assert files(out) == whole["budget"]


def diagonal(seed):
    """A calibration of the model of `source`, with the moments of some of its matrices."""
    random = np.random.default_rng(seed)
    sizes = {"wte": 300, **{f"h.{i}.{name}": 64 for i in range(3) for name in ("attn.c_attn", "mlp.c_fc")}}
    return Calibration({f"input.{name}": random.random(size) for name, size in sizes.items()}, 10, sensitivity=False)


CHANGES = {
    "seed": ({"seed": 1}, "seed was 0, now 1"),
    "effort": ({"effort": "best"}, 'effort was "fast", now "best"'),
    "budget": ({"budget": "70%"}, 'budget was "0.6", now "70%"'),
    "cap": ({"max_macs": 0.9}, "max_macs was 0.8, now 0.9"),
    "dtype": ({"dtype": "float16"}, 'dtype was nothing, now "float16"'),
    "shards": ({"max_shard_size": "1MB"}, "max_shard_size was 5000000000, now 1000000"),
    "matrices": ({"matrices": ["h.*"]}, r'matrices was nothing, now \["h.\*"\]'),
    "calibration": ({"calibration": diagonal(0)}, "calibration was nothing, now"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_other_arguments_are_refused_by_name_and_change_nothing(changed, source, whole, tmp_path):
    out, options = tmp_path / "out", BUDGETS["fast budget"]
    stopped(source, out, options, 1, "energies")
    before = files(kept(out))
    more, words = CHANGES[changed]
    with pytest.raises(ConfigError, match=words):
        compress_checkpoint(source, out, **{**options, **more}, resume=True, progress=False)
    assert files(kept(out)) == before
    compress_checkpoint(source, out, **options, resume=True, progress=False)
    assert files(out) == whole["fast budget"]


def test_the_values_of_a_calibration_count(source, tmp_path):
    out, options = tmp_path / "out", {"budget": 0.6, "matrices": ["h.*.attn.c_attn", "h.*.mlp.c_fc"]}
    options["objective"] = "diagonal"
    stopped(source, out, {**options, "calibration": diagonal(0)}, 1, "energies")
    with pytest.raises(ConfigError, match="calibration was"):
        compress_checkpoint(source, out, **options, calibration=diagonal(1), resume=True, progress=False)
    diagonal(0).save(tmp_path / "same.safetensors")
    same = tmp_path / "same.safetensors"
    compress_checkpoint(source, out, **options, calibration=same, resume=True, progress=False)
    assert out.exists()


@pytest.mark.parametrize("change", ["weights", "config.json"])
def test_another_source_is_refused_by_its_file(change, source, tmp_path):
    mine, out = shutil.copytree(source, tmp_path / "mine"), tmp_path / "out"
    stopped(mine, out, RECIPE, 2)
    if change == "weights":
        os.utime(mine / "model.safetensors", ns=(1, 1))
        words = "source model.safetensors was"
    else:
        text = json.loads((mine / "config.json").read_text())
        (mine / "config.json").write_text(json.dumps({**text, "note": "edited"}))
        words = "source config.json was"
    with pytest.raises(ConfigError, match=words):
        compress_checkpoint(mine, out, **RECIPE, resume=True, progress=False)


def test_without_resume_a_run_begins_anew_and_says_so(source, whole, tmp_path):
    out = tmp_path / "out"
    stopped(source, out, BUDGETS["fast budget"], 1, "energies")
    with pytest.warns(UserWarning, match="resume would have gone on with it"):
        compress_checkpoint(source, out, **RECIPE, progress=False)
    assert files(out) == whole["recipe"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_resume_a_run_that_fails_leaves_nothing(source, tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(StoppedError):
        compress_checkpoint(source, out, **RECIPE, progress=Stop(out, 2))
    assert list(tmp_path.iterdir()) == []


def test_resume_without_an_earlier_run_is_a_run(source, whole, tmp_path):
    compress_checkpoint(source, tmp_path / "out", **RECIPE, resume=True, progress=False)
    assert files(tmp_path / "out") == whole["recipe"]
    with pytest.raises(DestinationError, match="not empty"):
        compress_checkpoint(source, tmp_path / "out", **RECIPE, resume=True, progress=False)


def test_a_second_run_is_refused_while_the_first_is_planning(source, tmp_path):
    out = tmp_path / "out"

    def second(done, total):
        with pytest.raises(DestinationError, match="another run"):
            compress_checkpoint(source, out, **RECIPE, resume=True, progress=False)
        raise StoppedError

    with pytest.raises(StoppedError):
        compress_checkpoint(source, out, **BUDGETS["budget"], progress=second)


def test_a_text_is_not_read_by_the_model_again(tmp_path, monkeypatch):
    tiny = os.path.join(os.path.dirname(__file__), "..", "..", "data", "tiny-gpt2")
    text = tmp_path / "text.txt"
    with open(os.path.join(tiny, "heldout.txt"), encoding="utf-8") as file:
        text.write_text(file.read()[:20000], encoding="utf-8")
    options = {"budget": 0.65, "text": text, "num_samples": 4, "seq_len": 32}
    compress_checkpoint(tiny, tmp_path / "whole", **options, progress=False)
    out = tmp_path / "out"
    stopped(tiny, out, options, 1, "energies")

    def refused(*_, **__):
        raise AssertionError("the calibration was repeated")

    monkeypatch.setattr(on_disk, "calibrate_checkpoint", refused)
    moved = text.rename(tmp_path / "moved.txt")
    with pytest.raises(ConfigError, match="num_samples was 4, now 5"):
        compress_checkpoint(tiny, out, **{**options, "text": moved, "num_samples": 5}, resume=True, progress=False)
    (tmp_path / "other.txt").write_text("another text", encoding="utf-8")
    with pytest.raises(ConfigError, match="text was"):
        compress_checkpoint(tiny, out, **{**options, "text": tmp_path / "other.txt"}, resume=True, progress=False)
    kept_file = tmp_path / "kept.safetensors"
    options |= {"text": moved, "save_calibration": kept_file}
    report = compress_checkpoint(tiny, out, **options, resume=True, progress=False)
    assert report.calibrated and kept_file.exists() and not kept(out).exists()
    assert files(out) == files(tmp_path / "whole")


def test_on_the_command_line(source, whole, tmp_path):
    script = """if True:
        import os, signal, sys, threading, time
        from pathlib import Path
        from tqcompressor.cli.main import main
        folder = Path(sys.argv[1])
        def kill():
            while not list(folder.glob("fit-*[0-9]")):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=kill, daemon=True).start()
        main(sys.argv[2:])
    """
    out = tmp_path / "out"
    command = ["compress", str(source), "--out", str(out), "--budget", "0.6", "--effort", "balanced"]
    done = subprocess.run([sys.executable, "-c", script, str(kept(out)), *command], env=environment())
    assert done.returncode == -signal.SIGKILL
    assert cli.main([*command, "--resume", "--seed", "1"]) == 2
    assert cli.main([*command, "--resume"]) == 0
    assert files(out) == whole["budget"]


def test_each_phase_is_told(source, tmp_path):
    calls = []
    compress_checkpoint(
        source, tmp_path / "out", **BUDGETS["fast budget"], progress=lambda *counts: calls.append(counts)
    )
    ends = [i for i, (done, total) in enumerate(calls) if done == total > 0]
    # The plan ends, then what follows it.
    assert len({calls[i][1] for i in ends}) >= 2 and calls[-1][0] == calls[-1][1]
