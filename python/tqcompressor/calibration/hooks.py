"""One pass of a live model over a text, with hooks that sum the layers' inputs and output gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError, NonFiniteError
from ..utils.torch_utils import mean_embedding
from .batches import Batch, is_encoder_decoder, mask_of
from .sharing import SharedSums
from .sums import Diagonal, SumStore, checked_mean
from .units import Unit

# Random vectors for each text of a model that returns embeddings.
_EMBEDDING_SAMPLES = 8
# Rows of a softmax that labels are drawn from at a time.
_ROWS_DRAWN = 64


def run(model: nn.Module, batch: Batch) -> Any:
    """A forward pass on the model's device, without a cache of keys and values.

    Raises `ConfigError` where an encoder-decoder gets nothing to decode.
    """
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    try:
        return model(**inputs)
    except ValueError as error:
        if is_encoder_decoder(model) and not {"labels", "decoder_input_ids"} & batch.keys():
            raise ConfigError(
                f'{type(model).__name__} is an encoder-decoder: expected batches with "labels" or "decoder_input_ids", '
                f"got {', '.join(batch)}"
            ) from error
        raise


class ReadingPass:
    """Hooks on some units of a model, and the sums that they collect.

    `samples` random gradients are drawn for each text; None stands for 1 for logits and 8 for embeddings. The sums take
    `max_memory` bytes and, beyond that, a temporary file. The units `apart` share no sums with others.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Sequence[Unit],
        sensitivity: bool,
        samples: int | None,
        max_memory: int,
        apart: Collection[str] = (),
    ) -> None:
        self._model, self._group, self._sensitivity = model, group, sensitivity
        self._samples = samples
        self._device = next(model.parameters()).device
        self._store = SumStore(self._device, max_memory)
        self.inputs, self.gradients = SharedSums(self._store, apart), SharedSums(self._store, apart)
        self.counts: dict[str, Diagonal] = {}
        """How often each row of an embedding was looked up."""
        self._mask = torch.empty(0)

    def __enter__(self) -> ReadingPass:
        self._stack = ExitStack()
        lookups: dict[int, Unit] = {}
        try:
            for unit in self._group:
                weight = getattr(unit.module, "weight", None)
                if unit.embedding and isinstance(unit.module, nn.Embedding) and weight is not None:
                    # A subclass may compute the ids itself, as OPT's positions do.
                    lookups.setdefault(id(weight), unit)
                    continue
                for module in (unit.module, *unit.twins):
                    handle = module.register_forward_hook(self._hook(unit), with_kwargs=True)
                    self._stack.callback(handle.remove)
        except BaseException:
            self._stack.close()
            raise
        self._lookups = _Lookups(lookups, self._looked_up)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, batch: Batch, generator: torch.Generator, scale: float) -> None:
        """Runs the model on a batch, forward and, where gradients are measured, backward.

        Raises `NotShared` where units must be kept apart.
        """
        self._mask = mask_of(batch).to(self._device)
        with self._lookups:
            outputs = run(self._model, batch)
        self.inputs.end_pass()
        if self._sensitivity:
            self._backward(outputs, generator, scale)

    def _backward(self, outputs: Any, generator: torch.Generator, scale: float) -> None:
        logits = getattr(outputs, "logits", None)
        hidden = getattr(outputs, "last_hidden_state", None)
        if isinstance(logits, torch.Tensor):
            target, samples = logits, self._samples or 1
        elif isinstance(hidden, torch.Tensor):
            pooled = mean_embedding(hidden, self._mask)
            target, samples = nn.functional.normalize(pooled, dim=-1), self._samples or _EMBEDDING_SAMPLES
        else:
            raise ConfigError(
                f"{type(self._model).__name__} returns neither .logits nor .last_hidden_state: calibrate it with "
                "sensitivity=False"
            )
        for sample in range(samples):
            gradient = self._gradient(target, target is logits, generator)
            if not target.requires_grad:
                return
            gradient = gradient if scale == 1 else gradient * scale
            more = sample < samples - 1
            target.backward(gradient.to(target.dtype), retain_graph=more)  # type: ignore[no-untyped-call]
            self.gradients.end_pass()

    def _gradient(self, target: torch.Tensor, logits: bool, generator: torch.Generator) -> torch.Tensor:
        """A random gradient of the model's output, which must be finite; a single logit is a regression output."""
        if logits and target.shape[-1] > 1:
            gradient = _sampled_gradient(target.detach(), generator)
            # NaN spreads over a row of the softmax; a logit itself may be minus infinity.
            checked = gradient[..., 0]
        else:
            # Of unit variance.
            gradient = torch.randn(target.shape, generator=generator).to(target.device)
            checked = target.detach()
        if not bool(checked.isfinite().all()):
            raise NonFiniteError(f"{type(self._model).__name__} returns NaN or an infinity")
        if logits and tuple(target.shape[:2]) == tuple(self._mask.shape) and not bool(self._mask.all()):
            gradient *= self._mask.unsqueeze(-1)
        return gradient

    def _hook(self, unit: Unit) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            if unit.embedding:
                return self._looked_up(unit, x, output)
            with torch.no_grad():
                self.inputs.add(unit.name, ((unit.inputs, False),), x, self._weights(tuple(x.shape[:-1])))
            return self._watched(unit, output)

        return hook

    def _looked_up(self, unit: Unit, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        weights = self._weights(tuple(ids.shape))
        if unit.name not in self.counts:
            self.counts[unit.name] = self.new_counts(unit.inputs)
        # Counts are integers, hence exact.
        self.counts[unit.name].add_sums(torch.bincount(ids.reshape(-1), weights.double(), minlength=unit.inputs))
        return self._watched(unit, rows)

    def new_counts(self, rows: int) -> Diagonal:
        """The counts of an embedding of so many rows, all 0."""
        return Diagonal(rows, self._store)

    def moments(self, tokens: int, scale: float) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The means as float32: of inputs over all `tokens` of the text, of gradients over the rows with one.

        With these denominators the product of both is right for a layer that sees only some tokens, such as a pooler.
        The gradients were computed `scale` times larger. A unit that was never called has no moments. Units that share
        a sum share an array. A sum is gone when its mean is there.

        Raises `NonFiniteError`, which names the moment.
        """
        while self.counts:
            name, counts = self.counts.popitem()
            yield f"input.{name}", checked_mean(f"input.{name}", counts, tokens)
        for units, sums in self.inputs.taken():
            for _, mean in sums.means([f"input.{units[0]}"], tokens):
                yield from ((f"input.{unit}", mean) for unit in units)
        outputs = {unit.name: [f"output.{name}" for name, _ in unit.outputs] for unit in self._group}
        for units, sums in self.gradients.taken():
            for part, (_, mean) in enumerate(sums.means(outputs[units[0]], sums.tokens * scale**2)):
                yield from ((outputs[unit][part], mean) for unit in units)

    def _watched(self, unit: Unit, output: torch.Tensor) -> torch.Tensor:
        """The output of a unit, with a hook on its gradient."""
        # A module may run without gradients, as sinusoidal positions do.
        if not self._sensitivity or not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            # The graph begins here. A clone, because the model may change it in place, which a leaf does not allow.
            output = output.requires_grad_().clone()
        weights = self._weights(tuple(output.shape[:-1]))
        parts = tuple((count, unit.is_diagonal(count)) for _, count in unit.outputs)

        def seen(gradient: torch.Tensor) -> None:
            with torch.no_grad():
                self.gradients.add(unit.name, parts, gradient, weights)

        output.register_hook(seen)  # type: ignore[no-untyped-call]
        return output

    def _weights(self, shape: tuple[int, ...]) -> torch.Tensor:
        """How many tokens each row of an array `(*shape, features)` represents, flattened."""
        rows, positions = self._mask.shape
        if shape in ((rows, positions), (rows * positions,)):
            return self._mask.reshape(-1)
        if shape == (1, positions):
            # Positions, shared by all rows of the batch.
            return self._mask.sum(0)
        return self._mask.new_ones(int(np.prod(shape)))


class _Lookups(TorchFunctionMode):
    """Intercepts every lookup in the watched weights, whichever module makes it."""

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
    """The gradient of the cross-entropy of labels drawn from the softmax: `softmax(logits) − one-hot(label)`."""
    classes = logits.shape[-1]
    probabilities = logits.float().softmax(-1).reshape(-1, classes)
    # By the inverse of the distribution function: one random number a token, the same on every device.
    levels = torch.rand((len(probabilities), 1), generator=generator).to(logits.device)
    # Few rows at a time, because each takes a copy of its probabilities.
    parts = zip(torch.split(probabilities, _ROWS_DRAWN), torch.split(levels, _ROWS_DRAWN), strict=True)
    labels = torch.cat([_drawn(rows, level) for rows, level in parts])
    probabilities.scatter_add_(1, labels, torch.full_like(levels, -1.0))
    return probabilities.view(logits.shape)


def _drawn(probabilities: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The class `(rows, 1)` of each row at which the sum of its probabilities passes its level."""
    cumulative = probabilities.cumsum(-1)
    found = torch.searchsorted(cumulative, levels * cumulative[:, -1:], right=True)
    return found.clamp_(max=probabilities.shape[-1] - 1)
