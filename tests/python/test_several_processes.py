"""Training on two processes: the losses are those of one process with batches twice as large."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.models import tiny_model
from helpers.processes import ENVIRONMENT, TESTS
from helpers.tokenizer import save_tokenizer
from test_distillation import letters

SCRIPT = TESTS / "helpers" / "train_script.py"


def launch(launcher, folder, out, batch_size):
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), str(out), str(batch_size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "training_report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    # Without dropout, whose random numbers differ between one process and two.
    tiny_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(folder / "teacher")
    save_tokenizer(folder / "teacher")
    (folder / "text.txt").write_text(letters(5000), encoding="utf-8")
    return folder, launch([], folder, folder / "one", 8)


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
ACCELERATE = (
    "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
    "--main_process_port 0"
)


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(launcher, one_process, tmp_path):
    folder, expected = one_process
    found = launch(launcher.split(), folder, tmp_path / "two", 4)
    assert found["settings"]["processes"] == 2
    for one, two in zip(expected["stages"], found["stages"], strict=True):
        assert one["tokens"] == two["tokens"] and len(one["losses"]) == len(two["losses"]) >= 8
        curve, other = (torch.tensor([record["loss"] for record in stage["losses"]]) for stage in (one, two))
        assert torch.allclose(curve, other, rtol=1e-3, atol=0), (curve, other)
        assert abs(one["trained"]["perplexity"] / two["trained"]["perplexity"] - 1) < 1e-3
