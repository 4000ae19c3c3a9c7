"""The notebooks run from the first cell to the last, as a reader would run them."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TQCOMPRESSOR_CACHE", str(tmp_path))
    # A short budget: that it runs is what is tested here.
    monkeypatch.setenv("TQCOMPRESSOR_NOTEBOOK_TOKENS", "6000")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(cell.execution_count for cell in cells)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs), (
        "no figure was drawn"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_outputs_are_kept(path):
    # They would go stale unseen; this file is what shows that the cells run.
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_the_notebooks_that_the_readme_names_are_there():
    assert {"quickstart.ipynb", "distillation.ipynb", "frontier.ipynb"} <= {path.name for path in NOTEBOOKS}
