"""Settings of the whole suite, small disks, and fixtures that several files share."""

import os
import signal
import subprocess

import pytest
from hypothesis import settings

# A shell ignores SIGINT for tests in the background, and for the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples at every run, and no failure because the machine is busy.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# They take far longer than others, and begin first, so that no process is left with one of them at the end.
LONGEST = (
    "test_notebooks.py",
    "test_sweep.py",
    "test_readme.py",
    "test_transformers.py",
    "test_convert.py",
    "test_resume.py",
    "test_int8.py",
    "test_low_rank_and_mixed.py",
    "test_several_processes.py",
    "test_paper.py",
    "test_untied_heads.py",
    "test_plugin.py",
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts a separate small file system, where that is allowed."""
    mounted = []

    def mount(options):
        place = tmp_path / f"mount{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("only root may mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        # Lazily: an exception's frames may still hold a file that could not be written.
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the tiny GPT-2."""
    import transformers
    from helpers.corpora import TINY

    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Every test has its own cache; the user's cache is never used."""
    monkeypatch.setenv("TQCOMPRESSOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenised(monkeypatch):
    """The documents that were tokenised since the test began."""
    from tqcompressor.data import tokenize

    seen = []
    encode = tokenize.Encoder.__call__
    monkeypatch.setattr(
        tokenize.Encoder, "__call__", lambda self, documents: seen.extend(documents) or encode(self, documents)
    )
    return seen


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A directory with checkpoints `dense`, `compressed` (tied), `untied`, `base` (no head), and what they give."""
    import torch
    from helpers.models import CONFIG, first_output, some_ids, tiny_model
    from tqcompressor.compression.model import compress

    directory = tmp_path_factory.mktemp("checkpoints")
    model = tiny_model()
    base = tiny_model("GPT2Model")
    base.load_state_dict(model.transformer.state_dict())
    untied = tiny_model(tie_word_embeddings=False)
    untied.transformer.load_state_dict(base.state_dict())
    model.save_pretrained(directory / "dense")
    with_head = CONFIG.replace(specs={**CONFIG.specs, "lm_head": CONFIG.specs["wte"]})
    for name, each, config in [("compressed", model, CONFIG), ("untied", untied, with_head), ("base", base, CONFIG)]:
        compress(each, config)
        each.save_pretrained(directory / name)
        torch.save(first_output(each, some_ids()), directory / f"{name}.pt")
    return directory
