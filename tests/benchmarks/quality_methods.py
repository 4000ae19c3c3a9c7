"""Whole models compressed to a budget, by ours and by every peer: what `quality` compares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import peers
import scipy.linalg
import torch
import tqcompressor
from numpy.typing import NDArray
from peers import Spectrum
from quality_data import (
    Batch,
    Block,
    Inputs,
    Subject,
    collect_inputs,
    every_matrix,
    matrix,
    on,
    set_matrix,
    token_counts,
)
from torch import nn
from tqcompressor.models.blocks import Call, recorded_calls
from transformers import PreTrainedModel

OURS = ("tqcompressor", "tqcompressor, refined")
Compressed = tuple[PreTrainedModel, int]
"""A model, and how many of the parameters that its budget counts it keeps."""


class Study:
    """One model with the calibration text of one seed; what several budgets share is computed once."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.seed = subject, seed
        self.batches = [on(subject.model.device, batch) for batch in subject.calibration(seed)]
        self._spectra: dict[tuple[str, str], Spectrum] = {}

    @cached_property
    def inputs(self) -> dict[str, Inputs]:
        if not self.subject.large:
            return collect_inputs(self.subject, self.batches)
        calibration = self.our_calibration
        tokens = calibration.tokens
        moments = {name: calibration.input(self.subject.bare(name)) for name in self.subject.layers}
        return {name: Inputs(moment.astype(float) * tokens, None, tokens) for name, moment in moments.items()}

    def gradients(self, name: str) -> NDArray[np.float64]:
        """The second moment of the gradients at the outputs of a layer, of our calibration.

        Ours has one for each of the fused query, key and value, without those between them.
        """
        bare, calibration = self.subject.bare(name), self.our_calibration
        parts = [calibration.output(bare)]
        if parts[0] is None:
            parts = [calibration.output(f"{bare}.{part}") for part in "qkv"]
        return scipy.linalg.block_diag(*parts).astype(float)

    @cached_property
    def our_calibration(self):
        return tqcompressor.calibrate(self.subject.model, self.batches, seed=self.seed)

    def spectrum(self, kind: str, name: str) -> Spectrum:
        if (kind, name) not in self._spectra:
            self._spectra[kind, name] = self._new_spectrum(kind, name)
        return self._spectra[kind, name]

    def _new_spectrum(self, kind: str, name: str) -> Spectrum:
        w = matrix(self.subject.model, name)
        if name not in self.subject.layers:
            if kind == "frequencies" and name == self.subject.word_embedding:
                # The inputs of an embedding are one-hot: their second moment is the tokens' frequencies. Add-one
                # smoothing, because few tokens of the vocabulary occur in a calibration text.
                root = np.sqrt(token_counts(self.subject, self.batches) + 1)[:, None]
                scaled = peers.svd(root * w)
                return Spectrum(scaled.left / root, scaled.values, scaled.right)
            # Positions, and layers beside the blocks, of whose inputs SVD-LLM knows nothing.
            return peers.svd(w)
        if kind == "SVD":
            return peers.svd(w)
        if kind == "ASVD":
            return peers.asvd(w, self.inputs[name].mean_absolute)
        if kind == "two-sided":
            return peers.two_sided(w, self.inputs[name].moment, self.gradients(name))
        decompose = peers.svd_llm_v2 if kind == "SVD-LLM V2" else peers.svd_llm
        return decompose(w, self.inputs[name].moment)


@dataclass(frozen=True)
class Method:
    compress: Callable[[Study, float], Compressed]
    seeded: bool = True
    """Whether the seed makes a difference: by the calibration text, or by chance."""


def matrices_parameters(model: nn.Module, names: list[str]) -> int:
    return sum(model.get_submodule(name).weight.numel() for name in names)


# Ours.


