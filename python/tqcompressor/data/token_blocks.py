"""Text as training data: documents are tokenised in parallel, packed to blocks of one length, memory-mapped."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, StorageError, TextError
from ..utils import validate
from ..utils.atomic_io import WholeFile, storage_errors
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption, reporter
from .cut import documents
from .text import TextOption, Texts, open_texts
from .token_spool import Tokens
from .tokenize import Contents, Encoder, digest, encoded, token_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Part of the name of a cache file. Raise it when the same text and tokenizer give other tokens.
_FORMAT = 2


class TokenBlocks:
    """A corpus as consecutive blocks of `seq_len` tokens, memory-mapped: a map-style dataset.

    `torch.utils.data.DataLoader` and `transformers.Trainer` take it as it is. Worker processes map
    the same file. `token_blocks` makes it; `take` and `section` return parts of it that use no memory of their own,
    and `drawn` blocks at random, for 8 bytes a block.

    Example: see `token_blocks`.
    """

    seq_len: int
    """Tokens of a block."""
    vocab_size: int
    """Every token is below it."""
    corpus_tokens: int
    """Tokens of the whole corpus; these blocks may be a part of it."""

    def __init__(self, path: StrPath, corpus: str, vocab_size: int, seq_len: int) -> None:
        """Maps the cache file at `path`, whose contents have the digest `corpus`. Call `token_blocks` instead."""
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self._path, self._corpus = Path(path), corpus
        self._map()
        self._chosen: range | NDArray[np.int64] = range(self.corpus_tokens // seq_len)

    def _map(self) -> None:
        tokens = _map_tokens(self._path, token_dtype(self.vocab_size))
        if tokens is None:
            raise StorageError(errno.ENOENT, "no token cache, or a damaged one", str(self._path))
        self._tokens, self.corpus_tokens = tokens, len(tokens)

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block `index` as `{"input_ids": int64 (seq_len,)}`; a negative index counts from the end."""
        import torch

        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        begin = int(self._chosen[index]) * self.seq_len
        return {"input_ids": torch.from_numpy(self._tokens[begin : begin + self.seq_len].astype(np.int64))}

    @property
    def tokens(self) -> int:
        """Tokens of all blocks: `len(self) * seq_len`."""
        return len(self) * self.seq_len

    @property
    def left_over(self) -> int:
        """Tokens at the end of the corpus that do not fill a block and are left out."""
        return self.corpus_tokens % self.seq_len

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: equal where text, tokenizer, sequence length and chosen blocks are equal."""
        if isinstance(self._chosen, range):
            chosen = [str(self._chosen.start), str(len(self))]
        else:
            chosen = [hashlib.blake2b(self._chosen.astype("<i8").tobytes(), digest_size=16).hexdigest()]
        return digest(self._corpus, str(self.seq_len), *chosen)

    def take(self, tokens: int) -> TokenBlocks:
        """The first blocks: as many as `tokens` tokens fill.

        Raises:
            TextError: There are fewer tokens.
            ConfigError: `tokens` do not fill a block.
        """
        if tokens < self.seq_len:
            raise ConfigError(f"tokens: expected at least {self.seq_len:,} (one block), got {tokens:,}")
        if tokens // self.seq_len > len(self):
            raise TextError(f"expected {tokens:,} tokens, there are {self.tokens:,} in these blocks")
        return self.section(0, tokens // self.seq_len)

    def section(self, first: int, num_samples: int) -> TokenBlocks:
        """The `num_samples` consecutive blocks from block `first` on, such as those of one training stage.

        Raises:
            TextError: There are fewer blocks.
        """
        if first < 0 or num_samples < 1 or first + num_samples > len(self):
            raise TextError(f"expected blocks {first} to {first + num_samples - 1}, the texts have {len(self)}")
        return self._part(self._chosen[first : first + num_samples])

    def drawn(self, num_samples: int, seed: int) -> TokenBlocks:
        """`num_samples` of the blocks, drawn with `seed` from all of them, each at most once, in random order.

        The first blocks of a corpus are few of its documents; as many drawn ones are of most of them.

        Raises:
            TextError: There are fewer blocks.
        """
        if not 1 <= num_samples <= len(self):
            raise TextError(f"expected {num_samples} blocks, the texts have {len(self)}")
        order = np.random.default_rng(seed).permutation(len(self))
        return self._part(np.asarray(self._chosen)[order[:num_samples]])

    def _part(self, chosen: range | NDArray[np.int64]) -> TokenBlocks:
        part = object.__new__(TokenBlocks)
        vars(part).update(vars(self), _chosen=chosen)
        return part

    def __repr__(self) -> str:
        return (
            f"TokenBlocks({len(self):,} blocks of {self.seq_len:,} tokens from a corpus of "
            f"{self.corpus_tokens:,}, of which the last {self.left_over:,} fill no block)"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would be a copy of the whole corpus.
        return {name: value for name, value in vars(self).items() if name != "_tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()


def token_blocks(
    text: TextOption,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    tokens: int | None = None,
    cache: StrPath | None = None,
    workers: int | None = None,
    progress: ProgressOption = None,
) -> TokenBlocks:
    """Tokenises a corpus and packs it to blocks of `seq_len` tokens.

    - A document is a text, a file, or a row of a dataset, split further wherever the end-of-text token (`eos_token` of
      the tokenizer, else `bos_token`) is in the text. Documents of white space alone are left out.
    - Each document is tokenised by itself with no special tokens added, then followed by one end-of-text token. A
      tokenizer that has neither token joins documents directly.
    - Documents are joined in the order given (the files of a glob are sorted) and cut to blocks, so that a block may
      hold the end of one document and the beginning of the next. The rest that fills no block is dropped; `left_over`
      is its number of tokens.

    The tokens are cached as a `.npy` file. Its name depends on the documents' contents and the tokenizer, not on paths,
    dates or sequence length: the file is found again when the texts are renamed, and not when a byte changes. A damaged
    file is written anew. Processes that need the same file at the same time write it once.

    Args:
        text: A str is the text itself, a `pathlib.Path` is a UTF-8 file or a glob pattern (`**` for any folders), a
            list holds either, and a `datasets.Dataset` has a column `"text"`.
        tokenizer: The tokenizer of teacher and student.
        seq_len: Tokens of a sequence, from 2 to the tokenizer's `model_max_length`.
        tokens: Take only the first blocks: as many as this number of tokens fills. Default: all.
        cache: The cache folder. Default: `$TQCOMPRESSOR_CACHE`, else `$XDG_CACHE_HOME/tqcompressor`, else
            `~/.cache/tqcompressor`.
        workers: Threads that tokenise; a slow (Python) tokenizer uses one. Default: one for every processor that this
            process may use, at most 16. The result does not depend on it.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)` in bytes
            of text; not called when the tokens are cached.

    Raises:
        TextError: A pattern matches no file, a str is the name of a file, a file is not UTF-8, a row is not text, or
            there are fewer tokens than a block or than `tokens`.
        ConfigError: `seq_len`, `tokens` or `workers` is out of its range, or the dataset has no column `"text"`.
        StorageError: The cache cannot be written.
        OSError: A file cannot be read.

    Cost: every text is read once to find the cache file, and once more to tokenise it if there is none. Memory: some
    20 MB for each thread, whatever the size of a file. A document of more than 32,768 characters is encoded in pieces.
    They have the tokens of the whole, but for a single word (of the tokenizer's pre-tokenizer) that is longer than
    that. On two cores, 24 MB of books take 6 seconds, and 0.3 when they are in the cache.

    Example:
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-gpt2")
        >>> blocks = token_blocks(Path("tests/data/tiny-gpt2/*.txt"), tokenizer, 128, tokens=12_800)
        >>> first_stage, second_stage = blocks.section(0, 40), blocks.section(40, 60)
        >>> len(first_stage), second_stage.tokens, blocks[0]["input_ids"].shape
        (40, 7680, torch.Size([128]))
    """
    seq_len = validate.integer("seq_len", seq_len, 2)
    if seq_len > (longest := tokenizer.model_max_length):
        raise ConfigError(f"seq_len: expected at most {longest} (the tokenizer's), got {seq_len}")
    if tokens is not None and tokens < seq_len:
        raise ConfigError(f"tokens: expected at least {seq_len:,} (one block), got {tokens:,}")
    if workers is not None:
        workers = validate.integer("workers", workers, 1)
    encoder = Encoder(tokenizer)
    source = open_texts(text)
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
    blocks = TokenBlocks(path, corpus, encoder.vocab_size, seq_len)
    if len(blocks) == 0:
        raise TextError(f"the texts have {blocks.corpus_tokens:,} tokens, one block needs {seq_len:,}")
    return blocks if tokens is None else blocks.take(tokens)


def _write_tokens(
    file: WholeFile,
    source: Texts,
    contents: Contents,
    encoder: Encoder,
    workers: int | None,
    progress: ProgressOption,
) -> None:
    count = done = 0
    again = Contents()
    stream = encoded(again.watch(documents(source, encoder.end_text)), encoder, workers, encoder.end)
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
