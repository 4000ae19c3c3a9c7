"""The boundary to Rust. Arrays are C-contiguous; a matrix `w` is held in × out; every call releases the GIL.

The public functions in `tqcompressor` wrap these and document them; nothing else should call them.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from .config.specs import MatrixSpec
from .config.tq_config import TQConfig

__all__ = [
    "KEPT_SPECTRA",
    "MODEL_TYPES",
    "TEXT_HEAD",
    "UNCALIBRATED_BUDGET",
    "Checkpoint",
    "Choice",
    "DecodeStream",
    "Fitted",
    "GroupedTerm",
    "Journal",
    "KroneckerTerm",
    "LowRankTerm",
    "MatrixInfo",
    "ModelPlan",
    "Runtime",
    "SpectrumStore",
    "SpentBudget",
    "Tokenizer",
    "Written",
    "__version__",
    "apply",
    "check_destination",
    "distillation_loss",
    "expand",
    "expand_checkpoint",
    "expand_gradients",
    "find_permutation",
    "fit_many",
    "fit_within",
    "foreign_json",
    "foreign_text",
    "fused_parts",
    "head_loss",
    "hidden_state_loss",
    "hub_id",
    "instruction_set",
    "instruction_sets",
    "least_parameters",
    "list_matrices",
    "macs",
    "native_refusal",
    "nearest_kronecker_sum",
    "plan",
    "quantize",
    "read_config",
    "reconstruct",
    "source_name",
    "spend_budget",
    "split_part",
    "times_kronecker",
    "times_low_rank",
    "topk_distillation_loss",
    "write_checkpoint",
]

__version__: str
MODEL_TYPES: list[str]
"""Those whose checkpoints can be compressed on disk."""
TEXT_HEAD: int
"""How many bytes at the beginning of a file `foreign_text` looks at."""
UNCALIBRATED_BUDGET: str
KEPT_SPECTRA: int
"""Bytes of eigendecompositions that a budget keeps between planning and fitting."""

_Float32Array = NDArray[np.float32]
_Int64Array = NDArray[np.int64]
# Called with (done, total) from the calling thread, about every 50 ms and once at the end.
_ProgressCallback = Callable[[int, int], object]

# The second moments of a matrix's inputs and of the gradients at its outputs: `(d, d)`, or `(d,)` for a diagonal.
class _Measured(Protocol):
    """What a report says of a calibration: a `Calibration` has it."""

    @property
    def tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def sensitivity(self) -> bool: ...
    @property
    def texts(self) -> dict[str, int]: ...

_Moments = tuple[_Float32Array | None, _Float32Array | None]
# `(folder, weight files, whether every file of the folder belongs to the model)`.
_Origin = tuple[str | PathLike[str], Sequence[str | PathLike[str]], bool]
# `(stored name, name without the base prefix, shape, kind)`.
_Weight = tuple[str, str, tuple[int, ...], str]

def instruction_set() -> str:
    """The instruction set that the kernels use: the best of `instruction_sets`, or what `TQCOMPRESSOR_ISA` names.

    ConfigError if the variable has an unknown name, or that of one which this processor lacks.
    """

def instruction_sets() -> list[str]:
    """Those that this processor has, the best last: "baseline", "avx2", "avx512", "neon"."""

def foreign_text(head: bytes) -> str | None:
    """What the beginning of a file that should be UTF-8 shows in its place, with the way out; None if nothing."""

def foreign_json(head: bytes) -> str | None:
    """As `foreign_text`, for JSON: that has no byte order mark either."""

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

@final
class KroneckerTerm:
    """One permuted Kronecker sum: `W[p][:, q] = Σ_k A_k ⊗ B_k`."""

    a: _Float32Array
    """`A` (rank, m1, n1)."""
    b: _Float32Array
    """`B` (rank, m2, n2)."""
    row_permutation: _Int64Array
    """`p`, gather indices."""
    column_permutation: _Int64Array
    """`q`, gather indices."""
    def __new__(
        cls, a: _Float32Array, b: _Float32Array, row_permutation: _Int64Array, column_permutation: _Int64Array
    ) -> KroneckerTerm: ...

@final
class LowRankTerm:
    """One low-rank matrix: `W[order] = [I; left] right`, or `W[:, order] = left [I right]` where `m > n`."""

    left: _Float32Array
    right: _Float32Array
    order: _Int64Array
    """Gather indices of the shorter side, with the pivots first."""
    def __new__(cls, left: _Float32Array, right: _Float32Array, order: _Int64Array) -> LowRankTerm: ...

@final
class GroupedTerm:
    """One table in groups of rows, each of low rank: `W[row_order]` is the groups one above the other."""

    left: _Float32Array
    """The `left` factors of all groups, row-major, one after the other."""
    right: _Float32Array
    row_order: _Int64Array
    """Gather indices of the rows."""
    column_order: _Int64Array
    """Gather indices of the columns of all groups, those of group `g` from `g · columns` up."""
    def __new__(
        cls, left: _Float32Array, right: _Float32Array, row_order: _Int64Array, column_order: _Int64Array
    ) -> GroupedTerm: ...

@final
class Fitted:
    """The fit of one matrix."""

    spec: MatrixSpec
    terms: list[KroneckerTerm | LowRankTerm | GroupedTerm]
    """Its terms, in the order of the spec."""
    lost_energy: float
    """The lost share of its energy, in the norm of the fit."""
    seconds: float

def fit_many(
    matrices: Sequence[_Float32Array],
    names: Sequence[str],
    specs: Sequence[MatrixSpec],
    moments: Sequence[_Moments],
    *,
    effort: str,
    seed: int,
    threads: int | None,
    progress: _ProgressCallback | None,
) -> list[Fitted]:
    """The fit of each matrix, in parallel; `names` are for error messages."""

def fit_within(
    w: _Float32Array,
    moment_pair: _Moments,
    *,
    parameters: int,
    max_macs: float | None,
    effort: str,
    threads: int | None,
    progress: _ProgressCallback | None,
) -> Fitted:
    """The best fit of any kind with at most the given number of parameters, and MACs as for `spend_budget`."""

@final
class MatrixInfo:
    """A matrix that can be compressed; in a plan, with its spec."""

    name: str
    """Its name in configs and reports: "h.0.attn.c_attn.q"."""
    module: str
    """The name of its module, without the base model's prefix: "h.0.attn.c_attn"."""
    tensor: str
    """The stored name of its tensor: "transformer.h.0.attn.c_attn.weight"."""
    kind: str
    """"conv1d", "linear" or "embedding"."""
    shape: tuple[int, int]
    """In × out."""
    first_column: int
    """Its first column in the in × out tensor; not 0 only for the later parts of a fused weight."""
    parameters_before: int
    spec: MatrixSpec | None
    """None where it stays dense."""
    parameters_after: int

