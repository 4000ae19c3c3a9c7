"""The spec of one matrix: a Kronecker sum, a low-rank product, one by groups of rows, or a sum of several.

Specs are plain values: the same in a config, in JSON and as an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import ConfigError, ShapeError
from ..utils.validate import integer
from .choices import PERMUTES, Permute, one_of

# Counts and seeds are unsigned 64-bit integers in Rust.
LARGEST_INTEGER = 2**64 - 1


def check_keys(data: Any, what: str, known: tuple[str, ...], required: tuple[str, ...]) -> None:
    """Raises `ConfigError` unless `data` is a mapping that has the required keys and only known ones."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"a {what} must be a JSON object, got {type(data).__name__}")
    unknown = [str(key) for key in data if key not in known]
    if unknown:
        raise ConfigError(f"unknown key of a {what}: {', '.join(unknown)}; known are {', '.join(known)}")
    missing = [key for key in required if key not in data]
    if missing:
        raise ConfigError(f"a {what} needs {', '.join(missing)}")


@dataclass(frozen=True)
class KroneckerSpec:
    """One matrix as a Kronecker sum: `W[p][:, q] ≈ Σ_k A_k ⊗ B_k`, `k < rank`.

    `W` has shape `(m, n)`, in × out; `block = (m2, n2)` is the shape of every `B_k` and must divide it, so that `A_k`
    has shape `(m / m2, n / n2)`. The parameters are `rank · (m1·n1 + m2·n2)`. `permute` names the sides searched
    for a permutation: "none", "rows" (`p`), "columns" (`q`) or "both". `block = (1, n)` is a plain low-rank product.

    >>> KroneckerSpec(block=(2, 4), rank=4).parameters(768, 3072)
    1179680
    """

    block: tuple[int, int]
    rank: int
    permute: Permute = "both"

    def __post_init__(self) -> None:
        try:
            rows, columns = self.block
        except (TypeError, ValueError):
            raise ConfigError(f"block must be two positive integers (m2, n2), got {self.block!r}") from None
        block = (integer("block", rows, 1, LARGEST_INTEGER), integer("block", columns, 1, LARGEST_INTEGER))
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "rank", integer("rank", self.rank, 1, LARGEST_INTEGER))
        one_of("permute", self.permute, PERMUTES)

    @property
    def permutes_rows(self) -> bool:
        """Whether the rows of `W` are permuted."""
        return self.permute in ("rows", "both")

    @property
    def permutes_columns(self) -> bool:
        """Whether the columns of `W` are permuted."""
        return self.permute in ("columns", "both")

    def factor_shapes(self, rows: int, columns: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """The shapes `(rank, m1, n1)` of A and `(rank, m2, n2)` of B for a `(rows, columns)` matrix.

        Raises `ShapeError` when the block does not divide the matrix, or when the rank is larger than any matrix of
        this shape can need, which is `min(m1·n1, m2·n2)`.
        """
        m2, n2 = self.block
        if rows % m2 or columns % n2 or not rows or not columns:
            raise ShapeError(f"block {self.block} does not divide a {rows} × {columns} matrix")
        m1, n1 = rows // m2, columns // n2
        if self.rank > min(m1 * n1, m2 * n2):
            raise ShapeError(
                f"rank {self.rank} is too large: block {self.block} of a {rows} × {columns} matrix "
                f"allows at most {min(m1 * n1, m2 * n2)}"
            )
        return (self.rank, m1, n1), (self.rank, m2, n2)

    def check(self, rows: int, columns: int) -> None:
        """Raises `ShapeError` unless a `(rows, columns)` matrix can have this spec."""
        self.factor_shapes(rows, columns)

    def parameters(self, rows: int, columns: int) -> int:
        """The number of elements in the factors of a `(rows, columns)` matrix: `rank · (m1·n1 + m2·n2)`."""
        (_, m1, n1), (_, m2, n2) = self.factor_shapes(rows, columns)
        return self.rank * (m1 * n1 + m2 * n2)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON types."""
        return {"block": list(self.block), "rank": self.rank, "permute": self.permute}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KroneckerSpec:
        """The inverse of `to_dict`; raises `ConfigError` for unknown or missing keys."""
        check_keys(data, "spec", known=("block", "rank", "permute"), required=("block", "rank"))
        return cls(**data)


@dataclass(frozen=True)
class LowRankSpec:
    """One matrix as a product of rank `k`, in interpolative form.

    Every matrix of rank `k` has `k` rows that span the others. A permutation puts them first:
    `W[p] = [I; left] right`, with `left (m − k, k)` and `right (k, n)`. Where `m > n`, columns are chosen instead:
    `W[:, q] = left [I right]`, with `left (m, k)` and `right (k, n − k)`. The identity is not stored, so the parameters
    are `k · (m + n − k)` in place of the `k · (m + n)` of a plain product.

    Source: Cheng, Gimbutas, Martinsson and Rokhlin, "On the compression of low rank matrices", 2005.

    >>> LowRankSpec(rank=128).parameters(768, 3072)
    475136
    """

    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", integer("rank", self.rank, 1, LARGEST_INTEGER))

    def factor_shapes(self, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of `left` and `right` for a `(rows, columns)` matrix.

        Raises `ShapeError` unless the rank is smaller than both sides, as nothing is saved at full rank.
        """
        most = min(rows, columns) - 1
        if self.rank > most:
            raise ShapeError(
                f"rank {self.rank} is too large: a {rows} × {columns} matrix allows at most {max(most, 0)}"
            )
        if rows <= columns:
            return (rows - self.rank, self.rank), (self.rank, columns)
        return (rows, self.rank), (self.rank, columns - self.rank)

    def check(self, rows: int, columns: int) -> None:
        """Raises `ShapeError` unless a `(rows, columns)` matrix can have this spec."""
        self.factor_shapes(rows, columns)

    def parameters(self, rows: int, columns: int) -> int:
        """The number of elements in the factors of a `(rows, columns)` matrix: `rank · (rows + columns − rank)`."""
        self.check(rows, columns)
        return self.rank * (rows + columns - self.rank)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON types."""
        return {"rank": self.rank}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LowRankSpec:
        """The inverse of `to_dict`; raises `ConfigError` for unknown or missing keys."""
        check_keys(data, "spec", known=("rank",), required=("rank",))
        return cls(**data)


@dataclass(frozen=True)
class GroupedSpec:
    """An embedding whose rows are sorted by importance and cut into groups, each of low rank by itself.

    `groups` are pairs of a number of rows `n_g` and their rank `k_g`, the most important rows first. Group `g` is
    `W_g[:, q_g] = left_g [I right_g]`, with `k_g · (n_g + d − k_g)` parameters for `d` columns. `left` and `right` hold
    the factors of all groups one after the other. A budget makes the groups itself, by the frequencies of the tokens.

    Source: Chen, Si, Li, Chelba and Hsieh, "GroupReduce", arXiv 1806.06950, which has groups of different ranks.

    >>> GroupedSpec(((384, 200), (7808, 40))).parameters(8192, 256)
    408960
    """

    groups: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        try:
            pairs = [(rows, rank) for rows, rank in self.groups]
        except (TypeError, ValueError):
            raise ConfigError(f"groups must be pairs of rows and a rank, got {self.groups!r}") from None
        if not pairs:
            raise ConfigError("groups must be at least one pair of rows and a rank, got none")
        whole = [tuple(integer("groups", value, 1, LARGEST_INTEGER) for value in pair) for pair in pairs]
        object.__setattr__(self, "groups", tuple(whole))

    def factor_shapes(self, rows: int, columns: int) -> tuple[tuple[int], tuple[int]]:
        """The shapes of `left` and `right` for a `(rows, columns)` matrix.

        Raises `ShapeError` unless the groups have all rows together, and each has more rows than there are columns and
        a rank below that.
        """
        total = sum(group for group, _ in self.groups)
        if total != rows:
            raise ShapeError(f"groups of {total} rows together do not fit a {rows} × {columns} matrix")
        for group, rank in self.groups:
            if group <= columns or rank >= columns:
                raise ShapeError(
                    f"a group of {group} rows and rank {rank} does not fit a {rows} × {columns} matrix: it must have "
                    f"more than {columns} rows and a rank below {columns}"
                )
        left = sum(group * rank for group, rank in self.groups)
        return (left,), (sum(rank * (columns - rank) for _, rank in self.groups),)

    def check(self, rows: int, columns: int) -> None:
        """Raises `ShapeError` unless a `(rows, columns)` matrix can have this spec."""
        self.factor_shapes(rows, columns)

    def parameters(self, rows: int, columns: int) -> int:
        """The number of elements in the factors of a `(rows, columns)` matrix: `Σ k_g · (n_g + columns − k_g)`."""
        (left,), (right,) = self.factor_shapes(rows, columns)
        return left + right

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON types."""
        return {"groups": [list(group) for group in self.groups]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GroupedSpec:
        """The inverse of `to_dict`; raises `ConfigError` for unknown or missing keys."""
        check_keys(data, "spec", known=("groups",), required=("groups",))
        return cls(**data)


@dataclass(frozen=True)
class MixedSpec:
    """One matrix as a sum of several terms: `W ≈ Σ_t W_t`.

    There are at least two terms. Each is a [`KroneckerSpec`] or a [`LowRankSpec`] and has its own permutations.

    >>> MixedSpec((LowRankSpec(rank=96), KroneckerSpec(block=(8, 8), rank=16))).parameters(768, 768)
    286720
    """

    terms: tuple[KroneckerSpec | LowRankSpec, ...]

    def __post_init__(self) -> None:
        if isinstance(self.terms, str | Mapping):
            raise ConfigError(f"terms must be a list of specs, got {self.terms!r}")
        try:
            given = tuple(self.terms)
        except TypeError:
            raise ConfigError(f"terms must be a list of specs, got {self.terms!r}") from None
        if len(given) < 2:
            raise ConfigError(f"terms must be at least two specs, got {len(given)}")
        terms = []
        for number, term in enumerate(given):
            try:
                spec = spec_from_dict(term) if isinstance(term, Mapping) else term
            except ConfigError as error:
                raise ConfigError(f"terms[{number}]: {error}") from None
            if not isinstance(spec, KroneckerSpec | LowRankSpec):
                raise ConfigError(f"terms[{number}] must be a KroneckerSpec or a LowRankSpec, got {term!r}")
            terms.append(spec)
        object.__setattr__(self, "terms", tuple(terms))

    def check(self, rows: int, columns: int) -> None:
        """Raises `ShapeError` unless a `(rows, columns)` matrix can have this spec; names the term."""
        for number, term in enumerate(self.terms):
            try:
                term.check(rows, columns)
            except ShapeError as error:
                raise ShapeError(f"terms[{number}]: {error}") from None

    def parameters(self, rows: int, columns: int) -> int:
        """The number of elements in the factors of all terms for a `(rows, columns)` matrix."""
        self.check(rows, columns)
        return sum(term.parameters(rows, columns) for term in self.terms)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON types."""
        return {"terms": [term.to_dict() for term in self.terms]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MixedSpec:
        """The inverse of `to_dict`; raises `ConfigError` for unknown or missing keys."""
        check_keys(data, "spec", known=("terms",), required=("terms",))
        return cls(**data)


MatrixSpec: TypeAlias = KroneckerSpec | LowRankSpec | GroupedSpec | MixedSpec


def spec_from_dict(data: Mapping[str, Any]) -> MatrixSpec:
    """The spec of a JSON object: by its key "terms" a sum, by "groups" groups of rows, by "block" a Kronecker sum.

    Any other is low rank.

    Raises `ConfigError` for unknown or missing keys.

    >>> spec_from_dict({"rank": 3})
    LowRankSpec(rank=3)
    """
    if isinstance(data, Mapping) and "terms" in data:
        return MixedSpec.from_dict(data)
    if isinstance(data, Mapping) and "groups" in data:
        return GroupedSpec.from_dict(data)
    # A Kronecker spec without its block is recognised by its other key.
    if isinstance(data, Mapping) and {"block", "permute"} & data.keys():
        return KroneckerSpec.from_dict(data)
    return LowRankSpec.from_dict(data)


def planned_spec(entry: Mapping[str, Any]) -> MatrixSpec:
    """The spec in the entry of one matrix of a plan or a report; keys that are None count as missing.

    >>> planned_spec({"name": "wte", "rank": 3, "block": None, "lost_energy": 0.1})
    LowRankSpec(rank=3)
    """
    keys = ("block", "rank", "permute", "terms", "groups")
    return spec_from_dict({key: entry[key] for key in keys if entry.get(key) is not None})


def describe(spec: MatrixSpec) -> str:
    """A spec in a table: "block 2×4, rank 4", "low rank 224", "low rank 213/120/40 by groups"."""
    if isinstance(spec, MixedSpec):
        return " + ".join(describe(term) for term in spec.terms)
    if isinstance(spec, LowRankSpec):
        return f"low rank {spec.rank}"
    if isinstance(spec, GroupedSpec):
        return f"low rank {'/'.join(str(rank) for _, rank in spec.groups)} by groups"
    return f"block {spec.block[0]}×{spec.block[1]}, rank {spec.rank}, permute {spec.permute}"
