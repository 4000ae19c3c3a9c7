"""What a teacher says of a corpus, kept on disk: of every next-token distribution the k largest and the rest's mass."""

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
    """The distributions of a teacher over the next token, at every position of every block, memory-mapped.

    `cache_teacher` makes the file, `CachedTeacher.open` maps it. Of the teacher's softmax at the temperature, each
    position keeps the `k` largest probabilities and the mass of all others.

    The file is safetensors: `tail_mass`, float32 `(blocks, block_size)`; `tokens`, uint16 (uint32 where the vocabulary
    exceeds 65,536) and `log_probability_steps`, uint16, both `(blocks, block_size, k)`, with
    `ln p = −32/65535 · steps`. That is `4k + 4` bytes a token (`6k + 4` for a wide vocabulary): 260 bytes at `k = 64`,
    where the logits of GPT-2 take 201,028 in float32.

    Error: a probability above `e^-32` is read with a relative error below 5e-4, a smaller one with an absolute error
    below 2e-14.
    """

    k: int
    """Probabilities kept of each distribution."""
    temperature: float
    """What the teacher's logits were divided by."""
    fingerprint: str
    """That of the blocks."""
    vocabulary: int
    """The teacher's: every token is below it."""
    block_size: int
    """Positions of a block."""
    teacher: str
    """The teacher: its class, name and number of parameters."""
    weights: str
    """32 hexadecimal digits: equal where the teacher's weights are."""

    def __init__(self, path: StrPath) -> None:
        """Maps the file at `path`; see `open`."""
        self._path = Path(path)
        self._map()

    @classmethod
    def open(
        cls, path: StrPath, *, blocks: TokenBlocks | None = None, k: int | None = None, temperature: float | None = None
    ) -> CachedTeacher:
        """Maps the file at `path`, and checks that it is what the caller thinks it is.

        Args:
            path: What `cache_teacher` wrote.
            blocks: The blocks that the teacher has to have read.
            k: The number of probabilities that there have to be.
            temperature: The temperature that there has to be.

        Raises:
            CheckpointError: The file is no such cache, is damaged, or is of a newer version.
            ConfigError: It is of other blocks, of another `k` or of another temperature.
            StorageError: It cannot be read.

        Cost: the header is read, nothing else.
        """
        cached = cls(path)
        for name, expected, found in (
            ("the blocks' fingerprint", None if blocks is None else blocks.fingerprint, cached.fingerprint),
            ("k", k, cached.k),
            ("temperature", temperature, cached.temperature),
        ):
            if expected is not None and expected != found:
                raise ConfigError(f"{path}: {name}: expected {expected}, got {found}")
        return cached

    def _map(self) -> None:
        file, tensors = TeacherFile.read(self._path)
        self.k, self.temperature, self.vocabulary = file.k, file.temperature, file.vocabulary
        self.block_size, self._blocks = file.block_size, file.blocks
        self.fingerprint, self.teacher, self.weights = file.fingerprint, file.teacher, file.weights
        self._tail, self._tokens, self._steps = tensors.values()

    def __len__(self) -> int:
        """The number of blocks."""
        return self._blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The distributions of block `index`, for `losses.topk_distillation_loss`; the most probable come first.

        Returns:
            `{"teacher_tokens": int64 (block_size, k), "teacher_probabilities": float32 (block_size, k)}`. Row `i` is
            of the token behind position `i`. A row's sum does not exceed 1; what it lacks to 1 is the mass of all
            other tokens.

        Raises:
            IndexError: There is no such block.
            CheckpointError: The block is damaged: a token outside the vocabulary, a mass outside [0, 1].
        """
        if not -self._blocks <= index < self._blocks:
            raise IndexError(f"block {index} of {self._blocks}")
        tail, tokens = self._tail[index].astype(np.float64), self._tokens[index].astype(np.int64)
        if tokens.max() >= self.vocabulary or not ((tail >= 0) & (tail <= 1)).all():
            raise CheckpointError(f"{self._path}: block {index} is damaged")
        return {
            "teacher_tokens": torch.from_numpy(tokens),
            "teacher_probabilities": torch.from_numpy(probabilities_of(self._steps[index], tail)),
        }

    def mean_tail_mass(self) -> float:
        """The mean mass of what was not kept: how much of the teacher's distributions `k` and the temperature lose.

        A high temperature spreads the mass: for the checkpoint of 8,192 tokens in `tests/data`, the 64 most probable
        leave 0.29 at temperature 1 and 0.85 at 2, and 1,024 leave 0.09 and 0.54.

        Cost: reads 4 bytes a token.
        """
        return float(self._tail.mean(dtype=np.float64))

    def __repr__(self) -> str:
        return (
            f"CachedTeacher({self._blocks:,} blocks of {self.block_size:,} positions, the {self.k} most probable of "
            f"{self.vocabulary:,} tokens at temperature {self.temperature:g}, by {self.teacher})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would be a copy of the whole file.
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()


class TaughtBlocks:
    """Blocks of tokens together with what the teacher says of them: a map-style dataset.

    An item has the keys of both: `input_ids`, `teacher_tokens` and `teacher_probabilities`.

    Raises:
        ConfigError: The teacher was cached on other blocks.
    """

    def __init__(self, blocks: TokenBlocks, teacher: CachedTeacher) -> None:
        if blocks.fingerprint != teacher.fingerprint:
            raise ConfigError(
                f"the teacher was cached on other blocks: expected the fingerprint {blocks.fingerprint}, "
                f"got {teacher.fingerprint}"
            )
        self.blocks, self.teacher = blocks, teacher
        self._first = 0

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block `index`: what `TokenBlocks` and `CachedTeacher` return for it, in one dictionary."""
        item = self.blocks[index]
        return item | self.teacher[self._first + index % len(self)]

    def section(self, first: int, blocks: int) -> TaughtBlocks:
        """The `blocks` consecutive blocks from block `first` on, as `TokenBlocks.section`."""
        part = object.__new__(TaughtBlocks)
        part.blocks, part.teacher = self.blocks.section(first, blocks), self.teacher
        part._first = self._first + first
        return part


