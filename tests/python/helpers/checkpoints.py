"""Small GPT-2 checkpoints, written and read with numpy alone, so that tests can also write faulty files."""

import json
from pathlib import Path

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1", "BF16": "<u2"}


def encode(values, dtype="F32"):
    """Float values as `(dtype, shape, bytes)`; bfloat16 by truncation, which is exact for the values of `decode`."""
    values = np.asarray(values)
    if dtype == "BF16":
        stored = (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2")
    else:
        stored = values.astype(DTYPES[dtype])
    return dtype, list(values.shape), stored.tobytes()


def decode(dtype, shape, data):
    """The values of a stored tensor; bfloat16 as float32."""
    stored = np.frombuffer(data, DTYPES[dtype]).reshape(shape)
    return (stored.astype("<u4") << 16).view("<f4") if dtype == "BF16" else stored


def write_safetensors(path, tensors, **lies):
    """Writes `{name: (dtype, shape, bytes)}`; `lies` maps a name to header entries that replace the true ones."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, stored) in tensors.items():
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(stored)]}
        header[name] = entry | lies.get(name, {})
        data += stored
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_safetensors(path):
    """`{name: (dtype, shape, bytes)}` of a file, or of all weight files of a directory."""
    path, tensors = Path(path), {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = entry["dtype"], entry["shape"], content[start + begin : start + end]
    return tensors


class Checkpoint:
    """A GPT-2 in memory, to be changed and written. `tensors` are `(dtype, shape, bytes)`, `config` is a dict."""

    def __init__(self, prefix="transformer.", dtype="F32", layers=2, width=8, vocabulary=20, positions=6, seed=0):
        self.random, self.dtype, self.prefix = np.random.default_rng(seed), dtype, prefix
        self.config = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": layers,
            "n_embd": width,
            "n_head": 2,
            "vocab_size": vocabulary,
            "n_positions": positions,
        }
        self.tensors = {}
        self.add("wte.weight", (vocabulary, width))
        self.add("wpe.weight", (positions, width))
        for layer in range(layers):
            for norm in ("ln_1", "ln_2"):
                self.add(f"h.{layer}.{norm}.weight", (width,))
                self.add(f"h.{layer}.{norm}.bias", (width,))
            maps = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
            maps |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
            for name, shape in maps.items():
                self.add(f"h.{layer}.{name}.weight", shape)
                self.add(f"h.{layer}.{name}.bias", shape[1:])
        self.add("ln_f.weight", (width,))
        self.add("ln_f.bias", (width,))

    def add(self, name, shape, prefix=None):
        """Adds a tensor of random values; `prefix=""` for a head."""
        name = (self.prefix if prefix is None else prefix) + name
        self.tensors[name] = encode(self.random.standard_normal(shape), self.dtype)

    def values(self, name):
        return decode(*self.tensors[name])

    def write(self, directory, shards=1):
        """Writes it as one file, or as shards with an index."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        if shards == 1:
            write_safetensors(directory / "model.safetensors", self.tensors)
            return directory
        names, weight_map = list(self.tensors), {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {name: self.tensors[name] for name in names[number::shards]}
            weight_map |= dict.fromkeys(part, file)
            write_safetensors(directory / file, part)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory


def config(specs, **rest):
    """The dict form of a TQConfig from `{pattern: (block, rank, permute)}`."""
    named = {name: dict(zip(("block", "rank", "permute"), spec, strict=True)) for name, spec in specs.items()}
    return {"quant_method": "tqcompressor", "format_version": 1, "specs": named, "effort": "fast", "seed": 0} | rest


def listing(directory):
    """Everything below a directory, hidden files too."""
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*"))
