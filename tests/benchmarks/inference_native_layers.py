"""The native runtime's layers one by one: by the factors, by the matrix, and by what its cost model chooses.

A child of the benchmark `inference`.
"""

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from inference_layers import LAYERS, QUICK_LAYERS, all_of, copies
from measuring import interleaved_medians
from tqcompressor import _core

ROWS = (1, 16, 64, 128, 256, 512)
BLOCKS = {"c_fc": ((2, 4), 4), "c_proj": ((4, 2), 4), "head": ((4, 1), 1)}
WAYS = ("factors", "matrix", "cheapest")


def measure_native_layers(layers: list[str], repeats: int, threads: int, quick: bool) -> Iterator[dict]:
    """One row a layer and number of rows: milliseconds dense and in every way, and what the choice costs."""
    workers = _core.Threads(threads)
    for layer in layers:
        yield from measure_native_layer(layer, (QUICK_LAYERS if quick else LAYERS)[layer], repeats, workers, quick)


def measure_native_layer(
    layer: str, shape: tuple[int, int], repeats: int, workers: _core.Threads, quick: bool
) -> Iterator[dict]:
    inputs, outputs = shape
    rng = np.random.default_rng(0)
    # Bytes that a row of each reads.
    factors = sum(math.prod(shape) for shape in factor_shapes(layer, inputs, outputs))
    weights = {"dense": 4 * inputs * outputs, "factors": 4 * factors}
    for rows in ROWS:
        x = rng.standard_normal((rows, inputs), dtype=np.float32)
        dense = copies(partial(dense_layer, rng, inputs, outputs), lambda _: weights["dense"], rows, quick)
        factored = copies(
            partial(kronecker_layer, rng, layer, inputs, outputs), lambda _: weights["factors"], rows, quick
        )
        calls = {"dense": (dense, "cheapest")} | {way: (factored, way) for way in WAYS}
        times = interleaved_medians(
            {
                name: all_of([partial(one.times, way=way, threads=workers) for one in made], x)
                for name, (made, way) in calls.items()
            },
            repeats,
        )
        seconds = {name: times[name] / len(made) for name, (made, _) in calls.items()}
        yield {
            "native layer": f"{layer} {inputs}×{outputs}",
            "rows": rows,
            **{f"{name} ms": 1000 * seconds[name] for name in calls},
            "dense / chosen": seconds["dense"] / seconds["cheapest"],
            "chosen / better": seconds["cheapest"] / min(seconds["factors"], seconds["matrix"]),
            "dense GB/s": weights["dense"] / seconds["dense"] / 1e9,
            "factors GB/s": weights["factors"] / seconds["factors"] / 1e9,
        }


def dense_layer(rng: np.random.Generator, inputs: int, outputs: int) -> Any:
    return _core.Layer.dense(rng.standard_normal((inputs, outputs), dtype=np.float32))


def kronecker_layer(rng: np.random.Generator, layer: str, inputs: int, outputs: int) -> Any:
    """A layer with random factors and permutations."""
    factors = (rng.standard_normal(shape, dtype=np.float32) for shape in factor_shapes(layer, inputs, outputs))
    # As in the recipe, tokens keep their order.
    order = np.arange(outputs) if layer == "head" else rng.permutation(outputs)
    return _core.Layer.kronecker(*factors, rng.permutation(inputs), order)


def factor_shapes(layer: str, inputs: int, outputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    (m2, n2), rank = BLOCKS[layer]
    return (rank, inputs // m2, outputs // n2), (rank, m2, n2)


if __name__ == "__main__":
    print(json.dumps(list(measure_native_layers(**json.loads(sys.argv[1])))))
