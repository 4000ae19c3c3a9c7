"""Decode and prefill of GPT-2 small, dense, compressed and of 6 layers: native, int8, torch, torch.compile; layers.

"compressed" is the recipe `tq-81m`, "65% budget" is compressed to 0.65 of all parameters without a calibration.

Weights are random (`GPT2Config()`, seed 0, float32 unless `--dtype` says float16): times and memory are real, texts
mean nothing. Decode is greedy, batch 1, timed from the second new token on; prefill reads a text and takes the logits
of its last token. "native int8" quantizes the same weights on loading. torch runs a bare loop, which is quicker than
transformers' `generate`. Each engine and model gets a fresh process, in turns over repetitions; times are the medians,
memory is the largest peak beyond the process before loading. Before each process numpy sums and copies a large array,
as what memory gives changes within seconds on a shared machine: `of read` is the bytes of weights that a token needs,
times tokens/s, over the rate of that sum, `of limit` the same over that of sum or copy, whichever moves more; medians,
too. Layers are timed within one process, medians of turns; a single row finds their weights in memory. `cargo bench`
times native layers: by the factors, by the matrix, and by what the cost model chooses of the two.

onnxruntime runs the graph that torch exports, with a cache of keys and values, in float32. llama.cpp, by the package
llama-cpp-python, runs the dense models in float16 and Q8_0, whatever the dtype of the checkpoint. An engine whose
package is missing is left out. Build llama.cpp for the machine that it runs on:
`pip install llama-cpp-python --no-binary llama-cpp-python`.

`--isa` runs the native engines with each of the named instruction sets (`TQCOMPRESSOR_ISA`), which must generate the
same tokens. `--dtype` may name both dtypes; then the models are told apart by it.

`--checkpoint DIR` runs given checkpoints in place of these, of any family that the native runtime has, and no layers.
They also score `--score` random tokens, all in one window, as a perplexity does. "torch as stored" computes in the
dtype of the weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf_models
import inference_engines
import inference_layers
import onnx_models
from measuring import ROOT, fresh_process
from whole_checkpoint import COMPRESS, MAKE, headers, weights_size

MODELS = ("dense", "compressed", "65% budget", "6 layers")
COMPRESSED = {"compressed": ["--recipe", "tq-81m"], "65% budget": ["--budget", "0.65"]}
ENGINES = tuple(inference_engines.ENGINES)
DEFAULT_ENGINES = [name for name in ENGINES if name != "torch as stored"]
FLOATS = ("F32", "F16", "BF16")
# Bytes of a weight, where they are not those of the checkpoint.
WIDTHS = {"native int8": 1, "llama.cpp Q8_0": 1, "llama.cpp float16": 2, "onnxruntime": 4}
TIMES = ("decode seconds", "prefill seconds", "score seconds")
# What makes the files of the engines that do not read checkpoints, by the beginning of their names.
WRITERS = {"llama.cpp": gguf_models, "onnxruntime": onnx_models}
# Between an engine and its instruction set.
AT = " at "
Measured = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=3, help="fresh processes for each model and engine")
    parser.add_argument("--passes", type=int, default=2, help="runs in each process")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--checkpoint", nargs="*", metavar="DIR", default=[], help="checkpoints to run in place of the random models"
    )
    parser.add_argument(
        "--score", type=int, default=2000, metavar="N", help="tokens of a text of --checkpoint to score"
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(DEFAULT_ENGINES))
    parser.add_argument(
        "--layers", nargs="*", choices=list(inference_layers.LAYERS), default=list(inference_layers.LAYERS)
    )
    parser.add_argument(
        "--dtype", nargs="*", choices=["float32", "float16"], default=["float32"], help="of the stored weights"
    )
    parser.add_argument("--isa", nargs="*", metavar="NAME", default=[], help="instruction sets of the native engines")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument(
        "--compile-limit", type=int, default=300, metavar="SECONDS", help="for a compiled model's process"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")


def run(options: argparse.Namespace) -> Iterator[dict]:
    lengths = {"prompt": 8, "new": options.new_tokens, "prefill": 32 if options.quick else 512}
    lengths["score"] = options.score if options.checkpoint else 0
    engines = [name for engine in installed(options.engines) for name in with_isa(engine, options.isa)]
    with tempfile.TemporaryDirectory() as folder:
        # What is compiled is kept from one process to the next, but not beyond this run, unless the caller says where.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")
        models = {name: Path(name) for name in options.checkpoint}
        models = models or {
            name: path
            for dtype in options.dtype
            for name, path in make_models(Path(folder), options.models, dtype, options.quick, options.dtype).items()
        }
        others = {
            beginning: rewritten(writer, Path(folder), models)
            for beginning, writer in WRITERS.items()
            if any(name.startswith(beginning) for name in engines)
        }
        probe = {"bandwidth": options.threads, "quick": options.quick}
        runs: dict[tuple[str, str], list[Measured]] = {}
        for _ in range(options.repetitions):
            for model in models:
                for engine in engines:
                    folders = others.get(engine.split(" ")[0], models)
                    if model not in folders:
                        continue
                    earlier = runs.setdefault((model, engine), [])
                    if any("failed" in result for result in earlier):
                        continue
                    plain, _, isa = engine.partition(AT)
                    task = {
                        "engine": plain,
                        "folder": str(folders[model]),
                        "threads": options.threads,
                        "lengths": lengths,
                    }
                    task |= {"passes": options.passes, "compile_limit": options.compile_limit}
                    variables = {"TQCOMPRESSOR_ISA": isa} if isa else {}
                    bandwidth = child(inference_layers, probe, options.threads)
                    result = child(inference_engines, task, options.threads, variables)
                    earlier.append(result | {"bandwidth": bandwidth})
                    # At once, as the medians are known only in the end.
                    shown = {name: value for name, value in earlier[-1].items() if name != "generated"}
                    print(f"{model}, {engine}: {json.dumps(shown)}", file=sys.stderr, flush=True)
        for name in ("read", "copy"):
            rates = [result["bandwidth"][name] / 1e9 for results in runs.values() for result in results]
            yield {
                "bandwidth": name,
                "threads": options.threads,
                "GB/s": statistics.median(rates),
                "least": min(rates),
                "most": max(rates),
            }
        summaries = {key: summary_of(results) for key, results in runs.items()}
        for model in models:
            for plain in ("native", "native int8"):
                sets = with_isa(plain, options.isa)
                if together := [result for engine in sets for result in runs.get((model, engine), [])]:
                    summary_of(together)
        for (model, engine), result in summaries.items():
            yield row(model, engine, result, models[model], lengths["prefill"])
        yield from ratios(summaries, list(models), engines)
    if options.layers and not options.checkpoint:
        task = {"layers": options.layers, "repeats": 2 * options.repetitions + 1, "quick": options.quick}
        task |= {"threads": options.threads}
        yield from child(inference_layers, task, options.threads)
        yield from native_layers(task)


def installed(engines: Sequence[str]) -> Iterator[str]:
    """The engines whose package is there."""
    for engine in engines:
        if (package := inference_engines.missing(engine)) is None:
            yield engine
        else:
            print(f"{engine}: left out, as the package {package} is not installed", file=sys.stderr)


def with_isa(engine: str, instruction_sets: Sequence[str]) -> list[str]:
    """The engine with each instruction set: "native at avx2"."""
    return [f"{engine}{AT}{isa}" for isa in instruction_sets if engine.startswith("native")] or [engine]


def int8_of(engine: str) -> str:
    """The engine with eight-bit weights, of one without."""
    return engine.replace("native", "native int8")


def make_models(
    folder: Path, wanted: Sequence[str], dtype: str, quick: bool, dtypes: Sequence[str] = ("float32",)
) -> dict[str, Path]:
    width, layers, vocabulary = (96, 2, 512) if quick else (768, 12, 50257)
    depths = {"dense": layers, "6 layers": layers // 2}
    paths = {name: folder / f"{name} {dtype}" for name in MODELS}
    for name in depths.keys() & {"dense" if name in COMPRESSED else name for name in wanted}:
        fresh_process(["-c", MAKE, str(paths[name]), str(width), str(depths[name]), str(vocabulary), dtype])
    for name in COMPRESSED.keys() & set(wanted):
        arguments = [*COMPRESSED[name], "--effort", "fast", "--out", str(paths[name]), "--json"]
        fresh_process(["-c", COMPRESS, "compress", str(paths["dense"]), *arguments])
    return {named(name, dtype, dtypes): paths[name] for name in wanted}


def named(model: str, dtype: str, dtypes: Sequence[str]) -> str:
    """The model's name in the tables, with the dtype if there are several."""
    return f"{model}, {dtype}" if len(dtypes) > 1 else model


