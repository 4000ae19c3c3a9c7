"""Runs killed at random moments: what has its final name is whole, and the next run works.

`pytest -m long tests/python/test_kills.py` kills each command 30 times.
"""

import json
import random
import shutil
import time

import numpy as np
import pytest
import torch
from helpers.checkpoints import Checkpoint, config
from helpers.distillation import RECIPE, letters
from helpers.models import tiny_model
from helpers.processes import forked
from helpers.tokenizer import save_tokenizer
from safetensors.numpy import load_file
from tqcompressor import Calibration, cache_teacher, compress_checkpoint, distill, token_blocks
from tqcompressor.cli import main as cli
from tqcompressor.distillation.artifacts import COMPLETE
from tqcompressor.distillation.config import TrainingConfig
from tqcompressor.distillation.teacher_cache import CachedTeacher
from transformers import AutoModelForCausalLM, AutoTokenizer

CONFIG = config({"h.*.mlp.*": ((2, 4), 2, "both"), "h.*.attn.*": ((2, 4), 2, "rows")}, effort="fast")


def compress(folder, out):
    # Over its own result, from the second run on.
    compress_checkpoint(folder / "dense", out / "compressed", CONFIG, overwrite=True)


def calibrate(folder, out):
    text = ["--text", str(folder / "text.txt"), "--num-samples", "64", "--seq-len", "32"]
    assert cli.main(["calibrate", str(folder / "teacher"), *text, "--out", str(out / "moments.safetensors")]) == 0


def cache(folder, out):
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    blocks = token_blocks(folder / "text.txt", AutoTokenizer.from_pretrained(folder / "teacher"), 32, cache=out)
    cache_teacher(teacher, blocks, out / "teacher.safetensors", k=50, batch_size=1)


def distillation(folder, out):
    training = TrainingConfig(batch_size=4, save_steps=2)
    options = {"recipe": RECIPE.stages[2].config, "tokens": 384, "training": training, "device": "cpu", "resume": True}
    distill(folder / "teacher", text=folder / "text.txt", out=out / "student", cache=out / "cache", **options)


JOBS = {"compress": compress, "calibrate": calibrate, "cache_teacher": cache, "distill": distillation}


def work(name, folder, out):
    torch.set_num_threads(1)
    begun = time.perf_counter()
    JOBS[name](folder, out)
    # Without the imports.
    (folder / f"{name}.seconds").write_text(str(time.perf_counter() - begun))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    Checkpoint(layers=4, width=128, vocabulary=300).write(folder / "dense")
    save_tokenizer(folder / "teacher")
    tiny_model().save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text(letters(6000), encoding="utf-8")
    return folder


def finished(name, folder, out):
    process = forked(work, name, folder, out)
    process.join(300)
    assert process.exitcode == 0
    assert_whole(out)
    # Of a cache that was complete when its writer was killed, the empty lock may be left beside it.
    left = {path for path in out.rglob(".*.lock") if "student" not in path.parts}
    found = set(out.rglob("*")) - left
    assert not [path for path in found if path.name.startswith(".")]
    return {path.relative_to(out) for path in found}


def assert_whole(out):
    """Every file under its final name can be read; a folder has all of its files."""
    for path in out.rglob("*"):
        inside = path.relative_to(out).parts
        state = next((out.joinpath(*inside[: i + 1]) for i, part in enumerate(inside) if "checkpoint-" in part), None)
        if path.is_dir() or any(part.startswith(".") for part in inside):
            continue
        if state is not None and not (state / COMPLETE).exists():
            # The trainer's, which a resumed run does not read without this mark.
            continue
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".npy":
            np.load(path)
    for folder, last in (("compressed", "compression_report.json"), ("student/stages/*/*ed", "stage.json")):
        for found in out.glob(folder):
            assert (found / last).exists() and (found / "model.safetensors").exists(), found
    if (found := out / "moments.safetensors").exists():
        Calibration.load(found)
    if (found := out / "teacher.safetensors").exists():
        CachedTeacher.open(found)


def killed(name, folder, out, seconds):
    """Kills a run after so many seconds; whether it was alive then."""
    process = forked(work, name, folder, out)
    process.join(seconds)
    alive = process.is_alive()
    process.kill()
    process.join()
    if out.exists():
        assert_whole(out)
    return alive


def kill_at_random(name, inputs, tmp_path, moments, between):
    """Kills runs at random moments, and finishes one after every `between` of them."""
    whole = finished(name, inputs, tmp_path / "whole")
    seconds = float((inputs / f"{name}.seconds").read_text())
    generator = random.Random(name)
    alive = 0
    for number in range(1, moments + 1):
        alive += killed(name, inputs, tmp_path / "out", generator.uniform(0, 0.9 * seconds))
        if number % between == 0:
            assert finished(name, inputs, tmp_path / "out") == whole
            if number % (2 * between) == 0:
                # Half of the runs begin anew, the others beside a result.
                shutil.rmtree(tmp_path / "out")
    assert alive >= moments // 3


@pytest.mark.parametrize("name", JOBS)
def test_a_few_moments(name, inputs, tmp_path):
    moments = 2 if name == "distill" else 3
    kill_at_random(name, inputs, tmp_path, moments, moments)


@pytest.mark.long
@pytest.mark.parametrize("name", JOBS)
def test_thirty_moments(name, inputs, tmp_path):
    kill_at_random(name, inputs, tmp_path, 30, 1)