def ours(study: Study, share: float, whole: bool, refined: bool = False) -> Compressed:
    """Calibrated and compressed by the package; counted by the parameters that torch finds afterwards.

    The plan is the same where it is `refined`; the factors are then trained on the outputs of the original blocks.
    """
    calibration = study.our_calibration
    model = study.subject.copy()
    before = sum(parameter.numel() for parameter in model.parameters())
    counted = before if whole else matrices_parameters(study.subject.model, study.subject.layers)
    # The package counts a budget over the whole model.
    allowed = before - counted + int(share * counted)
    chosen = None if whole else study.subject.layers
    # Low rank only: what else "balanced" finds is in the table of single layers, at minutes a model.
    options = {"matrices": chosen, "effort": "fast", "seed": study.seed}
    options["refine"] = study.batches if refined else False
    tqcompressor.compress(model, budget=allowed, calibration=calibration, **options)
    after = sum(parameter.numel() for parameter in model.parameters())
    return model, counted - (before - after)


# Low rank.


def low_rank(study: Study, share: float, kind: str, pivoting: bool = False, allocated: bool = False) -> Compressed:
    """One ratio for all matrices, or SVD-LLM V2's."""
    names = study.subject.layers
    shares = dict.fromkeys(names, share)
    if allocated:
        spectra = {name: study.spectrum(kind, name) for name in names}
        shares = peers.svd_llm_v2_shares(spectra, study.subject.groups, share)
    model = study.subject.copy()
    return model, cut_to_shares(model, study, kind, shares, pivoting)


def low_rank_everywhere(study: Study, share: float, kind: str, pivoting: bool = False) -> Compressed:
    """Every matrix by one ratio, the embeddings too, so that the whole model keeps `share` of its parameters."""
    model = study.subject.copy()
    total = sum(parameter.numel() for parameter in model.parameters())
    names = every_matrix(model)
    of_matrices = matrices_parameters(model, names)
    rest = total - of_matrices
    shares = dict.fromkeys(names, (share * total - rest) / of_matrices)
    return model, rest + cut_to_shares(model, study, kind, shares, pivoting)


def cut_to_shares(model: nn.Module, study: Study, kind: str, shares: Mapping[str, float], pivoting: bool) -> int:
    """Replaces every matrix by its best low-rank one within its share, and returns the parameters kept."""
    kept = 0
    for name, share in shares.items():
        spectrum = study.spectrum(kind, name)
        rows, columns = spectrum.shape
        if share >= 1:
            kept += rows * columns
        elif pivoting:
            rank = peers.pifa_rank_within(spectrum.shape, share * rows * columns)
            factored = peers.pifa(spectrum.left[:, :rank], spectrum.right[:rank])
            set_matrix(model, name, factored.matrix())
            kept += factored.parameters
        else:
            rank = peers.low_rank_within(spectrum.shape, share * rows * columns)
            set_matrix(model, name, spectrum.truncated(rank))
            kept += rank * (rows + columns)
    return kept


def two_sided_globally(study: Study, share: float) -> Compressed:
    """Plain factors, with the ranks that lose the least over all matrices."""
    names = study.subject.layers
    spectra = {name: study.spectrum("two-sided", name) for name in names}
    model, kept = study.subject.copy(), 0
    parameters = share * matrices_parameters(model, names)
    for name, rank in peers.global_ranks(spectra, parameters).items():
        rows, columns = spectra[name].shape
        if rank is not None:
            set_matrix(model, name, spectra[name].truncated(rank))
        kept += rows * columns if rank is None else rank * (rows + columns)
    return model, kept


