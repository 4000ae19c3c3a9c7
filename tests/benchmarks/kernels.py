"""Times of the kernels against numpy and torch: nearest Kronecker sum, and applying it; on one thread and on all.

The methods take turns within one process, after one run each that does not count; the figures are medians. `ratio` is
how many times longer a method takes than ours.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from measuring import fresh_process, interleaved_medians

# (rows, columns, block, rank): feed-forward, attention, a large block, and the token embedding of GPT-2 small.
SHAPES = [
    (768, 3072, (2, 4), 4),
    (768, 768, (2, 1), 1),
    (768, 768, (24, 32), 16),
    (768, 768, (1, 768), 96),
    (50257, 768, (1, 4), 1),
]
QUICK_SHAPES = [(96, 128, (2, 4), 4), (64, 64, (1, 64), 8)]
BATCHES = (1, 128)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, nargs="*", default=sorted({1, len(os.sched_getaffinity(0))}), metavar="N"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")


def run(options: argparse.Namespace) -> Iterator[dict]:
    for threads in options.threads:
        # Thread pools are sized once in a process, so each count gets its own.
        _, _, output = fresh_process([__file__, str(options.repeats), str(int(options.quick))], threads)
        yield from ({"threads": threads} | json.loads(line) for line in output.splitlines())


def decomposition_methods(w: np.ndarray, block: tuple[int, int], rank: int) -> dict[str, Callable[[], object]]:
    import torch
    from tqcompressor import KroneckerSpec, nearest_kronecker_sum

    (m, n), (m2, n2) = w.shape, block
    shared = torch.from_numpy(w)

    def blocks() -> np.ndarray:
        return w.reshape(m // m2, m2, n // n2, n2).transpose(0, 2, 1, 3).reshape(-1, m2 * n2)

    def blocks_in_torch() -> "torch.Tensor":
        return shared.reshape(m // m2, m2, n // n2, n2).permute(0, 2, 1, 3).reshape(-1, m2 * n2)

    def numpy_svd() -> object:
        u, s, v = np.linalg.svd(blocks(), full_matrices=False)
        return u[:, :rank] * np.sqrt(s[:rank]), v[:rank]

    def numpy_gram() -> object:
        r = blocks()
        vectors = np.linalg.eigh(r.T @ r)[1][:, -rank:]
        return r @ vectors, vectors

    def torch_svd() -> object:
        u, s, v = torch.linalg.svd(blocks_in_torch(), full_matrices=False)
        return u[:, :rank] * s[:rank].sqrt(), v[:rank]

    def torch_gram() -> object:
        r = blocks_in_torch()
        vectors = torch.linalg.eigh(r.T @ r)[1][:, -rank:]
        return r @ vectors, vectors

    return {
        "tqcompressor": lambda: nearest_kronecker_sum(w, KroneckerSpec(block=block, rank=rank)),
        "numpy thin SVD": numpy_svd,
        "numpy Gram": numpy_gram,
        "torch thin SVD": torch_svd,
        "torch Gram": torch_gram,
    }


def apply_methods(w: np.ndarray, block: tuple[int, int], rank: int, batch: int) -> dict[str, Callable[[], object]]:
    from tqcompressor import KroneckerSpec, decompose

    # Permuted, so that the gathers are in the time; the search itself is not what is measured here.
    kronecker = decompose(w, KroneckerSpec(block=block, rank=rank, permute="both"), effort="fast")
    x = np.random.default_rng(1).standard_normal((batch, w.shape[0]), dtype=np.float32)
    a, b = np.asarray(kronecker.a), np.asarray(kronecker.b)
    (m2, n2), (m1, n1) = b.shape[1:], a.shape[1:]

    def contraction() -> object:
        return np.einsum("zij,kia,kjb->zab", x.reshape(batch, m1, m2), a, b, optimize=True).reshape(batch, n1 * n2)

    return {
        "tqcompressor": lambda: kronecker.apply(x),
        "numpy dense": lambda: x @ w,
        "numpy einsum, unpermuted": contraction,
    }


def measure(repeats: int, quick: bool) -> Iterator[dict]:
    generator = np.random.default_rng(0)
    for m, n, block, rank in QUICK_SHAPES if quick else SHAPES:
        w = generator.standard_normal((m, n), dtype=np.float32)
        shape = f"{m}×{n} block {block} rank {rank}"
        times = interleaved_medians(decomposition_methods(w, block, rank), repeats)
        yield from rows("nearest Kronecker sum", shape, times)
        # The embedding is never applied as a map of its rows.
        for batch in BATCHES if m < 10_000 else ():
            times = interleaved_medians(apply_methods(w, block, rank, batch), repeats)
            yield from rows(f"apply, batch {batch}", shape, times)


def rows(operation: str, shape: str, times: dict[str, float]) -> Iterator[dict]:
    ours = times["tqcompressor"]
    for method, seconds in times.items():
        yield {
            "operation": operation,
            "shape": shape,
            "method": method,
            "milliseconds": 1000 * seconds,
            "ratio": seconds / ours,
        }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    for result in measure(int(sys.argv[1]), bool(int(sys.argv[2]))):
        print(json.dumps(result), flush=True)
