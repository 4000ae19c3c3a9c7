"""A calibration that was stopped goes on with the sums that it had, and ends as one that was not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.families import family_model
from tqcompressor import calibrate, calibrate_checkpoint, compress_checkpoint
from tqcompressor.calibration import partial as saving
from tqcompressor.cli import main as cli
from tqcompressor.errors import CheckpointError, ConfigError, DestinationError
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
TEXT = TINY / "heldout.txt"
READING = {"num_samples": 6, "seq_len": 16}
# Four batches, the last of them smaller.
BATCHES = {"num_samples": 50, "seq_len": 64}


class StoppedError(Exception):
    pass


def stop_after(batches):
    def progress(done, total):
        if done == batches:
            raise StoppedError

    return progress


@pytest.fixture(autouse=True)
def saved_at_every_batch(monkeypatch):
    monkeypatch.setattr(saving, "_SECONDS", 0.0)
    monkeypatch.setattr(saving, "_TIMES", 0.0)


def batches_of(model):
    """Six batches, the last of them with padding."""
    ids = torch.randint(model.config.vocab_size, (12, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, 6:] = 0
    whole = {"input_ids": ids, "attention_mask": mask}
    return [{name: value[first : first + 2] for name, value in whole.items()} for first in range(0, 12, 2)]


def equal(first, second):
    return first.moments.keys() == second.moments.keys() and all(
        np.array_equal(first.moments[name], second.moments[name]) for name in first.moments
    )


@pytest.mark.parametrize("options", [{}, {"sensitivity": False}, {"max_memory": 0}, {"samples": 2, "seed": 5}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "bert", "opt-tied"])
def test_it_ends_as_one_that_was_not_stopped(family, options, tmp_path):
    model = family_model(family)
    batches = batches_of(model)
    whole = calibrate(model, batches, progress=False, **options)
    kept = tmp_path / "sums"
    for stop in (2, 5):
        with pytest.raises(StoppedError):
            calibrate(model, batches, partial=kept, progress=stop_after(stop), **options)
    seen = []
    found = calibrate(model, batches, partial=kept, progress=lambda done, total: seen.append((done, total)), **options)
    assert seen == [(6, 6)] and equal(found, whole)
    assert not kept.exists()


def test_sums_of_something_else_are_refused(tmp_path):
    model, kept = family_model("llama-tied"), tmp_path / "sums"
    batches = batches_of(model)
    with pytest.raises(StoppedError):
        calibrate(model, batches, partial=kept, progress=stop_after(3))
    before = kept.read_bytes()
    other = [{**batches[0], "input_ids": batches[0]["input_ids"] + 1 - 2 * (batches[0]["input_ids"] > 0)}, *batches[1:]]
    others = [
        (model, other, {}),
        (model, batches, {"seed": 1}),
        (model, batches, {"sensitivity": False}),
        (family_model("llama-tied", seed=1), batches, {}),
    ]
    for changed, texts, options in others:
        with pytest.raises(CheckpointError, match="got those of another: remove the file"):
            calibrate(changed, texts, partial=kept, progress=False, **options)
    assert kept.read_bytes() == before
    kept.write_bytes(before[:-8])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        calibrate(model, batches, partial=kept, progress=False)
    with pytest.raises(DestinationError, match="is no folder"):
        calibrate(model, batches, partial=tmp_path / "none" / "sums", progress=False)


def test_compressing_on_a_text_goes_on_with_them(tmp_path):
    options = {"budget": 0.6, "text": TEXT, **BATCHES}
    compress_checkpoint(TINY, tmp_path / "whole", **options, progress=False)
    with pytest.raises(StoppedError):
        compress_checkpoint(TINY, tmp_path / "out", **options, resume=True, progress=stop_after(2))
    assert list(tmp_path.glob(".out.*resume/sums.safetensors"))
    seen = []
    compress_checkpoint(TINY, tmp_path / "out", **options, resume=True, progress=lambda done, total: seen.append(done))
    assert seen[0] == 3
    assert not list(tmp_path.glob(".out.*/*"))
    whole, out = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert out.read_bytes() == whole.read_bytes()


def test_on_the_command_line(tmp_path, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32"), AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(StoppedError):
        calibrate(model, tokenizer, TEXT, **BATCHES, partial=tmp_path / "sums", progress=stop_after(1))
    command = ["calibrate", str(TINY), "--text", str(TEXT), "--num-samples", "50", "--seq-len", "64"]
    assert cli.main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert cli.main([*command, "--out", str(tmp_path / "found"), "--partial", str(tmp_path / "sums")]) == 0
    assert (tmp_path / "found").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "sums").exists()


def test_the_native_engine_has_none(tmp_path):
    with pytest.raises(ConfigError, match=r"partial .*not an option with the native engine"):
        calibrate_checkpoint(TINY, TEXT, **READING, engine="native", partial=tmp_path / "sums")
