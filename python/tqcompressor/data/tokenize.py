"""Documents of a corpus and their tokens: read in order, tokenised in parallel, with bounded read-ahead."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, TextError
from ..utils import validate
from ..utils.portable import processors
from .cut import Piece, cut, documents
from .text import TextOption, open_texts, utf8
from .token_spool import Tokens, TokenSpool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Short documents are passed to a thread in batches: a call costs about as much as 10,000 characters.
_BATCH_CHARACTERS = 1 << 16
# Tokens of a sequence that is drawn for a calibration. At equal cost, more short sequences describe a layer's input
# better than fewer long ones.
CALIBRATION_SEQ_LEN = 128
# Characters read ahead of the tokens that are written, per thread.
_CHARACTERS_AHEAD = 1 << 18
# One thread reads and divides the texts, which more than so many others would wait for.
_MOST_THREADS = 16


class Contents:
    """The digest and the size of the documents that were read."""

    def __init__(self) -> None:
        self.bytes = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yields the pieces of documents and adds each to the digest and the size."""
        size = 0
        for piece in pieces:
            data = utf8(piece.text)
            self._hash.update(data)
            size += len(data)
            self.bytes += len(data)
            if piece.ends:
                # Read from the end of the last document, the sizes give all boundaries.
                self._hash.update(size.to_bytes(8, "little"))
                size = 0
            yield piece

    @property
    def digest(self) -> str:
        """32 hexadecimal digits; they differ where documents, their order or their boundaries do."""
        return self._hash.hexdigest()


