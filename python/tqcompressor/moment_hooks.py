"""Measuring second moments: a live model reads text, and hooks see what goes into its layers and what comes back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from .calibration import Calibration
from .corpus import StrPath, TokenBlocks
from .errors import ConfigError, NonFiniteError, TextError
from .moment_batches import Batch, batches_of, mask_of
from .moment_sums import Sums, Unit, outer_products, token_counts, units
from .progress import ProgressOption, Report, reporter
from .scoring import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["calibrate"]

Moments = dict[str, NDArray[np.float32]]

# float16 gradients of single tokens would vanish: they are computed this many times larger.
_HALF_SCALE = 1024.0
# Random vectors for each text whose embedding is the output.
_EMBEDDING_SAMPLES = 8


def calibrate(
    model: PreTrainedModel,
    tokenizer_or_batches: PreTrainedTokenizerBase | TokenBlocks | Iterable[Any],
    text: str | Sequence[str] | StrPath | Sequence[StrPath] | Any | None = None,
    *,
    blocks: int = 128,
    block_length: int | None = None,
    sensitivity: bool = True,
    samples: int | None = None,
    seed: int = 0,
    max_memory: int = 2 << 30,
    progress: ProgressOption = None,
) -> Calibration:
    """Measures the second moments of a model's activations, and of its gradients, on a text: what compressing needs.

    For every linear layer `y = x W + b` (`nn.Linear`, `Conv1D` and the compressed ones): `E[xᵀx]` over all tokens but
    padding, and with `sensitivity` also `E[gᵀg]`, where `g` is the gradient at `y` of

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
        model: A model of transformers on any device, compressed or not. It is in evaluation mode for the duration of
            the call, and comes back as it was, whatever is raised.
        tokenizer_or_batches: Its tokenizer; or `token_blocks`' blocks; or batches, each a tensor of token ids or a
            mapping with `input_ids` and what else the model takes. `attention_mask` says what is padding.
        text: With a tokenizer: a string is the text itself, a list of strings are documents, and everything else is
            read as `token_blocks` does: a `pathlib.Path`, a list of them, or a dataset.
        blocks: How many blocks are drawn from a text; ignored with batches, which are read all.
        block_length: Tokens of a block, with the special tokens that the tokenizer adds. Default: 128, or the model's
            longest input if that is shorter.
        sensitivity: Whether gradients are measured, which more than doubles the time.
        seed: Of the blocks that are drawn, and of labels and random vectors. Equal seeds give equal results on one
            machine.
        max_memory: Bytes that the sums may take, beside the model and the result. What needs more is measured in
            several passes over the text, with the same result.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)` in
            batches.

    Raises:
        TextError: The text has fewer blocks than asked for, or there is no token that is not padding.
        ConfigError: An argument is out of its range, the model knows fewer tokens than the text has, returns neither
            `.logits` nor `.last_hidden_state`, or one layer alone needs more than `max_memory`.
        NonFiniteError: The model computes NaN or an infinity; the message names the first moment that has it.

    Cost: a forward pass, with `sensitivity` a backward pass without the weights' gradients, and `m²` and `n²`
    multiplications a token and layer. The GPT-2 of `tests/data` takes 8 seconds of processor time for 128 blocks of 128
    tokens, and 4 without gradients.

    Example:
        >>> calibration = calibrate(model, tokenizer, pathlib.Path("books/train.txt"))  # doctest: +SKIP
        >>> calibration.save("calibration.safetensors")  # doctest: +SKIP

    Source: second moments of inputs, Wang et al., *SVD-LLM*, arXiv 2403.07378; of both sides, Martens & Grosse,
    arXiv 1503.05671.
    """
    if samples is not None and samples < 1:
        raise ConfigError(f"samples: expected at least 1, got {samples}")
    batches = batches_of(model, tokenizer_or_batches, text, blocks=blocks, block_length=block_length, seed=seed)
    with reporter(progress, "calibrate") as report:
        found = measure(
            model,
            batches,
            units(model),
            sensitivity=sensitivity,
            samples=samples,
            seed=seed,
            max_memory=max_memory,
            report=report,
        )
    return calibration_of(model, found, batches, sensitivity=sensitivity, seed=seed)


def calibration_of(
    model: nn.Module, moments: Moments, batches: Sequence[Batch], *, sensitivity: bool, seed: int
) -> Calibration:
    """The `Calibration` of moments that `measure` found on `batches`."""
    config: Any = getattr(model, "config", None)
    tokens = sum(int(mask_of(batch).sum()) for batch in batches)
    return Calibration(moments, tokens, seed, sensitivity, getattr(config, "model_type", None))


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    wanted: Sequence[Unit],
    *,
    sensitivity: bool,
    seed: int,
    max_memory: int,
    samples: int | None = None,
    report: Report | None = None,
    stop_behind: nn.Module | None = None,
) -> Moments:
    """The moments of the units `wanted`, by their names in a `Calibration`; a tied head's are in its embedding's.

    `stop_behind` is the module whose end ends a forward pass, where no gradients are asked for. Raises as `calibrate`.
    """
    tokens = sum(int(mask_of(batch).sum()) for batch in batches)
    if tokens == 0:
        raise TextError("there is no token that is not padding")
    groups = list(_groups(wanted, sensitivity, max_memory))
    scale = _HALF_SCALE if any(parameter.dtype == torch.float16 for parameter in model.parameters()) else 1.0
    moments: Moments = {}
    done, total = 0, len(groups) * len(batches)
    with _frozen(model, sensitivity):
        for group in groups:
            # Anew for every group, so that the number of passes makes no difference.
            generator = torch.Generator().manual_seed(seed)
            with _Pass(model, group, sensitivity, samples, stop_behind) as reading:
                for batch in batches:
                    reading.read(batch, generator, scale)
                    done += 1
                    if report is not None:
                        report(done, total)
                for sums in reading.sums.values():
                    moments.update(sums.moments(tokens, scale))
    for unit in wanted:
        if unit.tied_to is not None:
            _merge_tied(moments, unit.tied_to, unit.name)
    return moments


def _groups(wanted: Sequence[Unit], sensitivity: bool, max_memory: int) -> Iterator[list[Unit]]:
    """Units that are measured in one pass, in order."""
    group: list[Unit] = []
    room = max_memory
    for unit in wanted:
        needed = unit.bytes(sensitivity)
        if needed > max_memory:
            raise ConfigError(f"max_memory: expected at least {needed:,} bytes, for {unit.name}, got {max_memory:,}")
        if needed > room:
            yield group
            group, room = [], max_memory
        group.append(unit)
        room -= needed
    if group:
        yield group


@contextmanager
def _frozen(model: nn.Module, sensitivity: bool) -> Iterator[None]:
    """Evaluation mode without gradients of parameters; then everything as it was."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model), torch.inference_mode(False), torch.set_grad_enabled(sensitivity):
        try:
            for parameter, _ in required:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, before in required:
                parameter.requires_grad_(before)


class _Stop(Exception):
    """Ends a forward pass whose rest is of no interest."""


class _Pass:
    """Hooks on some units of a model, and what they have seen."""

    def __init__(
        self,
        model: nn.Module,
        group: Sequence[Unit],
        sensitivity: bool,
        samples: int | None,
        stop_behind: nn.Module | None,
    ) -> None:
        self._model, self._group, self._sensitivity, self._stop = model, group, sensitivity, stop_behind
        self._samples = samples
        self._device = next(model.parameters()).device
        self._takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self.sums: dict[str, Sums] = {}
        # Layers that share an input are called one after the other: it is multiplied once.
        self._last: tuple[torch.Tensor, int, list[tuple[torch.Tensor, int]]] | None = None
        self._mask = torch.empty(0)

    def __enter__(self) -> _Pass:
        self._stack = ExitStack()
        lookups: dict[int, Unit] = {}
        try:
            for unit in self._group:
                weight = getattr(unit.module, "weight", None)
                if unit.embedding and isinstance(unit.module, nn.Embedding) and weight is not None:
                    # Its ids may be computed within its subclass, as OPT's positions are.
                    lookups.setdefault(id(weight), unit)
                    continue
                handle = unit.module.register_forward_hook(self._hook(unit), with_kwargs=True)
                self._stack.callback(handle.remove)
            if self._stop is not None and not self._sensitivity:
                self._stack.callback(self._stop.register_forward_hook(self._end).remove)
        except BaseException:
            self._stack.close()
            raise
        self._lookups = _Lookups(lookups, self._looked_up)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._last = None

    def read(self, batch: Batch, generator: torch.Generator, scale: float) -> None:
        """Runs the model on a batch, forward and, where gradients are measured, backward."""
        self._mask = mask_of(batch).to(self._device)
        inputs: dict[str, Any] = {name: value.to(self._device) for name, value in batch.items()}
        if self._takes_cache:
            inputs["use_cache"] = False
        try:
            with self._lookups:
                outputs = self._model(**inputs)
        except _Stop:
            return
        finally:
            self._last = None
        if self._sensitivity:
            self._backward(outputs, generator, scale)

    def _backward(self, outputs: Any, generator: torch.Generator, scale: float) -> None:
        logits = getattr(outputs, "logits", None)
        hidden = getattr(outputs, "last_hidden_state", None)
        if isinstance(logits, torch.Tensor):
            target, samples = logits, self._samples or 1
            # A softmax spreads what is not finite over its row; a logit itself may be minus infinity.
            checked = logits.detach().float().softmax(-1)[..., 0]
            checked = checked + (logits.detach()[..., 0] if logits.shape[-1] == 1 else 0)
        elif isinstance(hidden, torch.Tensor):
            mask = self._mask.unsqueeze(-1).float()
            pooled = (hidden.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
            target = checked = nn.functional.normalize(pooled, dim=-1)
            samples = self._samples or _EMBEDDING_SAMPLES
        else:
            raise ConfigError(
                f"{type(self._model).__name__} returns neither .logits nor .last_hidden_state: calibrate it with "
                "sensitivity=False"
            )
        if not bool(checked.isfinite().all()):
            raise NonFiniteError(f"{type(self._model).__name__} returns NaN or an infinity")
        if not target.requires_grad:
            return
        for sample in range(samples):
            gradient = self._gradient(target, target is logits, generator)
            gradient = gradient if scale == 1 else gradient * scale
            more = sample < samples - 1
            target.backward(gradient.to(target.dtype), retain_graph=more)  # type: ignore[no-untyped-call]

    def _gradient(self, target: torch.Tensor, logits: bool, generator: torch.Generator) -> torch.Tensor:
        """A random gradient of what the model says."""
        if not logits:
            return torch.randn(target.shape, generator=generator).to(target.device)
        gradient = _sampled_gradient(target.detach(), generator)
        if tuple(target.shape[:2]) == tuple(self._mask.shape) and not bool(self._mask.all()):
            gradient *= self._mask.unsqueeze(-1)
        return gradient

    def _hook(self, unit: Unit) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            if unit.embedding:
                return self._looked_up(unit, x, output)
            weights = self._weights(tuple(x.shape[:-1]))
            if self._last is None or self._last[0] is not x or self._last[1] != x._version:
                with torch.no_grad():
                    self._last = x, x._version, outer_products(x, weights)
            self._sums_of(unit).add_inputs(self._last[2])
            return self._watched(unit, output)

        return hook

    def _looked_up(self, unit: Unit, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        weights = self._weights(tuple(ids.shape))
        self._sums_of(unit).add_inputs(token_counts(ids, weights, unit.inputs))
        return self._watched(unit, rows)

    def _sums_of(self, unit: Unit) -> Sums:
        if unit.name not in self.sums:
            self.sums[unit.name] = Sums(unit, self._device, self._sensitivity)
        return self.sums[unit.name]

    def _watched(self, unit: Unit, output: torch.Tensor) -> torch.Tensor:
        """The output of a unit, whose gradient will be seen."""
        if not self._sensitivity:
            return output
        if not output.requires_grad:
            # The graph begins here; not with the leaf itself, which the model must not change in place.
            output = output.requires_grad_().clone()
        weights = self._weights(tuple(output.shape[:-1]))

        def seen(gradient: torch.Tensor) -> None:
            with torch.no_grad():
                self._sums_of(unit).add_gradient(gradient, weights)

        output.register_hook(seen)  # type: ignore[no-untyped-call]
        return output

    def _weights(self, shape: tuple[int, ...]) -> torch.Tensor:
        """For how many tokens each row of an array `(*shape, features)` stands, as one dimension."""
        rows, positions = self._mask.shape
        if shape in ((rows, positions), (rows * positions,)):
            return self._mask.reshape(-1)
        if shape == (1, positions):
            # Positions, which all rows of the batch share.
            return self._mask.sum(0)
        return self._mask.new_ones(int(np.prod(shape)))

    def _end(self, *_: object) -> None:
        raise _Stop


class _Lookups(TorchFunctionMode):
    """Sees every lookup in the weights it is given, by whatever code it is made."""

    def __init__(
        self, watched: dict[int, Unit], looked_up: Callable[[Unit, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self._watched, self._looked_up = watched, looked_up

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is nn.functional.embedding and len(args) > 1 and (unit := self._watched.get(id(args[1]))):
            return self._looked_up(unit, args[0], found)
        return found


def _sampled_gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of the summed cross-entropy with labels drawn from the softmax: `softmax(logits) − one-hot(label)`, float32.

    A single logit is taken for a regression of unit variance, whose gradient is normal.
    """
    classes = logits.shape[-1]
    if classes == 1:
        return torch.randn(logits.shape, generator=generator).to(logits.device)
    probabilities = logits.float().softmax(-1).reshape(-1, classes)
    # By the inverse of the distribution function: one random number a token, the same on every device.
    cumulative = probabilities.cumsum(-1)
    levels = torch.rand((len(probabilities), 1), generator=generator).to(logits.device) * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, levels, right=True).clamp_(max=classes - 1)
    probabilities.scatter_add_(1, labels, torch.full_like(levels, -1.0))
    return probabilities.view(logits.shape)


def _merge_tied(moments: Moments, embedding: str, head: str) -> None:
    """Replaces the moments of an embedding and its tied head by those of the matrix that both are."""
    rows, columns = moments.get(f"input.{embedding}"), moments.pop(f"input.{head}", None)
    gradients, logits = moments.get(f"output.{embedding}"), moments.pop(f"output.{head}", None)
    if rows is None or columns is None:
        return
    d1, c2 = rows.astype(np.float64), columns.astype(np.float64)
    c1 = np.eye(len(c2)) if gradients is None else gradients.astype(np.float64)
    d2 = np.ones(len(d1)) if logits is None else logits.astype(np.float64)
    trace1, trace2 = np.trace(c1), np.trace(c2)
    total = d1.sum() * trace1 + d2.sum() * trace2
    if total > 0:
        moments[f"input.{embedding}"] = ((d1 * trace1 + d2 * trace2) / total).astype(np.float32)
        moments[f"output.{embedding}"] = (d1.sum() * c1 + d2.sum() * c2).astype(np.float32)
