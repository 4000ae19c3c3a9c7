"""Lost energy and time of every permutation search, matrix by matrix, then the means.

Times are those of the search and of the decomposition after it.

Peers in numpy and scipy: no permutation, the best of 8 random ones, alternating assignment from the identity, sorting
by norm, sorting by norm then alternating assignment; and the truncated SVD with as many parameters, which is no
Kronecker sum. The lost energy of our results is computed by numpy from the reconstructed matrix, not taken from the
library.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from measuring import ROOT
from safetensors.numpy import load_file
from scipy.optimize import linear_sum_assignment
from tqcompressor import KroneckerSpec, decompose

GPT2_ATTENTION = ROOT.parent / "shared" / "data" / "gpt2-small-attention" / "layers-0-5-11.safetensors"
TINY = ROOT / "tests" / "data" / "tiny-gpt2" / "model.safetensors"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, default=GPT2_ATTENTION if GPT2_ATTENTION.exists() else TINY, metavar="FILE"
    )
    parser.add_argument("--block", type=int, nargs=2, default=(2, 4), metavar=("M2", "N2"))
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--efforts", nargs="*", default=["fast", "balanced", "best"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only the first so many matrices")
    parser.add_argument("--no-peers", action="store_true", help="our own efforts only")


def run(options: argparse.Namespace) -> Iterator[dict]:
    block, rank = tuple(options.block), options.rank
    rows: list[dict] = []
    for name, w in list(matrices(options.data, block))[: options.limit]:
        for method, search in {} if options.no_peers else PEERS.items():
            start = time.perf_counter()
            p, q = search(w, block, rank)
            near = kronecker_sum(w[p][:, q], block, rank)
            seconds = time.perf_counter() - start
            rows.append(row(name, method, lost_energy(w[p][:, q], near), seconds))
            yield rows[-1]
        if not options.no_peers:
            start = time.perf_counter()
            approximation = truncated_svd(w, block, rank)
            seconds = time.perf_counter() - start
            rows.append(row(name, "truncated SVD", lost_energy(w, approximation), seconds))
            yield rows[-1]
        for effort in options.efforts:
            start = time.perf_counter()
            result = decompose(w, KroneckerSpec(block=block, rank=rank), effort=effort, seed=options.seed)
            seconds = time.perf_counter() - start
            rows.append(row(name, f"tqcompressor {effort}", lost_energy(w, result.reconstruct()), seconds))
            yield rows[-1]
    for method in dict.fromkeys(entry["method"] for entry in rows):
        entries = [entry for entry in rows if entry["method"] == method]
        yield {
            "mean over the matrices": method,
            "lost energy": float(np.mean([entry["lost energy"] for entry in entries])),
            "worst": max(entry["lost energy"] for entry in entries),
            "seconds a matrix": float(np.mean([entry["seconds"] for entry in entries])),
        }


def row(name: str, method: str, lost: float, seconds: float) -> dict:
    return {"matrix": name, "method": method, "lost energy": lost, "seconds": seconds}


def matrices(path: Path, block: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    """The weight matrices that the block divides, in float32; embeddings left out."""
    for name, tensor in load_file(path).items():
        embedding = "wte" in name or "wpe" in name
        if tensor.ndim == 2 and not embedding and not any(np.remainder(tensor.shape, block)):
            yield name.removesuffix(".weight").removeprefix("transformer."), tensor.astype(np.float32)


def lost_energy(w: np.ndarray, approximation: np.ndarray) -> float:
    w = w.astype(np.float64)
    return float(((w - approximation) ** 2).sum() / (w**2).sum())


def kronecker_sum(w: np.ndarray, block: tuple[int, int], rank: int) -> np.ndarray:
    """The nearest Kronecker sum as a dense matrix: the rows of `r` are the blocks of `w`."""
    (m, n), (m2, n2) = w.shape, block
    r = w.reshape(m // m2, m2, n // n2, n2).transpose(0, 2, 1, 3).reshape(-1, m2 * n2)
    vectors = np.linalg.eigh(r.T @ r)[1][:, -rank:]
    near = (r @ vectors) @ vectors.T
    return near.reshape(m // m2, n // n2, m2, n2).transpose(0, 2, 1, 3).reshape(m, n)


def truncated_svd(w: np.ndarray, block: tuple[int, int], rank: int) -> np.ndarray:
    """The truncated SVD that spends at most the parameters of the Kronecker sum."""
    (m, n), (m2, n2) = w.shape, block
    kept = rank * (m * n // (m2 * n2) + m2 * n2) // (m + n)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u[:, :kept] * s[:kept]) @ v[:kept]


def no_permutation(w: np.ndarray, block: tuple[int, int], rank: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(w.shape[0]), np.arange(w.shape[1])


def best_of_8_random(w: np.ndarray, block: tuple[int, int], rank: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    pairs = [(generator.permutation(w.shape[0]), generator.permutation(w.shape[1])) for _ in range(8)]

    def lost(pair: tuple[np.ndarray, np.ndarray]) -> float:
        permuted = w[pair[0]][:, pair[1]]
        return lost_energy(permuted, kronecker_sum(permuted, block, rank))

    return min(pairs, key=lost)


def norm_sorted(w: np.ndarray, block: tuple[int, int], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """By descending norm, dealt out phase by phase: the t-th row goes to `(t mod m1)·m2 + t div m1`."""
    (m, n), (m2, n2) = w.shape, block
    p = np.argsort(-(w**2).sum(1)).reshape(m2, m // m2).T.ravel()
    q = np.argsort(-(w**2).sum(0)).reshape(n2, n // n2).T.ravel()
    return p, q


def assigned(
    w: np.ndarray, block: tuple[int, int], rank: int, start: Callable = no_permutation
) -> tuple[np.ndarray, np.ndarray]:
    """Alternating linear assignment (scipy) and refit, until it gains less than 1e-7."""
    p, q = start(w, block, rank)
    last = np.inf
    for _ in range(12):
        near = kronecker_sum(w[p][:, q], block, rank)
        lost = lost_energy(w[p][:, q], near)
        if last - lost < 1e-7:
            break
        last = lost
        if block[0] > 1:
            p = linear_sum_assignment(-(near @ w[:, q].T))[1]
            near = kronecker_sum(w[p][:, q], block, rank)
        if block[1] > 1:
            q = linear_sum_assignment(-(near.T @ w[p]))[1]
    return p, q


def norm_sorted_then_assigned(w: np.ndarray, block: tuple[int, int], rank: int) -> tuple[np.ndarray, np.ndarray]:
    return assigned(w, block, rank, norm_sorted)


PEERS = {
    "no permutation": no_permutation,
    "best of 8 random": best_of_8_random,
    "assignment from identity": assigned,
    "norm sort": norm_sorted,
    "norm sort, assignment": norm_sorted_then_assigned,
}