class TextEncoder(Protocol):
    """What gives texts their tokens."""

    @property
    def is_fast(self) -> bool:
        """Whether it releases the interpreter's lock, so that threads tokenise in parallel."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the tokens."""

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The tokens of every text, with no special tokens added."""


class Encoder:
    """A tokenizer's identity, and the token ids that it gives texts; callable from any thread."""

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

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The tokens of every text, with no special tokens added."""
        if self._backend is not None:
            rows = [row.ids for row in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            rows = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        largest = max((max(row) for row in rows if row), default=0)
        if largest >= self.vocab_size:
            raise ConfigError(f"the tokenizer gives token {largest}, its vocabulary has {self.vocab_size:,}")
        return rows


def encoded(
    pieces: Iterable[Piece], encoder: TextEncoder, workers: int | None, end: int | None
) -> Generator[tuple[Tokens, int], None, None]:
    """Yields the tokens of documents, some at a time and in order, with the bytes of their text.

    `end` is put behind every document that has tokens, unless it is None. Memory: for each thread about 200 bytes for
    every character of a batch, and what is read ahead.
    """
    # A slow tokenizer holds the interpreter's lock and need not be thread-safe.
    threads = (workers or min(processors(), _MOST_THREADS)) if encoder.is_fast else 1
    pending: deque[tuple[Future[tuple[Tokens, list[int]]], list[Piece], int]] = deque()
    ahead = 0
    filled = False

    def oldest() -> tuple[Tokens, int]:
        nonlocal ahead, filled
        future, batch, characters = pending.popleft()
        ahead -= characters
        tokens, counts = future.result()
        ends, done = [], 0
        for piece, count in zip(batch, counts, strict=True):
            done += count
            filled = filled or count > 0
            if piece.ends:
                ends += [done] * filled
                filled = False
        if end is not None:
            tokens = np.insert(tokens, ends, end)
        return tokens, sum(len(utf8(piece.text)) for piece in batch)

    with _own_threads_only():
        pool = ThreadPoolExecutor(threads)
        try:
            for batch in _batches(cut(pieces, encoder)):
                characters = sum(len(piece.text) for piece in batch)
                pending.append((pool.submit(_encode, encoder, batch), batch, characters))
                ahead += characters
                while ahead > threads * _CHARACTERS_AHEAD:
                    yield oldest()
            while pending:
                yield oldest()
        finally:
            pool.shutdown(cancel_futures=True)


def collected(pieces: Iterable[Piece], encoder: TextEncoder, end: int | None, begin: Iterable[int] = ()) -> TokenSpool:
    """The tokens of documents behind those in `begin`; see `encoded`."""
    tokens = TokenSpool(encoder.dtype)
    tokens.append(np.array(list(begin), encoder.dtype))
    with closing(encoded(pieces, encoder, None, end)) as stream:
        for some, _ in stream:
            tokens.append(some)
    return tokens


def _encode(encoder: TextEncoder, batch: list[Piece]) -> tuple[Tokens, list[int]]:
    """The tokens of a batch, and how many each piece has."""
    rows = encoder([piece.context + piece.text for piece in batch])
    rows = [row[piece.known :] for row, piece in zip(rows, batch, strict=True)]
    return np.array(list(chain.from_iterable(rows)), encoder.dtype), [len(row) for row in rows]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
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


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer adds before and after a text, such as [CLS] and [SEP]."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for begin in range(len(full) - len(bare) + 1):
        if full[begin : begin + len(bare)] == bare:
            return full[:begin], full[begin + len(bare) :]
    return [], []


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
        raise TextError(
            f"expected {wanted} sequences of {length} tokens, got a text of {tokens:,} tokens: {available}. Give a "
            "longer text, or a smaller num_samples or seq_len"
        )
    chosen = np.random.default_rng(seed).choice(available, wanted, replace=False)
    return [int(index) for index in np.sort(chosen)]


def drawn_sequences(tokens: TokenSpool, length: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """Sequences `(wanted, length)` drawn from `tokens`; a last sequence that is not full is left out."""
    chosen = drawn_indices(len(tokens) // length, wanted, length, len(tokens), seed)
    return np.stack([tokens[index * length : (index + 1) * length] for index in chosen]).astype(np.int64)


def even_shares(available: Sequence[int], wanted: int, seed: int) -> list[int]:
    """How many of `wanted` sequences each of several texts gives: equal numbers, where it has as many.

    What a short text lacks is shared by the others, and what cannot be divided goes to texts drawn with `seed`.
    """
    shares = [0] * len(available)
    # The shortest first, so that the others share what it lacks.
    order = sorted(np.random.default_rng(seed).permutation(len(available)).tolist(), key=available.__getitem__)
    for done, text in enumerate(order):
        shares[text] = min(available[text], (wanted - sum(shares)) // (len(order) - done))
    return shares


def drawn_evenly(
    texts: Sequence[tuple[str, TextOption]],
    encoder: TextEncoder,
    end_text: str | None,
    end: int | None,
    *,
    length: int,
    wanted: int,
    seed: int,
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Sequences `(wanted, length)` drawn from `texts` evenly, and how many tokens of each text they have, by its name.

    Texts that are too short for a sequence are joined to one. Raises as `open_texts`, and `TextError` where all of them
    together are too short.
    """
    names: list[str] = []
    spools: list[TokenSpool] = []
    short: TokenSpool | None = None
    for name, text in texts:
        spool = collected(documents(open_texts(text), end_text), encoder, end)
        if len(texts) == 1 or len(spool) >= length:
            names.append(name)
            spools.append(spool)
        elif short is None:
            short = spool
        else:
            short.append(spool[:])
    if short is not None:
        names.append("short texts")
        spools.append(short)
    available = [len(spool) // length for spool in spools]
    # Checks and words of an error are those of one text.
    drawn_indices(sum(available), wanted, length, sum(map(len, spools)), seed)
    read: dict[str, int] = {}
    rows = []
    for name, spool, share in zip(names, spools, even_shares(available, wanted, seed), strict=True):
        if share:
            rows.append(drawn_sequences(spool, length, share, seed))
            read[name] = read.get(name, 0) + share * length
    return np.concatenate(rows), read
