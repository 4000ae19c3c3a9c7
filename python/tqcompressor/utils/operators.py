"""Operators of torch with kernels of this package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

_NAMESPACE = "tqcompressor"


@cache
def _library() -> Any:
    import torch

    return torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def operator(
    schema: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    keep: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Makes the decorated function an operator of torch, for any device and for `torch.compile`, and returns it.

    `torch.library.custom_op` does the same. Its operators import torch's compiler, and with it sympy, when they are
    first called: 3 to 5 seconds.

    Args:
        schema: "name(arguments) -> results", as for `torch.library.define`. No argument is written to.
        fake: As for `torch.library.register_fake`.
        backward: As for `torch.library.register_autograd`.
        keep: Its `setup_context`.
    """
    import torch

    def register(kernel: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        operators = getattr(torch.ops, _NAMESPACE)
        # A second import of this package in one process uses the operators of the first.
        if not hasattr(operators, name):
            library, qualified = _library(), f"{_NAMESPACE}::{name}"
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            library.impl(name, _untraced(kernel), "CompositeExplicitAutograd")
            torch.library.register_fake(qualified, fake, lib=library)
            if backward is not None:
                torch.library.register_autograd(qualified, backward, setup_context=keep, lib=library)
        return getattr(operators, name).default

    return register


def _untraced(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the compiler out of a kernel. A process that has not imported the compiler has nothing to keep out."""
    disabled: list[Callable[..., Any]] = []

    @wraps(kernel)
    def run(*arguments: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return kernel(*arguments)
        if not disabled:
            import torch

            disabled.append(torch.compiler.disable(kernel))  # type: ignore[no-untyped-call]
        return disabled[0](*arguments)

    return run
