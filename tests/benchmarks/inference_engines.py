"""One model in one engine, measured in a process of its own: the child of the benchmark `inference`."""

import gc
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf_models
from measuring import resident, restart_peak
from onnx_models import FILE

Tokens = list[int]


@dataclass(frozen=True)
class Engine:
    """A loaded model: `generate(prompt, count)` is greedy, `prefill(tokens)` may tell the token that follows, and
    `score(tokens)` is the mean log-likelihood of all but the first; None where it has the last token's logits alone."""

    generate: Callable[[Tokens, int], Tokens]
    prefill: Callable[[Tokens], int | None]
    score: Callable[[Tokens], float] | None


@dataclass(frozen=True)
class Lengths:
    """What is run, in tokens."""

    prompt: int
    new: int
    prefill: int
    score: int = 0


def native(folder: Path, threads: int, _: Lengths, *, int8: bool = False) -> Engine:
    """The runtime of this package, without torch; with `int8`, weights are quantized on loading."""
    from tqcompressor import _core

    runtime = _core.Runtime.load(folder, threads, None, int8=int8)

    def generate(prompt: Tokens, count: int) -> Tokens:
        return runtime.generate([prompt], count, 0.0, 0, 1.0, 0, [], None)[0]

    def prefill(tokens: Tokens) -> None:
        # Scoring one more token reads all before it and takes the logits of the last, as `prefill` of torch does.
        runtime.score([[*tokens, tokens[0]]], [1])

    def score(tokens: Tokens) -> float:
        return float(runtime.score([tokens], [len(tokens) - 1])[0].mean())

    return Engine(generate, prefill, score)


def eager(folder: Path, threads: int, _: Lengths, *, dtype: str = "float32") -> Engine:
    """transformers' model as it is; with the dtype "auto", in that of its weights."""
    from transformers import DynamicCache

    model = torch_model(folder, threads, dtype)

    def generate(prompt: Tokens, count: int) -> Tokens:
        cache = DynamicCache(config=model.config)
        return greedy(model, model, cache, prompt, count)

    def prefill(tokens: Tokens) -> int:
        return greedy(model, model, DynamicCache(config=model.config), tokens, 1)[0]

    return Engine(generate, prefill, partial(torch_score, model))


def compiled(folder: Path, threads: int, lengths: Lengths) -> Engine:
    """`torch.compile` of the model, with caches of fixed sizes; a short prompt is read uncompiled."""
    import torch
    from transformers import StaticCache

    model = torch_model(folder, threads)
    step = torch.compile(model, dynamic=False)

    def cache(length: int) -> Any:
        made = StaticCache(config=model.config, max_cache_len=length)
        heads = model.config.num_attention_heads
        size = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
        heads = getattr(model.config, "num_key_value_heads", heads)
        made.early_initialization(1, heads, size, torch.float32, torch.device("cpu"))
        return made

    # Made once: a new cache may mean to compile anew.
    short, long = cache(lengths.prompt + lengths.new), cache(lengths.prefill)

    def generate(prompt: Tokens, count: int) -> Tokens:
        short.reset()
        return greedy(model, step, short, prompt, count)

    def prefill(tokens: Tokens) -> int:
        long.reset()
        return greedy(step, step, long, tokens, 1)[0]

    return Engine(generate, prefill, partial(torch_score, step))


