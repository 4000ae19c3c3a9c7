"""The boundary to Rust. Arrays are C-contiguous; a matrix `w` is held in × out; every call releases the GIL.

The public functions in `tqcompressor` wrap these and document them; nothing else should call them.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DecodeStream",
    "Layer",
    "Runtime",
    "Threads",
    "Tokenizer",
    "__version__",
    "apply",
    "choose_specs",
    "choose_specs_of_checkpoint",
    "compress_checkpoint",
    "distillation_loss",
    "distillation_loss_in_place",
    "expand",
    "find_permutation",
    "fit_many",
    "fit_within",
    "head_loss",
    "hidden_state_loss",
    "nearest_kronecker_sum",
    "plan",
    "plan_checkpoint",
    "reconstruct",
    "topk_distillation_loss",
]

__version__: str

_Float32Array = NDArray[np.float32]
_Int64Array = NDArray[np.int64]
# Called with (done, total) from the calling thread, about every 50 ms and once at the end.
_ProgressCallback = Callable[[int, int], object]
# The second moments of a matrix's inputs and of the gradients at its outputs: `(d, d)`, or `(d,)` for a diagonal.
_Moments = tuple[_Float32Array | None, _Float32Array | None]
_Chosen = tuple[str | None, int, tuple[int, int], float, NDArray[np.float64]]

def nearest_kronecker_sum(
    w: _Float32Array, block: tuple[int, int], rank: int
) -> tuple[_Float32Array, _Float32Array, float]:
    """`(A, B, lost_energy)` with `A` (rank, m1, n1) and `B` (rank, m2, n2)."""

def find_permutation(
    w: _Float32Array,
    block: tuple[int, int],
    rank: int,
    permute: str,
    effort: str,
    seed: int,
    threads: int | None,
    progress: _ProgressCallback | None,
) -> tuple[_Int64Array, _Int64Array, float]:
    """`(p, q, lost_energy)`: gather indices such that `w[p][:, q]` is near a Kronecker sum."""

def fit_many(
    matrices: Sequence[_Float32Array],
    names: Sequence[str],
    specs: Sequence[str],
    moment_arrays: Sequence[_Moments],
    effort: str,
    seed: int,
    threads: int | None,
    progress: _ProgressCallback | None,
) -> list[tuple[list[tuple[Any, ...]], float, float]]:
    """`(terms, lost_energy, seconds)` of each matrix, in parallel; `names` are for error messages, `specs` are JSON.

    A term is `("kronecker", A, B, p, q)` or `("low_rank", left, right, order)`.
    """

def fit_within(
    w: _Float32Array,
    moment_arrays: _Moments,
    parameters: int,
    effort: str,
    seed: int,
    threads: int | None,
    progress: _ProgressCallback | None,
) -> tuple[str, list[tuple[Any, ...]], float]:
    """`(spec, terms, lost_energy)`: the best of any kind with at most so many parameters; the spec is JSON."""

def choose_specs(
    matrices: Sequence[_Float32Array],
    names: Sequence[str],
    usages: Sequence[str],
    moment_arrays: Sequence[_Moments],
    target_value: tuple[str, float],
    max_multiplies: float | None,
    effort: str,
    seed: int,
    threads: int | None,
    progress: _ProgressCallback | None,
) -> list[_Chosen]:
    """`(spec or None, parameters, (multiplies_before, multiplies), lost_energy, energies)` of each matrix, under one
    budget for all of them.

    The target is `("parameters", count)` or `("lost_energy", share)`; a spec is JSON, None where a matrix stays dense.
    A usage is "map", "lookup" or "tied_lookup"; `max_multiplies` is a share of the multiplies of the dense matrices.
    """

def choose_specs_of_checkpoint(
    source: str,
    config: str,
    moment_arrays: Sequence[tuple[str, _Moments]],
    target_value: tuple[str, float],
    max_multiplies: float | None,
    threads: int | None,
    progress: _ProgressCallback | None,
) -> list[tuple[str, _Chosen]]:
    """`choose_specs` for the matrices of a checkpoint that `config` (JSON) names, each with its name."""

def reconstruct(a: _Float32Array, b: _Float32Array, p: _Int64Array, q: _Int64Array) -> _Float32Array:
    """The dense `(m, n)` matrix that the factors stand for, permutations undone."""

def expand(
    a: _Float32Array, b: _Float32Array, rows: _Int64Array | None, columns: _Int64Array | None, threads: int
) -> _Float32Array:
    """`K[rows][:, columns]` for `K = Σ_k A_k ⊗ B_k`, in float32; rows and columns are permutations."""

def apply(x: _Float32Array, a: _Float32Array, b: _Float32Array, p: _Int64Array, q: _Int64Array) -> _Float32Array:
    """`x @ reconstruct(a, b, p, q)` for `x` (batch, m), without forming the product."""

def plan(tensors: Sequence[tuple[str, tuple[int, ...], str]], tied_head: bool, config: str) -> str:
    """What `config` (JSON) would do to these `(name, shape, kind)` tensors, as JSON.

    A kind is "conv1d", "linear", "embedding" or, for what is never compressed, "other".
    """

def plan_checkpoint(source: str, config: str) -> str:
    """What `config` (JSON) would do to the checkpoint in the directory `source`, as JSON."""

def compress_checkpoint(
    source: str,
    destination: str,
    config: str,
    moment_arrays: Sequence[tuple[str, _Moments]],
    dtype: str | None,
    overwrite: bool,
    max_shard_bytes: int,
    threads: int | None,
    progress: _ProgressCallback | None,
) -> str:
    """Compresses `source` into the directory `destination` and returns the report as JSON."""

# A half-precision matrix comes and goes as its bits; the dtype beside it says which of the two it is.
_FloatMatrix = _Float32Array | NDArray[np.uint16]

def distillation_loss(
    student: _FloatMatrix,
    student_dtype: str,
    teacher: _FloatMatrix | None,
    teacher_dtype: str,
    labels: _Int64Array | None,
    temperature: float,
    divergence: float,
    cross_entropy: float,
    reverse: bool,
    ignore_index: int,
    gradient: bool,
    threads: int | None,
) -> tuple[float, _FloatMatrix | None]:
    """`divergence·KL_T + cross_entropy·CE`, the mean over rows of logits, and its gradient by the student's."""

