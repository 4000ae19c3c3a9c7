"""Scoring text with a model: sliding-window perplexity, and last words; their conventions stand in the docstrings."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..data.text import open_passages, open_text
from ..data.token_spool import TokenSpool
from ..data.tokenize import Encoder
from ..errors import MissingDependencyError
from ..utils import validate
from ..utils.progress import ProgressOption, reporter
from ..utils.torch_utils import evaluating
from .results import LastWordResult, PerplexityResult, WindowResult, exponential
from .windows import (
    Encode,
    TextToScore,
    checked_window,
    first_token,
    last_word_items,
    perplexity_result,
    text_to_score,
    windows,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Item = TypeVar("_Item")
# Logits of one batch, in elements: 256 MB in float32.
_LOGITS_PER_BATCH = 1 << 26


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | PathLike[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> PerplexityResult:
    """Sliding-window perplexity of `text`.

    `perplexity = exp(−(1/N) Σ_i ln p(t_i | the tokens before t_i in its window))`

    The convention, exactly:

    - The text is tokenized as a whole, with no special tokens added; a long one in pieces that have its tokens, as
      `token_blocks` says. The sequence is the begin-of-text token (`bos_token_id` of the tokenizer, else
      `eos_token_id`) followed by the `N` tokens of the text. All `N` are scored,
      each once; the begin-of-text token is not. A tokenizer with neither token gives no such start: then the first
      token of the text is only context and the other `N − 1` are scored.
    - The first window scores `context` tokens; each later one moves on by `stride` tokens, scores just those, and holds
      the `context` tokens before the last of them as its input. So every scored token but those of the first window
      has at least `context − stride` tokens of the text before it. A text shorter than `context` is one window.
    - `stride == context` is the cheapest (each token is read once) and equals lm-eval's `loglikelihood_rolling`; a
      small stride comes nearer to the true conditional probabilities and gives lower figures. Compare only figures
      with equal settings.
    - Log-probabilities are taken in float32 whatever the model's dtype, and summed in float64.

    Args:
        model: A causal language model; it is put in evaluation mode for the duration of the call.
        tokenizer: Its tokenizer.
        text: A str is the text itself, a `pathlib.Path` is a UTF-8 file.
        context: Longest input of the model, in tokens. Default: the model's `max_position_embeddings`.
        stride: Tokens by which the window moves, from 1 to `context`. Default: half of `context`.
        batch_size: Windows in one forward pass; results do not depend on it but for rounding. Default: as many as keep
            the logits under 256 MB, at most 32.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Raises:
        TextError: The text is empty or has fewer than 2 tokens.
        ConfigError: `context`, `stride` or `batch_size` is out of its range.
        MissingDependencyError: torch is not installed.

    Cost: about `N · context / stride` token positions through the model. The tokens of a long text are in a temporary
    file: the memory does not depend on its length.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> model = AutoModelForCausalLM.from_pretrained("tests/data/tiny-gpt2")
        >>> tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-gpt2")
        >>> result = perplexity(model, tokenizer, "He looked at her, and she looked at the door.")
        >>> result.tokens, 10 < result.perplexity < 100
        (12, True)
    """
    start = time.perf_counter()
    scored = tokenised(tokenizer, text)
    context, stride = checked_window(_longest(model), context, stride)
    total, tokens = negative_log_likelihood(
        model, scored.tokens, context=context, stride=stride, batch_size=batch_size, progress=progress
    )
    return perplexity_result(scored, total, tokens, context, stride, time.perf_counter() - start)


def mean_window_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | PathLike[str],
    *,
    context: int | None = None,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> WindowResult:
    """Perplexity by the mean over windows, the convention of many published figures; `perplexity` is the better one.

    `perplexity = exp((1/W) Σ_w ℓ_w)`, where `ℓ_w` is the mean negative log-likelihood of the tokens of window `w` but
    the first. The windows have `context` tokens and do not overlap. Nothing is put before the text, the first token of
    each window is context only, and a last window that is shorter has the weight of a full one. A last window of one
    token has nothing to score and does not count.

    Args:
        model: A causal language model; it is put in evaluation mode for the duration of the call.
        tokenizer: Its tokenizer.
        text: A str is the text itself, a `pathlib.Path` is a UTF-8 file.
        context: Tokens of a window, from 2 up. Default: the model's `max_position_embeddings`.
        batch_size: Windows in one forward pass. Default: as for `perplexity`.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Raises: As `perplexity`.

    Source: "Perplexity of fixed-length models" in the documentation of transformers, with `stride = max_length`.
    """
    torch = import_torch()
    start = time.perf_counter()
    longest = _longest(model)
    context = longest if context is None else validate.integer("context", context, 2, longest)
    tokens = text_to_score(open_text(text), Encoder(tokenizer), []).tokens
    batch_size = checked_batch_size(model, batch_size, context)
    begins = range(0, len(tokens) - 1, context)
    # The last window may be shorter than the others: it is in a batch of its own.
    batches = chain(_chunks(begins[:-1], batch_size), [[begins[-1]]])
    means: list[float] = []
    with evaluating(model), torch.inference_mode(), reporter(progress, "perplexity") as report:
        for batch in batches:
            read = np.stack([np.asarray(tokens[begin : begin + context], np.int64) for begin in batch])
            rows = torch.from_numpy(read).to(model.device)
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            means += [
                -float(_log_likelihoods(row, ids[1:]).double().mean()) for row, ids in zip(logits, rows, strict=True)
            ]
            if report is not None:
                report(len(means), len(begins))
    return WindowResult(
        exponential(float(np.mean(means))), len(begins), len(tokens), context, time.perf_counter() - start
    )


def tokenised(tokenizer: PreTrainedTokenizerBase, text: str | PathLike[str]) -> TextToScore:
    """`text_to_score` by a tokenizer of transformers: a str is the text itself, a `pathlib.Path` is a UTF-8 file."""
    return text_to_score(open_text(text), Encoder(tokenizer), begin_tokens(tokenizer))


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token: `bos_token_id`, else `eos_token_id`, else none."""
    return first_token(tokenizer.bos_token_id, tokenizer.eos_token_id)