def cache_teacher(
    teacher: PreTrainedModel,
    blocks: TokenBlocks,
    path: StrPath,
    *,
    k: int = 64,
    temperature: float = 2.0,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> CachedTeacher:
    """Runs the teacher over all blocks once, and keeps the `k` largest of each `softmax(logits / temperature)`.

    Distilling from the file saves the teacher's forward pass in every epoch and run. The file is written aside and
    appears when it is whole; its space is reserved before the teacher starts. When `path` already holds what would be
    written, made by a teacher of the same weights, it is opened instead; processes that start together make it once.

    Args:
        teacher: A causal language model on any device; it is in evaluation mode for the duration of the call.
        blocks: What it reads, one block after another, each from its first token.
        path: The file to write, `.safetensors` by custom; missing folders are made.
        k: Probabilities kept, from 1 to the vocabulary.
        temperature: The temperature of the distillation, from 1e-4 to 1e4.
        batch_size: Blocks in one forward pass; it changes the result only by rounding. Default: as many as keep the
            logits under 256 MB, at most 32.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)` in blocks.

    Raises:
        ConfigError: `k`, `temperature` or `batch_size` is out of its range, or the teacher knows fewer tokens or
            positions than the blocks have.
        DestinationError: `path` exists and is something else.
        NonFiniteError: The teacher's logits are NaN or infinite.
        StorageError: The file cannot be written; nothing is left of it.

    Cost: one forward pass of every block, a top-k of its logits, and `4k + 4` bytes a token.

    Example:
        >>> cached = cache_teacher(teacher, blocks, "teacher.safetensors", k=64)  # doctest: +SKIP
        >>> taught = TaughtBlocks(blocks, cached)  # doctest: +SKIP

    Source: distilling from truncated distributions on disk is studied by Peng et al., *Pre-training Distillation for
    Large Language Models: A Design Space Exploration*, arXiv 2410.16215.
    """
    path = Path(path)
    vocabulary = int(teacher.config.vocab_size)
    positions = getattr(teacher.config, "max_position_embeddings", None)
    k = validate.integer("k", k, 1, vocabulary)
    check_temperature(temperature)
    batch_size = checked_batch_size(teacher, batch_size, blocks.seq_len)
    if blocks.vocab_size > vocabulary:
        raise ConfigError(f"the teacher knows {vocabulary:,} tokens, the blocks' tokenizer has {blocks.vocab_size:,}")
    if positions is not None and blocks.seq_len > positions:
        raise ConfigError(f"the teacher knows {positions:,} positions, a block has {blocks.seq_len:,}")
    contents = TeacherFile(
        blocks=len(blocks),
        block_size=blocks.seq_len,
        k=k,
        temperature=float(temperature),
        vocabulary=vocabulary,
        fingerprint=blocks.fingerprint,
        teacher=_description(teacher),
        weights=weights_digest(teacher),
    )
    if not path.exists():
        with WholeFile(path) as file:
            if path.exists():
                # Made by the process that this one waited for.
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
        # The description holds the path that the teacher was loaded from: its weights say more.
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
                raise NonFiniteError(f"the teacher's logits are not finite in blocks {first} to {end - 1}")
            for name, array in zip(contents.tensors(), arrays, strict=True):
                writer.write(name, array, first)
            if report is not None:
                report(end, len(blocks))


def _description(teacher: PreTrainedModel) -> str:
    name = f" {teacher.name_or_path}" if teacher.name_or_path else ""
    return f"{type(teacher).__name__}{name} ({sum(part.numel() for part in teacher.parameters()):,} parameters)"
