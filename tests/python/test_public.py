"""The public names and their signatures, so that a change of either is seen; and what they need.

`python tests/python/test_public.py` writes `public.txt` anew.
"""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin

import pytest
import tqcompressor

SNAPSHOT = Path(__file__).with_name("public.txt")
# Further modules with public names.
MODULES = ("config", "errors", "evaluate", "losses", "modules", "plots", "verify")


def signature(value):
    try:
        found = str(inspect.signature(value))
    except ValueError:
        return ""
    # Remove memory addresses from defaults: they differ from run to run.
    return re.sub(r" at 0x[0-9a-f]+", "", found)


def lines_of(name, value):
    """A public name as lines: a function with its signature, a class with those of its public methods."""
    if isinstance(value, ModuleType):
        return [f"{name}: module"]
    if get_origin(value) is Literal:
        return [f"{name}: Literal{list(get_args(value))}"]
    if not callable(value):
        return [f"{name}: {type(value).__name__}"]
    lines = [f"{name}{signature(value)}"]
    if inspect.isclass(value) and not issubclass(value, Exception):
        # Members of bases in other packages are not ours.
        own = [base for base in value.__mro__ if base.__module__.startswith("tqcompressor")]
        members = {name: found for base in reversed(own) for name, found in vars(base).items()}
        for member, found in sorted(members.items()):
            if not member.startswith("_"):
                function = getattr(found, "__func__", found)
                lines.append(f"{name}.{member}{signature(function) if callable(function) else ''}")
    return lines


def public():
    lines = [line for name in sorted(tqcompressor.__all__) for line in lines_of(name, getattr(tqcompressor, name))]
    for module in MODULES:
        found = __import__(f"tqcompressor.{module}", fromlist=["*"])
        names = getattr(found, "__all__", None) or [
            name for name, value in vars(found).items() if inspect.isclass(value)
        ]
        for name in sorted(names):
            if not hasattr(tqcompressor, name):
                lines += lines_of(f"{module}.{name}", getattr(found, name))
    return lines


def test_the_public_names_and_signatures():
    assert public() == SNAPSHOT.read_text(encoding="utf-8").splitlines()


def test_every_public_name_is_listed_and_there():
    assert set(tqcompressor.__all__) <= set(dir(tqcompressor))
    with pytest.raises(AttributeError, match="no attribute 'decomposer'"):
        _ = tqcompressor.decomposer


@pytest.mark.parametrize(
    ("missing", "names"),
    [
        ("torch", ["CachedTeacher", "DistillTrainer", "calibrate", "compress", "distill", "modules", "recompress"]),
        ("transformers", ["calibrate", "compress", "distill", "recompress"]),
        ("peft", ["merge_lora", "register_lora"]),
    ],
)
def test_a_name_whose_package_is_missing_says_what_to_install(missing, names):
    # A None in sys.modules is what an absent package looks like to an import.
    code = f"""
import sys
sys.modules[{missing!r}] = None
import tqcompressor
for name in {names!r}:
    try:
        getattr(tqcompressor, name)
    except tqcompressor.errors.MissingDependencyError as error:
        assert isinstance(error, ImportError)
        assert f"tqcompressor.{{name}} needs {missing}" in str(error) and "pip install" in str(error), error
    else:
        raise AssertionError(name)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(public()) + "\n", encoding="utf-8")