def negative_log_likelihood(
    model: PreTrainedModel,
    tokens: Sequence[int] | TokenSpool,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> tuple[float, int]:
    """`−Σ_i ln p(t_i | the tokens before t_i in its window)` over all tokens but the first, in nats, and their number.

    The windows, and the other arguments, are those of `perplexity`.
    """
    torch = import_torch()
    context, stride = checked_window(_longest(model), context, stride)
    targets = len(tokens) - 1
    parts = windows(targets, context, stride)
    batch_size = checked_batch_size(model, batch_size, stride)
    total, done = 0.0, 0
    with evaluating(model), torch.inference_mode(), reporter(progress, "perplexity") as callback:
        report = callback or _silent
        report(done, targets)
        # The first window scores more tokens than the others: in a batch of its own it does not widen their logits.
        for batch in chain([list(islice(parts, 1))], _chunks(parts, batch_size)):
            read = np.stack([np.asarray(tokens[begin : end + 1], np.int64) for begin, end, _ in batch])
            rows = torch.from_numpy(read).to(model.device)
            most = max(scored for _, _, scored in batch)
            logits = model(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=most).logits
            for row, ids, (_, _, scored) in zip(logits, rows, batch, strict=True):
                total -= float(_log_likelihoods(row[most - scored :], ids[-scored:]).double().sum())
                done += scored
            report(done, targets)
    return total, done


def last_word_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[str] | PathLike[str],
    *,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> LastWordResult:
    """LAMBADA's task: how well the model continues each passage by its last word.

    The last word is what follows the last white space of the passage (punctuation that is attached to it included),
    scored with one space in front. A passage counts as right when every token of the word is the model's most probable
    one, given the true tokens before it. The perplexity is `exp` of the mean negative log-likelihood of a whole word.
    Passage and word are tokenized together, so that the word is split as in running text; nothing is put before the
    passage, and one that is longer than the model's context loses its beginning. These are lm-eval's `lambada` rules.

    Args:
        model: A causal language model; it is put in evaluation mode for the duration of the call.
        tokenizer: Its tokenizer.
        passages: Texts of two words or more, or the `pathlib.Path` of a file that `evaluate.read_passages` reads.
        batch_size: Passages in one forward pass, padded on the right under an attention mask; results do not depend on
            it but for rounding. Default: as for `perplexity`.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`.

    Raises:
        TextError: There are no passages, one has no word before its last, or a last word alone exceeds the context.
        ConfigError: `batch_size` is not positive.
        MissingDependencyError: torch is not installed.

    Source: Paperno et al., *The LAMBADA dataset*, arXiv 1606.06031.
    """
    torch = import_torch()
    start = time.perf_counter()
    # Sorted by length: little padding, and last words at few different positions.
    items = last_word_items(open_passages(passages), _encoder(tokenizer), _longest(model))
    batch_size = checked_batch_size(model, batch_size, len(items[0][0]))
    right, total, done = 0, 0.0, 0
    with evaluating(model), torch.inference_mode(), reporter(progress, "last words") as callback:
        report = callback or _silent
        report(done, len(items))
        for batch in _chunks(items, batch_size):
            inputs = torch.zeros((len(batch), len(batch[0][0])), dtype=torch.long)
            mask = torch.zeros_like(inputs)
            for row, (tokens, _) in enumerate(batch):
                inputs[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
            spans = [range(len(tokens) - len(targets), len(tokens)) for tokens, targets in batch]
            # The head is a third of a small model's MACs: compute logits only at the positions of last words.
            positions = sorted(set().union(*spans))
            column = {position: index for index, position in enumerate(positions)}
            logits = model(
                input_ids=inputs.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
                logits_to_keep=torch.tensor(positions, device=model.device),
            ).logits
            for row, (_, targets), span in zip(logits, batch, spans, strict=True):
                scores = row[[column[position] for position in span]]
                expected = torch.tensor(targets, device=model.device)
                total -= float(_log_likelihoods(scores, expected).double().sum())
                right += bool((scores.argmax(-1) == expected).all())
            done += len(batch)
            report(done, len(items))
    count = len(items)
    return LastWordResult(right / count, exponential(total / count), count, time.perf_counter() - start)


def _log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """`ln p(target)` in each row of `logits` (positions, vocabulary), in float32."""
    logits = logits.float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    # Without the warning about texts that are longer than the context.
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _longest(model: PreTrainedModel) -> int:
    return int(model.config.max_position_embeddings)


def checked_batch_size(model: PreTrainedModel, batch_size: int | None, positions: int) -> int:
    """The batch size, by default one that keeps the logits of so many positions a row under 256 MB, at most 32."""
    if batch_size is None:
        return max(1, min(32, _LOGITS_PER_BATCH // (positions * int(model.config.vocab_size))))
    return validate.integer("batch_size", batch_size, 1)


def _chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def _silent(done: int, total: int) -> None:
    """The callback without progress."""


def import_torch() -> ModuleType:
    """torch, or `MissingDependencyError` with what to install."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError('evaluating needs torch: pip install "tqcompressor[hf]"') from error
    return torch
