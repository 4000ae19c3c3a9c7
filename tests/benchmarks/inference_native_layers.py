"""The native runtime's layers one by one: by the factors, by the matrix, and by what its cost model chooses.

A child of the benchmark `inference`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from inference_layers import LAYERS, QUICK, QUICK_LAYERS, WEIGHTS
from measuring import interleaved_medians
from tqcompressor import _core

ROWS = (1, 16, 64, 128, 256, 512)
BLOCKS = {"c_fc": ((2, 4), 4), "c_proj": ((4, 2), 4), "head": ((4, 1), 1)}
WAYS = ("factors", "matrix", "cheapest")


def measure_native_layers(layers: list[str], repeats: int, threads: int, quick: bool) -> Iterator[dict]:
    """One row a layer and number of rows: milliseconds dense and in every way, and what the choice costs."""
    workers = _core.Threads(threads)
    for layer in layers:
        inputs, outputs = (QUICK_LAYERS if quick else LAYERS)[layer]
        rng = np.random.default_rng(0)
        for rows in ROWS:
            x = rng.standard_normal((rows, inputs), dtype=np.float32)
            dense = copies(partial(dense_layer, rng, inputs, outputs), inputs * outputs, rows, quick)
            factored, parameters = kronecker_layers(rng, layer, inputs, outputs, rows, quick)
            calls = {"dense": (dense, "cheapest")} | {way: (factored, way) for way in WAYS}
            times = interleaved_medians(
                {name: all_of(made, x, way, workers) for name, (made, way) in calls.items()}, repeats
            )
            seconds = {name: times[name] / len(made) for name, (made, _) in calls.items()}
            yield {
                "native layer": f"{layer} {inputs}×{outputs}",
                "rows": rows,
                **{f"{name} ms": 1000 * seconds[name] for name in calls},
                "dense / chosen": seconds["dense"] / seconds["cheapest"],
                "chosen / better": seconds["cheapest"] / min(seconds["factors"], seconds["matrix"]),
                "dense GB/s": 4 * inputs * outputs / seconds["dense"] / 1e9,
                "factors GB/s": 4 * parameters / seconds["factors"] / 1e9,
            }


def dense_layer(rng: np.random.Generator, inputs: int, outputs: int) -> Any:
    return _core.Layer.dense(rng.standard_normal((inputs, outputs), dtype=np.float32))


def kronecker_layers(
    rng: np.random.Generator, layer: str, inputs: int, outputs: int, rows: int, quick: bool
) -> tuple[list[Any], int]:
    """Layers with random factors and permutations, and the parameters of each."""
    (m2, n2), rank = BLOCKS[layer]
    a_shape, b_shape = (rank, inputs // m2, outputs // n2), (rank, m2, n2)

    def make() -> Any:
        factors = (rng.standard_normal(shape, dtype=np.float32) for shape in (a_shape, b_shape))
        # As in the recipe, tokens keep their order.
        order = np.arange(outputs) if layer == "head" else rng.permutation(outputs)
        return _core.Layer.kronecker(*factors, rng.permutation(inputs), order)

    parameters = int(np.prod(a_shape) + np.prod(b_shape))
    return copies(make, parameters, rows, quick), parameters


def copies(make: Callable[[], Any], parameters: int, rows: int, quick: bool) -> list[Any]:
    """For one row as many layers as leave none in the caches until its turn comes again, as in a whole model."""
    more = (QUICK if quick else WEIGHTS) // (4 * parameters) if rows == 1 else 0
    return [make() for _ in range(1 + more)]


def all_of(layers: list[Any], x: np.ndarray, way: str, workers: Any) -> Callable[[], None]:
    def run() -> None:
        for layer in layers:
            layer.times(x, way, workers)

    return run


if __name__ == "__main__":
    print(json.dumps(list(measure_native_layers(**json.loads(sys.argv[1])))))
