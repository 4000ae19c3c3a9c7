"""What makes a result again: the command, or the call in Python, with the arguments that are not the default."""

from __future__ import annotations

import inspect
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

from ..calibration.calibration import Calibration
from ..config.recipes import RECIPES
from ..data.text import TextOption

# What stands for a text or a calibration that is in no file.
_TEXT, _CALIBRATION, _CONFIG = "text.txt", "calibration.safetensors", "quantization_config.json"


def shell_command(source: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The command `tqcompressor compress` for a source of this name, with the arguments of `function`.

    Of paths, only the names are in it: a path would tell the readers of a published model of its maker's machine.
    """
    words = ["tqcompressor", "compress", source]
    for name, value in _given(function, arguments).items():
        if name == "config":
            recipe = value in RECIPES if isinstance(value, str) else False
            words += ["--recipe", value] if recipe else ["--config", _name(value, _CONFIG)]
            continue
        words.append(f"--{name.replace('_', '-')}")
        words += [str(word) for word in _words(name, value)]
    return shlex.join([*words, "--out", f"{os.path.basename(source)}-compressed"])


def python_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The call `tqcompressor.compress(model, …)` with the arguments of `function`."""
    written = []
    for name, value in _given(function, arguments).items():
        shown = repr(value)
        if name == "text":
            paths = [f"Path({word!r})" for word in _words(name, value)]
            shown = paths[0] if len(paths) == 1 else f"[{', '.join(paths)}]"
        elif name == "calibration":
            shown = repr(_name(value, _CALIBRATION))
        elif name == "config":
            shown = repr(value) if isinstance(value, str) and value in RECIPES else repr(_name(value, _CONFIG))
        elif name == "tokenizer" or (name == "refine" and value is not True):
            shown = name
        elif name == "budget":
            shown = repr(value) if isinstance(value, str) else str(value)
        written.append(f"{name}={shown}")
    return f"tqcompressor.compress(model, {', '.join(written)})"


def texts_read(text: TextOption, calibration: Calibration) -> TextOption:
    """The texts of a calibration under the names that it has for them, where it has as many."""
    entries = text if isinstance(text, list | tuple) else [text]
    files = all(isinstance(entry, PathLike) for entry in entries)
    return [Path(name) for name in calibration.texts] if files and len(entries) == len(calibration.texts) else text


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, numpy and these packages, where they are installed."""
    found = {"Python": platform.python_version()}
    for name in ("numpy", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _given(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not the default of the function, in its order."""
    parameters = inspect.signature(function).parameters
    return {
        name: arguments[name]
        for name, parameter in parameters.items()
        if name in arguments and not _same(arguments[name], parameter.default)
    }


def _same(value: Any, default: Any) -> bool:
    # An array or a data set is never a default.
    return value is default or (isinstance(value, bool | int | float | str) and value == default)


def _words(name: str, value: Any) -> Sequence[Any]:
    if name == "text":
        entries = value if isinstance(value, list | tuple) else [value]
        return [_name(entry, _TEXT) if isinstance(entry, PathLike) else _TEXT for entry in entries]
    if name == "calibration":
        return [_name(value, _CALIBRATION)]
    if name == "matrices":
        return [value] if isinstance(value, str) else list(value)
    return [value]


def _name(value: Any, otherwise: str) -> str:
    return os.path.basename(value) or otherwise if isinstance(value, str | PathLike) else otherwise
