"""Register the quantizer when transformers' registry of quantizers is imported, and not before.

`import tqcompressor` needs neither torch nor transformers, and loading a compressed checkpoint works whichever of the
two packages is imported first. Registration happens at once if the registry is loaded already; otherwise an import hook
registers when it is (by `from_pretrained`, for example).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Registers now, or when transformers is imported. Calling it again does nothing."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


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


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds the registry as the other finders would, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


class _RegisteringLoader(importlib.abc.Loader):
    """Loads a module as the wrapped loader does, then registers."""

    def __init__(self, wrapped: importlib.abc.Loader, finder: _RegistryFinder) -> None:
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
        _register()
