"""Interrupted, killed and concurrent runs: the destination is absent, complete or unchanged."""

import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from helpers.checkpoints import Checkpoint, config
from tqcompressor import errors
from tqcompressor.compression.checkpoint import compress_checkpoint

LONG = config({"h.*.mlp.*": ((2, 4), 4, "both"), "h.*.attn.*": ((2, 4), 4, "both")}, effort="best")
SCRIPT = """
    import json, os, signal, sys, threading, time
    from pathlib import Path
    from tqcompressor import compress_checkpoint

    source, destination, config, action = sys.argv[1:]
    partial = Path(destination).parent / f".{Path(destination).name}.tqcompressor-partial"

    def interrupt():
        while not (partial / "model.safetensors").exists():
            time.sleep(0.005)
        time.sleep(0.2)
        sent.append(time.process_time())
        os.kill(os.getpid(), getattr(signal, action))

    sent = []
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        compress_checkpoint(source, destination, json.loads(config))
    except KeyboardInterrupt:
        print(time.process_time() - sent[0])
        sys.exit(130)
"""


def interrupted(tmp_path, action):
    source = Checkpoint(layers=4, width=128, vocabulary=300).write(tmp_path / "in")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    arguments = [str(source), str(tmp_path / "out"), json.dumps(LONG), action]
    return subprocess.run(command + arguments, capture_output=True, text=True, timeout=300)


def test_ctrl_c_stops_soon_and_leaves_nothing(tmp_path):
    run = interrupted(tmp_path, "SIGINT")
    assert run.returncode == 130, run.stderr
    # Seconds of CPU time, of all threads: a loaded machine does not change them.
    assert float(run.stdout) < 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM"])
def test_a_killed_run_leaves_no_destination_and_the_next_one_cleans_up(tmp_path, signal_name):
    run = interrupted(tmp_path, signal_name)
    assert run.returncode == -getattr(signal, signal_name), run.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.tqcompressor-partial").exists()
    compress_checkpoint(tmp_path / "in", tmp_path / "out", config({"wte": ((1, 4), 1, "columns")}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_killed_overwrite_leaves_the_old_checkpoint(tmp_path):
    source = Checkpoint(layers=4, width=128, vocabulary=300).write(tmp_path / "in")
    compress_checkpoint(source, tmp_path / "out", config({"wte": ((1, 4), 1, "columns")}))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    script = textwrap.dedent(SCRIPT).replace("json.loads(config))", "json.loads(config), overwrite=True)")
    arguments = [str(source), str(tmp_path / "out"), json.dumps(LONG), "SIGKILL"]
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_two_runs_at_once_do_not_mix(tmp_path):
    source = Checkpoint(layers=4, width=128, vocabulary=300).write(tmp_path / "in")
    script = """
        import json, sys
        from tqcompressor import compress_checkpoint

        compress_checkpoint(*sys.argv[1:3], json.loads(sys.argv[3]))
    """
    arguments = [str(source), str(tmp_path / "out"), json.dumps(LONG)]
    first = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), *arguments])
    try:
        partial = tmp_path / ".out.tqcompressor-partial" / "model.safetensors"
        deadline = time.monotonic() + 60
        while not partial.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        with pytest.raises(errors.DestinationError, match="another run"):
            compress_checkpoint(source, tmp_path / "out", config({"wte": ((1, 4), 1, "columns")}))
        assert partial.exists()
    finally:
        first.kill()
        first.wait()
