"""Lost energy of single layers at half the parameters: `run.py quality --layers`."""

import argparse
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import peers
from numpy.typing import NDArray
from quality_data import collect_inputs, matrix, minilm
from safetensors import safe_open
from search import GPT2_ATTENTION, lost_energy, matrices
from tqcompressor import Calibration, KroneckerSpec, LowRankSpec, MixedSpec, decompose
from tqcompressor.config.specs import MatrixSpec

SHARE = 0.5


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attention", type=Path, default=GPT2_ATTENTION, metavar="FILE", help="the GPT-2 matrices")
    parser.add_argument("--effort", default="balanced", help="ours, of --layers")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="of --layers: a checkpoint of linear layers instead"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="of --model")
    parser.add_argument("--pattern", default=r"layers\.15\.", help="of the names of --model's matrices")
    parser.add_argument("--limit", type=int, help="only the first so many matrices of each table of --layers")


def run(options: argparse.Namespace) -> Iterator[dict]:
    if options.model is not None:
        yield from of_a_checkpoint(options)
        return
    found = False
    if options.attention.exists():
        found = True
        yield from in_the_frobenius_norm(options)
    else:
        print(f"left out: no matrices at {options.attention}; --attention FILE", file=sys.stderr)
    try:
        subject = minilm(options.wikitext, options.num_samples)
    except FileNotFoundError as missing:
        print(f"left out: {missing}", file=sys.stderr)
        if not found:
            raise SystemExit("nothing to measure: see above what is missing") from missing
        return
    yield from in_the_inputs_norm(subject, options)


def ours(
    w: NDArray[np.float64], moment: NDArray[np.float64] | None, permuted: bool, options: argparse.Namespace
) -> tuple[NDArray[np.float64], int, float]:
    """The approximation, its parameters and the seconds it took.

    Not `permuted`: of the same spec, without permutations of its Kronecker terms.
    """
    arguments = {"moment": moment, "effort": options.effort, "seed": options.seeds[0]}
    start = time.perf_counter()
    result = decompose(w.astype(np.float32), budget=SHARE, **arguments)
    seconds = time.perf_counter() - start
    if not permuted:
        result = decompose(w.astype(np.float32), unpermuted(result.spec), **arguments)
    if result.parameters > SHARE * w.size:
        raise AssertionError(f"{result.parameters:,} parameters, over {SHARE} of {w.size:,}")
    return result.reconstruct().astype(np.float64), result.parameters, seconds


def unpermuted(spec: MatrixSpec) -> MatrixSpec:
    if isinstance(spec, MixedSpec):
        return MixedSpec(tuple(unpermuted(term) for term in spec.terms))
    return replace(spec, permute="none") if isinstance(spec, KroneckerSpec) else spec


def of_a_checkpoint(options: argparse.Namespace) -> Iterator[dict]:
    """Low rank and the sums with it that `sums` describes, in the norm of the inputs and in the two-sided norm."""
    calibration = Calibration.load(options.calibration)
    names = [name.removeprefix("output.") for name in calibration.moments if name.startswith("output.")]
    names = [name for name in names if re.search(options.pattern, name)][: options.limit]
    with safe_open(options.model / "model.safetensors", "np") as weights:
        tensors = {key.removeprefix("model.").removesuffix(".weight"): key for key in list(weights.keys())}
        for norm in ("norm of the inputs", "two-sided norm"):
            rows = []
            for name in names:
                # A linear layer of torch holds the transpose.
                w = np.ascontiguousarray(weights.get_tensor(tensors[name]).T.astype(np.float32))
                output = calibration.output(name) if norm == "two-sided norm" else None
                rows.append({norm: name, **sums(w, (calibration.input(name), output), options)})
                yield rows[-1]
            means = {
                key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key not in (norm, "low rank")
            }
            yield {f"{norm}, mean": f"{len(rows)} matrices", **means}