def distillation_loss_in_place(
    student: _Float32Array,
    teacher: _Float32Array | None,
    labels: _Int64Array | None,
    temperature: float,
    divergence: float,
    cross_entropy: float,
    reverse: bool,
    ignore_index: int,
    first: int,
    scale: float,
    gradient: bool,
    threads: int | None,
) -> float:
    """`scale` times the sum of some rows' losses, the gradient written over the student's logits.

    `first` is the number of the first row, for errors.
    """

def topk_distillation_loss(
    student: _FloatMatrix,
    student_dtype: str,
    tokens: _Int64Array,
    probabilities: _Float32Array,
    labels: _Int64Array | None,
    temperature: float,
    divergence: float,
    cross_entropy: float,
    ignore_index: int,
    gradient: bool,
    threads: int | None,
) -> tuple[float, _FloatMatrix | None]:
    """`distillation_loss` against a teacher's likeliest tokens (rows, k), all others taken as one."""

def hidden_state_loss(
    student: _FloatMatrix,
    student_dtype: str,
    teacher: _FloatMatrix,
    teacher_dtype: str,
    mask: NDArray[np.bool_] | None,
    kind: str,
    gradient: bool,
    threads: int | None,
) -> tuple[float, _FloatMatrix | None]:
    """The mean distance of hidden states, "mse" or "cosine", and its gradient by the student's."""

def head_loss(
    student: tuple[_Float32Array, _Float32Array],
    teacher: tuple[_Float32Array, _Float32Array] | None,
    labels: _Int64Array | None,
    temperature: float,
    divergence: float,
    cross_entropy: float,
    reverse: bool,
    ignore_index: int,
    gradient: bool,
    threads: int | None,
) -> tuple[float, tuple[_Float32Array, _Float32Array] | None]:
    """`distillation_loss` of `hidden @ head.T` for pairs `(hidden, head)`, with the gradients by both."""

@final
class Runtime:
    """A GPT-2 in memory, and the threads that it computes with. Token sequences are neither empty nor padded."""

    @staticmethod
    def load(directory: str | PathLike[str], threads: int | None, progress: _ProgressCallback | None) -> Runtime: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def begin_token(self) -> int | None: ...
    @property
    def end_tokens(self) -> list[int]: ...
    @property
    def parameters(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def logits(self, sequences: Sequence[Sequence[int]]) -> _Float32Array:
        """`(tokens of all sequences, vocabulary)`."""

    def score(
        self, sequences: Sequence[Sequence[int]], scored: Sequence[int]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """`ln p` of the last `scored[i]` tokens of each sequence, and whether each was the most probable one."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        end_tokens: Sequence[int],
        on_tokens: Callable[[list[tuple[int, int]]], object] | None,
    ) -> list[list[int]]:
        """The new tokens of each prompt; `on_tokens` is called with `(number of prompt, token)`, about every 50 ms."""

    @property
    def tied(self) -> bool: ...
    def linear_layers(self) -> list[tuple[str, int]]:
        """The linear layers by their names in configs, and the inputs of each; the head is "lm_head"."""

    def input_moments(
        self, sequences: Sequence[Sequence[int]], names: Sequence[str], progress: _ProgressCallback | None
    ) -> list[_Float32Array]:
        """`E[xᵀx]` of the inputs of the named layers, over all tokens."""

@final
class Tokenizer:
    """The tokenizer of a checkpoint."""

    @staticmethod
    def load(directory: str | PathLike[str]) -> Tokenizer: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def begin_token(self) -> int | None: ...
    @property
    def end_token(self) -> int | None: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str: ...
    def decode_stream(self, skip_special_tokens: bool) -> DecodeStream: ...

@final
class DecodeStream:
    """The text of tokens that come one after another."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` add; bytes that end no character yet are held back."""

@final
class Threads:
    """Threads that are kept between calls."""

    def __new__(cls, threads: int) -> Threads: ...

@final
class Layer:
    """A linear layer of the native runtime by itself: what benchmarks time."""

    @staticmethod
    def dense(w: _Float32Array) -> Layer:
        """The layer `y = x w`."""

    @staticmethod
    def kronecker(a: _Float32Array, b: _Float32Array, p: _Int64Array, q: _Int64Array) -> Layer:
        """The layer of `W` with `W[p][:, q] = Σ_k A_k ⊗ B_k`."""

    def times(self, x: _Float32Array, way: str, threads: Threads) -> _Float32Array:
        """`x W`; a Kronecker sum by its "factors", by its "matrix" or by the "cheapest" of the two."""
