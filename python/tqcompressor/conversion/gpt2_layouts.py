"""The tensors of a GPT-2 in any of the known layouts, as our format stores them.

A linear map is stored in one of these forms, which are recognised by their names, matrix by matrix:

- dense: `c_fc.weight`, in × out as GPT-2's, or out × in as nanoGPT's;
- TQCompressedGPT-2: `c_fc.A (rank, n1, m1)`, `c_fc.B (rank, m2, n2)`, `c_fc.p_inv`, `c_fc.q` and the bias `c_fc.b`, for
  `y = (x[p_inv] @ Σ_k A_kᵀ ⊗ B_k)[q] + b`;
- Krony-PT: `c_fc_0 (rank, m1, n1)`, `c_fc_1 (rank, m2, n2)` and `c_fc_bias`, for `y = x @ Σ_k c_fc_0[k] ⊗ c_fc_1[k]`;
  older files have a tensor for each factor, `c_fc_{k}_0 (m1, n1)` and `c_fc_{k}_1 (m2, n2)`.

An embedding is dense, or nested as TQCompressedGPT-2's is: `wte.embedding.embedding.weight (vocabulary, n1)`, and for
each level, from within, `B (1, n)` and `p` with `e' = (e ⊗ B)[p]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.choices import Permute
from ..config.specs import KroneckerSpec
from ..errors import CheckpointError, DtypeError, NonFiniteError

if TYPE_CHECKING:
    import torch

# What wrappers put before the names of a model: torch.compile anywhere, others in front.
_COMPILED = "_orig_mod."
_WRAPPED = ("module.", "_forward_module.", "model.")
_PREFIX = "transformer."
# The causal masks that older versions of transformers and nanoGPT store.
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_FACTORS = ("A", "B", "p_inv", "q")


@dataclass
class ConvertedMatrix:
    """A matrix of which the factors were found, in × out."""

    name: str
    """Its name in a config: "h.1.mlp.c_fc"."""
    rows: int
    columns: int
    spec: KroneckerSpec


@dataclass
class Gpt2Tensors:
    """A GPT-2 with a language-model head, in our format."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """The tensors by stored name, in model order."""
    matrices: list[ConvertedMatrix] = field(default_factory=list)
    """The compressed matrices, in model order."""
    width: int = 0
    layers: int = 0
    vocab_size: int = 0
    positions: int = 0
    inner: int = 0
    tied: bool = True
    """Whether the head is the token embedding."""
    out_by_in: bool = False
    """Whether dense maps were stored out × in, as nanoGPT's."""


def read_gpt2(tensors: Mapping[str, torch.Tensor], path: Path) -> Gpt2Tensors:
    """Reads the tensors of a GPT-2 in any known layout; `path` stands in errors.

    Names may have the prefixes of `torch.compile` and of wrappers for several devices, and "transformer." or not. A
    model without any bias gets biases of zeros. A rank beyond what a matrix can need is reduced, which is exact.

    Raises:
        CheckpointError: A tensor is missing, is no part of the model, or has a shape that does not fit.
        DtypeError, NonFiniteError: In a tensor.
    """
    return _Reader(tensors, path).read()


