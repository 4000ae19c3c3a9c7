"""The base of all factored modules: copies of factors, biases, permutations and tied heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .._core import GroupedTerm, KroneckerTerm, LowRankTerm
from ..errors import ShapeError
from .dense_weight import CompressedBase, Lookup
from .int8 import SCALE, MayBeInt8, Weights, quantized

# One term of the fit of a matrix.
Term: TypeAlias = KroneckerTerm | LowRankTerm | GroupedTerm
_Term = TypeVar("_Term", KroneckerTerm, LowRankTerm, GroupedTerm)


def the_one_term(terms: Sequence[Term], kind: type[_Term]) -> _Term:
    """The only term, which must be of that kind; raises `ShapeError` otherwise."""
    if len(terms) == 1 and isinstance(terms[0], kind):
        return terms[0]
    got = ", ".join(type(term).__name__ for term in terms) or "none"
    raise ShapeError(f"expected one {kind.__name__}, got {got}")


def add_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`y + bias` in the dtype of `y`, which autocast may have made narrower than the bias."""
    return y if bias is None else y + bias.to(y.dtype)


def copied_bias(
    bias: torch.Tensor, size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Parameter:
    """A parameter `(size,)` with the values of `bias`; raises `ShapeError` for another shape."""
    if bias.shape != (size,):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}, expected ({size},)")
    return nn.Parameter(bias.detach().clone().to(device=device, dtype=dtype))


def new_bias(bias: bool | torch.Tensor, size: int, like: torch.Tensor) -> nn.Parameter | None:
    """The bias of a `bias` argument: a copy of a tensor, zeros of the device and dtype of `like`, or None."""
    if isinstance(bias, torch.Tensor):
        return copied_bias(bias, size)
    return nn.Parameter(torch.zeros(size, device=like.device, dtype=like.dtype)) if bias else None


def draw_bias(bias: torch.Tensor | None, in_features: int) -> None:
    """Initialises a bias as `nn.Linear` does."""
    if bias is not None:
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(bias, -bound, bound)


def inverse(permutation: torch.Tensor | None) -> torch.Tensor | None:
    """The inverse of a permutation; None stands for the identity."""
    return None if permutation is None else torch.argsort(permutation)


