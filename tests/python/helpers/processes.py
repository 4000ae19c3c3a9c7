"""Running a script in a separate process, where the script controls all imports and their order."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent.parent

# No hub, no progress bars, no effects of the machine's settings.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


def environment(**more):
    """This process's environment variables, with the tests and what it imports itself importable."""
    paths = [str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def run_script(script, *arguments, fails=False, warm=None):
    """Runs `script` (dedented) and returns what it printed; `fails` says that a non-zero exit is expected.

    `warm` says what may be imported before: "torch" and what else this package needs of others, or "transformers", too;
    see `helpers.warm`.
    """
    script, arguments = textwrap.dedent(script), [*map(str, arguments)]
    status, printed = _run_warm(script, arguments, warm) if warm else _run_cold(script, arguments)
    assert (status != 0) == fails, f"exit status {status}\n{printed}"
    return printed


def _run_cold(script, arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def _run_warm(script, arguments, warm):
    server = _warm_server()
    with tempfile.NamedTemporaryFile() as output:
        request = {"script": script, "arguments": arguments, "environment": environment(), "folder": os.getcwd()}
        request["transformers"] = {"torch": False, "transformers": True}[warm]
        server.stdin.write(json.dumps({**request, "output": output.name}) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return status, output.read().decode("utf-8")


@cache
def _warm_server():
    # It ends with this process, which holds the other end of its standard input.
    return subprocess.Popen(
        [sys.executable, "-m", "helpers.warm"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def forked(target, *arguments):
    """Starts `target` in a process that is forked from one that has imported what takes seconds."""
    processes = multiprocessing.get_context("forkserver")
    # Modules that are installed: Python 3.11 leaves out those that only the `sys.path` of this process has.
    processes.set_forkserver_preload(
        [
            "transformers.models.gpt2.modeling_gpt2",
            "tqcompressor.calibration.calibrate",
            "tqcompressor.cli.main",
            "tqcompressor.distillation.runner",
        ]
    )
    process = processes.Process(target=target, args=arguments)
    process.start()
    return process
