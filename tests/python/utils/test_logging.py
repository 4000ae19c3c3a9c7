"""The log: quiet by default, with what the command line shows where the program asks for it."""

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tqcompressor
from helpers.corpora import TINY
from helpers.processes import run_script
from tqcompressor.cli.main import main
from tqcompressor.utils.progress import announce, phase_reporter, reporter


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [(record.name, record.getMessage()) for record in caplog.records]


def messages(lines):
    return [message.partition(" in ")[0].partition(" after ")[0] for _, message in lines()]


@pytest.mark.parametrize("option", [None, False, True, print])
def test_a_job_is_logged_whatever_shows_it(lines, capsys, option):
    with reporter(option, "fit") as report:
        for done in range(101):
            report(done, 100, "a note" if done == 50 else "")
    tenths = [f"fit: {10 * tenth} %" for tenth in range(1, 10)]
    tenths[4] += ", a note"
    assert messages(lines) == ["fit: begins", *tenths, "fit: done"]
    assert {name for name, _ in lines()} == {"tqcompressor.utils.progress"}


def test_a_job_that_stops_is_logged(lines):
    with pytest.raises(KeyboardInterrupt), reporter(False, "fit"):
        raise KeyboardInterrupt
    assert messages(lines) == ["fit: begins", "fit: stopped"]


def test_every_phase_is_logged(lines):
    with phase_reporter(False) as report:
        for phase in ("read", "write"):
            report(1, 2, phase)
            report(2, 2, phase)
    assert messages(lines) == [
        *("read: begins", "read: 50 %", "read: done"),
        *("write: begins", "write: 50 %", "write: done"),
    ]


def test_a_callback_is_called_beside_the_log(lines):
    seen = []
    with reporter(lambda done, total: seen.append((done, total)), "fit") as report:
        report(1, 2)
    assert seen == [(1, 2)] and "fit: 50 %" in messages(lines)


def test_nothing_is_called_where_nobody_reads_the_log(caplog):
    with reporter(False, "fit") as report:
        assert report is None
    with phase_reporter(False) as report:
        assert report is None
    # A job without a title is a part of another.
    caplog.set_level(logging.INFO)
    with reporter(False, "") as report:
        assert report is None


def jobs(folder):
    """A call of each kind that writes something, and the logger of its room."""
    text = Path(TINY, "evaluation.txt").read_text(encoding="utf-8")[:2000]
    return {
        "compress": (
            "compression.checkpoint",
            lambda: tqcompressor.compress_checkpoint(TINY, folder / "out", "tq-81m", effort="fast"),
        ),
        "expand": (
            "compression.checkpoint",
            lambda: tqcompressor.expand_checkpoint(folder / "out", folder / "dense"),
        ),
        "calibrate": (
            "compression.measured",
            lambda: main(
                f"calibrate {TINY} --text {folder / 'text.txt'} --out {folder / 'moments'} --num-samples 1 "
                "--seq-len 8 --engine native".split()
            ),
        ),
        "score": (None, lambda: tqcompressor.NativeModel.from_pretrained(TINY).score(text)),
    }


def test_every_room_logs_what_the_command_line_says(tmp_path, lines, capsys):
    (tmp_path / "text.txt").write_text("He looked at her. " * 20, encoding="utf-8")
    seen = 0
    for name, (room, call) in jobs(tmp_path).items():
        call()
        new, seen = lines()[seen:], len(lines())
        assert any(message.endswith(": begins") for _, message in new), name
        if room is not None:
            written = [logger for logger, message in new if message.startswith("written to")]
            assert written == [f"tqcompressor.{room}"], name
    assert any("compressing takes" in message for _, message in lines())


def test_the_command_line_prints_the_same_with_and_without_a_log(tmp_path):
    script = """
        import contextlib, io, logging, sys
        from tqcompressor.cli.main import main

        def run():
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
                options = ["--recipe", "tq-81m", "--effort", "fast", "--overwrite", "--out", sys.argv[2]]
                assert main(["compress", sys.argv[1], *options]) == 0
            # The last column of a report is the time that it took.
            return [line.rsplit(maxsplit=1)[0] for line in (out.getvalue() + errors.getvalue()).splitlines()]

        plain = run()
        logging.basicConfig(level="INFO", filename=sys.argv[3])
        assert run() == plain, plain
        assert sum("written" in line for line in plain) == 1, plain
    """
    run_script(script, TINY, tmp_path / "out", tmp_path / "log")
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert log.count("written to") == 1 and "compressing takes" in log


def test_the_log_is_quiet_unless_it_is_asked_for():
    script = """
        import logging, tqcompressor
        logging.getLogger("tqcompressor.compression").warning("a word")
        logging.getLogger("tqcompressor").error("a word")
        print(logging.getLogger("tqcompressor").level, logging.getLogger().handlers)
    """
    assert run_script(script) == "0 []\n"


@pytest.mark.parametrize(
    ("shell", "shown"), [(None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=object()), True)]
)
def test_a_bar_shows_in_the_kernel_of_a_notebook_but_not_in_a_program_that_has_imported_it(
    monkeypatch, capsys, shell, shown
):
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with reporter(None, "fit") as report:
        assert (report is not None) == shown
    announce(None, "three words beforehand", logging.getLogger("tqcompressor.test"))
    assert ("three words" in capsys.readouterr().err) == shown
