"""Imports point one way, in Rust and in Python, and `import tqcompressor` stays light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "tiny-gpt2"

# From the bottom up: a module imports only from those before it. CONTRIBUTING.md shows the same tables.
RUST = [
    "error",
    "shape",
    "spec",
    "progress",
    "memory",
    "testing",
    "simd",
    "loss",
    "kron",
    "permute",
    "fit",
    "checkpoint",
    "plan",
    "compress",
    "runtime",
    "python",
]
PYTHON = [
    "errors",
    "groups",
    "_core",
    "progress",
    "tables",
    "specs",
    "report",
    "config",
    "stages",
    "decomposed",
    "objective",
    "whole_file",
    "calibration",
    "budget",
    "budget_plan",
    "decomposition",
    "checkpoint",
    "loss_arrays",
    "torch_formulas",
    "torch_arrays",
    "torch_losses",
    "torch_topk_loss",
    "topk_loss",
    "factored_head",
    "losses",
    "contraction",
    "factors",
    "expansion",
    "modules",
    "embeddings",
    "low_rank",
    "low_rank_embedding",
    "mixed",
    "architecture",
    "planning",
    "transformers_integration",
    "_import_hook",
    "plans",
    "peft_integration",
    "texts",
    "whole_folder",
    "token_stream",
    "corpus",
    "model_files",
    "results",
    "scoring_rules",
    "runtime_tokens",
    "runtime_model",
    "runtime_moments",
    "runtime",
    "scoring",
    "moment_batches",
    "moment_sums",
    "moment_pass",
    "moment_hooks",
    "sequential",
    "in_place",
    "teacher_file",
    "teacher_cache",
    "evaluate",
    "training_config",
    "trainer",
    "training_report",
    "stage_training",
    "staged_distillation",
    "plots",
    "cli_options",
    "cli",
    "__init__",
]
# `from_pretrained(..., quantization_config=TQConfig())` runs the one above from within a hook of the one below.
UPWARDS = {("transformers_integration", "in_place")}
# What only some machines have, and what takes long to import: never at the price of `import tqcompressor`.
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "matplotlib", "scipy", "tqdm"}


def rust_module(path):
    return path.relative_to(ROOT / "src").parts[0].removesuffix(".rs")


def without_comments(source):
    return re.sub(r"//.*", "", source)


RUST_FILES = sorted(path for path in (ROOT / "src").rglob("*.rs") if path.name != "lib.rs")
PYTHON_FILES = sorted((ROOT / "python" / "tqcompressor").glob("*.py"))


def test_the_tables_name_every_module():
    assert {rust_module(path) for path in RUST_FILES} == set(RUST)
    assert {path.stem for path in PYTHON_FILES} | {"_core"} == set(PYTHON)


@pytest.mark.parametrize("path", RUST_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rust_imports_point_downwards(path):
    source = without_comments(path.read_text(encoding="utf-8"))
    own = RUST.index(rust_module(path))
    used = set(re.findall(r"\bcrate::(\w+)", source))
    for group in re.findall(r"\bcrate::\{(.*?)\};", source, re.DOTALL):
        # The heads of the group's entries: what stands at depth zero, before any `::`.
        flat = re.sub(r"::\{[^{}]*\}", "", group)
        used |= {entry.strip().split("::")[0] for entry in flat.split(",") if entry.strip()}
    # `crate::Error` and `crate::Result` are the root's names for things of `error`.
    modules = {"error" if name in ("Error", "Result") else name for name in used}
    above = sorted(name for name in modules if name not in RUST or RUST.index(name) > own)
    assert not above, f"{path.name} imports {above}"


@pytest.mark.parametrize("path", RUST_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_boundary_knows_python(path):
    if rust_module(path) != "python":
        assert not re.findall(r"\b(?:pyo3|numpy)::", without_comments(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_python_imports_point_downwards(path):
    own = PYTHON.index(path.stem)
    allowed = {above for below, above in UPWARDS if below == path.stem}
    above = sorted(name for name in imported(path) - allowed if PYTHON.index(name) >= own)
    assert not above, f"{path.name} imports {above}"


def imported(path):
    """The package's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "tqcompressor" if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" if module == "tqcompressor" else module for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "tqcompressor":
                found.add(rest.split(".")[0] if rest.split(".")[0] in PYTHON else "__init__")
    return found


def loaded_by(code):
    """The top-level packages that a fresh interpreter holds after `code`."""
    code += "\nimport sys; print(); print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_numpy_alone():
    loaded = loaded_by("import tqcompressor")
    assert "numpy" in loaded
    assert not loaded & HEAVY


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
    loaded = loaded_by(f"from tqcompressor.cli import main; assert main({command!r}) == 0")
    assert not loaded & (HEAVY - {"tqdm", "huggingface_hub"})


def test_contributing_shows_these_tables():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for table in (RUST, PYTHON):
        assert " ".join(f"`{name}`" for name in table) in text
