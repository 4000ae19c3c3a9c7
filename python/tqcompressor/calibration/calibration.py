"""Second moments of a model's activations and gradients, matrix by matrix, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import CheckpointError, MomentError, NonFiniteError, ShapeError
from ..utils.atomic_io import WholeFile
from ..utils.tensor_file import TensorSpec, TensorWriter, read_tensor_file
from ..utils.torch_utils import as_array
from ..utils.utf8 import parsed

Moment: TypeAlias = NDArray[np.float32]
_FORMAT = 1
# The bytes of a moment that are checked at a time.
_CHUNK = 1 << 24


class Calibration:
    """Second moments of a model's activations and gradients: measured by `calibrate`, the norm of compression errors.

    For a matrix `W` (m, n) in × out, `y = x W`:

    - `input(matrix)` is `E[xᵀx]`, float32 `(m, m)`: the mean over tokens of the outer product of the layer's input;
    - `output(matrix)` is `E[gᵀg]`, float32 `(n, n)`: the same for `g`, the gradient at the layer's output of the
      objective that `calibrate` describes, or None where `sensitivity` is False.

    Either has the shape `(m,)` or `(n,)` where only the diagonal is kept. For an embedding, `(vocabulary, dimension)`,
    the input moment is that of one-hot rows: the relative frequency of each token. An embedding that is tied to the
    head has one moment for both uses. The two moments define the norm `tr(C_in Δ C_out Δᵀ)` of an error `Δ = W − Ŵ`.

    The file is safetensors. Its tensors are `input.<module>` and `output.<matrix>`, named without the base prefix as in
    configs; the other fields are metadata.

    Example:
        >>> calibration = calibrate(model, tokenizer, text)  # doctest: +SKIP
        >>> calibration.save("calibration.safetensors")  # doctest: +SKIP
        >>> Calibration.load("calibration.safetensors").input("h.0.attn.c_attn.q").shape  # doctest: +SKIP
        (768, 768)

    Source: the two-sided norm is the Kronecker-factored curvature of Martens & Grosse, *Optimizing Neural Networks
    with Kronecker-factored Approximate Curvature*, arXiv 1503.05671.
    """

    moments: dict[str, Moment]
    """The moments by their names in the file, sorted."""
    tokens: int
    """The number of tokens that the means are taken over."""
    seed: int
    """The seed of the blocks and of the sampled gradients."""
    sensitivity: bool
    """Whether gradients were measured as well."""
    model_type: str | None
    """The `model_type` of the model's config."""
    texts: dict[str, int]
    """The names of the texts that were read, each with its number of tokens without special ones; empty where unknown.
    """

    def __init__(
        self,
        moments: Mapping[str, NDArray[Any]],
        tokens: int,
        seed: int = 0,
        sensitivity: bool = True,
        model_type: str | None = None,
        texts: Mapping[str, int] | None = None,
    ) -> None:
        """Converts `moments` to float32; arrays that are float32 already are not copied.

        Raises:
            ShapeError: A moment is neither square nor one-dimensional, or is empty.
            NonFiniteError: A moment holds NaN, or a value that is infinite in float32.
            MomentError: A moment is not symmetric or has a negative diagonal, its name begins with neither `input.`
                nor `output.`, or `tokens` is not positive.

        Cost: reads every moment once.
        """
        if tokens < 1:
            raise MomentError(f"tokens: expected at least 1, got {tokens}")
        self.moments = {}
        # Layers that read one tensor share an array, which is checked once.
        known: dict[int, Moment] = {}
        for name in sorted(moments):
            given = moments[name]
            if not name.startswith(("input.", "output.")):
                raise MomentError(f'{name}: expected a name that begins with "input." or "output."')
            if id(given) not in known:
                known[id(given)] = _checked(name, given)
            self.moments[name] = known[id(given)]
        self.tokens, self.seed, self.sensitivity, self.model_type = tokens, seed, sensitivity, model_type
        self.texts = dict(texts or {})

    def input(self, matrix: str) -> Moment | None:
        """The moment of the input of `matrix`, or None. The parts of a fused matrix share it."""
        found = self.moments.get(f"input.{matrix}")
        return self.moments.get(f"input.{_core.split_part(matrix)[0]}") if found is None else found

    def output(self, matrix: str) -> Moment | None:
        """The moment of the gradient at the output of `matrix`, or None."""
        return self.moments.get(f"output.{matrix}")

    def check(self, matrix: str, rows: int, columns: int) -> None:
        """Raises `ShapeError` unless the moments of `matrix` fit a `(rows, columns)` matrix."""
        for side, moment, expected in (
            ("input", self.input(matrix), rows),
            ("output", self.output(matrix), columns),
        ):
            if moment is not None and len(moment) != expected:
                raise ShapeError(
                    f"{side}.{matrix}: expected the moment of {expected} {side}s, as {matrix} ({rows}, {columns}) has "
                    f"them, got one of {len(moment)}: it is of another model"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file at `path`, whole or not at all; equal contents make equal bytes.

        Raises:
            StorageError: It cannot be written; what was at `path` is still there.
        """
        metadata = {
            "format_version": str(_FORMAT),
            "tokens": str(self.tokens),
            "seed": str(self.seed),
            "sensitivity": "true" if self.sensitivity else "false",
        }
        if self.model_type is not None:
            metadata["model_type"] = self.model_type
        if self.texts:
            metadata["texts"] = json.dumps(self.texts)
        specs = {name: TensorSpec(np.dtype("<f4"), moment.shape) for name, moment in self.moments.items()}
        with WholeFile(path) as file:
            writer = TensorWriter(file, specs, metadata)
            for name, moment in self.moments.items():
                writer.write(name, moment)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Maps the file at `path`; moments are read from the disk where they are used.

        Raises:
            CheckpointError: It is not a calibration, is truncated or damaged, or is of a newer version.
            ShapeError, NonFiniteError, MomentError: As the constructor; the message begins with the path.
            StorageError: It cannot be read.

        Cost: reads every moment once, to check it.
        """
        path = Path(path)
        metadata, moments = read_tensor_file(path, "a calibration", _FORMAT)
        try:
            fields: dict[str, Any] = {
                "tokens": int(metadata["tokens"]),
                "seed": int(metadata["seed"]),
                "sensitivity": {"true": True, "false": False}[metadata["sensitivity"]],
                "model_type": metadata.get("model_type"),
                "texts": {str(name): int(count) for name, count in parsed(metadata.get("texts", "{}")).items()},
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: the metadata of the calibration is damaged: {metadata}") from error
        for name, moment in moments.items():
            if moment.dtype != np.float32:
                raise CheckpointError(f"{path}: {name}: expected the dtype float32, got {moment.dtype}")
        try:
            return cls(moments, **fields)
        except (ShapeError, NonFiniteError, MomentError) as error:
            raise type(error)(f"{path}: {error}") from None

    def __repr__(self) -> str:
        sides = "inputs and output gradients" if self.sensitivity else "inputs"
        of = "" if self.model_type is None else f" of a {self.model_type}"
        several = ", ".join(f"{tokens:,} of {name}" for name, tokens in self.texts.items())
        texts = f": {several}" if len(self.texts) > 1 else ""
        return f"Calibration({len(self.moments)} moments of {sides}{of}, over {self.tokens:,} tokens{texts})"


def _checked(name: str, moment: NDArray[Any]) -> Moment:
    moment = as_array(moment, name)
    if moment.size == 0 or moment.ndim not in (1, 2) or (moment.ndim == 2 and moment.shape[0] != moment.shape[1]):
        raise ShapeError(f"{name}: expected a square matrix or its diagonal, got the shape {moment.shape}")
    with np.errstate(over="ignore"):
        moment = np.require(moment, np.float32, ["C", "A"])
    if not all(np.isfinite(part).all() for part in _chunks(moment)):
        raise NonFiniteError(f"{name}: holds NaN or an infinity")
    if (lowest := float((moment if moment.ndim == 1 else moment.diagonal()).min())) < 0:
        raise MomentError(f"{name}: expected a diagonal that is not negative, got {lowest:g}")
    if moment.ndim == 2:
        # In blocks: reading the transpose of a whole large matrix is slow.
        step = 512
        for row in range(0, len(moment), step):
            for column in range(0, row + 1, step):
                block = moment[row : row + step, column : column + step]
                other = moment[column : column + step, row : row + step].T
                if not np.array_equal(block, other):
                    i, j = np.argwhere(block != other)[0]
                    raise MomentError(
                        f"{name}: expected a symmetric matrix, got {block[i, j]:g} at ({row + i}, {column + j}) "
                        f"and {other[i, j]:g} at ({column + j}, {row + i})"
                    )
    return moment


def _chunks(moment: Moment) -> Iterator[Moment]:
    flat = moment.reshape(-1)
    for begin in range(0, len(flat), _CHUNK // 4):
        yield flat[begin : begin + _CHUNK // 4]


def load_calibration(calibration: Calibration | str | os.PathLike[str] | None) -> Calibration | None:
    """The calibration that a caller gives as itself or as the path of its file."""
    return Calibration.load(calibration) if isinstance(calibration, str | os.PathLike) else calibration


def merge_tied(moments: dict[str, Moment], embedding: str, head: str) -> None:
    """Replaces the moments of an embedding and its tied head by those of their shared matrix; see `calibrate`."""
    rows, columns = moments.get(f"input.{embedding}"), moments.pop(f"input.{head}", None)
    gradients, logits = moments.get(f"output.{embedding}"), moments.pop(f"output.{head}", None)
    if rows is None or columns is None:
        return
    d1, c2 = rows.astype(np.float64), columns.astype(np.float64)
    c1 = np.eye(len(c2)) if gradients is None else gradients.astype(np.float64)
    d2 = np.ones(len(d1)) if logits is None else logits.astype(np.float64)
    trace1, trace2 = np.trace(c1), np.trace(c2)
    total = d1.sum() * trace1 + d2.sum() * trace2
    if total > 0:
        moments[f"input.{embedding}"] = ((d1 * trace1 + d2 * trace2) / total).astype(np.float32)
        moments[f"output.{embedding}"] = (d1.sum() * c1 + d2.sum() * c2).astype(np.float32)
