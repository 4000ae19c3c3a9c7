"""Register with transformers and peft when the modules that need it are imported, and not before.

`import tqcompressor` needs neither torch nor transformers, and loading a compressed checkpoint works whichever of the
two packages is imported first. Registration happens at once if the module is loaded already; otherwise an import hook
registers when it is (by `from_pretrained`, for example). The same holds for peft and adapters on compressed models.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def install() -> None:
    """Registers now, or when transformers and peft are imported. Calling it again does nothing."""
    waiting = {finder.name for finder in sys.meta_path if isinstance(finder, _Finder)}
    for name, register in (("transformers.quantizers.auto", _register), ("peft.tuners.tuners_utils", _register_lora)):
        if name in sys.modules:
            register()
        elif name not in waiting:
            sys.meta_path.insert(0, _Finder(name, register))


def _register() -> None:
    try:
        # The import registers. If the quantizer's module is itself importing transformers, it registers at its end.
        from . import quantizer  # noqa: F401
    except (ImportError, AttributeError) as error:
        # Do not break an import of transformers, which may be unrelated to this package.
        warnings.warn(
            f"tqcompressor cannot register with this version of transformers, and cannot load compressed checkpoints: "
            f"expected transformers 5.20 or newer, below 6 ({error})",
            stacklevel=2,
        )


def _register_lora() -> None:
    """Lets peft's tuners prepare their configs for compressed models, before they change a model."""
    try:
        from peft.tuners.tuners_utils import BaseTuner

        inject = BaseTuner.inject_adapter
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"tqcompressor cannot register with this version of peft, and compressed models take no adapters: "
            f"tested with peft 0.21 ({error})",
            stacklevel=2,
        )
        return
    if hasattr(inject, "_without_tqcompressor"):
        return

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # No model is compressed before these modules are imported.
        if f"{__package__.partition('.')[0]}.modules" in sys.modules:
            from .peft import prepare_adapter

            prepare_adapter(self, model, adapter_name)
        inject(self, model, adapter_name, *args, **kwargs)

    inject_adapter._without_tqcompressor = inject  # type: ignore[attr-defined]
    setattr(BaseTuner, "inject_adapter", inject_adapter)  # noqa: B010 (a method, to mypy)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders would, and wraps its loader."""

    def __init__(self, name: str, register: Callable[[], None]) -> None:
        self.name, self.register = name, register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in list(sys.meta_path):
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


class _RegisteringLoader(importlib.abc.Loader):
    """Loads a module as the wrapped loader does, then registers."""

    def __init__(self, wrapped: importlib.abc.Loader, finder: _Finder) -> None:
        self._wrapped = wrapped
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Restore the module's own loader before its code runs.
        if module.__spec__ is not None:
            module.__spec__.loader = self._wrapped
        module.__loader__ = self._wrapped
        self._wrapped.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._finder.register()