@final
class ModelPlan:
    """A config resolved against the matrices of a model."""

    matrices: list[MatrixInfo]
    """The compressed matrices, in model order, each with its spec."""
    report: str
    """The plan as a `CompressionReport` in JSON."""

@final
class Choice:
    """The choice of a budget for one matrix."""

    spec: MatrixSpec | None
    """None where it stays dense."""
    parameters: int
    macs_before: int
    """MACs for one token while it is dense."""
    macs: int
    """MACs for one token after compression."""
    lost_energy: float
    energies: NDArray[np.float64]
    """In descending order, of all groups of rows together; without groups, rank `k` loses all but the first `k`."""

@final
class SpentBudget:
    """A budget after planning, with the results that fitting reuses."""

    @property
    def choices(self) -> list[Choice]:
        """The choice for every matrix, in the order of the arguments."""

    def fit(
        self,
        which: Sequence[int],
        matrices: Sequence[_Float32Array],
        names: Sequence[str],
        moments: Sequence[_Moments],
        *,
        threads: int | None,
        progress: _ProgressCallback | None,
    ) -> list[Fitted]:
        """The fits of the matrices at these positions of the budget. Each fit can be taken once."""

@final
class SpectrumStore:
    """The spectra of so many matrices in one norm, which several budgets share.

    What does not fit the memory that is kept is in an unnamed temporary file.
    """

    def __new__(cls, matrices: int) -> SpectrumStore: ...

def macs(spec: MatrixSpec, shape: tuple[int, int], usage: str) -> tuple[int, int]:
    """`(before, after)`: the MACs for one token of a matrix of this shape, in × out, while dense and by its spec.

    A usage is as for `spend_budget`.
    """

def least_parameters(shape: tuple[int, int], counted: bool) -> int:
    """The fewest parameters to which a budget can compress a matrix of this shape, in × out.

    They are those of rank 1, of each group of rows where `counted` says that it is an embedding whose tokens have
    frequencies.
    """

