"""Imports point one way, in Rust and in Python, and `import tqcompressor` stays light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import environment
from helpers.rust_imports import import_graph, without_comments

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "tiny-gpt2"

# From the bottom up: a module imports only from those before it. CONTRIBUTING.md shows the same tables.
RUST = [
    "error",
    "portable",
    "progress",
    "numeric",
    "spec",
    "loss",
    "kron",
    "permute",
    "fit",
    "family",
    "checkpoint",
    "plan",
    "compress",
    "runtime",
    "python",
]
# Each folder (or file at the top) of the Python package, and what it may import; CONTRIBUTING.md shows the same rows.
PYTHON = {
    "errors": "",
    "utils": "errors _core",
    "losses": "errors _core utils",
    "config": "errors utils",
    "data": "errors _core utils",
    "evaluate": "errors utils data",
    "decomposition": "errors _core utils config",
    "modules": "errors _core utils config",
    "models": "errors _core utils config modules",
    "calibration": "errors _core utils config data models",
    "native": "errors _core utils data evaluate calibration",
    "compression": "errors _core utils losses config data decomposition modules models calibration native",
    "conversion": "errors _core utils config compression",
    "distillation": "errors _core utils losses config data evaluate models calibration compression",
    "verify": "errors _core utils config data evaluate models compression native distillation",
    "integrations": "errors config modules models calibration compression",
    "plots": "errors config decomposition compression evaluate",
    "frontier": "errors _core utils config data evaluate calibration compression native verify plots",
    "pages": "errors utils config compression distillation frontier",
    "cli": "errors _core utils config data evaluate decomposition calibration compression conversion native "
    "distillation verify frontier pages",
}
# Optional packages and packages with a slow import: `import tqcompressor` must not import them.
HEAVY = {
    "accelerate",
    "filelock",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "safetensors",
    "scipy",
    "torch",
    "tqdm",
    "transformers",
}


RUST_SOURCES = {
    path.relative_to(ROOT / "src").as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.rs")
}
RUST_GRAPH = import_graph(RUST_SOURCES)
PACKAGE = ROOT / "python" / "tqcompressor"
PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_tables_name_every_module():
    assert {rust_module(path) for path in RUST_GRAPH} == {*RUST, "lib"}
    assert {python_module(path).partition(".")[0] for path in PYTHON_FILES} - {"", "__main__"} == set(PYTHON)


def test_the_top_of_the_package_holds_few_files():
    files = {path.name for path in PACKAGE.iterdir() if path.is_file() and path.suffix != ".so"}
    assert files == {"__init__.py", "__main__.py", "_core.pyi", "errors.py", "plots.py", "py.typed"}
    # Each folder documents its contents and its allowed imports.
    for folder in set(PYTHON) - {"errors", "plots"}:
        docstring = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")))
        assert "May import" in docstring, folder


def rust_module(path):
    return path.partition("/")[0].removesuffix(".rs")


def test_rust_imports_point_downwards():
    level = RUST.index
    wrong = {
        path: above
        for path, imports in RUST_GRAPH.items()
        if path != "lib.rs"
        and (above := sorted(used for used in imports if level(rust_module(used)) > level(rust_module(path))))
    }
    assert not wrong


def test_no_rust_file_is_in_a_circle():
    assert not circle(RUST_GRAPH)


def test_rust_imports_are_found_where_they_are_defined():
    graph = import_graph(
        {
            "lib.rs": "pub mod low; mod high; #[cfg(test)] mod testing; pub use low::Thing;",
            "low/mod.rs": "mod inner; pub use self::inner::{Thing, deep::{self, Other as Renamed}};",
            "low/inner.rs": "pub mod deep; pub struct Thing; // use crate::high::Up;",
            "low/inner/deep.rs": "use super::Thing; pub struct Other; #[cfg(test)] mod tests { use crate::high::Up; }",
            "high.rs": "use crate::{Thing, low::{self, Renamed}}; use serde::Serialize; fn f() { low::deep::g() }",
            "testing.rs": "use crate::high;",
        }
    )
    assert graph == {
        "lib.rs": set(),
        "low/mod.rs": set(),
        "low/inner.rs": set(),
        "low/inner/deep.rs": {"low/inner.rs"},
        "high.rs": {"low/mod.rs", "low/inner.rs", "low/inner/deep.rs"},
    }


def test_only_the_boundary_knows_python():
    for path, source in RUST_SOURCES.items():
        if rust_module(path) != "python":
            assert not re.findall(r"\b(?:pyo3|numpy)::", without_comments(source)), path


def python_module(path):
    """The dotted name of a file, below the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """The package's own modules that a file imports, anywhere in it, by dotted names below the package."""
    package = ["tqcompressor", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # The imported name is a submodule if there is one, otherwise a name in the module.
            for alias in node.names:
                name = f"{module}.{alias.name}"
                names.append(name if name.removeprefix("tqcompressor.") in MODULES else module)
        found |= {name.removeprefix("tqcompressor").removeprefix(".") for name in names if is_ours(name)}
    return found - {python_module(path)}


def is_ours(name):
    return name.partition(".")[0] == "tqcompressor"


MODULES = {python_module(path) for path in PYTHON_FILES} | {"_core"}


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_folder_imports_only_what_its_row_allows(path):
    folder = python_module(path).partition(".")[0]
    if folder in ("", "__main__"):
        return
    allowed = {folder, *PYTHON[folder].split()}
    wrong = sorted(name for name in imported(path) if name.partition(".")[0] not in allowed)
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_no_python_module_is_in_a_circle():
    graph = {python_module(path): imported(path) for path in PYTHON_FILES}
    assert not circle(graph)
    assert not circle({folder: set(row.split()) for folder, row in PYTHON.items()})


def circle(graph):
    """A cycle of the graph, or nothing."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        found = next((found for after in sorted(graph.get(node, ())) if (found := visit(after))), None)
        path.pop()
        done.add(node)
        return found

    return next((found for node in sorted(graph) if (found := visit(node))), None)


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def loaded_by(code):
    """The top-level packages that a fresh interpreter holds after `code`."""
    code += "\nimport sys; print(); print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_numpy_alone():
    loaded = loaded_by("import tqcompressor")
    assert "numpy" in loaded
    assert not loaded & HEAVY


def test_every_module_imports_without_what_only_posix_has():
    """`tests/python/test_without_posix.py` uses the package without it."""
    code = """
import importlib, pkgutil, sys
import numpy
from helpers.windows import take_away_functions, take_away_modules
take_away_modules()
take_away_functions()
sys.modules["torch"] = None
import tqcompressor
for module in pkgutil.walk_packages(tqcompressor.__path__, "tqcompressor."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert any(name in str(error) for name in ("torch", "transformers")), module
"""
    loaded_by(code)


def test_the_public_names_load_nothing_but_what_they_need():
    loaded = loaded_by("from tqcompressor import KroneckerSpec, TQConfig, compress_checkpoint, decompose")
    assert not loaded & (HEAVY - {"tqdm"})


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", str(TINY)],
        ["compress", str(TINY), "--recipe", "tq-81m", "--effort", "fast"],
        ["generate", str(TINY), "--prompt", "He", "--max-new-tokens", "3"],
    ],
)
def test_the_command_line_needs_no_torch(command, tmp_path):
    if command[0] == "compress":
        command = [*command, "--out", str(tmp_path / "compressed")]
    loaded = loaded_by(f"from tqcompressor.cli.main import main; assert main({command!r}) == 0")
    assert not loaded & (HEAVY - {"tqdm", "huggingface_hub"})


def test_contributing_shows_these_tables():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert " ".join(f"`{name}`" for name in RUST) in text
    for folder, row in PYTHON.items():
        assert re.search(
            rf"^\| `{folder}` \|.*\| {' '.join(f'`{name}`' for name in row.split())} ?\|$", text, re.MULTILINE
        )