def aa_svd(study: Study, share: float) -> Compressed:
    """One ratio, block by block: each layer is fitted to the original outputs from its inputs in the compressed model.

    Without the paper's training of each block.
    """
    subject = study.subject
    model, kept = subject.copy(), 0
    states, calls = block_calls(subject, study.batches)
    shifted, masks = states, [batch["attention_mask"].bool() for batch in study.batches]
    for index, block in enumerate(subject.blocks):
        original = subject.model.get_submodule(f"{subject.block_list}.{index}")
        compressed = model.get_submodule(f"{subject.block_list}.{index}")
        wanted = {name: subject.model.get_submodule(name) for name in block.layers}
        after, inputs = run_block(original, states, calls[index], wanted, masks)
        # Layers that read one tensor are fitted together.
        up = (block.up,) if block.gate is None else (block.gate, block.up)
        for names in (block.attention, (block.attention_output,), up, (block.down,)):
            _, seen = run_block(compressed, shifted, calls[index], {names[0]: model.get_submodule(names[0])}, masks)
            x, moved = inputs[names[0]], seen[names[0]]
            moment, cross = (moved.T @ each for each in (moved, x))
            for name in names:
                w = matrix(subject.model, name)
                rank = peers.low_rank_within(w.shape, share * w.size)
                found = peers.anchored(w, moment.double().cpu().numpy(), cross.double().cpu().numpy())
                set_matrix(model, name, found.truncated(rank))
                kept += rank * sum(w.shape)
        states, (shifted, _) = after, run_block(compressed, shifted, calls[index], {}, masks)
    return model, kept


@torch.no_grad()
def block_calls(subject: Subject, batches: Sequence[Batch]) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """The hidden states before the first block, batch by batch, and how every block is called."""
    blocks = list(subject.model.get_submodule(subject.block_list))
    states, calls = [], [[] for _ in blocks]
    for batch in batches:
        with recorded_calls(blocks) as found:
            subject.model(**batch, use_cache=False)
        states.append(found[0][0])
        for own, (_, call, _) in zip(calls, found, strict=True):
            own.append(call)
    return states, calls


@torch.no_grad()
def run_block(
    block: nn.Module,
    states: Sequence[torch.Tensor],
    calls: Sequence[Call],
    layers: Mapping[str, nn.Module],
    masks: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The hidden states after a block, and the inputs `(tokens, features)` of some of its layers, without padding."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0]))
        for name, layer in layers.items()
    ]
    after = [call.of(block, hidden) for hidden, call in zip(states, calls, strict=True)]
    for handle in handles:
        handle.remove()
    return after, {
        name: torch.cat([x[mask] for x, mask in zip(found, masks, strict=True)]) for name, found in inputs.items()
    }


# Smaller inner dimensions.


def modegpt(study: Study, share: float) -> Compressed:
    """Every block keeps a share by its influence, the same in its queries and keys, its values, and its MLP."""
    subject = study.subject
    model, kept = subject.copy(), 0
    shares = peers.modegpt_shares(influences(subject, study.batches), share, temperature=0.1)
    for block, own in zip(subject.blocks, shares, strict=True):
        kept += smaller_attention(model, study, block, own) + smaller_mlp(model, study, block, own)
    return model, kept


def smaller_mlp(model: nn.Module, study: Study, block: Block, share: float) -> int:
    down = matrix(model, block.down)
    units = max(1, int(share * len(down)))
    set_matrix(model, block.down, peers.nystrom(study.inputs[block.down].moment, down, units))
    return units * down.shape[1] * (2 if block.gate is None else 3)


