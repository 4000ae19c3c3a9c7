"""Decoders without torch: the extension module's runtime generates and scores text, with numpy arrays in and out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from os import PathLike
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..calibration.calibration import Calibration
from ..data.text import TextOption, open_passages, open_text, utf8
from ..errors import DtypeError, ShapeError
from ..evaluate.results import LastWordResult, ModelScore, PerplexityResult, exponential
from ..evaluate.windows import checked_window, first_token, last_word_items, perplexity_result, text_to_score, windows
from ..utils import validate
from ..utils.hub import StrPath, local_directory
from ..utils.progress import ProgressOption, reporter
from .calibrate import draw_sequences, measure
from .tokens import NativeEncoder, Streamer, TextStreams, batches, checked_tokens, integers

# The default limit of new tokens of `generate_tokens`.
_NEW_TOKENS = 128
# The largest count that the extension module accepts.
_LARGEST_COUNT = (1 << 63) - 1


class NativeModel:
    """A checkpoint, dense or compressed, that runs on the CPU without torch and transformers.

    It is a GPT-2, a Llama, a Mistral or a Qwen2 (`model_type` "gpt2", "llama", "mistral", "qwen2"), with grouped
    queries, windows of attention, and rotations of the types `default`, `linear` and `llama3`.

    Weights stay in their stored dtype; everything is computed in float32. The results do not depend on the number of
    threads, and Python threads may share a model.

    Example:
        >>> model = NativeModel.from_pretrained("tests/data/tiny-gpt2", threads=2)
        >>> model.generate("He looked at", max_new_tokens=3)
        ' the door.'
    """

    def __init__(self, directory: str, runtime: _core.Runtime) -> None:
        """Call `from_pretrained` instead."""
        self._directory, self._runtime = directory, runtime

    @classmethod
    def from_pretrained(
        cls,
        source: StrPath,
        *,
        dtype: Literal["int8"] | None = None,
        kv_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        threads: int | None = None,
        progress: ProgressOption = None,
    ) -> NativeModel:
        """Loads a checkpoint.

        Args:
            source: A directory with `config.json` and safetensors files, with or without the head, dense or compressed
                by this package; or the id of a model on the hub, fetched by huggingface_hub if that is installed. For
                text it needs the tokenizer too: `tokenizer.json`, or `vocab.json` and `merges.txt`.
            dtype: "int8": weights that are not eight-bit integers yet become so, as
                `compress_checkpoint(…, dtype="int8")` writes them. Default: weights stay in the dtype that they have.
                At up to eight tokens at a time, as in generation, activations are then rounded to 16-bit integers, with
                a scale for every 128, which changes probabilities far less than rounding the weights did.
            kv_dtype: The dtype of cached keys and values. "float16" takes half of the memory, at the error of its
                rounding.
            threads: Worker threads. Default: one for every processor that this process may use.
            progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

        Raises:
            CheckpointError: There is no such directory, its `config.json` asks for what the runtime does not compute,
                or the checkpoint is faulty: a tensor is missing, superfluous or of another shape than `config.json`
                says, a file is truncated, the config is invalid.
            NonFiniteError: A weight is NaN or infinite.
            DtypeError: A weight is not float32, float16, bfloat16 or int8 with its scales, or `dtype` or `kv_dtype` is
                another.
            ConfigError: `threads` is not an integer from 1 up.
            OSError: A file cannot be read.

        Cost: the memory of the weights in their own dtype.
        """
        threads = validate.threads(threads)
        if dtype not in (None, "int8"):
            raise DtypeError(f'dtype: expected "int8" or none, got {dtype!r}')
        if kv_dtype not in ("float32", "float16", "bfloat16"):
            raise DtypeError(f"kv_dtype: expected float32, float16 or bfloat16, got {kv_dtype!r}")
        directory = local_directory(source)
        with reporter(progress, "load") as report:
            runtime = _core.Runtime.load(directory, threads, report, int8=dtype is not None, kv_dtype=kv_dtype)
        return cls(directory, runtime)

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self._runtime.context

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary; every token id is below it."""
        return self._runtime.vocab_size

    @property
    def parameters(self) -> int:
        """Elements of the floating-point tensors, a tied head counted once."""
        return self._runtime.parameters

    @property
    def bytes(self) -> int:
        """Stored bytes of all tensors, the permutations included."""
        return self._runtime.bytes

    def logits(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> NDArray[np.float32]:
        """Logits of the next token at every position: float32 `(rows, positions, vocab_size)`.

        Args:
            input_ids: Tokens, `(rows, positions)`.
            attention_mask: 1 for tokens, 0 for padding, of the same shape; the tokens of a row are contiguous, with
                padding on either side. Positions count from a row's first token, and the logits
                of padding are 0. Default: no padding.

        Raises:
            ShapeError: `input_ids` does not have two dimensions or is ragged, the mask has another shape, or a row has
                padding between its tokens.
            DtypeError: `input_ids` are not integers, or the mask holds no numbers.
            ConfigError: A token is out of range, or a row longer than the model's context.

        Cost: one forward pass; the padding costs nothing. The result takes `4 · rows · positions · vocab_size` bytes.
        """
        ids = integers("input_ids", input_ids)
        if ids.ndim != 2:
            raise ShapeError(f"input_ids: expected two dimensions (rows, positions), got shape {ids.shape}")
        mask = np.ones(ids.shape, bool) if attention_mask is None else _mask(attention_mask)
        if mask.shape != ids.shape:
            raise ShapeError(f"attention_mask: expected the shape of input_ids, {ids.shape}, got {mask.shape}")
        begins = np.diff(mask.astype(np.int8), axis=1, prepend=0) == 1
        if (begins.sum(1) > 1).any():
            raise ShapeError("attention_mask: expected the tokens of a row side by side, got padding between them")
        result = np.zeros((*ids.shape, self.vocab_size), np.float32)
        if not ids.size:
            return result
        starts, lengths = mask.argmax(1), mask.sum(1)
        rows = np.flatnonzero(lengths).tolist()
        for batch in batches(rows, lambda row: int(lengths[row])):
            found = self._runtime.logits([checked_tokens(ids[row, mask[row]], self.vocab_size) for row in batch])
            if len(found) == ids.size:
                # No padding: return it without a copy, which would take as long as a small model.
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
        eos_token_id: int | Sequence[int] | None = None,
        on_tokens: Callable[[list[tuple[int, int]]], object] | None = None,
    ) -> list[list[int]]:
        """Continues token sequences of any lengths in one batch; returns the new tokens of each.

        Args:
            prompts: Sequences of tokens, not empty and not padded.
            max_new_tokens: The most tokens added to each, which must fit into the context. Default: 128, or fewer if
                the longest prompt leaves no room for them.
            temperature: The divisor of the logits before a token is drawn; 0 takes the most probable token.
            top_k: Draw from this number of most probable tokens only; 0 for all.
            top_p: Draw from the most probable tokens that together have this probability only; 1 for all.
            seed: The seed of the draws, from 0 to 2⁶⁴ − 1. Prompt `i` is continued as alone with `seed + i`: the
                result depends neither on the other prompts nor on the number of threads.
            eos_token_id: A continuation ends after this token, or any of several. Default: the checkpoint's own.
            on_tokens: Called from this thread, about every 50 ms, with the new `(number of prompt, token)`.

        Raises:
            ConfigError: An option is out of its range, a prompt is empty or holds a token out of range, or it has no
                room for `max_new_tokens` in the context; or `kv_dtype` does not hold a key or value.
            DtypeError: A prompt's tokens are not integers.

        Cost: one forward pass over the prompts, then for each token of all prompts one pass over the weights; and two
        values of `kv_dtype` for every layer, token of a sequence, and value of the heads of keys.
        """
        sequences = [checked_tokens(prompt, self.vocab_size) for prompt in prompts]
        if max_new_tokens is None:
            max_new_tokens = max(1, min(_NEW_TOKENS, self.context - max(map(len, sequences), default=0)))
        given = self._runtime.eos_token_id if eos_token_id is None else eos_token_id
        ends = np.atleast_1d(validate.array("eos_token_id", given))
        return self._runtime.generate(
            sequences,
            validate.integer("max_new_tokens", max_new_tokens, 0, _LARGEST_COUNT),
            temperature,
            validate.integer("top_k", top_k, 0, _LARGEST_COUNT),
            top_p,
            validate.seed(seed),
            checked_tokens(ends, self.vocab_size),
            on_tokens,
        )

    @cached_property
    def _tokenizer(self) -> _core.Tokenizer:
        return _core.Tokenizer.load(self._directory)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text by the checkpoint's own tokenizer, with no special tokens added.

        Raises:
            CheckpointError: The checkpoint has no tokenizer, or a damaged one.
            TextError: The text has lone surrogates.
        """
        utf8(text)
        return self._tokenizer.encode(text)

    def decode(self, tokens: ArrayLike, *, skip_special_tokens: bool = False) -> str:
        """The text of tokens. Bytes that are not UTF-8, such as part of a character, become U+FFFD.

        Raises:
            CheckpointError: As `encode`.
            ConfigError: A token is out of range.
        """
        return self._tokenizer.decode(checked_tokens(tokens, self.vocab_size), skip_special_tokens)

    @overload
    def generate(  # type: ignore[overload-overlap]  # A str is a sequence of str, but means one text.
        self,
        prompts: str,
        *,
        max_new_tokens: int | None = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int = ...,
        streamer: Streamer | None = ...,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int = ...,
        streamer: Streamer | None = ...,
    ) -> list[str]: ...
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        streamer: Streamer | None = None,
    ) -> str | list[str]:
        """Continues a text, or several in one batch; returns the continuations, without special tokens.

        Args:
            prompts: A text or several. An empty one begins with the begin-of-text token.
            max_new_tokens: As in `generate_tokens`, like the following arguments.
            temperature: 0 for the most probable token each time.
            top_k: 0 for all tokens.
            top_p: 1 for all tokens.
            seed: The seed of the draws.
            streamer: Called from this thread, about every 50 ms, with the number of a prompt and the new text of its
                continuation, in whole characters. An exception that it raises ends the generation.

        Errors are those of `encode` and `generate_tokens`.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokens = [self.encode(text) or self._begin() for text in texts]
        streams = None if streamer is None else TextStreams(self._tokenizer, len(texts), streamer)
        generated = self.generate_tokens(
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_tokens=None if streams is None else streams.add,
        )
        found = [self._text(continuation) for continuation in generated]
        if streams is not None:
            streams.finish(found)
        return found[0] if isinstance(prompts, str) else found

    def perplexity(
        self,
        text: str | PathLike[str],
        *,
        context: int | None = None,
        stride: int | None = None,
        progress: ProgressOption = None,
    ) -> PerplexityResult:
        """Sliding-window perplexity of `text`, by the convention of `evaluate.perplexity`.

        `perplexity = exp(−(1/N) Σ_i ln p(t_i | the tokens before t_i in its window))`

        Args:
            text: A str is the text itself, a `pathlib.Path` is a UTF-8 file.
            context: Longest input, in tokens. Default: the model's.
            stride: Tokens by which the window moves, from 1 to `context`. Default: half of `context`.
            progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

        Raises:
            TextError: The text is empty or has fewer than 2 tokens.
            ConfigError: `context` or `stride` is out of its range.
            CheckpointError: As `encode`.

        Cost: about `N · context / stride` token positions through the model.
        """
        start = time.perf_counter()
        scored_text = text_to_score(open_text(text), NativeEncoder(self._tokenizer), self._begin())
        sequence = scored_text.tokens
        context, stride = checked_window(self.context, context, stride)
        parts = windows(len(sequence) - 1, context, stride)
        total, done = 0.0, 0
        with reporter(progress, "perplexity") as report:
            for batch in batches(parts, lambda part: part[1] - part[0]):
                sequences = [sequence[begin : end + 1].tolist() for begin, end, _ in batch]
                likelihoods, _ = self._runtime.score(sequences, [scored for _, _, scored in batch])
                total -= float(likelihoods.sum())
                done += len(likelihoods)
                if report is not None:
                    report(done, len(sequence) - 1)
        return perplexity_result(scored_text, total, done, context, stride, time.perf_counter() - start)

    def last_word_accuracy(
        self, passages: Sequence[str] | PathLike[str], *, progress: ProgressOption = None
    ) -> LastWordResult:
        """The accuracy of last-word prediction (LAMBADA), by the rules of `evaluate.last_word_accuracy`.

        Args:
            passages: Texts of two words or more, or the `pathlib.Path` of a file that `evaluate.read_passages` reads.
            progress: As in `perplexity`.

        Raises:
            TextError: There are no passages, one has no word before its last, or a last word alone exceeds the context.
            CheckpointError: As `encode`.
        """
        start = time.perf_counter()
        items = last_word_items(open_passages(passages), self.encode, self.context)
        right, total, done = 0, 0.0, 0
        with reporter(progress, "last words") as report:
            for batch in batches(items, lambda item: len(item[0])):
                sequences = [[*tokens, *targets[-1:]] for tokens, targets in batch]
                counts = [len(targets) for _, targets in batch]
                likelihoods, found = self._runtime.score(sequences, counts)
                total -= float(likelihoods.sum())
                right += sum(bool(word.all()) for word in np.split(found, np.cumsum(counts)[:-1]))
                done += len(batch)
                if report is not None:
                    report(done, len(items))
        return LastWordResult(right / done, exponential(total / done), done, time.perf_counter() - start)

    def calibrate(
        self,
        text: TextOption,
        *,
        num_samples: int = 128,
        seq_len: int | None = None,
        seed: int = 0,
        max_memory: int = 2 << 30,
        progress: ProgressOption = None,
    ) -> Calibration:
        """Measures the second moments `E[xᵀx]` of the inputs of every layer on a text.

        It is `tqcompressor.calibrate` with `sensitivity=False`, on the same sequences of the same text, without torch.
        Gradients need torch.

        Args:
            text: A str is the text itself, a `pathlib.Path` is a file or a glob pattern, a list holds either, and a
                `datasets.Dataset` has a column `"text"`. Each path of a list gives as many sequences as any other.
            num_samples: How many sequences are drawn from the text.
            seq_len: Tokens of a sequence. Default: 128, or the model's context if that is shorter.
            seed: The seed of the sequences that are drawn.
            max_memory: Bytes that the sums may take, beside that of one layer. What exceeds it is kept in an unnamed
                file in the system's folder for temporary files.
            progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

        Raises:
            TextError: The text has fewer than `num_samples` sequences, or a file is not text.
            ConfigError: An argument is out of its range.
            NonFiniteError: The model computes NaN or an infinity.
            StorageError: The temporary file cannot be written.
            CheckpointError: As `encode`.

        Cost: a forward pass over the sequences, and little more than `m²/2` MACs a token and layer of `m` inputs.

        Example:
            >>> from pathlib import Path
            >>> model = NativeModel.from_pretrained("tests/data/tiny-gpt2")
            >>> model.calibrate(Path("tests/data/tiny-gpt2/heldout.txt"), num_samples=2)
            Calibration(19 moments of inputs of a gpt2, over 256 tokens)

        Source: Wang et al., *SVD-LLM*, arXiv 2403.07378.
        """
        seed = validate.seed(seed)
        drawn, texts = draw_sequences(self._runtime, self._tokenizer, text, num_samples, seq_len, seed)
        return measure(self._runtime, drawn, texts, seed=seed, max_memory=max_memory, progress=progress)

    def score(
        self,
        text: str | PathLike[str],
        *,
        name: str = "model",
        passages: Sequence[str] | PathLike[str] | None = None,
        context: int | None = None,
        stride: int | None = None,
        progress: ProgressOption = None,
    ) -> ModelScore:
        """One row of a `Comparison`: the model's size, its `perplexity` on `text` and, when there are `passages`, its
        `last_word_accuracy` on them. Arguments and errors are those of these methods."""
        result = self.perplexity(text, context=context, stride=stride, progress=progress)
        words = None if passages is None else self.last_word_accuracy(passages, progress=progress)
        return ModelScore(name, self.parameters, self.bytes, result, words)

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, True)

    def _begin(self) -> list[int]:
        return first_token(self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)


def _mask(attention_mask: ArrayLike) -> NDArray[np.bool_]:
    mask = validate.array("attention_mask", attention_mask)
    if mask.size and mask.dtype.kind not in "biuf":
        raise DtypeError(f"attention_mask: expected numbers or booleans, got {mask.dtype}")
    return mask.astype(bool)
