"""Import time of tqcompressor beyond numpy's own, in fresh processes."""

import argparse
import statistics
from collections.abc import Iterator

from measuring import fresh_process

CODE = """
import sys, time
start = time.perf_counter()
import numpy
middle = time.perf_counter()
import tqcompressor
end = time.perf_counter()
print(middle - start, end - middle, "torch" in sys.modules)
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=15)


def run(options: argparse.Namespace) -> Iterator[dict]:
    lines = [fresh_process(["-c", CODE])[2].split() for _ in range(options.repeats)]
    for index, name in enumerate(("numpy", "tqcompressor beyond numpy")):
        times = sorted(1000 * float(line[index]) for line in lines)
        yield {"import": name, "median ms": statistics.median(times), "fastest ms": times[0], "slowest ms": times[-1]}
    if any(line[2] == "True" for line in lines):
        raise SystemExit("torch was imported")
