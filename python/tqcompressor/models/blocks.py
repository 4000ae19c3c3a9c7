"""The transformer blocks of a live model, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks by their full names: the entries of the longest `nn.ModuleList` not inside another."""
    best: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside.update(module.modules())
            if len(module) > len(best):
                best = {f"{name}.{index}": block for index, block in enumerate(module)}
    return best


@dataclass(frozen=True)
class Call:
    """A call of a block, without the hidden states that come from the block before it."""

    others: tuple[Any, ...]
    keywords: dict[str, Any]
    behind: tuple[Any, ...] | None = None
    """What the block returned behind the hidden states; None if these were all, and not in a tuple."""

    def of(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states behind a block that is called like this; tensors of floats have the dtype of `hidden`."""
        others, keywords = _in_dtype((self.others, self.keywords), hidden.dtype)
        return hidden_states(block(hidden, *others, **keywords))

    def returned(self, hidden: torch.Tensor) -> Any:
        """The output of the block if its hidden states were these."""
        return hidden if self.behind is None else (hidden, *self.behind)


def hidden_states(output: Any) -> torch.Tensor:
    """The hidden states in the output of a block, which may be a tuple."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def recorded_calls(blocks: list[nn.Module]) -> Iterator[list[tuple[torch.Tensor, Call, list[torch.Tensor]]]]:
    """Within the block, the calls of `blocks` in order: hidden states before, how it was called, and those behind."""
    calls: list[tuple[torch.Tensor, Call, list[torch.Tensor]]] = []

    def begin(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        hidden = arguments[0] if arguments else keywords.pop("hidden_states", torch.empty(0))
        calls.append((hidden, Call(arguments[1:], keywords), []))

    def end(_module: nn.Module, _arguments: Any, output: Any) -> None:
        hidden, call, after = calls[-1]
        after.append(hidden_states(output))
        calls[-1] = (hidden, replace(call, behind=output[1:] if isinstance(output, tuple) else None), after)

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(end).remove)
        yield calls


@contextmanager
def passing(blocks: Iterable[nn.Module], calls: Iterable[Call], hidden: torch.Tensor | None = None) -> Iterator[None]:
    """Within the block, `blocks` compute nothing: each returns `hidden`, or what it gets, in the form of its call.

    A model that runs then computes what it makes of these hidden states behind its last block.
    """

    def instead(call: Call, *arguments: Any, **keywords: Any) -> Any:
        got = arguments[0] if arguments else keywords["hidden_states"]
        return call.returned(got if hidden is None else hidden)

    with ExitStack() as stack:
        for block, call in zip(blocks, calls, strict=True):
            stack.callback(_set_forward, block, vars(block).get("forward"))
            _set_forward(block, partial(instead, call))
        yield


def _set_forward(block: nn.Module, forward: Any) -> None:
    """The instance's own `forward`, before that of its class; None takes it away."""
    if forward is None:
        vars(block).pop("forward", None)
    else:
        vars(block)["forward"] = forward


class FirstBlock(Exception):
    """Ends a forward pass before the first block, with its input."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def input_of(block: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """The hidden states that reach a block when the model runs, which ends there."""

    def stop(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        raise FirstBlock(arguments[0] if arguments else keywords["hidden_states"])

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except FirstBlock as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise AssertionError("the model did not call its first block")


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Tensors of floats, also within tuples, lists and dicts, in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_in_dtype(each, dtype) for each in value)
    if type(value) is dict:
        return {name: _in_dtype(each, dtype) for name, each in value.items()}
    return value