def llama_cpp(folder: Path, threads: int, lengths: Lengths, *, kind: str) -> Engine:
    """llama.cpp by its C functions, which llama-cpp-python binds; `folder` is one of `gguf_models.write`."""
    import ctypes

    import numpy as np
    from llama_cpp import llama_cpp as library

    silent = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(silent, None)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(
        str(folder / f"{kind}.gguf").encode(), library.llama_model_default_params()
    )
    parameters = library.llama_context_default_params()
    longest = max(lengths.prompt + lengths.new, lengths.prefill, lengths.score)
    parameters.n_ctx, parameters.n_batch = longest, longest
    parameters.n_threads = parameters.n_threads_batch = threads
    context = library.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp does not load {folder / kind}.gguf")
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    # Freed when the process ends. The callback must live as long as the library may call it.
    keep = (silent, model)

    def logits(tokens: Tokens, *, first: int = 0, last: bool = True) -> Any:
        """Logits of the last token, or of all, after the tokens at positions from `first` on."""
        if first == 0:
            library.llama_memory_clear(library.llama_get_memory(context), True)
        batch = library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, first + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = not last or index == len(tokens) - 1
        if library.llama_decode(context, batch):
            raise SystemExit("llama.cpp failed")
        library.llama_batch_free(batch)
        assert keep
        values = ctypes.cast(library.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(values, shape=(1 if last else len(tokens), vocabulary))

    def generate(prompt: Tokens, count: int) -> Tokens:
        tokens = [int(logits(prompt)[0].argmax())]
        while len(tokens) < count:
            tokens.append(int(logits(tokens[-1:], first=len(prompt) + len(tokens) - 1)[0].argmax()))
        return tokens

    def score(tokens: Tokens) -> float:
        values = logits(tokens[:-1], last=False)
        values -= values.max(-1, keepdims=True)
        named = values[np.arange(len(values)), tokens[1:]].astype(np.float64)
        return float((named - np.log(np.exp(values, out=values).sum(-1, dtype=np.float64))).mean())

    return Engine(generate, lambda tokens: int(logits(tokens)[0].argmax()), score)


def onnxruntime(folder: Path, threads: int, _: Lengths) -> Engine:
    """onnxruntime on the CPU; `folder` is one of `onnx_models.write`. Keys and values stay where it has them."""
    import numpy as np
    from onnxruntime import InferenceSession, OrtValue, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    session = InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])
    first, *past = session.get_inputs()
    names = [output.name for output in session.get_outputs()]

    def step(tokens: Tokens, cache: list[Any]) -> tuple[int, list[Any]]:
        """The likeliest next token, and the keys and values of all tokens so far."""
        ids = OrtValue.ortvalue_from_numpy(np.array([tokens], dtype=np.int64))
        feeds = {first.name: ids} | {given.name: value for given, value in zip(past, cache, strict=True)}
        logits, *after = session.run_with_ort_values(names, feeds)
        return int(logits.numpy()[0, -1].argmax()), after

    nothing = [OrtValue.ortvalue_from_shape_and_type((1, each.shape[1], 0, each.shape[3]), np.float32) for each in past]

    def generate(prompt: Tokens, count: int) -> Tokens:
        new, cache, tokens = prompt, nothing, []
        for _ in range(count):
            token, cache = step(new, cache)
            tokens.append(token)
            new = [token]
        return tokens

    return Engine(generate, lambda tokens: step(tokens, nothing)[0], None)


ENGINES = {
    "torch eager": eager,
    "torch as stored": partial(eager, dtype="auto"),
    "torch compiled": compiled,
    "native": native,
    "native int8": partial(native, int8=True),
    **{f"llama.cpp {kind}": partial(llama_cpp, kind=kind) for kind in gguf_models.FILES},
    "onnxruntime": onnxruntime,
}
# The package beyond this one's own that an engine needs, by the beginning of its name.
PACKAGES = {"llama.cpp": "llama_cpp", "onnxruntime": "onnxruntime"}


def missing(engine: str) -> str | None:
    """The package that an engine needs and that is not installed."""
    package = PACKAGES.get(engine.split(" ")[0])
    return package if package is not None and importlib.util.find_spec(package) is None else None


