"""The notebooks run from the first cell to the last, and are committed with the outputs of such a run."""

import re
from pathlib import Path

import nbformat
import pytest
from helpers import notebooks
from helpers.corpora import TINY

ROOT = notebooks.FOLDER.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LARGEST = 500_000
# Few tokens to train on and a short text to evaluate on: the figures are not compared.
TOKENS = 3_000
CHARACTERS = 8_000

every_notebook = pytest.mark.parametrize("path", notebooks.PATHS, ids=lambda path: path.name)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(output):
    """The visible form of an output: the name of a stream or the types of a result."""
    return output.name if output.output_type == "stream" else sorted(output.data)


@pytest.fixture
def clone(tmp_path):
    """A folder with what the notebooks read."""
    data = tmp_path / "clone" / TINY.relative_to(ROOT)
    data.mkdir(parents=True)
    for file in TINY.iterdir():
        (data / file.name).symlink_to(file)
    evaluation = data / "evaluation.txt"
    shortened = evaluation.read_text(encoding="utf-8")[:CHARACTERS]
    evaluation.unlink()
    evaluation.write_text(shortened, encoding="utf-8")
    (tmp_path / "clone" / "pyproject.toml").touch()
    return tmp_path / "clone"


@every_notebook
def test_the_notebook_runs_and_its_committed_outputs_are_of_the_same_kinds(path, clone, tmp_path, monkeypatch):
    monkeypatch.setenv("TQCOMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQCOMPRESSOR_NOTEBOOK_TOKENS", str(TOKENS))
    # What a notebook writes to a temporary folder is removed with this test's.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    committed = nbformat.read(path, as_version=4)
    fresh = notebooks.clean(notebooks.execute(path, clone))
    for kept, new in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert kept.execution_count == new.execution_count, kept.id
        assert [kinds(output) for output in kept.outputs] == [kinds(output) for output in new.outputs], kept.id


@every_notebook
def test_the_committed_notebook_shows_figures_and_nothing_of_the_machine_that_ran_it(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= LARGEST
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(re.fullmatch(r"cell-\d\d", cell.id) for cell in notebook.cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure"
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr"
        shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert not re.search(r"/(home|root|tmp|Users|work|var)/|Warning|%\|", shown), shown


def test_the_readme_names_every_notebook_and_no_other():
    assert set(re.findall(r"\(notebooks/([^)]+)\)", README)) == {path.name for path in notebooks.PATHS}


def test_the_links_of_the_notebooks_lead_somewhere():
    for path in notebooks.PATHS:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (path.parent / Path(target)).exists(), target