class _Reader:
    def __init__(self, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        self._path = path
        self._stored: dict[str, str] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for stored, tensor in tensors.items():
            name = _bare(stored)
            if _MASK.fullmatch(name):
                continue
            if name in self._stored:
                raise self._error(f"tensors '{self._stored[name]}' and '{stored}' are the same weight under two names")
            self._stored[name], self._tensors[name] = stored, tensor
        self._unread = set(self._tensors)
        self._biased = any(name.endswith(".bias") for name in self._tensors)
        self._found = Gpt2Tensors()

    def read(self) -> Gpt2Tensors:
        found = self._found
        if not any(name.startswith(("wte.", "h.")) for name in self._tensors):
            names = ", ".join(list(self._stored.values())[:3]) or "no tensors"
            raise self._error(
                f"expected the tensors of a GPT-2, such as transformer.wte.weight, got {names}: load another model "
                "with transformers, whose save_pretrained writes safetensors"
            )
        found.vocab_size, found.width = self._embedding("wte")
        found.positions, width = self._embedding("wpe")
        if width != found.width:
            raise self._error(
                f"tensor '{self._name('wpe.weight')}': expected width {found.width} as wte's, got {width}"
            )
        layers = [int(match[1]) for name in self._tensors if (match := re.match(r"h\.(\d+)\.", name))]
        found.layers = max(layers, default=-1) + 1
        found.out_by_in = self._is_out_by_in()
        for layer in range(found.layers):
            self._layer(f"h.{layer}.")
        self._norm("ln_f")
        self._head()
        if self._unread:
            stored = self._stored[min(self._unread)]
            shape = tuple(self._tensors[min(self._unread)].shape)
            raise self._error(
                f"tensor '{stored}' of shape {shape} is no part of a GPT-2 in a known layout: remove it, or save the "
                "model in one of them"
            )
        return found

    def _layer(self, prefix: str) -> None:
        width = self._found.width
        self._norm(f"{prefix}ln_1")
        self._linear(f"{prefix}attn.c_attn", width, 3 * width)
        self._linear(f"{prefix}attn.c_proj", width, width)
        self._norm(f"{prefix}ln_2")
        # The first layer says how wide the inner layer is.
        self._found.inner = self._linear(f"{prefix}mlp.c_fc", width, self._found.inner or None)
        self._linear(f"{prefix}mlp.c_proj", self._found.inner, width)

    # Modules

    def _embedding(self, module: str) -> tuple[int, int]:
        """Reads an embedding and returns its rows and columns."""
        import torch

        levels, inner = [], module
        while f"{inner}.weight" not in self._tensors and any(name.startswith(f"{inner}.") for name in self._tensors):
            levels.append(inner)
            inner += ".embedding"
        table = self._floats(f"{inner}.weight", 2)
        rows, columns = table.shape
        if not levels:
            self._keep(f"{module}.weight", table)
            return rows, columns
        block = torch.ones(1, 1, dtype=torch.float64)
        order = torch.arange(columns)
        for level in reversed(levels):
            factor = self._floats(f"{level}.B", 2)
            if factor.shape[0] != 1:
                raise self._misshapen(f"{level}.B", "(1, n)")
            size = factor.shape[1]
            p = self._permutation(f"{level}.p", len(order) * size)
            block = torch.kron(block, factor.double())
            order = size * order[p // size] + p % size
        self._compressed(module, table[None], block[None].to(table.dtype), "columns")
        self._keep(f"{module}.output_permutation", order)
        return rows, len(order)

    def _linear(self, module: str, rows: int, columns: int | None) -> int:
        """Reads a linear map and its bias and returns its columns, which may be unknown."""
        import torch

        if any(f"{module}.{which}" in self._tensors for which in _FACTORS):
            a = self._floats(f"{module}.A", 3).transpose(1, 2)
            b = self._floats(f"{module}.B", 3)
            columns = self._check_factors(module, (f"{module}.A", f"{module}.B"), a, b, rows, columns)
            self._compressed(module, a, b, "both")
            self._keep(f"{module}.input_permutation", self._permutation(f"{module}.p_inv", rows))
            self._keep(f"{module}.output_permutation", self._permutation(f"{module}.q", columns))
        elif f"{module}_0" in self._tensors or f"{module}_1" in self._tensors:
            a, b = (self._floats(f"{module}_{side}", 3) for side in (0, 1))
            columns = self._check_factors(module, (f"{module}_0", f"{module}_1"), a, b, rows, columns)
            self._compressed(module, a, b, "none")
        elif terms := self._separate_terms(module):
            a, b = (torch.stack(self._separate(module, terms, side)) for side in (0, 1))
            columns = self._check_factors(module, (f"{module}_0_0", f"{module}_0_1"), a, b, rows, columns)
            self._compressed(module, a, b, "none")
        else:
            weight = self._floats(f"{module}.weight", 2)
            if self._found.out_by_in:
                weight = weight.transpose(0, 1)
            if weight.shape[0] != rows or weight.shape[1] != (columns or weight.shape[1]):
                expected = (rows, "n" if columns is None else columns)
                raise self._misshapen(f"{module}.weight", _shape(expected[::-1] if self._found.out_by_in else expected))
            columns = weight.shape[1]
            self._keep(f"{module}.weight", weight)
        self._bias(module, columns)
        return columns

    def _separate_terms(self, module: str) -> int:
        """The number of terms of which every factor is a tensor of its own."""
        name = re.compile(rf"{re.escape(module)}_(\d+)_[01]")
        return max((int(match[1]) + 1 for each in self._tensors if (match := name.fullmatch(each))), default=0)

    def _separate(self, module: str, terms: int, side: int) -> list[torch.Tensor]:
        factors: list[torch.Tensor] = []
        for term in range(terms):
            name = f"{module}_{term}_{side}"
            factor = self._floats(name, None)
            if factor.dim() == 3 and factor.shape[0] == 1:
                factor = factor[0]
            if factor.dim() != 2 or (factors and factor.shape != factors[0].shape):
                raise self._misshapen(name, _shape(factors[0].shape) if factors else "two dimensions")
            factors.append(factor)
        return factors

    def _check_factors(
        self,
        module: str,
        names: tuple[str, str],
        a: torch.Tensor,
        b: torch.Tensor,
        rows: int,
        columns: int | None,
    ) -> int:
        """The columns of the matrix of the factors."""
        made = (a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])
        expected = (rows, columns or made[1])
        if a.shape[0] == b.shape[0] and made == expected:
            return made[1]
        shapes = (f"'{self._name(name)}' {_shape(self._tensors[name].shape)}" for name in names)
        raise self._error(
            f"tensors {' and '.join(shapes)}: expected as many terms in both, and the factors of the "
            f"{rows} × {'n' if columns is None else columns} matrix {module}, got those of a {made[0]} × {made[1]} one"
        )

    def _compressed(self, module: str, a: torch.Tensor, b: torch.Tensor, permute: Permute) -> None:
        if not self._found.matrices:
            self._keep_guard(module)
        a, b = _within_rank(a, b)
        (rank, m1, n1), (_, m2, n2) = a.shape, b.shape
        self._found.matrices.append(ConvertedMatrix(module, m1 * m2, n1 * n2, KroneckerSpec((m2, n2), rank, permute)))
        self._keep(f"{module}.A", a)
        self._keep(f"{module}.B", b)

    def _bias(self, module: str, length: int) -> None:
        names = (f"{module}.bias", f"{module}.b", f"{module}_bias")
        name = next((name for name in names if name in self._tensors), names[0])
        if name == names[0] and name not in self._tensors and not self._biased:
            like = next(tensor for tensor in self._found.tensors.values() if tensor.is_floating_point())
            self._keep(names[0], like.new_zeros(length))
        else:
            self._keep(names[0], self._vector(name, length))

    def _norm(self, module: str) -> None:
        self._keep(f"{module}.weight", self._vector(f"{module}.weight", self._found.width))
        self._bias(module, self._found.width)

    def _head(self) -> None:
        import torch

        if "lm_head.weight" not in self._tensors:
            return
        head = self._floats("lm_head.weight", 2)
        expected = (self._found.vocab_size, self._found.width)
        if head.shape != expected:
            raise self._misshapen("lm_head.weight", _shape(expected))
        embedding = self._tensors.get("wte.weight")
        self._found.tied = embedding is not None and torch.equal(head, embedding)
        if not self._found.tied:
            self._found.tensors["lm_head.weight"] = head

    def _is_out_by_in(self) -> bool:
        """Whether dense maps are stored out × in. Square ones do not tell."""
        width = self._found.width
        for name, tensor in self._tensors.items():
            if name.endswith("attn.c_attn.weight") and tensor.dim() == 2:
                return tuple(tensor.shape) == (3 * width, width)
        for name, tensor in self._tensors.items():
            if name.endswith("mlp.c_fc.weight") and tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]:
                return tensor.shape[1] == width
        # Krony-PT is written with nanoGPT's maps.
        return any(re.fullmatch(r"h\.\d+\.mlp\.c_fc(_\d+)?_[01]", name) for name in self._tensors)

    # Tensors

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self._found.tensors[f"{_PREFIX}{name}"] = tensor

    def _keep_guard(self, module: str) -> None:
        """One byte under the name of a dense weight: a load without this package fails, and is not random."""
        import torch

        self._keep(f"{module}.weight", torch.zeros(1, dtype=torch.uint8))

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise self._error(f"tensor '{self._name(name)}' is missing: save the whole model, of one shard or several")
        self._unread.discard(name)
        return self._tensors[name]

    def _floats(self, name: str, dimensions: int | None) -> torch.Tensor:
        """A floating tensor of finite values."""
        import torch

        tensor = self._tensor(name)
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            where = f"{self._path}: tensor '{self._stored[name]}'"
            raise DtypeError(f"{where}: expected dense floats, got {kind}: save the model unquantized")
        if (dimensions is not None and tensor.dim() != dimensions) or not tensor.numel():
            raise self._misshapen(name, f"{dimensions or 2} dimensions")
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{self._path}: tensor '{self._stored[name]}': expected finite values, got NaN or inf")
        return tensor

    def _vector(self, name: str, length: int) -> torch.Tensor:
        tensor = self._floats(name, 1)
        if len(tensor) != length:
            raise self._misshapen(name, _shape((length,)))
        return tensor

    def _permutation(self, name: str, length: int) -> torch.Tensor:
        import torch

        tensor = self._tensor(name)
        if tuple(tensor.shape) != (length,):
            raise self._misshapen(name, _shape((length,)))
        whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
        if not whole or not torch.equal(tensor.long().sort().values, torch.arange(length)):
            raise self._error(
                f"tensor '{self._stored[name]}': expected a permutation of 0 to {length - 1}, got another list"
            )
        return tensor.long()

    # Errors

    def _name(self, name: str) -> str:
        """The name in the file; for a missing tensor the name that it would have there."""
        prefixed = any(_PREFIX in stored for stored in self._stored.values())
        return self._stored.get(name, f"{_PREFIX}{name}" if prefixed and name != "lm_head.weight" else name)

    def _error(self, words: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {words}")

    def _misshapen(self, name: str, expected: str) -> CheckpointError:
        return self._error(f"tensor '{self._name(name)}': expected {expected}, got {_shape(self._tensors[name].shape)}")


def _bare(name: str) -> str:
    """A name without the prefixes of wrappers and of the base model."""
    name = name.replace(_COMPILED, "")
    while wrapper := next((each for each in _WRAPPED if name.startswith(each)), None):
        name = name[len(wrapper) :]
    return name.removeprefix(_PREFIX)


def _shape(shape: Iterator[object] | tuple[object, ...]) -> str:
    extents = tuple(shape)
    return f"shape ({', '.join(map(str, extents))}{',' * (len(extents) == 1)})"


def _within_rank(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the same sum, of no higher rank than a matrix of their shapes can need.

    `Σ_k A_k ⊗ B_k = Σ_ij (Σ_k B_k[i, j] A_k) ⊗ E_ij` has as many terms as B has entries, and the like holds for A.
    """
    import torch

    dtype = torch.promote_types(a.dtype, b.dtype)
    rank, most = a.shape[0], min(a[0].numel(), b[0].numel())
    if rank <= most:
        return a.to(dtype), b.to(dtype)
    of_b = most == b[0].numel()
    kept, summed = (a, b) if of_b else (b, a)
    sums = (summed.double().flatten(1).T @ kept.double().flatten(1)).view(most, *kept.shape[1:]).to(dtype)
    units = torch.eye(most, dtype=dtype).view(most, *summed.shape[1:])
    return (sums, units) if of_b else (units, sums)
