"""Training in two processes gives the losses of one process with batches twice as large."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.distillation import letters
from helpers.models import tiny_model
from helpers.processes import TESTS, environment
from helpers.tokenizer import save_tokenizer
from helpers.train_script import train

SCRIPT = TESTS / "helpers" / "train_script.py"


def launch(launcher, folder, out, batch_size):
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), str(out), str(batch_size)]
    done = subprocess.run(
        command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return report(out)


def report(out):
    return json.loads((out / "training_report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    # No dropout: its random numbers differ between one process and two.
    tiny_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(folder / "teacher")
    save_tokenizer(folder / "teacher")
    (folder / "text.txt").write_text(letters(9000), encoding="utf-8")
    train(folder, folder / "one", 8)
    return folder, report(folder / "one")


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
# On the CPU without MPI, accelerate launches one process, whatever --num_processes says.
ACCELERATE = "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no"


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        pytest.param(TORCHRUN, 2, id="torchrun"),
        # The same script under a launcher that imports torch once more.
        pytest.param(f"{ACCELERATE} --dynamo_backend no", 1, id="accelerate", marks=pytest.mark.long),
    ],
)
def test_the_losses_equal_those_of_one_process_with_the_same_total_batch(launcher, processes, one_process, tmp_path):
    folder, expected = one_process
    found = launch(launcher.split(), folder, tmp_path / "launched", 8 // processes)
    assert found["settings"]["processes"] == processes
    for one, other in zip(expected["stages"], found["stages"], strict=True):
        assert one["tokens"] == other["tokens"] and len(one["losses"]) == len(other["losses"]) >= 8
        curve, launched = (torch.tensor([record["loss"] for record in stage["losses"]]) for stage in (one, other))
        assert torch.allclose(curve, launched, rtol=1e-3, atol=0), (curve, launched)
        assert abs(one["trained"]["score"] / other["trained"]["score"] - 1) < 1e-3