def torch_score(model: Callable, tokens: Tokens) -> float:
    """The mean log-likelihood of all but the first token."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([tokens])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
        return -float(torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:]))


def torch_model(folder: Path, threads: int, dtype: str = "float32") -> Any:
    import torch
    import tqcompressor  # noqa: F401  registers compressed checkpoints
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def greedy(first: Callable, then: Callable, cache: Any, prompt: Tokens, count: int) -> Tokens:
    """The bare loop, which takes less time than transformers' `generate` around the same model."""
    import torch

    with torch.inference_mode():
        new, forward = torch.tensor([prompt]), first
        tokens = []
        for _ in range(count):
            logits = forward(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            new, forward = logits[:, -1].argmax(-1, keepdim=True), then
            tokens.append(int(new))
        return tokens


def warm_up(engine: str) -> None:
    """What an engine imports and allocates once, whatever the model: not counted as the memory of one."""
    if engine.startswith("native"):
        return
    if engine.startswith("llama.cpp"):
        import llama_cpp  # noqa: F401

        return
    if engine == "onnxruntime":
        import onnxruntime  # noqa: F401

        return
    import torch
    import tqcompressor  # noqa: F401
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=2, n_layer=1, n_head=1, vocab_size=2, n_positions=2))
    with torch.inference_mode():
        model(torch.tensor([[0]]))
        if engine == "torch compiled":
            torch.compile(lambda x: x + 1)(torch.zeros(2))


def measure(engine: str, folder: Path, threads: int, lengths: Lengths, passes: int) -> dict[str, Any]:
    """The least seconds of `passes` runs, and peaks of memory in MB beyond that before loading.

    A token's seconds are the difference between generating `new` tokens and one, over the tokens from the second on.
    """
    import numpy as np

    warm_up(engine)
    gc.collect()
    before = restart_peak()
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokens = np.random.default_rng(0).integers(vocabulary, size=max(lengths.prompt, lengths.prefill)).tolist()
    prompt, text = tokens[: lengths.prompt], tokens[: lengths.prefill]

    model = ENGINES[engine](folder, threads, lengths)
    _, first_decode = timed(lambda: model.generate(prompt, 3))
    ones, whole = [], []
    for _ in range(passes):
        # Several, as a slow one would make decoding look fast.
        ones += [timed(lambda: model.generate(prompt, 1))[1] for _ in range(3)]
        generated, seconds = timed(lambda: model.generate(prompt, lengths.new))
        whole.append(seconds)
    one = min(ones)
    decode_peak = resident("VmHWM") - before
    gc.collect()
    restart_peak()
    _, first_prefill = timed(lambda: model.prefill(text))
    prefill = min(timed(lambda: model.prefill(text))[1] for _ in range(passes))
    scored: dict[str, float] = {}
    if lengths.score and model.score is not None:
        score = model.score
        words = np.random.default_rng(1).integers(vocabulary, size=lengths.score).tolist()
        runs = [timed(lambda: score(words)) for _ in range(passes + 1)]
        scored = {"score seconds": min(seconds for _, seconds in runs), "log-likelihood": runs[0][0]}
    return scored | {
        "decode seconds": (min(whole) - one) / (lengths.new - 1),
        "prefill seconds": prefill,
        "decode MB": decode_peak,
        "prefill MB": resident("VmHWM") - before,
        # The first calls, less what a call takes: compiling, or next to nothing.
        "first calls seconds": first_decode + first_prefill - one - prefill,
        "generated": generated,
    }


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def main(arguments: Sequence[str]) -> None:
    task = json.loads(arguments[0])
    limit = task.pop("compile_limit")
    task |= {"folder": Path(task["folder"]), "lengths": Lengths(**task["lengths"])}
    if task["engine"] != "torch compiled":
        print(json.dumps(measure(**task)))
        assert not task["engine"].startswith("native") or "torch" not in sys.modules, "torch was imported"
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {limit} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    # Whatever the compiler fails of is a result.
    try:
        print(json.dumps(measure(**task)))
    except Exception as error:
        print(json.dumps({"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}))


if __name__ == "__main__":
    main(sys.argv[1:])
