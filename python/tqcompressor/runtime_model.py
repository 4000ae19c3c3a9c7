"""A GPT-2 in the native runtime: tokens in, logits and tokens out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .checkpoint import StrPath, local_directory
from .errors import ShapeError
from .progress import ProgressOption, reporter
from .runtime_tokens import batches, checked_tokens, integers, whole_number

# What `generate_tokens` adds at most where it is not told.
_NEW_TOKENS = 128

_Model = TypeVar("_Model", bound="TokenModel")


class TokenModel:
    """What a `NativeModel` does without its tokenizer."""

    def __init__(self, directory: str, runtime: _core.Runtime) -> None:
        """Rather call `from_pretrained`."""
        self._directory, self._runtime = directory, runtime

    @classmethod
    def from_pretrained(
        cls: type[_Model], source: StrPath, *, threads: int | None = None, progress: ProgressOption = None
    ) -> _Model:
        """Loads a checkpoint.

        Args:
            source: A directory with `config.json` and safetensors files of a GPT-2, with or without its head, dense or
                compressed by this package; or the id of a model on the hub, fetched by huggingface_hub if that is
                installed. For text it needs the tokenizer too: `tokenizer.json`, or `vocab.json` and `merges.txt`.
            threads: Threads that compute. Default: one for every processor that this process may use.
            progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

        Raises:
            CheckpointError: There is no such directory, or what is wrong with it: a tensor that is missing, superfluous
                or of another shape than `config.json` says, a truncated file, a config that cannot be followed.
            NonFiniteError: A weight is NaN or infinite.
            DtypeError: A weight is not float32, float16 or bfloat16.
            ConfigError: `threads` is less than 1.
            OSError: A file cannot be read.

        Cost: the memory of the weights in their own dtype.
        """
        if threads is not None:
            threads = whole_number("threads", threads, 1, 2**16)
        directory = local_directory(source)
        with reporter(progress, "load") as report:
            return cls(directory, _core.Runtime.load(directory, threads, report))

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self._runtime.context

    @property
    def vocabulary(self) -> int:
        """Tokens are below it."""
        return self._runtime.vocabulary

    @property
    def parameters(self) -> int:
        """Elements of the floating-point tensors, a tied head counted once."""
        return self._runtime.parameters

    @property
    def bytes(self) -> int:
        """Stored bytes of all tensors, the permutations included."""
        return self._runtime.bytes

    def logits(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> NDArray[np.float32]:
        """Logits of the next token at every position: float32 `(rows, positions, vocabulary)`.

        Args:
            input_ids: Tokens, `(rows, positions)`.
            attention_mask: 1 for tokens, 0 for padding, of the same shape; the tokens of a row lie side by side, with
                padding on the left or on the right of them. Positions count from a row's first token, and the logits
                of padding are 0. Default: no padding.

        Raises:
            ShapeError: `input_ids` has not two dimensions, the mask another shape, or a row padding amid its tokens.
            DtypeError: `input_ids` are not integers.
            ConfigError: A token is out of range, or a row longer than the model's context.

        Cost: one forward pass; the padding costs nothing. The result takes `4 · rows · positions · vocabulary` bytes.
        """
        ids = integers("input_ids", input_ids)
        if ids.ndim != 2:
            raise ShapeError(f"input_ids: expected two dimensions (rows, positions), got shape {ids.shape}")
        mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
        if mask.shape != ids.shape:
            raise ShapeError(f"attention_mask: expected the shape of input_ids, {ids.shape}, got {mask.shape}")
        begins = np.diff(mask.astype(np.int8), axis=1, prepend=0) == 1
        if (begins.sum(1) > 1).any():
            raise ShapeError("attention_mask: expected the tokens of a row side by side, got padding between them")
        result = np.zeros((*ids.shape, self.vocabulary), np.float32)
        if not ids.size:
            return result
        starts, lengths = mask.argmax(1), mask.sum(1)
        rows = np.flatnonzero(lengths).tolist()
        for batch in batches(rows, lambda row: int(lengths[row])):
            found = self._runtime.logits([checked_tokens(ids[row, mask[row]], self.vocabulary) for row in batch])
            if len(found) == ids.size:
                # All that there is: a copy would take as long as a small model.
                return found.reshape(result.shape)
            ends = np.cumsum(lengths[batch])
            for row, values in zip(batch, np.split(found, ends[:-1]), strict=True):
                result[row, starts[row] : starts[row] + lengths[row]] = values
        return result

    def generate_tokens(
        self,
        prompts: Sequence[ArrayLike],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        end_tokens: Sequence[int] | None = None,
        on_tokens: Callable[[list[tuple[int, int]]], object] | None = None,
    ) -> list[list[int]]:
        """Continues token sequences in one batch, whatever their lengths: returns the new tokens of each.

        Args:
            prompts: Sequences of tokens, none empty, none padded.
            max_new_tokens: How many are added at most, as far as the model's context reaches. Default: 128, or fewer
                if the longest prompt leaves no room for them.
            temperature: What logits are divided by before a token is drawn; 0 takes the most probable token.
            top_k: Only so many of the most probable tokens are drawn from; 0 for all.
            top_p: Only the most probable tokens that together have this probability are drawn from; 1 for all.
            seed: Of the draws, from 0 to 2⁶⁴ − 1. Prompt `i` draws as it would alone with `seed + i`, so that it does
                not depend on its company, nor on the number of threads.
            end_tokens: A prompt is done after any of them. Default: those of the checkpoint's config (`eos_token_id`).
            on_tokens: Called from this thread, about every 50 ms, with the new `(number of prompt, token)`.

        Raises:
            ConfigError: An option is out of its range, a prompt is empty or holds a token out of range, or it has no
                room for `max_new_tokens` in the context.
            DtypeError: A prompt's tokens are not integers.

        Cost: one forward pass over the prompts, then for each token of all prompts one pass over the weights; and
            `8 · layers · width` bytes for every token of a sequence.
        """
        sequences = [checked_tokens(prompt, self.vocabulary) for prompt in prompts]
        if max_new_tokens is None:
            max_new_tokens = max(1, min(_NEW_TOKENS, self.context - max(map(len, sequences), default=0)))
        return self._runtime.generate(
            sequences,
            whole_number("max_new_tokens", max_new_tokens, 0, 2**63),
            temperature,
            whole_number("top_k", top_k, 0, 2**63),
            top_p,
            whole_number("seed", seed, 0, 2**64),
            self._runtime.end_tokens if end_tokens is None else checked_tokens(end_tokens, self.vocabulary),
            on_tokens,
        )
