"""The transformer blocks of a live model, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

    def of(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states behind a block that is called like this; tensors of floats have the dtype of `hidden`."""
        others, keywords = _in_dtype((self.others, self.keywords), hidden.dtype)
        return hidden_states(block(hidden, *others, **keywords))


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
        calls[-1][2].append(hidden_states(output))

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(end).remove)
        yield calls


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
