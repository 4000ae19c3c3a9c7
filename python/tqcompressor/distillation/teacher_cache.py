"""A teacher's predictions on disk: the k largest of every next-token distribution, and the mass of the rest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.token_blocks import TokenBlocks
from ..errors import CheckpointError, ConfigError, DestinationError, NonFiniteError
from ..evaluate.scoring import checked_batch_size
from ..losses._arrays import check_temperature
from ..utils import validate
from ..utils.atomic_io import WholeFile
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption, reporter
from ..utils.torch_utils import evaluating
from .artifacts import weights_digest
from .teacher_file import TeacherFile, largest, probabilities_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CachedTeacher:
    """The distributions of a teacher over the next token, at every position of every sample, memory-mapped.

    `cache_teacher` writes the file, `CachedTeacher.open` maps it. Each position has the `k` largest probabilities of
    the teacher's softmax at the temperature, and the mass of all others.

    The file is safetensors: `tail_mass`, float32 `(num_samples, seq_len)`; `tokens`, uint16 (uint32 where the
    vocabulary exceeds 65,536) and `log_probability_steps`, uint16, both `(num_samples, seq_len, k)`, with
    `ln p = −32/65535 · steps`. That is `4k + 4` bytes a token (`6k + 4` for a wide vocabulary): 260 bytes at `k = 64`,
    where the logits of GPT-2 take 201,028 in float32.

    Error: a probability above `e^-32` is read with a relative error below 5e-4, a smaller one with an absolute error
    below 2e-14.
    """

    k: int
    """Probabilities kept of each distribution."""
    temperature: float
    """Divisor of the teacher's logits."""
    fingerprint: str
    """The fingerprint of the samples: see `TokenBlocks.fingerprint`."""
    vocab_size: int
    """The vocabulary size of the teacher; every token id is below it."""
    seq_len: int
    """Positions of a sample."""
    teacher: str
    """The teacher: its class, name and number of parameters."""
    weights: str
    """32 hexadecimal digits: equal if and only if the teachers' weights are equal."""

    def __init__(self, path: StrPath) -> None:
        """Maps the file at `path`; see `open`."""
        self._path = Path(path)
        self._map()

    @classmethod
    def open(
        cls, path: StrPath, *, blocks: TokenBlocks | None = None, k: int | None = None, temperature: float | None = None
    ) -> CachedTeacher:
        """Maps the file at `path`, and checks that it is of the expected samples and settings.

        Args:
            path: A file that `cache_teacher` wrote.
            blocks: The expected samples.
            k: The expected number of probabilities.
            temperature: The expected temperature.

        Raises:
            CheckpointError: The file does not hold a cached teacher, is damaged, or has a newer version.
            ConfigError: It has other samples, another `k` or another temperature.
            StorageError: It cannot be read.

        Cost: only the header is read.
        """
        cached = cls(path)
        for name, expected, found in (
            ("fingerprint of the samples", None if blocks is None else blocks.fingerprint, cached.fingerprint),
            ("k", k, cached.k),
            ("temperature", temperature, cached.temperature),
        ):
            if expected is not None and expected != found:
                raise ConfigError(f"{path}: {name}: expected {expected}, got {found}")
        return cached

    def _map(self) -> None:
        file, tensors = TeacherFile.read(self._path)
        self.k, self.temperature, self.vocab_size = file.k, file.temperature, file.vocab_size
        self.seq_len, self._num_samples = file.seq_len, file.num_samples
        self.fingerprint, self.teacher, self.weights = file.fingerprint, file.teacher, file.weights
        self._tail, self._tokens, self._steps = tensors.values()

    def __len__(self) -> int:
        """The number of samples."""
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The distributions of sample `index`, the most probable first, for `losses.topk_distillation_loss`.

        Returns:
            `{"teacher_tokens": int64 (seq_len, k), "teacher_probabilities": float32 (seq_len, k)}`. Row `i` is the
            distribution of the token after position `i`. The sum of a row is at most 1, and 1 minus the sum is the mass
            of all other tokens.

        Raises:
            IndexError: There is no such sample.
            CheckpointError: The sample is damaged: a token outside the vocabulary, a mass outside [0, 1].
        """
        if not -self._num_samples <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        tail, tokens = self._tail[index].astype(np.float64), self._tokens[index].astype(np.int64)
        if tokens.max() >= self.vocab_size or not ((tail >= 0) & (tail <= 1)).all():
            raise CheckpointError(f"{self._path}: sample {index} is damaged")
        return {
            "teacher_tokens": torch.from_numpy(tokens),
            "teacher_probabilities": torch.from_numpy(probabilities_of(self._steps[index], tail)),
        }

    def mean_tail_mass(self) -> float:
        """The mean mass of the tokens that were not kept: the loss due to `k` and the temperature.

        A high temperature spreads the mass. For the checkpoint of 8,192 tokens in `tests/data`, the 64 most probable
        tokens leave 0.29 at temperature 1 and 0.85 at 2, and 1,024 leave 0.09 and 0.54.

        Cost: reads 4 bytes a token.
        """
        return float(self._tail.mean(dtype=np.float64))

    def __repr__(self) -> str:
        return (
            f"CachedTeacher({self._num_samples:,} samples of {self.seq_len:,} positions, the {self.k} most probable of "
            f"{self.vocab_size:,} tokens at temperature {self.temperature:g}, by {self.teacher})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would be a copy of the whole file.
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()


class CachedTeacherDataset:
    """Samples of tokens with the teacher's predictions on them: a map-style dataset.

    An item has the keys `input_ids`, `teacher_tokens` and `teacher_probabilities`.

    Raises:
        ConfigError: The teacher was cached on other samples.
    """

    def __init__(self, blocks: TokenBlocks, teacher: CachedTeacher) -> None:
        if blocks.fingerprint != teacher.fingerprint:
            raise ConfigError(
                f"the teacher was cached on other samples: expected the fingerprint {blocks.fingerprint}, "
                f"got {teacher.fingerprint}"
            )
        self.blocks, self.teacher = blocks, teacher
        self._first = 0

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: the items of `TokenBlocks` and `CachedTeacher` in one dictionary."""
        item = self.blocks[index]
        return item | self.teacher[self._first + index % len(self)]

    def section(self, first: int, num_samples: int) -> CachedTeacherDataset:
        """The `num_samples` consecutive samples from sample `first` on, as `TokenBlocks.section`."""
        part = object.__new__(CachedTeacherDataset)
        part.blocks, part.teacher = self.blocks.section(first, num_samples), self.teacher
        part._first = self._first + first
        return part


