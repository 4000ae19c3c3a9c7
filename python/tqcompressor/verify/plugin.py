"""The pytest plugin: options and fixtures for a checkpoint under test, and `pytest --pyargs tqcompressor.verify`.

pytest imports it in every run once this package is installed, so it imports neither torch nor transformers.

In your own tests:

    from tqcompressor.evaluate import perplexity

    def test_of_my_domain(tq_model, tq_tokenizer, tq_text):
        assert perplexity(tq_model, tq_tokenizer, tq_text).perplexity < 30

and `pytest --tq-model DIR --tq-text FILE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..errors import TQError
from .checks import Verification
from .subject import Settings, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SUITE = Path(__file__).with_name("suite.py")
_PACKAGE = "tqcompressor.verify"
_SETTINGS = pytest.StashKey[Settings]()
# The options: for each the field of `Settings`, the type, and the help text.
_OPTIONS: dict[str, tuple[str, type, str]] = {
    "--tq-model": ("source", str, "the checkpoint to verify: a directory, or a hub id"),
    "--tq-teacher": ("teacher", str, "the checkpoint that it was made from"),
    "--tq-text": ("text", str, "a UTF-8 file that quality is measured on"),
    "--tq-max-perplexity-ratio": ("max_perplexity_ratio", float, "largest perplexity as a multiple of the teacher's"),
    "--tq-min-cosine": ("min_cosine", float, "smallest mean cosine of an encoder's embeddings with the teacher's"),
    "--tq-context": ("context", int, "window in tokens"),
    "--tq-stride": ("stride", int, "window step"),
    "--tq-batch-size": ("batch_size", int, "windows or texts at a time"),
    "--tq-dtype": ("dtype", str, "dtype to compute in"),
    "--tq-device": ("device", str, "torch device"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options, with the defaults of `verify_checkpoint`."""
    group = parser.getgroup("tqcompressor", "a checkpoint under test (tqcompressor)")
    defaults = {field.name: None if field.default is MISSING else field.default for field in fields(Settings)}
    for option, (name, kind, words) in _OPTIONS.items():
        default: Any = defaults[name]
        shown = "" if default is None else f" (default: {default})"
        group.addoption(option, type=kind, default=default, help=words + shown)


def pytest_configure(config: pytest.Config) -> None:
    """Checks the options, so that a run with wrong ones ends before any test."""
    if config.getoption("--tq-model") is not None:
        config.stash[_SETTINGS] = _settings(config)
    elif config.getoption("pyargs") and any(argument.startswith(_PACKAGE) for argument in config.args):
        # Without a checkpoint, pytest would find no test.
        raise pytest.UsageError("--tq-model DIR: expected the checkpoint to verify")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out the examples in docstrings beside the suite, which the `--doctest-modules` of a user would collect."""
    beside = collection_path.parent == _SUITE.parent and collection_path != _SUITE
    return True if beside and config.getoption("--tq-model") is not None else None


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collects the suite where there is a checkpoint, whatever names of test files the user has configured."""
    if file_path != _SUITE or parent.config.getoption("--tq-model") is None:
        return None
    if any(file_path.match(pattern) for pattern in parent.config.getini("python_files")):
        # pytest collects it by itself.
        return None
    module: pytest.Collector = pytest.Module.from_parent(parent, path=file_path)
    return module


@pytest.fixture(scope="session")
def tq_verification(pytestconfig: pytest.Config) -> Verification:
    """The checks of the checkpoint in `--tq-model`, by the options of this run; skips the test without it."""
    _require(pytestconfig, "--tq-model")
    return Verification(Subject(pytestconfig.stash[_SETTINGS]))


@pytest.fixture(scope="session")
def tq_model(tq_verification: Verification) -> PreTrainedModel:
    """The model of `--tq-model` in evaluation mode, of the class that saved it."""
    return tq_verification.subject.model


@pytest.fixture(scope="session")
def tq_tokenizer(tq_verification: Verification) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tq-model`."""
    return tq_verification.subject.tokenizer


@pytest.fixture(scope="session")
def tq_teacher(tq_verification: Verification, pytestconfig: pytest.Config) -> Iterator[PreTrainedModel]:
    """The model of `--tq-teacher`, loaded as `tq_model` is."""
    _require(pytestconfig, "--tq-teacher")
    yield tq_verification.subject.load_teacher()


@pytest.fixture(scope="session")
def tq_text(tq_verification: Verification, pytestconfig: pytest.Config) -> Path:
    """The path of `--tq-text`, as `evaluate.perplexity` takes it."""
    _require(pytestconfig, "--tq-text")
    return Path(str(tq_verification.subject.settings.text))


def _settings(config: pytest.Config) -> Settings:
    values = {name: config.getoption(option) for option, (name, _, _) in _OPTIONS.items()}
    for name in ("source", "teacher", "text"):
        # Tests may run in another folder than pytest was started in.
        value = None if values[name] is None else config.invocation_params.dir / values[name]
        if value is not None and (value.exists() or name == "text"):
            values[name] = value
    try:
        return Settings(**values)
    except (TQError, OSError) as error:
        raise pytest.UsageError(str(error)) from None


def _require(config: pytest.Config, option: str) -> None:
    if config.getoption(option) is None:
        pytest.skip(f"needs {option}")
