"""Documents of a corpus and their tokens: read in order, tokenised in parallel, with bounded read-ahead."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, TextError
from ..utils import validate
from ..utils.portable import processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens: TypeAlias = NDArray[np.unsignedinteger[Any]]
# Short documents are passed to a thread in batches: a call costs about as much as 10,000 characters.
_BATCH_CHARACTERS = 1 << 16
# Tokens of a sequence that is drawn for a calibration. At equal cost, more short sequences describe a layer's input
# better than fewer long ones.
CALIBRATION_SEQ_LEN = 128
# Characters read ahead of the tokens that are written, per thread.
_CHARACTERS_AHEAD = 1 << 20


class Contents:
    """The digest and the size of the documents that were read."""

    def __init__(self) -> None:
        self.bytes = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def watch(self, documents: Iterable[str]) -> Iterator[str]:
        """Yields `documents` and adds each to the digest and the size."""
        for document in documents:
            data = document.encode()
            self._hash.update(len(data).to_bytes(8, "little"))
            self._hash.update(data)
            self.bytes += len(data)
            yield document

    @property
    def digest(self) -> str:
        """32 hexadecimal digits; they differ where documents, their order or their boundaries do."""
        return self._hash.hexdigest()


class Encoder:
    """A tokenizer's identity, and the token ids that it gives documents; callable from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Copies the state of `tokenizer`; later changes to it have no effect."""
        self.end_text, self.end = tokenizer.eos_token, tokenizer.eos_token_id
        if self.end is None:
            self.end_text, self.end = tokenizer.bos_token, tokenizer.bos_token_id
        vocabulary = tokenizer.get_vocab()
        # Not only the number of tokens: ids may have gaps.
        self.vocab_size = max(len(tokenizer), 1 + max(vocabulary.values()))
        self.dtype = token_dtype(self.vocab_size)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            self._tokenizer, self._backend = tokenizer, None
            state = f"{type(tokenizer).__qualname__} {sorted(vocabulary.items())}"
        else:
            # A copy: the caller's tokenizer keeps its settings and stays usable.
            settings = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
            self._backend = type(backend).from_str(json.dumps(settings))
            self._backend.encode_special_tokens = backend.encode_special_tokens
            state = f"{backend.encode_special_tokens} {json.dumps(settings, sort_keys=True)}"
        self.identity = digest(state, str(self.end_text), str(self.end))

    @property
    def is_fast(self) -> bool:
        """Whether it releases the interpreter's lock, so that threads tokenise in parallel."""
        return self._backend is not None

    def __call__(self, documents: list[str]) -> Tokens:
        """The tokens of every document, each followed by the end-of-text token."""
        if self._backend is not None:
            rows = [row.ids for row in self._backend.encode_batch_fast(documents, add_special_tokens=False)]
        else:
            rows = self._tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        end = [] if self.end is None else [self.end]
        ids = np.array([token for row in rows if row for token in (*row, *end)], dtype=np.int64)
        if len(ids) and ids.max() >= self.vocab_size:
            raise ConfigError(f"the tokenizer gives token {ids.max()}, its vocabulary has {self.vocab_size:,}")
        return ids.astype(self.dtype)


def documents(texts: Iterable[str], end_text: str | None) -> Iterator[str]:
    """Yields the parts of every text between end-of-text tokens, except those of white space alone."""
    for text in texts:
        yield from (part for part in split_document(text, end_text) if part.strip())


def split_document(text: str, end_text: str | None) -> list[str]:
    """The parts of `text` between end-of-text tokens."""
    return text.split(end_text) if end_text else [text]


def encoded(
    documents: Iterable[str], encoder: Encoder, workers: int | None
) -> Generator[tuple[Tokens, int], None, None]:
    """Yields the tokens of a few documents at a time, in order, with the bytes of their text."""
    # A slow tokenizer holds the interpreter's lock and need not be thread-safe.
    threads = (workers or processors()) if encoder.is_fast else 1
    pending: deque[tuple[Future[Tokens], list[str], int]] = deque()
    ahead = 0

    def oldest() -> tuple[Tokens, int]:
        nonlocal ahead
        future, batch, characters = pending.popleft()
        ahead -= characters
        return future.result(), sum(len(document.encode()) for document in batch)

    with _own_threads_only():
        pool = ThreadPoolExecutor(threads)
        try:
            for batch in _batches(documents):
                characters = sum(map(len, batch))
                pending.append((pool.submit(encoder, batch), batch, characters))
                ahead += characters
                while ahead > threads * _CHARACTERS_AHEAD:
                    yield oldest()
            while pending:
                yield oldest()
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _own_threads_only() -> Iterator[None]:
    """Prevents the tokenizers library from starting threads of its own.

    They would use every processor whatever the number of workers, and stay alive; versions before 0.23 then print a
    warning at every fork, such as a DataLoader's.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest dtype for tokens below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def digest(*parts: str) -> str:
    """A digest of `parts`: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def drawn_indices(available: int, wanted: int, length: int, tokens: int, seed: int) -> list[int]:
    """The indices of `wanted` different sequences, drawn with `seed`, in ascending order."""
    wanted = validate.integer("num_samples", wanted, 1)
    if available < wanted:
        raise TextError(f"expected {wanted} sequences of {length} tokens, got a text of {tokens:,} tokens: {available}")
    chosen = np.random.default_rng(seed).choice(available, wanted, replace=False)
    return [int(index) for index in np.sort(chosen)]


def drawn_sequences(chunks: list[Tokens], length: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """Sequences `(wanted, length)` drawn from the joined `chunks`; a last sequence that is not full is left out."""
    tokens = np.concatenate(chunks) if chunks else np.empty(0, np.int64)
    count = len(tokens) // length
    chosen = drawn_indices(count, wanted, length, len(tokens), seed)
    return tokens[: count * length].reshape(count, length)[chosen].astype(np.int64)