def cache_teacher(
    teacher: PreTrainedModel,
    blocks: TokenBlocks,
    path: StrPath,
    *,
    k: int = 64,
    temperature: float = 1.0,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> CachedTeacher:
    """Runs the teacher over all samples once, and writes the `k` largest of each `softmax(logits / temperature)`.

    Training on the file saves the teacher's forward pass in every epoch and run. The file appears only when it is
    complete; its space is reserved before the teacher runs. A file at `path` with the same samples, settings and
    teacher's weights is opened instead. Processes that start together write it once.

    Args:
        teacher: A causal language model on any device; it is in evaluation mode for the duration of the call.
        blocks: The samples, each read from its first token.
        path: The file to write, usually `.safetensors`; missing folders are created.
        k: Probabilities kept, from 1 to the vocabulary.
        temperature: The temperature of the distillation, from 1e-4 to 1e4.
        batch_size: Samples in one forward pass; it changes the result only by rounding. Default: as many as keep the
            logits under 256 MB, at most 32.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)` in
            samples.

    Raises:
        ConfigError: `k`, `temperature` or `batch_size` is out of its range, or the teacher's vocabulary or positions
            are fewer than the samples need.
        DestinationError: `path` exists and is another file.
        NonFiniteError: The teacher's logits are NaN or infinite.
        StorageError: The file cannot be written; no part of it stays.

    Cost: one forward pass of every sample, a top-k of its logits, and `4k + 4` bytes a token.

    Example:
        >>> cached = cache_teacher(teacher, blocks, "teacher.safetensors", k=64)  # doctest: +SKIP
        >>> dataset = CachedTeacherDataset(blocks, cached)  # doctest: +SKIP

    Source: distillation from truncated distributions on disk: Peng et al., *Pre-training Distillation for
    Large Language Models: A Design Space Exploration*, arXiv 2410.16215.
    """
    path = Path(path)
    vocab_size = int(teacher.config.vocab_size)
    positions = getattr(teacher.config, "max_position_embeddings", None)
    k = validate.integer("k", k, 1, vocab_size)
    check_temperature(temperature)
    batch_size = checked_batch_size(teacher, batch_size, blocks.seq_len)
    if blocks.vocab_size > vocab_size:
        raise ConfigError(f"the teacher has {vocab_size:,} tokens, the samples' tokenizer {blocks.vocab_size:,}")
    if positions is not None and blocks.seq_len > positions:
        raise ConfigError(f"the teacher has {positions:,} positions, a sample {blocks.seq_len:,}")
    contents = TeacherFile(
        num_samples=len(blocks),
        seq_len=blocks.seq_len,
        k=k,
        temperature=float(temperature),
        vocab_size=vocab_size,
        fingerprint=blocks.fingerprint,
        teacher=_description(teacher),
        weights=weights_digest(teacher),
    )
    if not path.exists():
        with WholeFile(path) as file:
            if path.exists():
                # Written by the process that held the lock.
                file.discard()
            else:
                _write(file, contents, teacher, blocks, batch_size, progress)
    _check_existing(path, contents)
    return CachedTeacher(path)


def _check_existing(path: Path, contents: TeacherFile) -> None:
    try:
        found = asdict(TeacherFile.read(path)[0])
    except CheckpointError as error:
        raise DestinationError(f"{path}: exists, and cannot be used: {error}") from error
    for name, expected in asdict(contents).items():
        # The description has the path that the teacher was loaded from; the weights identify it.
        if name != "teacher" and found[name] != expected:
            raise DestinationError(f"{path}: exists, with another {name}: expected {expected}, got {found[name]}")


def _write(
    file: WholeFile,
    contents: TeacherFile,
    teacher: PreTrainedModel,
    blocks: TokenBlocks,
    batch_size: int,
    progress: ProgressOption,
) -> None:
    writer = contents.writer(file)
    with evaluating(teacher), torch.inference_mode(), reporter(progress, "cache the teacher") as report:
        for first in range(0, len(blocks), batch_size):
            end = min(first + batch_size, len(blocks))
            inputs = torch.stack([blocks[index]["input_ids"] for index in range(first, end)]).to(teacher.device)
            logits = teacher(input_ids=inputs, use_cache=False).logits.float()
            arrays = largest(logits, contents.k, contents.temperature)
            if arrays is None:
                raise NonFiniteError(f"the teacher's logits are not finite in samples {first} to {end - 1}")
            for name, array in zip(contents.tensors(), arrays, strict=True):
                writer.write(name, array, first)
            if report is not None:
                report(end, len(blocks))


def _description(teacher: PreTrainedModel) -> str:
    name = f" {teacher.name_or_path}" if teacher.name_or_path else ""
    return f"{type(teacher).__name__}{name} ({sum(part.numel() for part in teacher.parameters()):,} parameters)"
