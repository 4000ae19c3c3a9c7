"""The command line as a user meets it: tables, JSON, exit statuses, one-line errors."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqcompressor import __version__, cli
from tqcompressor.errors import ConvergenceError, MissingDependencyError, StorageError

TINY = Path(__file__).parents[1] / "data" / "tiny-gpt2"
PARAMETERS = 5_289_472
# wte to a quarter of its width, c_fc and c_proj of blocks 1 and 3 to half of their parameters; plus the small factors.
AFTER = PARAMETERS - (8192 * 256 - (8192 * 64 + 4)) - 4 * (256 * 1024 - 4 * (128 * 256 + 8))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "compressed"
    assert cli.main(["compress", str(TINY), "--recipe", "tq-81m", "--effort", "fast", "--out", str(out)]) == 0
    return out


def line_of(table, first_word):
    (line,) = [line for line in table.splitlines() if line.split()[:1] == [first_word]]
    return line.split()


def test_inspect_shows_the_plan(capsys):
    assert cli.main(["inspect", str(TINY), "--recipe", "tq-81m"]) == 0
    table = capsys.readouterr().out
    assert line_of(table, "wte") == ["wte", "8192×256", "1×4", "1", "columns", "2,097,152", "524,292"]
    assert line_of(table, "h.3.mlp.c_proj")[1:5] == ["1024×256", "4×2", "4", "both"]
    assert line_of(table, "total") == ["total", f"{PARAMETERS:,}", f"{AFTER:,}"]
    assert f"{100 * AFTER / PARAMETERS:.1f}% of the parameters would be left" in table


def test_inspect_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", str(TINY)]) == 0
    assert not list(tmp_path.iterdir())


def test_inspect_as_json(capsys):
    assert cli.main(["inspect", str(TINY), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["parameters_before"], plan["parameters_after"]) == (PARAMETERS, AFTER)
    assert "wte" in [matrix["name"] for matrix in plan["matrices"]]


def test_inspect_of_a_compressed_checkpoint_shows_what_was_done(compressed, capsys):
    assert cli.main(["inspect", str(compressed)]) == 0
    table = capsys.readouterr().out
    assert "lost energy" in table
    assert line_of(table, "total")[1:3] == [f"{PARAMETERS:,}", f"{AFTER:,}"]


def test_compress_prints_what_it_cost(tmp_path, capsys):
    arguments = ["compress", str(TINY), "--recipe", "tq-81m", "--effort", "fast", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert 0 < float(line_of(table, "h.1.mlp.c_fc")[7]) < 1
    assert line_of(table, "total")[1:3] == [f"{PARAMETERS:,}", f"{AFTER:,}"]
    assert str(tmp_path / "out") in table


def test_compress_by_a_config_file_and_options(tmp_path, capsys):
    config = tmp_path / "config.json"
    specs = {"h.0.mlp.c_fc": {"block": [4, 4], "rank": 2, "permute": "rows"}}
    config.write_text(json.dumps({"quant_method": "tqcompressor", "format_version": 1, "specs": specs}))
    out = tmp_path / "out"
    options = ["--effort", "fast", "--seed", "7", "--dtype", "bfloat16", "--threads", "1", "--json"]
    assert cli.main(["compress", str(TINY), "--config", str(config), "--out", str(out), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["effort"], report["seed"], report["dtype"]) == ("fast", 7, "bfloat16")
    assert [(matrix["name"], matrix["block"], matrix["rank"]) for matrix in report["matrices"]] == [
        ("h.0.mlp.c_fc", [4, 4], 2)
    ]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_overwrite_is_asked_for(compressed, capsys):
    arguments = ["compress", str(TINY), "--recipe", "tq-81m", "--effort", "fast", "--out", str(compressed)]
    assert cli.main(arguments) == 2
    assert str(compressed) in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0


def test_shards(tmp_path):
    arguments = ["compress", str(TINY), "--recipe", "tq-81m", "--effort", "fast", "--max-shard-size", "2MB"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_evaluate_beside_the_teacher(compressed, tmp_path, capsys):
    text, lambada = tmp_path / "text.txt", tmp_path / "passages.jsonl"
    text.write_text((TINY / "heldout.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    lambada.write_text('{"text": "He looked at her"}\n', encoding="utf-8")
    arguments = ["evaluate", str(compressed), "--teacher", str(TINY), "--text", str(text), "--lambada", str(lambada)]
    assert cli.main([*arguments, "--stride", "128"]) == 0
    table = capsys.readouterr().out
    assert line_of(table, str(TINY))[1] == f"{PARAMETERS:,}"
    assert line_of(table, str(compressed))[1] == f"{AFTER:,}"
    assert "%" in table
    assert cli.main([*arguments, "--stride", "128", "--json"]) == 0
    teacher, student = json.loads(capsys.readouterr().out)["models"]
    assert (teacher["parameters"], student["parameters"]) == (PARAMETERS, AFTER)
    assert teacher["text"]["perplexity"] < student["text"]["perplexity"]
    assert teacher["text"]["stride"] == 128 and teacher["last_word"]["passages"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", str(TINY), "--recipe", "none-such", "--out", "out"], "none-such"),
        (["compress", str(TINY), "--config", "none-such.json", "--out", "out"], "none-such.json"),
        (["compress", "none-such-directory", "--recipe", "tq-81m", "--out", "out"], "none-such-directory"),
        (["inspect", "none-such-directory"], "none-such-directory"),
        (["evaluate", str(TINY), "--text", "none-such.txt"], "none-such.txt"),
        (["evaluate", "./none-such-directory", "--text", str(TINY / "heldout.txt")], "none-such-directory"),
        (["evaluate", str(TINY), "--text", str(TINY / "model.safetensors")], "not UTF-8"),
        (["evaluate", str(TINY), "--text", str(TINY / "heldout.txt"), "--stride", "129"], "stride"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err and output.out == ""
    assert output.err.startswith("tqcompressor: error: ") and output.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["distill"],
        ["compress", str(TINY), "--out", "out"],
        ["compress", str(TINY), "--recipe", "tq-81m"],
        ["compress", str(TINY), "--recipe", "tq-81m", "--config", "x.json", "--out", "out"],
        ["compress", str(TINY), "--recipe", "tq-81m", "--out", "out", "--effort", "heroic"],
        ["compress", str(TINY), "--recipe", "tq-81m", "--out", "out", "--threads", "0"],
        ["evaluate", str(TINY)],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        StorageError(errno.ENOSPC, "No space left on device", "out"),
        ConvergenceError("eigendecomposition did not converge"),
        MissingDependencyError("evaluate needs torch"),
        RuntimeError("first line\nsecond line"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_failures_are_status_1(error, monkeypatch, capsys):
    def fail(options):
        raise error

    monkeypatch.setattr(cli, "_inspect", fail)
    assert cli.main(["inspect", str(TINY)]) == 1
    assert capsys.readouterr().err == f"tqcompressor: error: {str(error).splitlines()[0]}\n"


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(Exception, match="none-such"):
        cli.main(["inspect", str(tmp_path / "none-such"), "--debug"])


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.split() == ["tqcompressor", __version__]


def test_the_installed_command_runs():
    command = Path(sys.executable).with_name("tqcompressor")
    run = subprocess.run([command, "inspect", str(TINY)], capture_output=True, text=True)
    assert run.returncode == 0 and f"{AFTER:,}" in run.stdout, run.stderr


def test_a_closed_pipe_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tqcompressor.cli", "inspect", str(TINY)]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, "")


def test_ctrl_c_is_status_130_and_leaves_nothing(tmp_path):
    # The signal comes from within, so that it cannot come before the command runs; `best` on one thread takes longer.
    code = (
        "import os, signal, sys, threading; from tqcompressor.cli import main; "
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start(); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["compress", str(TINY), "--recipe", "tq-81m", "--effort", "best", "--threads", "1"]
    command = [sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (130, "tqcompressor: interrupted\n")
    assert not list(tmp_path.iterdir())
