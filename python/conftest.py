"""The examples in docstrings run as tests, from a folder of their own with the `tests/data` of the repository."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(Path(__file__).parents[1] / "tests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQCOMPRESSOR_CACHE", str(tmp_path / "cache"))
