"""Compressed layers against dense ones, and the memory's bandwidth: children of the benchmark `inference`."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeVar

from measuring import interleaved_medians

if TYPE_CHECKING:
    import torch

Layer = TypeVar("Layer")

# (inputs, outputs) of GPT-2 small; the head is tied to the embedding.
LAYERS = {"c_fc": (768, 3072), "c_proj": (3072, 768), "head": (768, 50257)}
QUICK_LAYERS = {"c_fc": (96, 384), "c_proj": (384, 96), "head": (96, 512)}
ROWS = (1, 512)
# Bytes that caches do not hold; of those of an array, what two threads take turns with would still fit into large ones.
WEIGHTS, ARRAY, QUICK = 1 << 29, 1 << 28, 1 << 20


def methods(layer: str, shape: tuple[int, int]) -> dict[str, Callable[[], "torch.nn.Module"]]:
    """What makes torch's dense layer, first, and the compressed ones, with random factors and permutations."""
    import torch
    from peers import pifa_rank_within
    from tqcompressor.modules import KroneckerEmbedding, KroneckerHead, KroneckerLinear, LowRankLinear
    from transformers.pytorch_utils import Conv1D

    inputs, outputs = shape
    if layer == "head":
        return {
            "dense": lambda: torch.nn.Linear(inputs, outputs, bias=False),
            "Kronecker, block (1, 4), rank 1": lambda: KroneckerHead(
                shuffled(KroneckerEmbedding(outputs, inputs, (1, 4), 1))
            ),
        }
    block = (2, 4) if layer == "c_fc" else (4, 2)
    rank = pifa_rank_within(shape, inputs * outputs / 2)
    return {
        "dense": lambda: Conv1D(outputs, inputs),
        f"Kronecker, block {block}, rank 4": lambda: shuffled(KroneckerLinear(inputs, outputs, block, 4)),
        f"low rank {rank}": lambda: shuffled(LowRankLinear(inputs, outputs, rank)),
    }


def shuffled(module: "torch.nn.Module") -> "torch.nn.Module":
    import torch

    for permutation in module.buffers():
        permutation.copy_(torch.randperm(len(permutation)))
    return module


def measure_layers(layers: list[str], repeats: int, threads: int, quick: bool) -> Iterator[dict]:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for layer in layers:
        shape = (QUICK_LAYERS if quick else LAYERS)[layer]
        for rows in ROWS:
            x = torch.randn(rows, shape[0])
            made = {name: copies(make, weights, rows, quick) for name, make in methods(layer, shape).items()}
            with torch.inference_mode():
                times = interleaved_medians({name: all_of(modules, x) for name, modules in made.items()}, repeats)
            seconds = {name: times[name] / len(modules) for name, modules in made.items()}
            for name, modules in made.items():
                yield {
                    "layer": f"{layer} {shape[0]}×{shape[1]}",
                    "rows": rows,
                    "method": name,
                    "milliseconds": 1000 * seconds[name],
                    "dense / method": seconds["dense"] / seconds[name],
                    "weights MB": weights(modules[0]) / 2**20,
                }


def copies(make: Callable[[], Layer], size: Callable[[Layer], int], rows: int, quick: bool) -> list[Layer]:
    """For one row as many layers as leave none in the caches until its turn comes again, as in a whole model."""
    first = make()
    more = (QUICK if quick else WEIGHTS) // size(first) if rows == 1 else 0
    return [first, *(make() for _ in range(more))]


def all_of(layers: Sequence[Callable[[Any], object]], x: Any) -> Callable[[], None]:
    def run() -> None:
        for layer in layers:
            layer(x)

    return run


def weights(module: "torch.nn.Module") -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def measure_bandwidth(threads: int, quick: bool) -> dict[str, float]:
    """Bytes a second that all threads together read, or read and write, the best of some passes over large arrays."""
    import numpy as np

    source = np.ones((QUICK if quick else ARRAY) // 8)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    seconds: dict[str, list[float]] = {"read": [], "copy": []}
    with ThreadPoolExecutor(threads) as pool:
        works = {"read": lambda part: part[0].sum(), "copy": lambda part: np.copyto(part[1], part[0])}
        for name, _ in zip(cycle(works), range(2 * 3), strict=False):
            start = time.perf_counter()
            # numpy lets go of the interpreter's lock in both.
            list(pool.map(works[name], parts))
            seconds[name].append(time.perf_counter() - start)
    return {"read": source.nbytes / min(seconds["read"]), "copy": 2 * source.nbytes / min(seconds["copy"])}


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    if "bandwidth" in task:
        print(json.dumps(measure_bandwidth(task["bandwidth"], task["quick"])))
    else:
        print(json.dumps(list(measure_layers(**task))))
