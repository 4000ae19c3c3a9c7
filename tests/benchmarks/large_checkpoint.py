"""A Llama-shaped checkpoint that is larger than its memory bound: killed, resumed, and in one go."""

import argparse
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from measuring import SILENCE, resident
from tqcompressor import estimate_cost
from whole_checkpoint import COMPRESS, digest, parameters, weights_size

# The shape of TinyLlama: 1,100,048,384 parameters in 22 layers.
WIDTH, INNER, HEADS, KEYS, VOCABULARY = 2048, 5632, 32, 4, 32000
SHARD = 500_000_000


def run(options: argparse.Namespace) -> Iterator[dict]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, threads = Path(folder) / "dense", len(os.sched_getaffinity(0))
        make(source, options.llama)
        expected = estimate_cost(source, budget=0.65, threads=threads)
        row = {"layers": options.llama, "parameters": parameters(source), "bytes": weights_size(source)}
        yield row | {"estimated seconds": expected.seconds, "estimated MB": expected.peak_bytes / 2**20}
        hashes = set()
        for name, kill in (("killed", True), ("resumed", False), ("in one go", False)):
            out = Path(folder) / ("at-once" if name == "in one go" else "stopped")
            arguments = ["compress", str(source), "--out", str(out), "--budget", "0.65", "--effort", "fast", "--json"]
            arguments += ["--threads", str(threads), "--resume"]
            seconds, peak, finished = compress(arguments, out, 7 * options.llama // 2 if kill else None)
            row = {"run": name, "threads": threads, "seconds": seconds, "peak MB": peak, "fits kept": finished}
            if not kill:
                hashes.add(digest(out))
                row |= {"parameters": parameters(out), "bytes": weights_size(out), "hash": digest(out)[:12]}
            else:
                row |= {"parameters": 0, "bytes": 0, "hash": "none"}
            yield row
        if len(hashes) > 1:
            raise SystemExit("the resumed run wrote other bytes than the run in one go")


def compress(arguments: list[str], out: Path, kill_after: int | None) -> tuple[float, float, int]:
    """Seconds, peak MB and finished fits of a run, which is killed with SIGKILL once it has so many."""
    kept = out.with_name(f".{out.name}.tqcompressor-resume")
    begun = time.perf_counter()
    command = [sys.executable, "-c", COMPRESS, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | SILENCE)
    most, peak = 0, 0.0
    # Not the peak that `wait4` tells, which counts that of this process, too.
    while process.poll() is None:
        with suppress(LookupError, OSError):
            peak = resident("VmHWM", process.pid)
        finished = len(list(kept.glob("fit-*[0-9]")))
        most = max(most, finished)
        if kill_after is not None and finished >= kill_after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    if process.returncode != (0 if kill_after is None else -signal.SIGKILL):
        sys.exit(f"{' '.join(arguments)} ended with status {process.returncode}")
    return time.perf_counter() - begun, peak, most


def make(folder: Path, layers: int) -> None:
    """Writes bfloat16 shards of random weights, one tensor in memory at a time."""
    folder.mkdir()
    keys = WIDTH // HEADS * KEYS
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(layers):
        for name, shape in {
            "input_layernorm": (WIDTH,),
            "mlp.down_proj": (WIDTH, INNER),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "post_attention_layernorm": (WIDTH,),
            "self_attn.k_proj": (keys, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.v_proj": (keys, WIDTH),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    shards: list[list[str]] = [[]]
    room = SHARD
    for name, shape in shapes.items():
        room -= 2 * int(np.prod(shape))
        if room < 0 and shards[-1]:
            shards.append([])
            room = SHARD - 2 * int(np.prod(shape))
        shards[-1].append(name)
    random, where = np.random.default_rng(0), {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name in names:
            begin, end = end, end + 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            where[name] = file_name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file_name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                values = random.standard_normal(shapes[name], dtype=np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
