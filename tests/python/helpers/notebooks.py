"""Executes the notebooks for the tests; `python tests/python/helpers/notebooks.py` renews their outputs."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[3] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path, folder: Path = FOLDER) -> Any:
    """A notebook, executed in a folder from the first cell to the last."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def clean(notebook: Any) -> Any:
    """Removes warnings, progress bars and times, and joins outputs that the kernel splits at random."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = _joined(output for output in cell.outputs if not _is_noise(output))
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def _joined(outputs: Iterable[Any]) -> list[Any]:
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _is_noise(output: Any) -> bool:
    if output.output_type == "stream":
        return output.name == "stderr"
    # A progress bar that IPython draws, or its text once it is gone.
    return "image/png" not in output.data and output.output_type == "display_data"


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for path in PATHS:
        notebook = clean(execute(path))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
