"""Measures second moments: a live model reads a text, and hooks record its layers' inputs and output gradients."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial as bound
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..config.choices import DEFAULT_SEED
from ..data.text import TextOption
from ..data.token_blocks import TokenBlocks
from ..errors import NonFiniteError, TextError
from ..models.matrices import require_transformers_model
from ..utils import validate
from ..utils.progress import ProgressOption, Report, reporter
from ..utils.torch_utils import evaluating, frozen
from .batches import Batch, batches_and_texts, mask_of
from .calibration import Calibration, merge_tied
from .hooks import ReadingPass, run
from .nonfinite import first_nonfinite, hint
from .partial import PartialSums, key_of
from .sharing import NotShared
from .units import units

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Moments = dict[str, NDArray[np.float32]]
# Gradients of single tokens underflow in float16: they are scaled by this.
_HALF_SCALE = 1024.0


def calibrate(
    model: PreTrainedModel,
    tokenizer_or_batches: PreTrainedTokenizerBase | TokenBlocks | Iterable[Any],
    text: TextOption | None = None,
    *,
    num_samples: int = 128,
    seq_len: int | None = None,
    sensitivity: bool = True,
    samples: int | None = None,
    seed: int = DEFAULT_SEED,
    max_memory: int = 2 << 30,
    partial: str | os.PathLike[str] | None = None,
    progress: ProgressOption = None,
) -> Calibration:
    """Measures the second moments of a model's activations and gradients on a text, for compressing in their norm.

    For every linear layer `y = x W + b` (`nn.Linear`, `Conv1D` and the compressed ones): `E[xᵀx]` over all tokens
    except padding, and with `sensitivity` also `E[gᵀg]`, where `g` is the gradient at `y` of

    - the summed cross-entropy of labels that are drawn from the model's own softmax, where it returns `.logits` (`g`
      then has the second moment of the Fisher information);
    - the product of a random normal vector with the normalised mean-pooled embedding, where it returns
      `.last_hidden_state` alone (Gauss–Newton for the distance between embeddings).

    For every embedding the input moment is each row's relative frequency. A head that is tied to the token embedding
    is part of it: with token frequencies `d₁` and gradient moment `C₁` of the embedding, mean squared gradients `d₂` of
    the logits and input moment `C₂` of the head, and `T = Σd₁·tr C₁ + Σd₂·tr C₂`, the input moment is the diagonal
    `(d₁·tr C₁ + d₂·tr C₂) / T` and the output moment `Σd₁·C₁ + Σd₂·C₂`; without `sensitivity`, `C₁` is the identity
    and `d₂` is 1. Layers of more than 8,192 outputs keep the diagonal of the output moment.

    Args:
        model: A model of transformers on any device, compressed or not. It is in evaluation mode during the call
            and restored afterwards, also after an error.
        tokenizer_or_batches: Its tokenizer; or `token_blocks`' blocks; or batches, each a tensor of token ids or a
            mapping with `input_ids` and other inputs of the model. `attention_mask` is 0 at padding. An
            encoder-decoder such as T5 takes `labels` or `decoder_input_ids`.
        text: With a tokenizer: a str is the text itself, a `pathlib.Path` is a file or a glob pattern, a list holds
            either, and a `datasets.Dataset` has a column `"text"`. Each path of a list, and its strings together, give
            as many sequences as any other, whatever their lengths, where they have so many; one that stands twice in
            the list gives twice as many. Texts too short for a sequence are joined.
        num_samples: How many sequences are drawn from a text; ignored with batches, all of which are read.
        seq_len: Tokens of a sequence, with the special tokens that the tokenizer adds. Default: 128, or the model's
            longest input if that is shorter.
        sensitivity: Whether gradients are measured, which more than doubles the time.
        samples: Random gradients for each text. Default: 1 for logits, 8 for embeddings. More samples cost a backward
            pass each and reduce the noise of `E[gᵀg]`.
        seed: The seed of the sequences that are drawn, and of labels and random vectors. Equal seeds give equal results
            on one machine.
        max_memory: Bytes that the sums may take, beside the model, its activations and the result. What exceeds it is
            kept in an unnamed file in the folder for temporary files, `$TMPDIR`, with the moments computed from it, and
            one moment at a time is in memory. The text is read once, and the result is the same.
        partial: A file for the sums so far. They are saved about once a minute; if the run is stopped, a call with
            equal arguments goes on with them, to the same result. The file is removed at the end.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)` in
            batches.

    Raises:
        TextError: The text has fewer sequences than asked for, or all tokens are padding.
        ConfigError: An argument is out of its range, the model knows fewer tokens than the text has, or returns neither
            `.logits` nor `.last_hidden_state`.
        CheckpointError: `partial` has the sums of another model or text, or of other options.
        DestinationError: `partial` is in no folder.
        StorageError: The temporary file or `partial` has no room.
        NonFiniteError: The model computes NaN or an infinity; the message names the first moment and the first layer
            that have it.

    Cost: a forward pass, with `sensitivity` a backward pass without the weights' gradients, and little more than `m²/2`
    and `n²/2` MACs a token and layer, where layers that read one tensor, such as query, key and value, count its `m²`
    once. The sums take somewhat more than `4·m²` and `4·n²` bytes, and the moments as much. The GPT-2 of `tests/data`
    takes 8 seconds of processor time for 128 sequences of 128 tokens, and 4 without gradients.

    Example:
        >>> from pathlib import Path
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> model = AutoModelForCausalLM.from_pretrained("tests/data/tiny-gpt2")
        >>> tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-gpt2")
        >>> text = Path("tests/data/tiny-gpt2/heldout.txt")
        >>> calibration = calibrate(model, tokenizer, text, num_samples=2, seq_len=64)
        >>> calibration
        Calibration(44 moments of inputs and output gradients of a gpt2, over 128 tokens)
        >>> calibration.save("calibration.safetensors")

    Source: second moments of inputs, Wang et al., *SVD-LLM*, arXiv 2403.07378; of both sides, Martens & Grosse,
    arXiv 1503.05671.
    """
    require_transformers_model(model)
    seed = validate.seed(seed)
    if samples is not None:
        samples = validate.integer("samples", samples, 1)
    batches, texts = batches_and_texts(
        model, tokenizer_or_batches, text, num_samples=num_samples, seq_len=seq_len, seed=seed
    )
    kept = None
    if partial is not None:
        key = key_of(model, batches, sensitivity=sensitivity, samples=samples, seed=seed)
        kept = PartialSums(Path(partial), key)
    with reporter(progress, "calibrate") as report:
        found = measure(
            model,
            batches,
            sensitivity=sensitivity,
            samples=samples,
            seed=seed,
            max_memory=max_memory,
            report=report,
            partial_sums=kept,
        )
    calibration = calibration_of(model, found, batches, sensitivity=sensitivity, seed=seed, texts=texts)
    if kept is not None:
        kept.remove()
    return calibration


def calibration_of(
    model: nn.Module,
    moments: Moments,
    batches: Sequence[Batch],
    *,
    sensitivity: bool,
    seed: int,
    texts: Mapping[str, int] | None = None,
) -> Calibration:
    """The `Calibration` of moments that `measure` found on `batches`."""
    config: Any = getattr(model, "config", None)
    tokens = sum(int(mask_of(batch).sum()) for batch in batches)
    return Calibration(moments, tokens, seed, sensitivity, getattr(config, "model_type", None), texts)


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    sensitivity: bool,
    seed: int,
    max_memory: int,
    samples: int | None = None,
    report: Report | None = None,
    partial_sums: PartialSums | None = None,
) -> Moments:
    """The moments of all units, by their names in a `Calibration`; a tied head's are in its embedding's.

    With `partial_sums`, the sums are saved now and then, and those of a run that was stopped are taken. Raises as
    `calibrate`.
    """
    wanted = units(model)
    tokens = sum(int(mask_of(batch).sum()) for batch in batches)
    if tokens == 0:
        raise TextError("all tokens are padding")
    max_memory = validate.integer("max_memory", max_memory, 0)
    scale = _HALF_SCALE if any(parameter.dtype == torch.float16 for parameter in model.parameters()) else 1.0
    apart = set() if partial_sums is None else partial_sums.apart()
    with evaluating(model), torch.inference_mode(False), torch.set_grad_enabled(sensitivity), frozen(model):
        while True:
            reading = ReadingPass(model, wanted, sensitivity, samples, max_memory, apart)
            generator = torch.Generator().manual_seed(seed)
            try:
                with reading:
                    begun = 0 if partial_sums is None else partial_sums.restore(reading, generator)
                    for done, batch in enumerate(batches[begun:], begun + 1):
                        reading.read(batch, generator, scale)
                        if partial_sums is not None:
                            partial_sums.keep(reading, generator, done, apart)
                        if report is not None:
                            report(done, len(batches))
                moments = dict(reading.moments(tokens, scale))
                break
            except NotShared as different:
                # Rare, and mostly found in the first batch: the text is read again.
                apart |= different.units
                if partial_sums is not None:
                    partial_sums.remove()
            except NonFiniteError as error:
                first = first_nonfinite(model, batches, bound(run, model))
                place = "" if first is None else f"; {first} is the first to have it"
                raise NonFiniteError(f"{error}{place} ({hint(model)})") from None
    for unit in wanted:
        if unit.tied_to is not None:
            merge_tied(moments, unit.tied_to, unit.name)
    return moments