def spend_budget(
    matrices: Sequence[_Float32Array],
    names: Sequence[str],
    modules: Sequence[str],
    usages: Sequence[str],
    moments: Sequence[_Moments],
    *,
    parameters: int | None,
    lost_energy: float | None,
    max_macs: float | None,
    effort: str,
    keep: bool,
    threads: int | None,
    progress: _ProgressCallback | None,
) -> SpentBudget:
    """Distributes one budget: at most this number of `parameters`, or the fewest that lose this share of the energy.

    A usage is "map", "lookup" or "tied_lookup"; `max_macs` is a share of the MACs of the dense matrices, infinity for
    no cap; by default, no matrix takes more than while dense. Matrices of one module are compressed all or none. With
    `keep`, `SpentBudget.fit` can follow.
    """

def expand_checkpoint(
    source: str,
    out: str,
    *,
    dtype: str | None,
    overwrite: bool,
    max_shard_bytes: int,
    threads: int | None,
    progress: _ProgressCallback | None,
) -> None:
    """Writes the dense checkpoint of the compressed one in `source`."""

def check_destination(out: str | PathLike[str], source: _Origin, overwrite: bool) -> None:
    """Raises what `write_checkpoint` would raise for this destination."""

def write_checkpoint(
    out: str | PathLike[str],
    source: _Origin,
    tensors: Sequence[tuple[str, str, Sequence[int], NDArray[np.uint8]]],
    config: str,
    report: str | None,
    *,
    overwrite: bool,
    max_shard_bytes: int,
    progress: _ProgressCallback | None,
) -> None:
    """Writes tensors `(name, dtype, shape, bytes)` as a checkpoint with the text of its `config.json`.

    The report, JSON, gets the size of the weights and the names of the files that are copied from the source.
    """

def list_matrices(
    tensors: Sequence[_Weight],
    base_prefix: str,
    tied: Sequence[tuple[str, str]],
    patterns: Sequence[str] | None,
) -> list[MatrixInfo]:
    """The matrices of a model in memory that match a pattern, all of them for None; arguments as for `plan`."""

def plan(tensors: Sequence[_Weight], base_prefix: str, tied: Sequence[tuple[str, str]], config: TQConfig) -> ModelPlan:
    """What `config` would do to a model in memory.

    A weight is `(stored name, name without the base prefix, shape, kind)`, a kind "conv1d", "linear" or "embedding".
    Patterns may have `base_prefix` or not; `tied` are heads that are left out, each with what it is tied to.
    """

def quantize(
    values: NDArray[np.float32], rows: int, columns: int, by_rows: bool
) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """`(codes, scales)` of contiguous values of `(rows, columns)` matrices: `value ≈ code · scale`.

    There is one scale, given as the bits of a bfloat16, for each row or each column of every matrix. Raises
    `NonFiniteError` for NaN or an infinity.
    """

def read_config(text: str) -> tuple[list[tuple[str, MatrixSpec]], str, int, list[str] | None]:
    """`(specs, effort, seed, dense)` of a config in JSON, as the native runtime reads it from a checkpoint.

    `dense` are the dense modules with eight-bit weights, None where no weights are.
    """

def split_part(matrix: str) -> tuple[str, str | None]:
    """The module of a matrix and, if it is fused, the name of the part: "c_attn.q" is "c_attn", "q"."""

def fused_parts(module: str, kind: str, rows: int, columns: int) -> list[str] | None:
    """The parts of a fused weight `(rows, columns)`, in × out, such as q, k and v; None for any other module."""

@final
class Journal:
    """The finished work of a run, beside its destination, which no other run may write meanwhile."""

    @property
    def directory(self) -> Path:
        """A caller may keep files of its own in it."""

    @property
    def found(self) -> int:
        """The number of finished files that it took over."""

    @property
    def replaced(self) -> int:
        """The number of finished files of an earlier run that it removed."""

    def close(self) -> None:
        """Releases the destination, and removes the work unless it may be resumed. A second call does nothing."""