def rewritten(writer: Any, folder: Path, models: Mapping[str, Path]) -> dict[str, Path]:
    """A folder for each model that another program has, with the files that `writer` makes for it."""
    made = {}
    for number, (name, source) in enumerate(models.items()):
        if not source.exists():
            continue
        if (reason := writer.refusal(source)) is not None:
            print(f"{name}: left out by {writer.__name__}: {reason}", file=sys.stderr)
            continue
        made[name] = folder / f"{writer.__name__}-{number}"
        fresh_process([writer.__file__, str(source), str(made[name])])
    return made


def child(module: Any, task: Mapping[str, Any], threads: int, variables: Mapping[str, str] | None = None) -> Any:
    """What the last line says that the module prints when it is run with the task."""
    return json.loads(fresh_process([module.__file__, json.dumps(task)], threads, variables)[2].splitlines()[-1])


def native_layers(task: Mapping[str, Any]) -> Any:
    command = ["cargo", "bench", "--quiet", "--bench", "native_layers", "--", json.dumps(task)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def summary_of(results: list[Measured]) -> Measured:
    """The median times and the largest peaks of all processes, or the failure of one. They must generate the same."""
    failed = [result for result in results if "failed" in result]
    if failed:
        return failed[0]
    if any(result["generated"] != results[0]["generated"] for result in results):
        raise SystemExit("the generated tokens differ from run to run")
    worst = ("decode MB", "prefill MB", "first calls seconds")
    times = [name for name in TIMES if name in results[0]]
    summary = {name: statistics.median(result[name] for result in results) for name in times}
    summary |= {name: results[0][name] for name in ("log-likelihood",) if name in results[0]}
    # What memory moves in the time of a token.
    limits = {"read MB": lambda limit: limit["read"], "limit MB": lambda limit: max(limit.values())}
    for name, rate in limits.items():
        moved = (result["decode seconds"] * rate(result["bandwidth"]) / 1e6 for result in results)
        summary[name] = statistics.median(moved)
    return summary | {name: max(result[name] for result in results) for name in worst}


def weights_read(folder: Path, width: int | None = None) -> int:
    """Bytes of weights that one token needs: all but the embeddings', of which a tied one is read as the head.

    With `width` so many bytes each, without scales and the few of another dtype; else as stored.
    """
    tensors = [item for header in headers(folder) for item in header.items() if item[0] != "__metadata__"]
    size = {"F32": 4, "F16": 2, "BF16": 2}
    own_head = any(name.startswith("lm_head.") for name, _ in tensors)
    unread = [".wpe.", *([".wte.", ".embed_tokens."] if own_head else [])]
    spans = [
        (tensor["data_offsets"], size[tensor["dtype"]], width or size[tensor["dtype"]])
        for name, tensor in tensors
        if tensor["dtype"] in FLOATS and not any(module in f".{name}" for module in unread)
    ]
    return sum((end - begin) // stored * read for (begin, end), stored, read in spans)


def row(model: str, engine: str, result: Measured, folder: Path, prefill: int) -> dict:
    head = {"model": model, "engine": engine}
    if "failed" in result:
        return head | {"failed": result["failed"]}
    needed = weights_read(folder, WIDTHS.get(engine.partition(AT)[0])) / 1e6
    scored = {}
    if "score seconds" in result:
        scored = {"score seconds": result["score seconds"], "nats/token": -result["log-likelihood"]}
    return (
        head
        | scored
        | {
            "decode tokens/s": 1 / result["decode seconds"],
            "ms/token": 1000 * result["decode seconds"],
            "of limit": needed / result["limit MB"],
            "of read": needed / result["read MB"],
            "prefill tokens/s": prefill / result["prefill seconds"],
            "prefill seconds": result["prefill seconds"],
            "decode MB": result["decode MB"],
            "prefill MB": result["prefill MB"],
            "weights MB": weights_size(folder) / 2**20,
            "compile seconds": result["first calls seconds"] if engine == "torch compiled" else 0.0,
        }
    )


def ratios(
    summaries: Mapping[tuple[str, str], Measured], models: Sequence[str] = MODELS, engines: Sequence[str] = ENGINES
) -> Iterator[dict]:
    """Tokens/s of one model or engine over those of another.

    Of compressed models over the others in one engine, of float16 over float32, of the native runtime over torch and
    onnxruntime, of eight-bit weights over those that are stored, and of the first instruction set over the others.
    """
    several = [dtype for dtype in ("float32", "float16") if any(model.endswith(f", {dtype}") for model in models)]
    pairs = [
        ((named(ours, dtype, several), engine), (named(theirs, dtype, several), engine))
        for dtype in several or [""]
        for ours in COMPRESSED
        for theirs in ("dense", "6 layers")
        for engine in engines
    ]
    pairs += [((f"{model}, float16", engine), (f"{model}, float32", engine)) for model in MODELS for engine in engines]
    peers_of_all = [other for other in engines if other.startswith(("torch", "onnxruntime"))]
    native = [other for other in engines if other.partition(AT)[0] == "native"]
    pairs += [((model, engine), (model, other)) for other in peers_of_all for engine in native for model in models]
    pairs += [((model, int8_of(engine)), (model, engine)) for engine in native for model in models]
    for engine in ("native", "native int8"):
        first, *others = [other for other in engines if other.startswith(f"{engine}{AT}")] or [engine]
        pairs += [((model, first), (model, other)) for other in others for model in models]
    # A compressed model against the dense one that llama.cpp has.
    peers = {"native": "llama.cpp float16", "native int8": "llama.cpp Q8_0"}
    pairs += [
        ((model, engine), (other, peers[engine.partition(AT)[0]]))
        for engine in engines
        if engine.partition(AT)[0] in peers
        for other in models
        for model in models
    ]
    for ours, theirs in pairs:
        if all(key in summaries and "failed" not in summaries[key] for key in (ours, theirs)):
            both = summaries[ours].keys() & summaries[theirs].keys()
            times = {name: summaries[theirs][name] / summaries[ours][name] for name in TIMES if name in both}
            yield {
                "tokens/s of": ", ".join(ours),
                "over": ", ".join(theirs),
                **{name.removesuffix(" seconds"): time for name, time in times.items()},
            }
