"""`tqcompressor generate` and `evaluate --engine native` as a user sees them, with and without torch."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers.checkpoints import Checkpoint
from helpers.processes import run_script
from tqcompressor import NativeModel
from tqcompressor.cli import main as cli

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
PROMPT = "He looked at"
# A None in sys.modules is what an absent package looks like to an import.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'tokenizers', 'safetensors']))\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((TINY / "heldout.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return path


def generate(capsys, *options):
    assert cli.main(["generate", str(TINY), "--prompt", PROMPT, *options]) == 0
    return capsys.readouterr().out


def test_a_text_is_continued(capsys):
    model = NativeModel.from_pretrained(TINY)
    options = ["--max-new-tokens", "12", "--threads", "2"]
    greedy = model.generate(PROMPT, max_new_tokens=12)
    assert generate(capsys, *options) == greedy + "\n"
    assert json.loads(generate(capsys, *options, "--json")) == {"prompt": PROMPT, "text": greedy}
    drawn = model.generate(PROMPT, max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.9, seed=5)
    sampling = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.9", "--seed", "5"]
    assert generate(capsys, *options, *sampling) == drawn + "\n" != greedy + "\n"
    assert len(model.encode(generate(capsys))) > 100


def test_text_comes_as_it_is_made_and_a_closed_pipe_is_no_traceback(tmp_path):
    folder = Checkpoint(width=128, vocabulary=8192, positions=4_000).write(tmp_path / "model")
    shutil.copy(TINY / "tokenizer.json", folder)
    options = ["--prompt", PROMPT, "--max-new-tokens", "3900", "--temperature", "1"]
    command = [sys.executable, "-m", "tqcompressor.cli", "generate", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert os.read(run.stdout.fileno(), 100)
        # Thousands of tokens are still to come.
        assert run.poll() is None
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 1


def test_both_engines_print_one_table(text, capsys):
    rows = []
    for engine in ("torch", "native"):
        options = ["--engine", engine, "--threads", "2", "--stride", "64", "--json"]
        if engine == "torch":
            options += ["--dtype", "float32"]
        assert cli.main(["evaluate", str(TINY), "--text", str(text), *options]) == 0
        (row,) = json.loads(capsys.readouterr().out)["models"]
        rows.append(row)
    in_torch, native = rows
    assert native["text"].pop("perplexity") == pytest.approx(in_torch["text"].pop("perplexity"), rel=1e-5)
    assert (native["parameters"], native["name"]) == (in_torch["parameters"], in_torch["name"])
    # Those of the checkpoint, which both compute in float32.
    assert native["bytes"] == in_torch["bytes"]
    assert native["text"].keys() == in_torch["text"].keys() and native["text"]["tokens"] == in_torch["text"]["tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "--device cuda: expected cpu with the native engine"),
        (["--dtype", "bfloat16"], "--dtype bfloat16: expected float32 with the native engine"),
        (["--batch-size", "4"], "--batch-size 4: not an option with the native engine"),
        (["--stride", "129"], "stride: expected an integer from 1 to 128"),
        (["--context", "129"], "context: expected an integer from 1 to 128"),
    ],
    ids=str,
)
def test_the_native_engine_refuses(text, options, message, capsys):
    assert cli.main(["evaluate", str(TINY), "--text", str(text), "--engine", "native", *options]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and output.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "500"], "context of 128"),
        (["--temperature", "-1"], "temperature: expected at least 0, got -1"),
        (["--top-p", "0"], "top_p: expected above 0"),
        (["--seed", "-1"], "seed"),
        (["--prompt", "word " * 200], "context of 128"),
    ],
    ids=str,
)
def test_generate_refuses_in_one_line(options, message, capsys):
    assert cli.main(["generate", str(TINY), "--prompt", PROMPT, *options]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and output.out == ""
    assert cli.main(["generate", "./none-such-directory", "--prompt", PROMPT]) == 2


def test_everything_works_without_torch_and_transformers(text, tmp_path):
    out = tmp_path / "out"
    commands = [
        ["compress", str(TINY), "--recipe", "tq-81m", "--effort", "fast", "--out", str(out)],
        ["inspect", str(out)],
        ["evaluate", str(out), "--teacher", str(TINY), "--text", str(text), "--json"],
        ["generate", str(out), "--prompt", PROMPT, "--max-new-tokens", "20"],
    ]
    script = f"""
        from tqcompressor.cli.main import main
        for command in {commands!r}:
            assert main(command) == 0
            print("next")
        assert sys.modules["torch"] is None
    """
    output = run_script(WITHOUT + textwrap.dedent(script))
    compressed, inspected, evaluated, generated, _ = output.split("next\n")
    assert "written to" in compressed and "lost energy" in inspected
    student, teacher = json.loads(evaluated[evaluated.index("{") :])["models"]
    assert 0.6 < student["parameters"] / teacher["parameters"] < 0.7
    assert 20 < teacher["text"]["perplexity"] < student["text"]["perplexity"]
    assert len(generated) > 20


def test_without_torch_what_needs_it_says_so(text):
    script = f"""
        from tqcompressor.cli.main import main
        command = ["evaluate", {str(TINY)!r}, "--text", {str(text)!r}]
        assert main([*command, "--engine", "torch"]) == 1
        assert main([*command, "--device", "cuda"]) == 2
    """
    output = run_script(WITHOUT + textwrap.dedent(script))
    assert 'engine torch needs torch: pip install "tqcompressor[hf]"' in output
    assert "--device cuda: expected cpu with the native engine: torch is not installed" in output


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.14, 0.15, 0.16, 0.2, 0.4])
def test_ctrl_c_is_status_130(seconds):
    # The process signals itself, while it loads or later; a long text at a stride of 1 is not finished by then.
    code = (
        "import os, signal, sys, threading; from tqcompressor.cli.main import main; "
        f"threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGINT)).start(); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["evaluate", str(TINY), "--text", str(TINY / "heldout.txt"), "--stride", "1", "--engine", "native"]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr, run.stdout) == (130, "tqcompressor: interrupted\n", "")
