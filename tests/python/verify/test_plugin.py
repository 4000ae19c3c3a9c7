"""The checks as users run them: pytest in a process of its own, the command line, and Python."""

import inspect
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
from helpers.corpora import TINY
from helpers.processes import environment
from helpers.spoiling import copied, with_tensors
from tqcompressor import verify_checkpoint
from tqcompressor.cli import main as cli
from tqcompressor.verify import plugin, suite
from tqcompressor.verify.checks import CHECKS, Measured
from tqcompressor.verify.subject import Settings

# Runs of pytest within this process, which has imported what takes seconds.
pytest_plugins = ["pytester"]

PROJECT = Path(__file__).parents[3] / "pyproject.toml"
# A user's own tests, in a project that collects examples of docstrings and names its tests in its own way.
OWN = """
from pathlib import Path
from tqcompressor.evaluate import perplexity

def test_of_my_domain(tq_model, tq_tokenizer, tq_text, tq_teacher):
    assert isinstance(tq_text, Path) and not tq_model.training
    found, expected = (perplexity(model, tq_tokenizer, tq_text).perplexity for model in (tq_model, tq_teacher))
    assert found == expected
"""
CONFIG = (
    "[pytest]\naddopts = --doctest-modules\npython_files = check_*.py\nfilterwarnings = error::pytest.PytestWarning\n"
)


