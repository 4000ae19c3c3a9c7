"""Moments measured by the native runtime: equal to those of torch's hooks, and used without torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tqcompressor
from helpers.models import llama_model
from helpers.native import HEAD_SPECS, LLAMA_SPECS, SPECS, compressed
from helpers.tokenizer import save_tokenizer
from tqcompressor import Calibration, NativeModel
from tqcompressor.cli import main as cli
from tqcompressor.errors import ConfigError, StorageError, TextError
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
TEXT = TINY / "heldout.txt"


def same(ours, theirs):
    """Compares two calibrations, each moment relative to its largest entry."""
    assert ours.moments.keys() == theirs.moments.keys()
    assert (ours.tokens, ours.sensitivity, ours.model_type) == (theirs.tokens, theirs.sensitivity, theirs.model_type)
    for name, moment in ours.moments.items():
        largest = np.abs(theirs.moments[name]).max()
        assert np.abs(moment - theirs.moments[name]).max() <= 1e-5 * largest, name


def in_torch(folder, text, tokenizer=AutoTokenizer, **options):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tokenizer.from_pretrained(folder)
    return tqcompressor.calibrate(model.float(), tokenizer, text, sensitivity=False, progress=False, **options)


@pytest.mark.parametrize("text", [TEXT, TEXT.read_text(encoding="utf-8")], ids=["file", "text"])
def test_moments_are_those_of_torch(text):
    options = {"num_samples": 12, "seq_len": 50, "seed": 3}
    ours = NativeModel.from_pretrained(TINY).calibrate(text, **options)
    same(ours, in_torch(TINY, text, **options))


@pytest.mark.parametrize("tied", [True, False])
def test_moments_of_compressed_models_are_those_of_torch(tmp_path, tied):
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=104, n_positions=64, tie_word_embeddings=tied, eos_token_id=0
    )
    specs = SPECS if tied else {"own head": HEAD_SPECS}
    words, options = "a b c d e f g h " * 40, {"num_samples": 5, "seq_len": 30}
    for folder in compressed(GPT2LMHeadModel(config), specs, tmp_path).values():
        save_tokenizer(folder)
        same(NativeModel.from_pretrained(folder).calibrate(words, **options), in_torch(folder, words, **options))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {"tie_word_embeddings": True}), ("qwen2", {"tie_word_embeddings": False}), ("mistral", {"head_dim": 6})],
    ids=str,
)
def test_moments_of_llamas_relatives_are_those_of_torch(tmp_path, model_type, changes):
    specs = {"low rank": LLAMA_SPECS["low rank"], "up alone": LLAMA_SPECS["up alone"]}
    if changes.get("head_dim"):
        specs = {}
    words, options = "a b c d e f g h " * 40, {"num_samples": 5, "seq_len": 30}
    for folder in compressed(llama_model(model_type, **changes), specs, tmp_path).values():
        save_tokenizer(folder)
        native = NativeModel.from_pretrained(folder)
        found = native.calibrate(words, **options)
        # AutoTokenizer would give a Qwen2 the rules of the published tokenizer, whatever the file says.
        same(found, in_torch(folder, words, PreTrainedTokenizerFast, **options))
        # Measured once.
        assert found.moments["input.layers.0.self_attn.q_proj"] is found.moments["input.layers.0.self_attn.v_proj"]
        assert [len(names) for names, _ in native._runtime.linear_layers()][:4] == [3, 1, 2, 1]


def test_memory_and_threads_make_no_difference():
    found = [
        NativeModel.from_pretrained(TINY, threads=threads).calibrate(TEXT, num_samples=5, max_memory=memory)
        for threads, memory in ((1, 2 << 30), (3, 0), (2, 3_000_000), (2, 1 << 80))
    ]
    for other in found[1:]:
        for name, moment in found[0].moments.items():
            assert np.array_equal(moment, other.moments[name]), name


def test_progress_ends_at_its_total():
    for memory in (0, 1 << 30):
        seen = []
        model = NativeModel.from_pretrained(TINY)
        model.calibrate(TEXT, num_samples=4, max_memory=memory, progress=lambda *state, seen=seen: seen.append(state))
        # One pass over the text.
        assert seen[-1] == (4 * 128, 4 * 128) and seen == sorted(seen)


def test_a_file_without_room_is_refused(monkeypatch):
    monkeypatch.setenv("TMPDIR", str(TINY / "none"))
    with pytest.raises(StorageError, match="none"):
        NativeModel.from_pretrained(TINY).calibrate(TEXT, num_samples=4, max_memory=0)


def test_what_cannot_be_is_refused():
    model = NativeModel.from_pretrained(TINY)
    for options, error, words in (
        ({"seq_len": 129}, ConfigError, "2 to 128"),
        ({"num_samples": 0}, ConfigError, "num_samples"),
        ({"num_samples": 100_000}, TextError, "100000 sequences"),
        ({"max_memory": -1}, ConfigError, "max_memory"),
    ):
        with pytest.raises(error, match=words):
            model.calibrate(TEXT, **options)
    with pytest.raises(FileNotFoundError):
        model.calibrate(Path("no such file"))


def test_a_budget_is_spent_by_what_was_measured_without_torch(tmp_path):
    calibration, out = tmp_path / "calibration.safetensors", tmp_path / "out"
    commands = [
        ["calibrate", str(TINY), "--text", str(TEXT), "--out", str(calibration), "--num-samples", "16"],
        ["compress", str(TINY), "--budget", "0.6", "--calibration", str(calibration), "--out", str(out)],
    ]
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "from tqcompressor.cli.main import main; "
        f"sys.exit(max(main(command) for command in {commands!r}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "measures no gradients" in run.stderr
    same(Calibration.load(calibration), in_torch(TINY, TEXT, num_samples=16))
    report = json.loads((out / "compression_report.json").read_text(encoding="utf-8"))
    assert report["calibrated"]


def test_the_native_engine_is_chosen_by_name_too(tmp_path, capsys):
    out = tmp_path / "calibration.safetensors"
    arguments = [
        "calibrate",
        str(TINY),
        "--text",
        str(TEXT),
        "--out",
        str(out),
        "--num-samples",
        "4",
        "--no-sensitivity",
        "--json",
    ]
    assert cli.main([*arguments, "--engine", "native", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["sensitivity"] is False and "gradients" not in captured.err
    assert cli.main([*arguments, "--engine", "native", "--dtype", "float16"]) == 2
