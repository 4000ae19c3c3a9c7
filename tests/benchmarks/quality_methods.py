"""Whole models compressed to a budget, by ours and by every peer: what `quality` compares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import peers
import tqcompressor
from numpy.typing import NDArray
from peers import Spectrum
from quality_data import Subject, collect_inputs, every_matrix, matrix, set_matrix
from torch import nn
from transformers import PreTrainedModel

OURS = ("tqcompressor", "tqcompressor, sequential")
Compressed = tuple[PreTrainedModel, int]
"""A model, and how many of the parameters that its budget counts it keeps."""


class Study:
    """One model with the calibration text of one seed; what several budgets share is computed once."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.seed = subject, seed
        self.batches = subject.calibration(seed)
        self._spectra: dict[tuple[str, str], Spectrum] = {}

    @cached_property
    def _collected(self):
        return collect_inputs(self.subject, self.batches)

    @property
    def inputs(self):
        return self._collected[0]

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
                root = np.sqrt(self._collected[1] + 1)[:, None]
                scaled = peers.svd(root * w)
                return Spectrum(scaled.left / root, scaled.values, scaled.right)
            # Positions, and layers beside the blocks, of whose inputs SVD-LLM knows nothing.
            return peers.svd(w)
        if kind == "SVD":
            return peers.svd(w)
        if kind == "ASVD":
            return peers.asvd(w, self.inputs[name].mean_absolute)
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


def ours(study: Study, share: float, whole: bool, sequential: bool = False) -> Compressed:
    """Calibrated and compressed by the package; counted by the parameters that torch finds afterwards.

    The plan is the same with `sequential`; each layer is then fitted to its inputs in the model compressed so far.
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
    options["sequential"] = study.batches if sequential else None
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
    OURS[0]: Method(partial(ours, whole=False)),
    OURS[1]: Method(partial(ours, whole=False, sequential=True)),
}
WHOLE_METHODS = {
    "SVD": Method(partial(low_rank_everywhere, kind="SVD"), seeded=False),
    "SVD-LLM": Method(partial(low_rank_everywhere, kind="SVD-LLM")),
    "SVD-LLM, embedding by frequencies": Method(partial(low_rank_everywhere, kind="frequencies")),
    "PIFA on SVD-LLM, embedding by frequencies": Method(
        partial(low_rank_everywhere, kind="frequencies", pivoting=True)
    ),
    OURS[0]: Method(partial(ours, whole=True)),
    OURS[1]: Method(partial(ours, whole=True, sequential=True)),
}