@final
class Checkpoint:
    """A dense checkpoint on disk, opened and validated once."""

    @staticmethod
    def open(directory: str | PathLike[str], *, weights: bool = True) -> Checkpoint:
        """`weights` is whether they are used, and not only names and shapes."""

    @property
    def parameters(self) -> int:
        """A tied head does not count."""

    @property
    def bytes(self) -> int:
        """Size of its weight files."""

    @property
    def tensors(self) -> list[tuple[str, list[int], int]]:
        """`(name, shape, parameters)` of every tensor but a tied head, in model order."""

    @property
    def weight_files(self) -> list[Path]:
        """The files of its weights."""

    def journal(self, out: str, key: str, *, resume: bool, overwrite: bool) -> Journal:
        """Claims a destination, and opens the journal of a run whose result depends on `key`, a JSON object.

        With `resume`, the work of an earlier run with the same key is taken over, and that of this run is kept if it
        fails.
        """

    def check_destination(self, out: str, overwrite: bool) -> None:
        """Raises what `compress` would raise for this destination."""

    def list_matrices(self, patterns: Sequence[str] | None) -> list[MatrixInfo]:
        """Its matrices that match a pattern, all of them for None."""

    def plan(self, config: TQConfig) -> ModelPlan:
        """What `config` would do to it."""

    def spend_budget(
        self,
        names: Sequence[str],
        moments: Sequence[_Moments],
        *,
        parameters: int | None,
        lost_energy: float | None,
        max_macs: float | None,
        effort: str,
        journal: Journal | None,
        spectra: SpectrumStore | None,
        threads: int | None,
        progress: _ProgressCallback | None,
    ) -> SpentBudget:
        """`spend_budget` for matrices of the checkpoint, by their names. With a journal, fits can follow.

        What `spectra` holds, of the same matrices with the same moments, is not computed again.
        """

    def compress(
        self,
        journal: Journal,
        config: TQConfig,
        names: Sequence[str],
        moments: Sequence[_Moments],
        *,
        spent: SpentBudget | None,
        dtype: str | None,
        overwrite: bool,
        max_shard_bytes: int,
        measured: _Measured | None,
        facts: str,
        threads: int | None,
        progress: Callable[[int, int, str], object] | None,
    ) -> Written:
        """Writes the compressed checkpoint beside the journal's destination, where `Written.commit` puts it.

        `progress` is called with `(done, total, phase)`.

        Fits are made in the norms of the `moments` of the matrices `names`, or are those of a budget that was `spent`
        on these matrices with these moments. The report says what the moments were `measured` on, and has the entries
        of `facts`, a JSON object.
        """

@final
class Written:
    """A compressed checkpoint that is written beside its destination."""

    @property
    def report(self) -> str:
        """Its report, as JSON."""

    def add(self, name: str, contents: bytes) -> None:
        """Adds a small file."""

    def commit(self) -> None:
        """Makes it the destination, all of it in one step, and closes its journal."""

    def close(self) -> None:
        """Removes it unless it was committed. A second call does nothing."""

def hub_id(source: str | PathLike[str]) -> str | None:
    """The hub id of a directory in huggingface_hub's cache; None for any other."""

def source_name(source: str | PathLike[str]) -> str:
    """The name of a source in a report: its hub id if it is in the hub's cache, otherwise that of its folder."""

def reconstruct(a: _Float32Array, b: _Float32Array, p: _Int64Array, q: _Int64Array) -> _Float32Array:
    """The dense `(m, n)` matrix of the factors, in the original order of rows and columns."""

def expand(
    a: _Float32Array, b: _Float32Array, rows: _Int64Array | None, columns: _Int64Array | None, threads: int
) -> _Float32Array:
    """`K[rows][:, columns]` for `K = Σ_k A_k ⊗ B_k`, in float32; rows and columns are permutations."""

def expand_gradients(
    gradient: _Float32Array,
    a: _Float32Array,
    b: _Float32Array,
    rows: _Int64Array | None,
    columns: _Int64Array | None,
    threads: int,
) -> tuple[_Float32Array, _Float32Array]:
    """The gradients by `a` and `b` that follow from the gradient by the matrix of `expand`."""

def times_low_rank(
    x: _Float32Array | NDArray[np.uint16],
    left: _Float32Array | NDArray[np.uint16],
    right: _Float32Array | NDArray[np.uint16],
    input: _Int64Array | None,
    output: _Int64Array | None,
    bias: _Float32Array | NDArray[np.uint16] | None,
    dtype: str,
    transposed: bool,
) -> _Float32Array | NDArray[np.uint16]:
    """`x W + bias` of a few rows for `W[input] = [I; left] right`, or for `W = (left [I right])[:, output]`."""

def times_kronecker(
    x: _Float32Array | NDArray[np.uint16],
    a: _Float32Array | NDArray[np.uint16],
    b: _Float32Array | NDArray[np.uint16],
    input: _Int64Array | None,
    output: _Int64Array | None,
    bias: _Float32Array | NDArray[np.uint16] | None,
    dtype: str,
    transposed: bool,
) -> _Float32Array | NDArray[np.uint16]:
    """`y[:, output] + bias` of a few rows, for `y = x[:, input] Σ_k A_k ⊗ B_k`."""