def sums(w: NDArray[np.float32], moment: tuple, options: argparse.Namespace) -> dict:
    """Of one matrix: what low rank loses, and the ratios to it, MACs and seconds of sums.

    "Own orders" is what a budget chooses: a few Kronecker terms with orders of their own, within the MACs of the dense
    matrix. "One order" is a Kronecker term of many products with blocks of 16 × 16, in 15% of the parameters.
    """
    arguments = {"moment": moment, "effort": options.effort, "seed": options.seeds[0]}
    parameters = int(SHARE * w.size)
    low_rank = decompose(w, budget=SHARE, **(arguments | {"effort": "fast"}))
    row = {"low rank": low_rank.lost_energy, "its MACs": macs(low_rank.spec, w.shape)}
    start = time.perf_counter()
    found = decompose(w, budget=SHARE, **arguments)
    seconds = time.perf_counter() - start
    row |= {"own orders, ratio": found.lost_energy / low_rank.lost_energy, "MACs": macs(found.spec, w.shape)}
    row["seconds"] = seconds
    rank = peers.pifa_rank_within(w.shape, 0.85 * parameters)
    products = (parameters - rank * (sum(w.shape) - rank)) // (w.size // 256 + 256)
    one = MixedSpec((LowRankSpec(rank), KroneckerSpec(block=(16, 16), rank=products)))
    specs = {
        "own orders, unpermuted": unpermuted(found.spec),
        "one order": one,
        "one order, unpermuted": unpermuted(one),
    }
    for column, spec in specs.items():
        fitted = decompose(w, spec, **arguments)
        if fitted.parameters > parameters:
            raise AssertionError(f"{column}: {fitted.parameters:,} parameters, over {parameters:,}")
        row[f"{column}, ratio"] = fitted.lost_energy / low_rank.lost_energy
    return row | {"one order, MACs": macs(one, w.shape)}


def macs(spec: MatrixSpec, shape: tuple[int, int]) -> float:
    """As a share of those of the dense matrix."""
    terms = spec.terms if isinstance(spec, MixedSpec) else (spec,)
    return sum(macs_of_term(term, *shape) for term in terms) / math.prod(shape)


def macs_of_term(term: MatrixSpec, m: int, n: int) -> int:
    if not isinstance(term, KroneckerSpec):
        return term.rank * (m + n - term.rank)
    m2, n2 = term.block
    m1, n1 = m // m2, n // n2
    return term.rank * min(m1 * n1 * m2 + n1 * m2 * n2, m1 * m2 * n2 + m1 * n1 * n2)


def in_the_frobenius_norm(options: argparse.Namespace) -> Iterator[dict]:
    rows = []
    for name, w in list(matrices(options.attention, (1, 1)))[: options.limit]:
        w = w.astype(np.float64)
        start = time.perf_counter()
        spectrum = peers.svd(w)
        rank = peers.low_rank_within(w.shape, SHARE * w.size)
        row = {"Frobenius norm": name, "SVD": lost_energy(w, spectrum.truncated(rank))}
        row["SVD seconds"] = time.perf_counter() - start
        row["SVD by PIFA"] = spectrum.tail(peers.pifa_rank_within(w.shape, SHARE * w.size)) / spectrum.tail(0)
        if not options.no_ours:
            near, parameters, seconds = ours(w, None, True, options)
            row |= {"tqcompressor": lost_energy(w, near), "kept": parameters / w.size, "seconds": seconds}
            row["ratio to SVD"] = row["tqcompressor"] / row["SVD"]
        rows.append(row)
        yield row
    yield from summary(rows, "SVD", "ratio to SVD")


def in_the_inputs_norm(subject, options: argparse.Namespace) -> Iterator[dict]:
    inputs, _ = collect_inputs(subject, subject.calibration(options.seeds[0]))
    rows = []
    for name in subject.layers[: options.limit]:
        w = matrix(subject.model, name)
        moment = inputs[name].moment / inputs[name].tokens
        spectrum = peers.svd_llm(w, moment)
        energy = spectrum.tail(0)
        plain, compact = (within(w.shape, SHARE * w.size) for within in (peers.low_rank_within, peers.pifa_rank_within))
        row = {"norm of the inputs": name, "SVD-LLM": spectrum.tail(plain) / energy}
        row["SVD-LLM by PIFA"] = spectrum.tail(compact) / energy
        if not options.no_ours:
            for column, permuted in (("tqcompressor", True), ("unpermuted", False)):
                near, parameters, seconds = ours(w, moment, permuted, options)
                row[column] = float(((w - near) * (moment @ (w - near))).sum() / (w * (moment @ w)).sum())
                row |= {"kept": parameters / w.size, "seconds": seconds} if permuted else {}
            row["ratio to SVD-LLM"] = row["tqcompressor"] / row["SVD-LLM"]
        rows.append(row)
        yield row
    yield from summary(rows, "SVD-LLM", "ratio to SVD-LLM")


def summary(rows: list[dict], peer: str, ratio: str) -> Iterator[dict]:
    """The means over the layers, and how often ours is ahead."""
    columns = [name for name, value in rows[0].items() if isinstance(value, float)]
    result = {"mean over the matrices, beside": peer} | {
        name: float(np.mean([row[name] for row in rows])) for name in columns
    }
    if ratio in rows[0]:
        ratios = np.array([row[ratio] for row in rows])
        result |= {"largest ratio": float(ratios.max()), "below 0.97": f"{int((ratios < 0.97).sum())} of {len(rows)}"}
    yield result