def smaller_attention(model: nn.Module, study: Study, block: Block, share: float) -> int:
    subject = study.subject
    heads, key_heads = subject.heads, subject.key_heads or subject.heads
    readers = heads // key_heads
    moment = study.inputs[block.attention[0]].moment
    width = len(moment)
    weights = np.concatenate([matrix(model, name) for name in block.attention], axis=1)
    size = weights.shape[1] // (heads + 2 * key_heads)
    biases = [model.get_submodule(name).bias for name in block.attention]
    bias = None if biases[0] is None else torch.cat([each.detach() for each in biases]).double().cpu().numpy()
    # One row for each head: of queries, then of keys, then of values.
    by_head = weights.reshape(width, -1, size).transpose(1, 0, 2).copy()
    bias_by_head = None if bias is None else bias.reshape(-1, size).copy()
    output = matrix(model, block.attention_output).copy().reshape(heads, size, width)
    kept = max(2, int(share * size) // 2 * 2) if subject.rotary else max(1, int(share * size))
    constant = np.zeros(width)
    for key in range(key_heads):
        queries = slice(key * readers, (key + 1) * readers)
        at_key, at_value = heads + key, heads + key_heads + key
        chosen = peers.kept_of_head(moment, list(by_head[queries]), by_head[at_key], kept, subject.rotary)
        dropped = np.setdiff1d(np.arange(size), chosen)
        for index in (*range(*queries.indices(heads)), at_key):
            by_head[index][:, dropped] = 0
            if bias_by_head is not None:
                bias_by_head[index, dropped] = 0
        if bias_by_head is not None:
            # The weights of an attention sum to 1, so the values' bias reaches the output as it is.
            constant += np.einsum("i,hij->j", bias_by_head[at_value], output[queries])
            bias_by_head[at_value] = 0
        side_by_side = output[queries].transpose(1, 0, 2).reshape(size, -1)
        by_head[at_value], fitted = peers.value_and_output(moment, by_head[at_value], side_by_side, kept)
        output[queries] = fitted.reshape(size, readers, width).transpose(1, 0, 2)
    start = 0
    weights = by_head.transpose(1, 0, 2).reshape(width, -1)
    for name, old in zip(block.attention, biases, strict=True):
        stop = start + matrix(model, name).shape[1]
        set_matrix(model, name, weights[:, start:stop])
        if old is not None:
            old.data.copy_(torch.from_numpy(bias_by_head.reshape(-1)[start:stop]))
        start = stop
    set_matrix(model, block.attention_output, output.reshape(-1, width))
    if bias is not None:
        shifted = model.get_submodule(block.attention_output).bias.data
        shifted += torch.from_numpy(constant).to(shifted.device)
    # A query and the rows of the output for each head, a key and a value for each key head.
    return 2 * (heads + key_heads) * width * kept


@torch.inference_mode()
def influences(subject: Subject, batches: Sequence[Batch]) -> NDArray[np.float64]:
    """`1 − cos(x, y)` between a block's inputs and outputs, the mean over the tokens."""
    blocks = subject.model.get_submodule(subject.block_list)
    sums, tokens = np.zeros(len(blocks)), 0
    mask: torch.Tensor

    def measure(index: int) -> Callable:
        def hook(_module: nn.Module, arguments: tuple, keywords: dict, output: object) -> None:
            x = (arguments[0] if arguments else keywords["hidden_states"])[mask]
            y = (output[0] if isinstance(output, tuple) else output)[mask]
            sums[index] += float((1 - nn.functional.cosine_similarity(x, y, dim=-1)).sum())

        return hook

    handles = [block.register_forward_hook(measure(index), with_kwargs=True) for index, block in enumerate(blocks)]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        tokens += int(mask.sum())
        subject.model(**batch)
    for handle in handles:
        handle.remove()
    return sums / tokens


# Kronecker sums.


def kronecker(study: Study, share: float, permuted: bool) -> Compressed:
    """The recipe's block on every linear layer; two neighbouring ranks, because one rank would leave budget unused."""
    model = study.subject.copy()
    matrices = {name: matrix(model, name) for name in study.subject.layers}
    shapes = {name: w.shape for name, w in matrices.items()}
    parameters = share * sum(w.size for w in matrices.values())
    base = min(int(share * w.size // peers.kronecker_parameters(w.shape, 1)) for w in matrices.values())
    near = {name: [peers.kronecker(w, base + extra, permuted) for extra in (0, 1)] for name, w in matrices.items()}
    errors = {
        name: [((w - approximation) ** 2).sum() / (w**2).sum() for approximation in near[name]]
        for name, w in matrices.items()
    }
    ranks = peers.dealt_ranks(shapes, errors, base, parameters)
    for name, rank in ranks.items():
        set_matrix(model, name, near[name][rank - base])
    return model, sum(peers.kronecker_parameters(shapes[name], rank) for name, rank in ranks.items())


# Pruning.


def pruned(study: Study, share: float, by_magnitude: bool) -> Compressed:
    """Attention heads and hidden units of every block taken out whole.

    By the sum of squares of all their weights, or at random. What is taken out is set to zero where it is read: that
    computes the same as smaller matrices.
    """
    model, heads = study.subject.copy(), study.subject.heads
    generator = np.random.default_rng(study.seed)
    kept = 0
    for block in study.subject.blocks:
        attention = np.concatenate([matrix(model, name) for name in block.attention], axis=1)
        output, up, down = (matrix(model, name).copy() for name in (block.attention_output, block.up, block.down))
        width, hidden = up.shape
        kept_heads, kept_units = peers.kept_of_block(width, hidden, heads, share)
        head_scores, unit_scores = generator.random(heads), generator.random(hidden)
        if by_magnitude:
            # Query, key and value side by side, each head by head.
            head_scores = (attention.reshape(width, 3, heads, -1) ** 2).sum((0, 1, 3))
            head_scores += (output.reshape(heads, -1) ** 2).sum(1)
            unit_scores = (up**2).sum(0) + (down**2).sum(1)
        output.reshape(heads, -1)[all_but(peers.strongest(head_scores, kept_heads), heads)] = 0
        down[all_but(peers.strongest(unit_scores, kept_units), hidden)] = 0
        set_matrix(model, block.attention_output, output)
        set_matrix(model, block.down, down)
        kept += 4 * width * (width // heads) * kept_heads + 2 * width * kept_units
    return model, kept


def all_but(indices: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    return np.setdiff1d(np.arange(length), indices)


def layers_dropped(study: Study, share: float) -> Compressed:
    model, subject = study.subject.copy(), study.subject
    kept = peers.kept_layers(len(subject.blocks), share)
    layers = model.get_submodule(subject.block_list)
    model.set_submodule(subject.block_list, nn.ModuleList(layers[index] for index in kept))
    model.config.num_hidden_layers = len(kept)
    return model, sum(matrices_parameters(subject.model, list(subject.blocks[index].layers)) for index in kept)


METHODS = {
    "layers dropped": Method(layers_dropped, seeded=False),
    "pruned at random": Method(partial(pruned, by_magnitude=False)),
    "pruned by magnitude": Method(partial(pruned, by_magnitude=True), seeded=False),
    "Kronecker": Method(partial(kronecker, permuted=False), seeded=False),
    "Kronecker, permuted": Method(partial(kronecker, permuted=True), seeded=False),
    "SVD": Method(partial(low_rank, kind="SVD"), seeded=False),
    "ASVD": Method(partial(low_rank, kind="ASVD")),
    "SVD-LLM": Method(partial(low_rank, kind="SVD-LLM")),
    "SVD-LLM V2": Method(partial(low_rank, kind="SVD-LLM V2", allocated=True)),
    "PIFA on SVD-LLM": Method(partial(low_rank, kind="SVD-LLM", pivoting=True)),
    "PIFA on SVD-LLM V2": Method(partial(low_rank, kind="SVD-LLM V2", pivoting=True, allocated=True)),
    "two-sided": Method(partial(low_rank, kind="two-sided")),
    "two-sided, global ranks": Method(two_sided_globally),
    "AA-SVD, closed form": Method(aa_svd),
    "MoDeGPT": Method(modegpt),
    OURS[0]: Method(partial(ours, whole=False)),
    OURS[1]: Method(partial(ours, whole=False, refined=True)),
}
WHOLE_METHODS = {
    "SVD": Method(partial(low_rank_everywhere, kind="SVD"), seeded=False),
    "SVD-LLM": Method(partial(low_rank_everywhere, kind="SVD-LLM")),
    "SVD-LLM, embedding by frequencies": Method(partial(low_rank_everywhere, kind="frequencies")),
    "PIFA on SVD-LLM, embedding by frequencies": Method(
        partial(low_rank_everywhere, kind="frequencies", pivoting=True)
    ),
    OURS[0]: Method(partial(ours, whole=True)),
    OURS[1]: Method(partial(ours, whole=True, refined=True)),
}
