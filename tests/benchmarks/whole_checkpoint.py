"""A whole checkpoint by the command line, each run in a fresh process: seconds, peak memory, parameters, equal bytes.

The checkpoint is `GPT2LMHeadModel(GPT2Config())` (GPT-2 small, 124,439,808 parameters) with random weights: counts,
times and memory are real, lost energies mean nothing. `load` is what `from_pretrained` takes beyond an interpreter that
has imported torch and transformers, and the peak includes a first pass over all weights.

`--llama LAYERS` compresses a Llama-shaped checkpoint of that many layers instead, of 1.1 billion parameters with 22, by
a budget of 0.65: a run that is killed, its resumption, and a run in one go, which must write the same bytes.
"""

import argparse
import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measuring import fresh_process

MAKE = """
import sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
width, layers, vocabulary = map(int, sys.argv[2:5])
dtype = getattr(torch, sys.argv[5] if len(sys.argv) > 5 else "float32")
config = GPT2Config(n_embd=width, n_layer=layers, vocab_size=vocabulary)
GPT2LMHeadModel(config).to(dtype).save_pretrained(sys.argv[1])
"""
# Reports itself: the peak of the process would also hold that of the imports.
LOAD = """
import gc, re, sys, time
import torch, transformers, tqcompressor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
token = torch.tensor([[0]])
with torch.inference_mode():
    # A first model of no size, so that what is imported and allocated once is not counted.
    GPT2LMHeadModel(GPT2Config(n_embd=2, n_layer=1, n_head=1, vocab_size=2, n_positions=2))(token)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = kilobytes("VmRSS")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    seconds = time.perf_counter() - start
    model(token)  # weights are mapped from the file: only now are they all in memory
print(seconds, (kilobytes("VmHWM") - before) / 1024)
"""
COMPRESS = """
import sys
from tqcompressor.cli.main import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(status)
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--efforts", nargs="*", default=["fast", "balanced", "best"])
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, 2, 4, cores}), metavar="N")
    parser.add_argument(
        "--all-threads", action="store_true", help="every thread count at every effort, not at fast alone"
    )
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[0.65], help="by effort fast, in the Frobenius norm"
    )
    parser.add_argument("--llama", type=int, metavar="LAYERS", help="the Llama-shaped checkpoint, in bfloat16 shards")
    parser.add_argument("--folder", type=Path, help="for the files of --llama: 8 GB with 22 layers")
    parser.add_argument("--quick", action="store_true", help="a small checkpoint, to see that it runs")


def run(options: argparse.Namespace) -> Iterator[dict]:
    if options.llama is not None:
        import large_checkpoint

        yield from large_checkpoint.run(options)
        return
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense"
        fresh_process(["-c", MAKE, str(source), *(("96", "2", "512") if options.quick else ("768", "12", "50257"))])
        yield {"checkpoint": "GPT2Config()", "parameters": parameters(source), "bytes": weights_size(source)}
        out = source
        for effort in options.efforts:
            hashes = set()
            every = options.all_threads or effort == "fast"
            for threads in options.threads if every else [cores]:
                out = Path(folder) / f"{effort}-{threads}"
                arguments = ["compress", str(source), "--recipe", "tq-81m", "--out", str(out), "--json"]
                arguments += ["--effort", effort, "--threads", str(threads)]
                seconds, peak, output = fresh_process(["-c", COMPRESS, *arguments])
                hashes.add(digest(out))
                yield {
                    "effort": effort,
                    "threads": threads,
                    "seconds": seconds,
                    "peak MB": peak,
                    "parameters": parameters(out),
                    "reported parameters": json.loads(output)["parameters_after"],
                    "bytes": weights_size(out),
                    "hash": digest(out)[:12],
                }
            if len(hashes) > 1:
                raise SystemExit(f"effort {effort}: the bytes depend on the number of threads")
        for budget in options.budgets:
            arguments = ["--budget", str(budget), "--json", "--threads", str(cores)]
            seconds, peak, _ = fresh_process(["-c", COMPRESS, "inspect", str(source), *arguments])
            yield {"plan of budget": budget, "threads": cores, "seconds": seconds, "peak MB": peak}
            small = Path(folder) / f"budget-{budget}"
            command = ["compress", str(source), "--out", str(small), *arguments]
            seconds, peak, _ = fresh_process(["-c", COMPRESS, *command])
            row = {"budget": budget, "threads": cores, "seconds": seconds, "peak MB": peak}
            yield row | {"parameters": parameters(small), "bytes": weights_size(small)}
        for name, path in (("dense", source), ("compressed", out)):
            seconds, extra = map(float, fresh_process(["-c", LOAD, str(path)])[2].split()[-2:])
            yield {"load": name, "seconds": seconds, "extra MB": extra, "weights MB": weights_size(path) / 2**20}


def headers(folder: Path) -> Iterator[dict]:
    """The safetensors headers, read by hand: a count that does not rest on the code that is measured."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            yield json.loads(file.read(length))


def parameters(folder: Path) -> int:
    """Elements of all floating-point tensors."""
    tensors = [tensor for header in headers(folder) for name, tensor in header.items() if name != "__metadata__"]
    return sum(math.prod(tensor["shape"]) for tensor in tensors if tensor["dtype"] in ("F32", "F16", "BF16"))


def weights_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def digest(folder: Path) -> str:
    """Of all files but the report, which holds times."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name not in ("compression_report.json", "README.md"):
            total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()
