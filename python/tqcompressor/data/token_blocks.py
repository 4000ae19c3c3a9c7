"""Text as training data: documents are tokenised in parallel, packed to blocks of one length, memory-mapped."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, StorageError, TextError
from ..utils import validate
from ..utils.atomic_io import WholeFile, storage_errors
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption, reporter
from .tokenize import Contents, Encoder, Tokens, digest, documents, encoded, open_texts, token_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Part of the name of a cache file. Raise it when the same text and tokenizer give other tokens.
_FORMAT = 1


class TokenBlocks:
    """A corpus as consecutive blocks of `block_size` tokens, memory-mapped: a map-style dataset.

    `torch.utils.data.DataLoader` and `transformers.Trainer` take it as it is. Worker processes map
    the same file. `token_blocks` makes it; `take` and `section` return parts of it that use no memory of their own.

    Example:
        >>> loader = torch.utils.data.DataLoader(blocks, batch_size=8)  # doctest: +SKIP
        >>> next(iter(loader))["input_ids"].shape  # doctest: +SKIP
        torch.Size([8, 128])
    """

    block_size: int
    """Tokens of a block."""
    vocabulary: int
    """Every token is below it."""
    corpus_tokens: int
    """Tokens of the whole corpus; these blocks may be a part of it."""

    def __init__(self, path: StrPath, corpus: str, vocabulary: int, block_size: int) -> None:
        """Maps the cache file at `path`, whose contents have the digest `corpus`. Call `token_blocks` instead."""
        self.block_size, self.vocabulary = block_size, vocabulary
        self._path, self._corpus = Path(path), corpus
        self._map()
        self._first, self._blocks = 0, self.corpus_tokens // block_size

    def _map(self) -> None:
        tokens = _map_tokens(self._path, token_dtype(self.vocabulary))
        if tokens is None:
            raise StorageError(errno.ENOENT, "no token cache, or a damaged one", str(self._path))
        self._tokens, self.corpus_tokens = tokens, len(tokens)

    def __len__(self) -> int:
        """The number of blocks."""
        return self._blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block `index` as `{"input_ids": int64 (block_size,)}`; a negative index counts from the end."""
        import torch

        if not -self._blocks <= index < self._blocks:
            raise IndexError(f"block {index} of {self._blocks}")
        begin = (self._first + index % self._blocks) * self.block_size
        return {"input_ids": torch.from_numpy(self._tokens[begin : begin + self.block_size].astype(np.int64))}

    @property
    def tokens(self) -> int:
        """Tokens of all blocks: `len(self) * block_size`."""
        return self._blocks * self.block_size

    @property
    def left_over(self) -> int:
        """Tokens at the end of the corpus that do not fill a block and are left out."""
        return self.corpus_tokens % self.block_size

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: equal where text, tokenizer, block size and section are equal."""
        return digest(self._corpus, str(self.block_size), str(self._first), str(self._blocks))

    def take(self, tokens: int) -> TokenBlocks:
        """The first blocks: as many as `tokens` tokens fill.

        Raises:
            TextError: There are fewer tokens.
            ConfigError: `tokens` do not fill a block.
        """
        if tokens < self.block_size:
            raise ConfigError(f"tokens: expected at least {self.block_size:,} (one block), got {tokens:,}")
        if tokens // self.block_size > self._blocks:
            raise TextError(f"expected {tokens:,} tokens, there are {self.tokens:,} in these blocks")
        return self.section(0, tokens // self.block_size)

    def section(self, first: int, blocks: int) -> TokenBlocks:
        """The `blocks` consecutive blocks from block `first` on, such as those of one training stage.

        Raises:
            TextError: There are fewer blocks.
        """
        if first < 0 or blocks < 1 or first + blocks > self._blocks:
            raise TextError(f"expected blocks {first} to {first + blocks - 1}, the texts have {self._blocks}")
        part = object.__new__(TokenBlocks)
        vars(part).update(vars(self), _first=self._first + first, _blocks=blocks)
        return part

    def __repr__(self) -> str:
        return (
            f"TokenBlocks({self._blocks:,} blocks of {self.block_size:,} tokens from a corpus of "
            f"{self.corpus_tokens:,}, of which the last {self.left_over:,} fill no block)"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would be a copy of the whole corpus.
        return {name: value for name, value in vars(self).items() if name != "_tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()


def token_blocks(
    texts: StrPath | Sequence[StrPath] | Any,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    tokens: int | None = None,
    cache: StrPath | None = None,
    workers: int | None = None,
    progress: ProgressOption = None,
) -> TokenBlocks:
    """Tokenises a corpus and packs it to blocks of `block_size` tokens.

    - A document is a file or a row of a dataset. It is split wherever its text contains the end-of-text token
      (`eos_token` of the tokenizer, else `bos_token`). Documents of white space alone are left out.
    - Each document is tokenised by itself with no special tokens added, then followed by one end-of-text token. A
      tokenizer that has neither token joins documents directly.
    - Documents are joined in the order given (the files of a glob are sorted) and cut to blocks, so that a block may
      hold the end of one document and the beginning of the next. The rest that fills no block is dropped; `left_over`
      is its number of tokens.

    The tokens are cached as a `.npy` file. Its name depends on the documents' contents and the tokenizer, not on paths,
    dates or block size: the file is found again when the texts are renamed, and not when a byte changes. A damaged
    file is written anew. Processes that need the same file at the same time write it once.

    Args:
        texts: A path, a glob (`"books/*.txt"`, `**` for any folders), a list of these, or a `datasets.Dataset` with a
            column `"text"`. Files are UTF-8.
        tokenizer: The tokenizer of teacher and student.
        block_size: Tokens of a block, from 2 to the tokenizer's `model_max_length`.
        tokens: Take only the first blocks: as many as this number of tokens fills. Default: all.
        cache: The cache folder. Default: `$TQCOMPRESSOR_CACHE`, else `$XDG_CACHE_HOME/tqcompressor`, else
            `~/.cache/tqcompressor`.
        workers: Threads that tokenise; a slow (Python) tokenizer uses one. Default: one for every processor that this
            process may use. The result does not depend on it.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)` in bytes
            of text; not called when the tokens are cached.

    Raises:
        TextError: A glob matches no file, a file is not UTF-8, a row is not text, or there are fewer tokens than a
            block or than `tokens`.
        ConfigError: `block_size`, `tokens` or `workers` is out of its range, or the dataset has no column `"text"`.
        StorageError: The cache cannot be written.
        OSError: A file cannot be read.

    Cost: every text is read once to find the cache file, and once more to tokenise it if there is none. Memory: one
    text file and, per thread, about 200 bytes for every character of its document. On two cores, 24 MB of books take
    6 seconds, and 0.3 when they are in the cache.

    Example:
        >>> blocks = token_blocks("books/*.txt", tokenizer, 1024)  # doctest: +SKIP
        >>> first_stage, second_stage = blocks.section(0, 400), blocks.section(400, 400)  # doctest: +SKIP
    """
    block_size = validate.integer("block_size", block_size, 2)
    if block_size > (longest := tokenizer.model_max_length):
        raise ConfigError(f"block_size: expected at most {longest} (the tokenizer's), got {block_size}")
    if tokens is not None and tokens < block_size:
        raise ConfigError(f"tokens: expected at least {block_size:,} (one block), got {tokens:,}")
    if workers is not None:
        workers = validate.integer("workers", workers, 1)
    encoder = Encoder(tokenizer)
    source = open_texts(texts)
    contents = Contents()
    for _ in contents.watch(documents(source, encoder.end_text)):
        pass
    if contents.bytes == 0:
        raise TextError("the texts are empty or white space")
    corpus = digest(str(_FORMAT), encoder.identity, contents.digest)
    path = Path(default_cache() if cache is None else cache) / f"tokens-{corpus}.npy"
    if _map_tokens(path, encoder.dtype) is None:
        with WholeFile(path) as file:
            if _map_tokens(path, encoder.dtype) is None:
                _write_tokens(file, source, contents, encoder, workers, progress)
            else:
                # Another process made it meanwhile.
                file.discard()
    blocks = TokenBlocks(path, corpus, encoder.vocabulary, block_size)
    if len(blocks) == 0:
        raise TextError(f"the texts have {blocks.corpus_tokens:,} tokens, one block needs {block_size:,}")
    return blocks if tokens is None else blocks.take(tokens)


def _write_tokens(
    file: WholeFile, source: Any, contents: Contents, encoder: Encoder, workers: int | None, progress: ProgressOption
) -> None:
    count = done = 0
    again = Contents()
    stream = encoded(again.watch(documents(source, encoder.end_text)), encoder, workers)
    # Written again when the count is known: numpy leaves room for any count, so that the length is the same.
    file.write(_header(encoder.dtype, 0))
    with closing(stream), reporter(progress, "tokenise") as report:
        for ids, size in stream:
            file.write(ids.tobytes())
            count += len(ids)
            done += size
            if report is not None:
                report(done, contents.bytes)
    if again.digest != contents.digest:
        raise TextError("the texts changed while they were tokenised")
    if count == 0:
        raise TextError("the tokenizer returned no tokens for the texts")
    file.write_at(0, _header(encoder.dtype, count))


def default_cache() -> Path:
    """The default folder: `$TQCOMPRESSOR_CACHE`, else `$XDG_CACHE_HOME/tqcompressor`, else `~/.cache/tqcompressor`."""
    if own := os.environ.get("TQCOMPRESSOR_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqcompressor"


def _header(dtype: np.dtype[Any], count: int) -> bytes:
    """The header of a `.npy` file of `count` numbers, of one length for every count."""
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _map_tokens(path: Path, dtype: np.dtype[Any]) -> Tokens | None:
    """The tokens of a cache file; None if it does not exist or its header and size are not those of such a file."""
    begin = len(_header(dtype, 0))
    with storage_errors(path):
        try:
            with open(path, "rb") as file:
                count, rest = divmod(os.fstat(file.fileno()).st_size - begin, dtype.itemsize)
                if count < 1 or rest or file.read(begin) != _header(dtype, count):
                    return None
                return np.memmap(file, dtype=dtype, mode="r", offset=begin, shape=(count,))
        except FileNotFoundError:
            return None
