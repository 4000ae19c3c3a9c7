"""The command line as a user sees it: tables, JSON, exit statuses, one-line errors."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqcompressor import Calibration, CompressionReport, __version__, inspect
from tqcompressor.cli import main as cli
from tqcompressor.errors import ConvergenceError, MissingDependencyError, StorageError

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
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
    assert line_of(table, "wte") == [
        "wte",
        "8192×256",
        "block",
        "1×4,",
        "rank",
        "1,",
        "permute",
        "columns",
        "2,097,152",
        "524,292",
    ]
    assert " ".join(line_of(table, "h.3.mlp.c_proj")[1:8]) == "1024×256 block 4×2, rank 4, permute both"
    assert line_of(table, "total") == ["total", f"{PARAMETERS:,}", f"{AFTER:,}"]
    assert f"{100 * AFTER / PARAMETERS:.1f}% of the parameters would be left" in table


def test_inspect_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", str(TINY)]) == 0
    assert not list(tmp_path.iterdir())


def test_arguments_may_be_paths(capsys):
    assert cli.main(["inspect", TINY, "--recipe", "tq-81m"]) == 0
    assert line_of(capsys.readouterr().out, "total")[1:] == [f"{PARAMETERS:,}", f"{AFTER:,}"]
    with pytest.raises(TypeError, match="int"):
        cli.main(["inspect", TINY, "--budget", 1])


def test_inspect_as_json(capsys):
    assert cli.main(["inspect", str(TINY), "--recipe", "tq-81m", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["parameters_before"], plan["parameters_after"]) == (PARAMETERS, AFTER)
    assert "wte" in [matrix["name"] for matrix in plan["matrices"]]


def test_inspect_lists_the_matrices_of_a_dense_checkpoint(capsys):
    assert cli.main(["inspect", str(TINY)]) == 0
    table = capsys.readouterr().out
    assert line_of(table, "wte") == ["wte", "8192×256", "2,097,152"]
    assert line_of(table, "total") == ["total", f"{PARAMETERS:,}"] and "block" not in table
    assert cli.main(["inspect", str(TINY), "--json"]) == 0
    found = CompressionReport.from_dict(json.loads(capsys.readouterr().out))
    assert found == inspect(TINY) and found.parameters_before == found.parameters_after == PARAMETERS
    assert all(matrix.spec is None for matrix in found.matrices) and found.effort is None


def test_inspect_of_a_compressed_checkpoint_shows_what_was_done(compressed, capsys):
    assert cli.main(["inspect", str(compressed)]) == 0
    table = capsys.readouterr().out
    assert "lost energy" in table
    assert line_of(table, "total")[1:3] == [f"{PARAMETERS:,}", f"{AFTER:,}"]


def test_compress_prints_what_it_cost(tmp_path, capsys):
    arguments = ["compress", str(TINY), "--recipe", "tq-81m", "--effort", "fast", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert 0 < float(line_of(table, "h.1.mlp.c_fc")[-2]) < 1
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


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """A calibration file from few and short blocks."""
    folder = tmp_path_factory.mktemp("calibration")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQCOMPRESSOR_CACHE", str(folder / "cache"))
        out = folder / "calibration.safetensors"
        options = ["--num-samples", "4", "--seq-len", "32", "--seed", "3"]
        assert cli.main(["calibrate", str(TINY), "--text", str(TINY / "heldout.txt"), "--out", str(out), *options]) == 0
    return out


def test_a_calibration_is_measured(calibration, capsys, tmp_path, monkeypatch):
    found = Calibration.load(calibration)
    assert (found.tokens, found.seed, found.sensitivity, found.model_type) == (128, 3, True, "gpt2")
    assert found.input("h.0.attn.c_attn.k").shape == (256, 256) and found.output("wte").shape == (256, 256)
    monkeypatch.setenv("TQCOMPRESSOR_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "inputs.safetensors"
    options = ["--num-samples", "2", "--seq-len", "32", "--no-sensitivity", "--json"]
    assert cli.main(["calibrate", str(TINY), "--text", str(TINY / "held*.txt"), "--out", str(out), *options]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["tokens"], data["sensitivity"], data["model_type"]) == (64, False, "gpt2")
    assert data["moments"]["input.h.1.mlp.c_proj"] == [1024, 1024] and "output.h.1.mlp.c_proj" not in data["moments"]


def test_inspect_shows_how_a_budget_is_spent(calibration, capsys):
    arguments = ["inspect", str(TINY), "--budget", "65%", "--effort", "fast"]
    tables = []
    for options in ([], ["--calibration", str(calibration)], ["--calibration", str(calibration), "--json"]):
        assert cli.main([*arguments, *options]) == 0
        tables.append(capsys.readouterr().out)
    plain, calibrated, text = tables
    assert "budget 65%: at most 0.65 of the model's parameters" in plain and "in the Frobenius norm" in plain
    assert "low rank" in plain and "in the norm of the calibration" in calibrated
    data = json.loads(text)
    assert 0.995 * 0.65 < data["parameters_after"] / PARAMETERS <= 0.65
    assert line_of(calibrated, "total")[1:3] == [f"{PARAMETERS:,}", f"{data['parameters_after']:,}"]
    matrix = data["matrices"][0]
    assert matrix["name"] == "wte" and f"{matrix['parameters_after']:,}" in line_of(calibrated, "wte")
    assert data["config"]["specs"]["wte"] == matrix["spec"]


def test_a_budget_needs_no_torch(calibration, tmp_path):
    options = [
        "--budget",
        "0.5",
        "--calibration",
        str(calibration),
        "--effort",
        "fast",
        "--matrices",
        "wte",
        "h.*.mlp.*",
    ]
    commands = [["inspect", str(TINY), *options], ["compress", str(TINY), "--out", "out", *options]]
    code = (
        f"import sys; from tqcompressor.cli.main import main; assert not any(map(main, {commands!r})); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("budget 0.5: at most 0.5 of the model's parameters") == 2
    report = json.loads((tmp_path / "out" / "compression_report.json").read_text(encoding="utf-8"))
    assert 0.995 * 0.5 * PARAMETERS < report["parameters_after"] <= 0.5 * PARAMETERS and report["calibrated"]
    assert {matrix["name"].rpartition(".")[2] for matrix in report["matrices"]} == {"wte", "c_fc", "c_proj"}
    assert f"{report['parameters_after']:,}" in line_of(run.stdout.partition("budget")[0], "total")


def test_calibrate_in_torch_without_torch_says_what_to_install(tmp_path):
    # A None in sys.modules is what an absent package looks like to an import.
    command = [
        "calibrate",
        str(TINY),
        "--text",
        str(TINY / "heldout.txt"),
        "--out",
        str(tmp_path / "out"),
        "--engine",
        "torch",
    ]
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "from tqcompressor.cli.main import main; "
        f"sys.exit(main({command!r}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("tqcompressor: error: engine torch needs ") and "tqcompressor[hf]" in run.stderr
    assert not list(tmp_path.iterdir())


def test_evaluate_beside_the_teacher(compressed, tmp_path, capsys):
    text, passages = tmp_path / "text.txt", tmp_path / "passages.jsonl"
    text.write_text((TINY / "heldout.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    passages.write_text('{"text": "He looked at her"}\n', encoding="utf-8")
    arguments = ["evaluate", str(compressed), "--teacher", str(TINY), "--text", str(text), "--passages", str(passages)]
    assert cli.main([*arguments, "--stride", "128"]) == 0
    table = capsys.readouterr().out
    assert line_of(table, str(TINY))[1] == f"{PARAMETERS:,}"
    assert line_of(table, str(compressed))[1] == f"{AFTER:,}"
    assert "%" in table
    assert cli.main([*arguments, "--stride", "128", "--json"]) == 0
    student, teacher = json.loads(capsys.readouterr().out)["models"]
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
        (["compress", str(TINY), "--out", "out"], "expected a config"),
        (["compress", str(TINY), "--budget", "much", "--out", "out"], "budget must be a share"),
        (["compress", str(TINY), "--budget", "0.001", "--out", "out"], "already"),
        (["compress", str(TINY), "--budget", "0.5", "--calibration", "none-such", "--out", "out"], "none-such"),
        (["compress", str(TINY), "--budget", "0.5", "--objective", "sensitivity", "--out", "out"], "needs"),
        (["compress", str(TINY), "--recipe", "tq-81m", "--matrices", "h.*", "--out", "out"], "matrices"),
        (["inspect", str(TINY), "--calibration", "none-such"], "--calibration needs --budget"),
        (["inspect", str(TINY), "--budget", "0.5", "--matrices", "none.such"], "none.such"),
        (["calibrate", str(TINY), "--text", "none-such.txt", "--out", "out"], "none-such.txt"),
        (["calibrate", str(TINY), "--text", str(TINY / "heldout.txt"), "--out", "out", "--seq-len", "999"], "seq_len"),
        (
            ["calibrate", "./none-such-directory", "--text", str(TINY / "heldout.txt"), "--out", "out"],
            "none-such-directory",
        ),
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
        ["compress", str(TINY), "--recipe", "tq-81m"],
        ["compress", str(TINY), "--recipe", "tq-81m", "--config", "x.json", "--out", "out"],
        ["compress", str(TINY), "--recipe", "tq-81m", "--budget", "0.5", "--out", "out"],
        ["compress", str(TINY), "--budget", "0.5", "--objective", "happiness", "--out", "out"],
        ["calibrate", str(TINY), "--out", "out"],
        ["calibrate", str(TINY), "--text", "text.txt"],
        ["calibrate", str(TINY), "--text", "text.txt", "--out", "out", "--num-samples", "0"],
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
    assert run.returncode == 0 and f"{PARAMETERS:,}" in run.stdout, run.stderr


def test_a_closed_pipe_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tqcompressor.cli", "inspect", str(TINY)]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, "")


def test_ctrl_c_is_status_130_and_leaves_nothing(tmp_path):
    # The process signals itself, so that the signal arrives while the command runs; `best` on one thread takes longer.
    code = (
        "import os, signal, sys, threading; from tqcompressor.cli.main import main; "
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start(); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["compress", str(TINY), "--recipe", "tq-81m", "--effort", "best", "--threads", "1"]
    command = [sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (130, "tqcompressor: interrupted\n")
    assert not list(tmp_path.iterdir())
