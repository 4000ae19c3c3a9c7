"""The README's Python blocks run, in order and in one namespace; its commands parse; the files it names exist."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from tqcompressor.cli import main as cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if line.strip()]


def test_the_python_blocks_run(tmp_path, monkeypatch):
    # What they write goes elsewhere; what they read lies where they say.
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQCOMPRESSOR_CACHE", str(tmp_path / "cache"))
    found = blocks("python")
    assert len(found) >= 3
    namespace = {"__name__": "readme"}
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "tiny-gpt2-compressed" / "model.safetensors").exists()
    assert (tmp_path / "tiny-gpt2-distilled" / "training_report.json").exists()


@pytest.mark.parametrize("words", [words for words in COMMANDS if "tqcompressor" in words], ids=" ".join)
def test_the_commands_parse(words, monkeypatch):
    parsed = []
    monkeypatch.setattr(cli, "_compress", parsed.append)
    monkeypatch.setattr(cli, "_calibrate", parsed.append)
    monkeypatch.setattr(cli, "_distill", parsed.append)
    monkeypatch.setattr(cli, "_inspect", parsed.append)
    monkeypatch.setattr(cli, "_evaluate", parsed.append)
    monkeypatch.setattr(cli, "_generate", parsed.append)
    assert cli.main(words[words.index("tqcompressor") + 1 :]) == 0
    assert len(parsed) == 1


def test_the_extras_exist():
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = re.findall(r"^(\w+) = \[", section.partition("\n[")[0], re.MULTILINE)
    named = {after for words in COMMANDS for before, after in pairwise(words) if before == "--extra"}
    assert named and named <= set(extras)


def test_the_benchmarks_that_figures_are_from_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import run

    named = set(re.findall(r"`run\.py (\w+)", README))
    assert named and named <= set(run.BENCHMARKS)


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_test_command_is_what_continuous_integration_runs():
    assert ["uv", "run", "--extra", "dev", "pytest"] in COMMANDS
    assert "uv run --extra dev pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
