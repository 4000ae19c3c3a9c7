"""Registers the transformers integration as soon as transformers' quantizers are there, and not before.

`import tqcompressor` must cost nothing and need neither torch nor transformers, yet loading a compressed checkpoint
must work whichever of the two packages is imported first. So the module that holds transformers' registry is watched:
if it is loaded already, registration happens at once, else when somebody imports it (`from_pretrained` does).
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
        # Importing it registers. It may itself be what is importing transformers: then it does so when it is done.
        from . import quantizer  # noqa: F401
    except (ImportError, AttributeError) as error:
        # Never break somebody's import of transformers, which may have nothing to do with this package.
        warnings.warn(
            f"tqcompressor cannot register with this version of transformers, so that loading compressed checkpoints "
            f"will fail; it needs transformers 5.20 or newer, below 6 ({error})",
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
        # What the module's spec and `__loader__` say must be the truth again before its code runs.
        if module.__spec__ is not None:
            module.__spec__.loader = self._wrapped
        module.__loader__ = self._wrapped
        self._wrapped.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register()
