"""What all benchmarks share: facts of the machine, interleaved timing, a process's memory, runs of a fresh one."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("tqcompressor", "numpy", "scipy", "torch", "transformers", "safetensors", "llama-cpp-python")
# Warnings and bars of transformers, which would stand between the figures.
SILENCE = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
THREAD_VARIABLES = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def machine() -> dict[str, str]:
    """Processor, what the kernels use of it, cores, Python, versions of the peers, and the commit."""
    from tqcompressor import _core

    facts = {"processor": processor(), "instruction set": _core.instruction_set()}
    facts |= {"cores": str(len(os.sched_getaffinity(0))), "python": platform.python_version()}
    for name in PEERS:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    facts["commit"] = git.stdout.strip() or "unknown"
    return facts


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def interleaved_medians(methods: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each method, taken in turns so that a disturbance of the machine hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for method in methods.values():
        method()
    for _ in range(repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def fresh_process(
    arguments: Sequence[str], threads: int | None = None, variables: Mapping[str, str] | None = None
) -> tuple[float, float, str]:
    """Runs `python ARGUMENTS` and returns its wall-clock seconds, peak resident MB and standard output."""
    environment = os.environ | SILENCE | (variables or {})
    if threads is not None:
        environment |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    output = process.stdout.read()
    # Not `wait`, which does not tell this child's peak memory from that of others.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed with status {process.returncode}")
    return seconds, usage.ru_maxrss / 1024, output


def lines_of_fresh_process(arguments: Sequence[str], threads: int) -> list[dict]:
    """Runs `python ARGUMENTS` and returns the lines of JSON that it prints."""
    _, _, output = fresh_process(arguments, threads)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def restart_peak() -> float:
    """Sets this process's peak memory back to what is resident now, which it returns in MB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def resident(field: str, process: int | str = "self") -> float:
    """MB that a process holds (`VmRSS`), or held at most since the peak was restarted (`VmHWM`)."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)