def apply(x: _Float32Array, a: _Float32Array, b: _Float32Array, p: _Int64Array, q: _Int64Array) -> _Float32Array:
    """`x @ reconstruct(a, b, p, q)` for `x` (batch, m), without forming the product."""

# A half-precision matrix is passed as its bits, with its dtype beside it.
_FloatMatrix = _Float32Array | NDArray[np.uint16]

# In what follows `out` is the place of the gradient by the student's values: None, an array of the same shape and
# dtype, or the student's array itself.
def distillation_loss(
    student: _FloatMatrix,
    student_dtype: str,
    out: _FloatMatrix | None,
    teacher: _FloatMatrix | None,
    teacher_dtype: str,
    labels: _Int64Array | None,
    temperature: float,
    divergence: float,
    cross_entropy: float,
    reverse: bool,
    ignore_index: int,
    part: tuple[int, float] | None,
    threads: int | None,
) -> float:
    """`divergence·KL_T + cross_entropy·CE`, the mean over rows of logits.

    For a `part` of a larger batch, (the first row's number, a factor), the sum of the rows' losses times the factor.
    """

def topk_distillation_loss(
    student: _FloatMatrix,
    student_dtype: str,
    out: _FloatMatrix | None,
    tokens: _Int64Array,
    probabilities: _Float32Array,
    labels: _Int64Array | None,
    temperature: float,
    divergence: float,
    cross_entropy: float,
    ignore_index: int,
    threads: int | None,
) -> float:
    """`distillation_loss` against a teacher's most probable tokens (rows, k); all other tokens count as one."""

def hidden_state_loss(
    student: _FloatMatrix,
    student_dtype: str,
    out: _FloatMatrix | None,
    teacher: _FloatMatrix,
    teacher_dtype: str,
    mask: NDArray[np.bool_] | None,
    kind: str,
    threads: int | None,
) -> float:
    """The mean distance of hidden states, "mse" or "cosine"."""

def head_loss(
    student: tuple[_Float32Array, _Float32Array],
    teacher: tuple[_Float32Array, _Float32Array] | None,
    labels: _Int64Array | None,
    temperature: float,
    divergence: float,
    cross_entropy: float,
    reverse: bool,
    ignore_index: int,
    out: tuple[_Float32Array, _Float32Array] | None,
    threads: int | None,
) -> float:
    """`distillation_loss` of `hidden @ head.T` for pairs `(hidden, head)`; `out` holds the gradients by both."""

def native_refusal(config: str) -> str | None:
    """Why the native runtime does not compute the model of a `config.json`, given as its text; None if it does."""

@final
class Runtime:
    """A decoder in memory with its thread pool. Token sequences are neither empty nor padded."""

    @staticmethod
    def load(
        directory: str | PathLike[str],
        threads: int | None,
        progress: _ProgressCallback | None,
        *,
        int8: bool = False,
        kv_dtype: str = "float32",
    ) -> Runtime: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> list[int]: ...
    @property
    def parameters(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def logits(self, sequences: Sequence[Sequence[int]]) -> _Float32Array:
        """`(tokens of all sequences, vocab_size)`."""

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
        eos_token_id: Sequence[int],
        on_tokens: Callable[[list[tuple[int, int]]], object] | None,
    ) -> list[list[int]]:
        """The new tokens of each prompt; `on_tokens` is called with `(number of prompt, token)`, about every 50 ms."""

    @property
    def tied(self) -> bool: ...
    @property
    def model_type(self) -> str: ...
    @property
    def embeddings(self) -> tuple[str, str | None]:
        """The names in configs of the embeddings of tokens and of positions."""

    @property
    def output_head(self) -> str:
        """The name of the head in configs."""

    def linear_layers(self) -> list[tuple[list[str], int]]:
        """The linear layers by their names in configs: those that share their inputs, and how many these are."""

    def input_moments(
        self,
        sequences: Sequence[Sequence[int]],
        names: Sequence[str],
        max_memory: int,
        progress: _ProgressCallback | None,
    ) -> list[_Float32Array]:
        """`E[xᵀx]` of the inputs of the named layers, over all tokens; sums beyond `max_memory` bytes are in a file."""

@final
class Tokenizer:
    """The tokenizer of a checkpoint."""

    @staticmethod
    def load(directory: str | PathLike[str]) -> Tokenizer: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str: ...
    def decode_stream(self, skip_special_tokens: bool) -> DecodeStream: ...

@final
class DecodeStream:
    """A decoder of a stream of tokens."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` add; the bytes of an incomplete character are held back."""