def gathered(matrix: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
    """`matrix[rows][:, columns]`; None stands for the identity."""
    if rows is not None:
        matrix = matrix.index_select(0, rows)
    return matrix if columns is None else matrix.index_select(1, columns)


class Factors(MayBeInt8, CompressedBase):
    """The factors of a matrix, parameters or eight-bit integers, and the gather indices of its permuted sides."""

    # The names of the factors, and of the sizes that a tied module has too.
    factors: ClassVar[tuple[str, ...]]
    # Whether eight-bit factors have a scale for each row and not for each column.
    _by_rows: ClassVar[bool] = False
    _sizes: ClassVar[tuple[str, ...]] = ("rank",)
    input_permutation: torch.Tensor | None
    output_permutation: torch.Tensor | None

    def _a_factor(self) -> torch.Tensor:
        factor: torch.Tensor = self._like if self.is_int8 else getattr(self, self.factors[0])
        return factor

    def weights(self, name: str) -> Weights:
        """A factor as it is stored."""
        return Weights(getattr(self, name), self._buffers.get(name + SCALE))

    def factor(self, name: str, like: torch.Tensor | None = None) -> torch.Tensor:
        """The values of a factor; eight-bit ones in the dtype of `like`, by default that of the module."""
        return self.weights(name).dense((self._a_factor() if like is None else like).dtype)

    def _int8_factors(self) -> tuple[str, ...]:
        """The factors that are eight-bit integers where any are."""
        return self.factors

    def make_int8(self) -> None:
        """Makes the factors that matrix products read eight-bit integers: codes and scales, both buffers."""
        like = self._a_factor()
        for name in self._int8_factors():
            self._set_int8(name, *self._quantized(name, getattr(self, name)))
        self._computes_in(like.dtype, like.device)

    def _quantized(self, name: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes and scales of a factor."""
        return quantized(values, self._by_rows)

    def _new_factors(
        self, shapes: Sequence[tuple[int, ...]], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Registers the factors, without values."""
        for name, shape in zip(self.factors, shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def _copy(
        self, tensors: Mapping[str, NDArray[Any]], dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        """Copies values into parameters and buffers; buffers that are None in the module are skipped.

        Raises `ShapeError` for shapes other than the module's; then nothing is changed.
        """
        kept = {name: values for name, values in tensors.items() if getattr(self, name) is not None}
        for name, values in kept.items():
            expected = tuple(getattr(self, name).shape)
            if values.shape != expected:
                raise ShapeError(f"{name} has shape {values.shape}, expected {expected}")
        for name, values in kept.items():
            current = getattr(self, name)
            values = np.ascontiguousarray(values)
            if self._buffers.get(name + SCALE) is not None:
                codes, scale = self._quantized(name, torch.from_numpy(values))
                self._set_int8(name, codes.to(device), scale.to(device))
            elif isinstance(current, nn.Parameter):
                copy = torch.tensor(values, dtype=dtype, device=device)
                setattr(self, name, nn.Parameter(copy, current.requires_grad))
            else:
                setattr(self, name, torch.tensor(values, dtype=torch.int64, device=device))
        if self.is_int8:
            self._computes_in(dtype or self._like.dtype, device)

    def _input_indices(self, p: NDArray[np.int64]) -> NDArray[np.int64]:
        """The gather indices of this module's input for the row permutation `p`."""
        return p

    def _draw_factors(self, variance: float) -> None:
        """Draws factors such that the entries of the matrix have the given variance."""
        raise NotImplementedError

    def _matrix(self, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
        """The matrix of the factors with its sides gathered, in the dtype of the factors."""
        raise NotImplementedError


class LinearFactors(Factors):
    """The base of linear layers with two factors."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def _set_sizes(self, in_features: int, out_features: int, bias: bool) -> None:
        """Completes a constructor that has made the factors: sizes, bias and initial values."""
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", new_bias(bias, out_features, next(self.parameters())))
        self.reset_parameters()

    def _copy_bias(
        self, bias: torch.Tensor | None, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        if bias is not None:
            self.bias = copied_bias(bias, self.out_features, device, dtype)

    def reset_parameters(self) -> None:
        """Initialises like `nn.Linear`: entries of `W` of variance `1 / (3 · in_features)`, and the bias."""
        self._draw_factors(1 / (3 * self.in_features))
        draw_bias(self.bias, self.in_features)

    def dense_weight(self) -> torch.Tensor:
        """The dense matrix `W (in_features, out_features)`, in the dtype of the factors."""
        return self._matrix(inverse(self.input_permutation), self.output_permutation)


class EmbeddingFactors(Lookup, Factors):
    """The base of embeddings with two factors."""

    num_embeddings: int
    embedding_dim: int
    # Rows are looked up, and are the outputs of a tied head.
    _by_rows = True

    def _set_sizes(self, num_embeddings: int, embedding_dim: int) -> None:
        """Completes a constructor that has made the factors: sizes and initial values."""
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.reset_parameters()

    def _input_indices(self, p: NDArray[np.int64]) -> NDArray[np.int64]:
        # Token `i` is at the permuted position of row `i`.
        return np.argsort(p)

    def _permuted(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of the factored matrix at which the tokens `ids (tokens,)` are."""
        # index_select refuses negative ids, as nn.Embedding does; indexing would wrap them round.
        return ids if self.input_permutation is None else self.input_permutation.index_select(0, ids)

    def reset_parameters(self) -> None:
        """Initialises like `nn.Embedding`: entries of variance 1."""
        self._draw_factors(1.0)

    def dense_weight(self) -> torch.Tensor:
        """The dense matrix `W (num_embeddings, embedding_dim)`, in the dtype of the factors."""
        return self._matrix(self.input_permutation, self.output_permutation)


class Tied(nn.Module):
    """An output layer, or a second embedding, that shares the factors of an embedding."""

    # In a tuple: a submodule would be saved a second time.
    _owner: tuple[Any, ...] = ()

    @property
    def owner(self) -> Any:
        """The embedding."""
        return self._owner[0]

    def set_terms(self, *_: object, **__: object) -> None:
        """Raises `TypeError`, since new factors would untie it. Set the embedding's factors and call `tie`."""
        raise TypeError(
            f"a {type(self).__name__} takes its factors from its embedding: set those, then call tie(embedding)"
        )


class TiedFactors(Tied, Factors):
    """A second embedding with the `Factors` of another: shared factors, and the other's permutations, not saved."""

    def __init__(self, embedding: Any) -> None:
        # The constructor of the factors would create new ones.
        nn.Module.__init__(self)
        for name in self._sizes:
            setattr(self, name, getattr(embedding, name))
        self._copy_sizes(embedding)
        self.register_buffer("input_permutation", None, persistent=False)
        self.register_buffer("output_permutation", None, persistent=False)
        self.tie(embedding)
        embedding.register_load_state_dict_post_hook(self._follow)

    def tie(self, embedding: Any) -> None:
        """Shares the embedding's factors and derives the permutations from the embedding's."""
        self._owner = (embedding,)
        for name in self.factors:
            # transformers ties parameters by name, and cannot tie buffers: eight-bit factors stay with the embedding.
            if isinstance(getattr(embedding, name), nn.Parameter):
                setattr(self, name, getattr(embedding, name))
            else:
                self._parameters.pop(name, None)
        self._follow(embedding)

    @property
    def is_int8(self) -> bool:
        """Whether the embedding's factors are eight-bit integers."""
        return bool(self.owner.is_int8)

    def _a_factor(self) -> torch.Tensor:
        factor: torch.Tensor = self.owner._a_factor()
        return factor

    def weights(self, name: str) -> Weights:
        """A factor of the embedding as it is stored."""
        own = self._parameters.get(name)
        found: Weights = self.owner.weights(name) if own is None else Weights(own, None)
        return found

    def _copy_sizes(self, embedding: Any) -> None:
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim

    def set_factors(self, *_: object, **__: object) -> None:
        """Raises `TypeError`, as `set_terms` does."""
        self.set_terms()

    def _follow(self, embedding: Any, _incompatible_keys: object = None) -> None:
        self.input_permutation = embedding.input_permutation
        self.output_permutation = embedding.output_permutation


class TiedHeadFactors(TiedFactors):
    """The head of an embedding with `Factors`: permutations derived from the embedding's, and a bias of its own."""

    bias: nn.Parameter | None

    def __init__(self, embedding: Any, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding)
        self.register_parameter("bias", bias)

    def _copy_sizes(self, embedding: Any) -> None:
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings

    def dense_weight(self) -> torch.Tensor:
        """The matrix `(embedding_dim, num_embeddings)`, in × out, in the dtype of the factors."""
        # The rows of the embedding's matrix are this module's outputs.
        return self._matrix(self.output_permutation, inverse(self.input_permutation)).transpose(0, 1)

    def _follow(self, embedding: Any, _incompatible_keys: object = None) -> None:
        self.input_permutation = inverse(embedding.output_permutation)
        self.output_permutation = embedding.input_permutation
