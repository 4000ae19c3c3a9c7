"""The file of a cached teacher: its layout, and probabilities as 16 bits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data.tokenize import token_dtype
from ..errors import CheckpointError
from ..utils.atomic_io import WholeFile
from ..utils.tensor_file import TensorSpec, TensorWriter, read_tensor_file

if TYPE_CHECKING:
    import torch

_FORMAT = 1
# A log-probability is stored as a number of steps below zero, in 16 bits: down to -32, with an error of half a step.
_LOWEST = 32.0
_STEPS = (1 << 16) - 1


@dataclass(frozen=True)
class TeacherFile:
    """The metadata of a cached teacher's file; the dtypes and shapes of its tensors follow from them."""

    num_samples: int
    seq_len: int
    k: int
    temperature: float
    vocab_size: int
    fingerprint: str
    teacher: str
    weights: str

    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors of the file in order, those with wide elements first, so that all are aligned."""
        shape = (self.num_samples, self.seq_len, self.k)
        return {
            "tail_mass": TensorSpec(np.dtype("<f4"), shape[:2]),
            "tokens": TensorSpec(token_dtype(self.vocab_size), shape),
            "log_probability_steps": TensorSpec(np.dtype("<u2"), shape),
        }

    def writer(self, file: WholeFile) -> TensorWriter:
        """Begins to write the file: reserves its space and writes its header."""
        metadata = {name: value if isinstance(value, str) else repr(value) for name, value in asdict(self).items()}
        return TensorWriter(file, self.tensors(), {"format_version": str(_FORMAT), **metadata})

    @classmethod
    def read(cls, path: Path) -> tuple[TeacherFile, dict[str, NDArray[Any]]]:
        """The metadata of the file at `path`, and its tensors, memory-mapped.

        Raises:
            CheckpointError: The file does not hold a cached teacher, is truncated or damaged, has tensors that differ
                from its metadata, or has a newer version.
            StorageError: It cannot be read.
        """
        metadata, tensors = read_tensor_file(path, "a cached teacher", _FORMAT)
        # With annotations postponed, the types of the fields are their names.
        readers: dict[Any, Any] = {"int": int, "float": float, "str": str}
        try:
            found = cls(**{field.name: readers[field.type](metadata.pop(field.name)) for field in fields(cls)})
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: the metadata of the cached teacher are damaged") from error
        specs = [(name, (tensor.dtype, tensor.shape)) for name, tensor in tensors.items()]
        # Refuse any file that `cache_teacher` would write differently.
        if metadata or min(found.num_samples, found.seq_len, found.k) < 1 or specs != list(found.tensors().items()):
            raise CheckpointError(f"{path}: the tensors of the cached teacher are not those of its metadata: damaged")
        return found, tensors


def largest(logits: torch.Tensor, k: int, temperature: float) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None:
    """Tail mass, tokens and steps of the `k` largest probabilities of each row of `logits`, which are overwritten.

    None where a row has NaN or plus infinity.
    """
    # Subtract before dividing: differences of close logits are exact at any temperature.
    exponentials = logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature).exp_()
    total = exponentials.sum(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        return None
    values, tokens = exponentials.topk(k)
    steps = ((total.log() - values.log()) * (_STEPS / _LOWEST)).round_().clamp_(0, _STEPS)
    # Sum the rest directly: 1 minus the kept mass would round a small tail away.
    exponentials.scatter_(-1, tokens, 0.0)
    tail = exponentials.sum(-1).div_(total[..., 0]).clamp_(0, 1)
    return tail.cpu().numpy(), tokens.cpu().numpy(), steps.cpu().numpy()


def probabilities_of(steps: NDArray[np.uint16], tail: NDArray[np.float64]) -> NDArray[np.float32]:
    """The probabilities `(positions, k)` of `steps`, given the mass `tail` of all other tokens."""
    probabilities = np.exp(steps * (-_LOWEST / _STEPS))
    # Normalise, to slightly below 1: rounding to float32 must not lift the sum above 1.
    scale = (1 - 2.0**-24) / (probabilities.sum(-1) + tail)
    scaled: NDArray[np.float32] = (probabilities * scale[:, None]).astype(np.float32)
    return scaled