@pytest.fixture
def project(tmp_path):
    """A user's folder with a copy of the tiny GPT-2, its teacher, a text and tests; and the package's entry points.

    The installed package may be older than this source, so that its entry points are written anew.
    """
    site = tmp_path / "site" / "tqcompressor-0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: tqcompressor\nVersion: 0\n")
    (lines,) = re.findall(
        r"^\[project\.entry-points\.pytest11\]\n(.*?)^\[", PROJECT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    (site / "entry_points.txt").write_text(f"[pytest11]\n{lines.replace(chr(34), '')}")
    folder = tmp_path / "project"
    folder.mkdir()
    copied(TINY, folder / "model")
    (folder / "teacher").symlink_to(TINY)
    (folder / "text.txt").write_text((TINY / "evaluation.txt").read_text(encoding="utf-8")[:600], encoding="utf-8")
    (folder / "check_own.py").write_text(OWN)
    (folder / "pytest.ini").write_text(CONFIG)
    return folder


def cases_of(project):
    """The test cases of the JUnit file by name."""
    junit = project / "junit.xml"
    return {} if not junit.exists() else {case.get("name"): case for case in ElementTree.parse(junit).iter("testcase")}


@pytest.fixture
def run_here(project, pytester, monkeypatch):
    """Runs pytest in the project: the exit status, the output, and the test cases."""
    (project / "pytest.ini").write_text("[pytest]\npython_files = check_*.py\n")

    def run(*arguments):
        monkeypatch.chdir(project)
        options = ["-p", "tqcompressor.verify.plugin", "-p", "no:cacheprovider", "--junitxml=junit.xml"]
        done = pytester.runpytest_inprocess(*options, *arguments)
        return done.ret, f"{done.stdout}\n{done.stderr}", cases_of(project)

    return run


def test_a_user_runs_the_suite_and_own_tests(project):
    options = ["--tq-model=model", "--tq-teacher=teacher", "--tq-text=text.txt", "--tq-max-perplexity-ratio=1.0"]
    path = environment()["PYTHONPATH"]
    command = [sys.executable, "-m", "pytest", "--junitxml=junit.xml", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "--pyargs", "tqcompressor.verify", "check_own.py", *options],
        cwd=project,
        env=environment(PYTHONPATH=f"{path}:{project.parent / 'site'}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    cases = cases_of(project)
    assert set(cases) == {*(f"test_checkpoint[{name}]" for name in CHECKS), "test_of_my_domain"}
    skipped = {name for name, case in cases.items() if case.find("skipped") is not None}
    assert skipped == {"test_checkpoint[permutations]", "test_checkpoint[embeddings]"}
    figures = {
        figure.get("name"): figure.get("value") for figure in cases["test_checkpoint[perplexity]"].iter("property")
    }
    assert float(figures["ratio"]) == 1.0 and "at most 1" in figures["detail"]


def test_a_spoiled_checkpoint_fails_in_the_junit_file(project, run_here):
    def spoil(tensors):
        tensors["transformer.ln_f.weight"][3] = float("nan")

    with_tensors(project / "model", spoil)
    status, output, cases = run_here("--pyargs", "tqcompressor.verify", "--tq-model", "model")
    assert status == 1 and "1 of 256 values" in output, output
    failures = {
        name: case.find("failure").get("message") for name, case in cases.items() if case.find("failure") is not None
    }
    assert "transformer.ln_f.weight" in failures.pop("test_checkpoint[finite]")
    assert "test_checkpoint[perplexity]" in failures and "test_checkpoint[files]" not in failures
    assert all("not measured, as `finite` has failed" in message for message in failures.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pyargs", "tqcompressor.verify"], "--tq-model DIR: expected"),
        (["--pyargs", "tqcompressor.verify", "--tq-model", "./nowhere"], "nowhere: no such directory"),
        (["check_own.py", "--tq-model", "model", "--tq-text", "nowhere"], "nowhere"),
        (["check_own.py", "--tq-model", "model", "--tq-min-cosine", "2"], "min_cosine: expected a number from -1 to 1"),
    ],
)
def test_wrong_options_are_refused_before_any_test(run_here, arguments, message):
    status, output, cases = run_here(*arguments)
    assert status == pytest.ExitCode.USAGE_ERROR and message in output and not cases, output
    assert "Traceback" not in output


def test_without_a_checkpoint_tests_that_need_one_are_skipped(run_here):
    status, output, cases = run_here("check_own.py")
    assert status == 0 and cases["test_of_my_domain"].find("skipped").get("message") == "needs --tq-model", output


def test_the_plugin_is_light():
    code = (
        "import tqcompressor.verify.plugin, sys; print({'torch', 'transformers', 'safetensors'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert run.stdout == "set()\n"


def test_pytest_has_an_option_for_each_argument():
    arguments = {
        name: parameter.default
        for name, parameter in inspect.signature(verify_checkpoint).parameters.items()
        if name != "progress"
    }
    settings = {field.name: field.default for field in fields(Settings)}
    assert settings.pop("source") is MISSING and arguments.pop("source") is inspect.Parameter.empty
    assert settings == arguments
    options = {name: option for option, (name, _, _) in plugin._OPTIONS.items()}
    assert options.pop("source") == "--tq-model"
    assert options == {name: f"--tq-{name.replace('_', '-')}" for name in settings}
    assert suite.__doc__


def test_the_command_line(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    # A fresh process takes seconds; pytest has started one above.
    stub = replace(CHECKS["fresh-process"], measure=lambda subject: Measured("a stub"))
    monkeypatch.setitem(CHECKS, "fresh-process", stub)
    command = ["verify", "model", "--teacher", "teacher", "--text", "text.txt", "--max-perplexity-ratio"]
    assert cli.main([*command, "1.0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["source"] == "model" and report["teacher"] == "teacher"
    found = {check["name"]: check for check in report["checks"]}
    assert list(found) == list(CHECKS) and found["perplexity"]["figures"]["ratio"] == 1.0
    assert cli.main([*command, "0.99"]) == 1
    table = capsys.readouterr().out
    (line,) = [line for line in table.splitlines() if line.startswith("perplexity")]
    assert "failed" in line and "expected at most 0.99" in line and "ratio 1.0000" in line
    assert table.splitlines()[-1] == "model: 8 passed, 1 failed, 2 skipped"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "nowhere: no such directory"),
        ([str(TINY), "--text", "nowhere.txt"], "nowhere.txt"),
        ([str(TINY), "--teacher", "./nowhere"], "nowhere: no such directory"),
        ([str(TINY), "--min-cosine", "2"], "min_cosine"),
    ],
)
def test_bad_input_of_the_command_line(arguments, message, capsys):
    assert cli.main(["verify", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.out == "" and output.err.count("\n") == 1
