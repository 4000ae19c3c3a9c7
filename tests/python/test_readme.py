"""The README's Python runs, its commands run in their order, its files exist, and it stays short.

The commands of the notebooks and of the results parse, too.
"""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from helpers.notebooks import PATHS
from tqcompressor.cli import main as cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "tests" / "benchmarks" / "README.md"
LARGEST = 9216
RUN = re.compile(r"run\.py ([a-z0-9]+)")


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The commands of all shell blocks, as words. A backslash at the end of a line continues it."""
    lines = "".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


COMMANDS = commands(README)
OF_THE_RESULTS = commands(RESULTS.read_text(encoding="utf-8"))
OF_THE_NOTEBOOKS = [
    words
    for path in PATHS
    for cell in nbformat.read(path, as_version=4).cells
    if cell.cell_type == "markdown"
    for words in commands(cell.source + "\n")
]
EVERYWHERE = [*COMMANDS, *OF_THE_RESULTS, *OF_THE_NOTEBOOKS]
BENCHMARK = "tests/benchmarks/run.py"


def arguments(words, program):
    return words[words.index(program) + 1 :]


def of_the_product(found):
    return [arguments(words, "tqcompressor") for words in found if "tqcompressor" in words and "python" not in words]


PRODUCT = of_the_product(COMMANDS)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the files that commands and code read; what they write stays there."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_short_and_has_a_picture():
    assert len(README.encode()) <= LARGEST
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    content = (ROOT / picture).read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) <= 150_000


def test_the_python_blocks_run(clone):
    found = blocks("python")
    assert found
    namespace = {"__name__": "readme"}
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["model"].num_parameters() <= 0.65 * 5_289_472
    assert (clone / "tiny-gpt2-compressed" / "model.safetensors").exists()


def test_the_first_commands_run_in_their_order_on_the_compressed_model(clone, capsys):
    assert [words[0] for words in PRODUCT] == ["compress", "evaluate", "generate"]
    assert cli.main(PRODUCT[0]) == 0
    # The README states the perplexities of the student and the teacher.
    capsys.readouterr()
    assert cli.main([*PRODUCT[1], "--json"]) == 0
    shown = capsys.readouterr().out
    for stated in re.search(r"calibration: (\d+\.\d)[^:]* against (\d+\.\d)", README.replace("\n", " ")).groups():
        assert re.search(rf'"perplexity": {re.escape(stated[:-2])}', shown), (stated, shown)
    out = PRODUCT[0][PRODUCT[0].index("--out") + 1]
    assert out in PRODUCT[1] and out in PRODUCT[2]
    assert cli.main([*PRODUCT[2], "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize("words", of_the_product(EVERYWHERE), ids=" ".join)
def test_the_commands_parse(words, monkeypatch):
    parsed = []
    for command in (
        "compress",
        "expand",
        "calibrate",
        "distill",
        "inspect",
        "evaluate",
        "generate",
        "verify",
        "convert",
    ):
        monkeypatch.setattr(cli, f"_{command}", parsed.append)
    assert cli.main(words) == 0
    assert len(parsed) == 1


@pytest.mark.parametrize(
    "words",
    [arguments(words, BENCHMARK) for words in OF_THE_RESULTS if BENCHMARK in words and "--help" not in words],
    ids=" ".join,
)
def test_the_commands_of_the_benchmarks_parse(words, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import run

    parsed = []
    for module in run.BENCHMARKS.values():
        monkeypatch.setattr(module, "run", lambda options: parsed.append(options) or iter(()))
    monkeypatch.setattr("sys.argv", ["run.py", *words])
    run.main()
    assert len(parsed) == 1


def test_the_extras_exist():
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = re.findall(r"^(\w+) = \[", section.partition("\n[")[0], re.MULTILINE)
    named = {
        after
        for words in [*COMMANDS, *OF_THE_RESULTS, *OF_THE_NOTEBOOKS]
        for before, after in pairwise(words)
        if before == "--extra"
    }
    assert named and named <= set(extras)


def test_the_benchmarks_that_figures_are_from_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import run

    named = set(RUN.findall(README))
    assert named and named <= set(run.BENCHMARKS)
    assert set(RUN.findall(RESULTS.read_text(encoding="utf-8"))) == set(run.BENCHMARKS)


def test_the_readme_shows_the_figures_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import frontier

    measured = frontier.frontier()
    rows = re.findall(r"^\| \**([^|*]+?)\** \|.*\| \**([\d.]+)\** \| \**([\d.]+)\** \|$", README, re.MULTILINE)
    assert len(rows) == 4
    by_name = {
        "SVD-LLM, embedding by token frequencies": "SVD-LLM, embedding by frequencies",
        "PIFA on the same": "PIFA on SVD-LLM, embedding by frequencies",
    }
    for name, at_065, at_05 in rows:
        assert dict(measured[by_name.get(name, name)]) | {0.5: float(at_05), 0.65: float(at_065)} == dict(
            measured[by_name.get(name, name)]
        )


def test_the_picture_can_be_drawn_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import frontier

    monkeypatch.setattr("sys.argv", ["frontier.py", str(tmp_path / "frontier.png")])
    frontier.main()
    assert (tmp_path / "frontier.png").stat().st_size <= 150_000


@pytest.mark.parametrize("path", [ROOT / "README.md", RESULTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    headings = {
        "#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or target in headings or (path.parent / target).exists(), target


def test_the_test_command_is_what_continuous_integration_runs():
    (tests,) = [words for words in COMMANDS if words[-1] == "pytest"]
    assert f"step {' '.join(tests)}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_two_texts_are_the_held_out_text():
    data = ROOT / "tests" / "data" / "tiny-gpt2"
    calibration, evaluation, heldout = (
        (data / f"{name}.txt").read_bytes() for name in ("calibration", "evaluation", "heldout")
    )
    assert calibration + evaluation == heldout
