"""A checkpoint or a live model and a text, in one call: as calibrating first and compressing then."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tqcompressor
from helpers.families import family_model
from safetensors.torch import load_file, save_file
from tqcompressor.cli import main as cli
from tqcompressor.compression.measured import check_files
from tqcompressor.errors import CheckpointError, ConfigError, DestinationError, TextError
from tqcompressor.utils.atomic_io import sole_run
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
TEXT = TINY / "heldout.txt"
READING = {"num_samples": 8, "seq_len": 64}
BUDGET = {"budget": 0.65, "progress": False}


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The weights, and the calibration, of calibrating first and compressing then."""
    folder = tmp_path_factory.mktemp("by-hand")
    found = tqcompressor.calibrate_checkpoint(TINY, TEXT, **READING, progress=False)
    found.save(folder / "calibration.safetensors")
    tqcompressor.compress_checkpoint(TINY, folder / "out", calibration=found, **BUDGET)
    return weights(folder / "out"), (folder / "calibration.safetensors").read_bytes()


def test_on_disk_it_is_both_steps_in_one(tmp_path, by_hand):
    kept = tmp_path / "kept.safetensors"
    report = tqcompressor.compress_checkpoint(
        TINY, tmp_path / "out", text=TEXT, save_calibration=kept, **READING, **BUDGET
    )
    assert report.calibrated
    assert (weights(tmp_path / "out"), kept.read_bytes()) == by_hand


@pytest.mark.parametrize("sensitivity", [True, False])
def test_the_report_and_the_card_say_what_was_read(tmp_path, sensitivity):
    other = tmp_path / "other.txt"
    other.write_bytes(TEXT.read_bytes())
    found = tqcompressor.calibrate_checkpoint(TINY, [TEXT, other], **READING, sensitivity=sensitivity, progress=False)
    report = tqcompressor.compress_checkpoint(TINY, tmp_path / "out", calibration=found, **BUDGET)
    record = report.calibration
    assert (record.tokens, record.seed, record.sensitivity) == (512, 0, sensitivity)
    assert record.texts == {"heldout.txt": 256, "other.txt": 256}
    gradients = " and gradients" * sensitivity
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Inputs{gradients} were measured on 512 tokens: 256 of `heldout.txt`, 256 of `other.txt`." in card
    assert tqcompressor.inspect(tmp_path / "out") == report
    live = tqcompressor.compress(AutoModelForCausalLM.from_pretrained(TINY), calibration=found, **BUDGET)
    assert live.calibration == record

    plain = tqcompressor.compress_checkpoint(
        TINY, tmp_path / "plain", calibration=found, objective="frobenius", **BUDGET
    )
    assert plain.calibration is None and "were measured" not in (tmp_path / "plain" / "README.md").read_text()


def test_on_the_command_line_too(tmp_path, by_hand):
    options = ["--budget", "0.65", "--text", str(TEXT), "--num-samples", "8", "--seq-len", "64"]
    assert cli.main(["compress", str(TINY), "--out", str(tmp_path / "out"), *options]) == 0
    assert weights(tmp_path / "out") == by_hand[0]


def test_of_a_live_model_it_is_both_steps_in_one():
    models = [AutoModelForCausalLM.from_pretrained(TINY, dtype="float32") for _ in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tqcompressor.compress(models[0], text=TEXT, tokenizer=tokenizer, **READING, **BUDGET)
    found = tqcompressor.calibrate(models[1], tokenizer, TEXT, **READING, progress=False)
    tqcompressor.compress(models[1], calibration=found, **BUDGET)
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_without_torch_the_native_engine_calibrates(tmp_path):
    code = """if True:
        import sys, warnings
        sys.modules["torch"] = sys.modules["transformers"] = None
        import tqcompressor
        from pathlib import Path
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = tqcompressor.compress_checkpoint(
                sys.argv[1], sys.argv[2], budget=0.65, text=Path(sys.argv[1], "heldout.txt"), engine="native",
                num_samples=4,
            )
        assert report.calibrated
        assert "measures no gradients" in str(caught[0].message), caught
    """
    subprocess.run([sys.executable, "-c", code, str(TINY), str(tmp_path / "out")], check=True, timeout=120)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"calibration": "c.safetensors"}, ConfigError, "got both"),
        ({"text": None, "save_calibration": "c.safetensors"}, ConfigError, "save_calibration: expected with a text"),
        ({"engine": "gpu"}, ConfigError, "engine: expected"),
        ({"engine": "native", "device": "cuda"}, ConfigError, "device cuda: expected cpu with the native engine"),
        ({"matrices": ["none.such"]}, ConfigError, "matches no matrix"),
        ({"budget": -1}, ConfigError, "budget"),
        ({"num_samples": 10**9}, TextError, ""),
    ],
)
def test_refusals_leave_nothing(tmp_path, options, error, words):
    arguments = {"budget": 0.65, "text": TEXT, **options}
    with pytest.raises(error, match=words):
        tqcompressor.compress_checkpoint(TINY, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_taken_destination_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("tqcompressor.compression.measured.calibrate_checkpoint", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(DestinationError):
        tqcompressor.compress_checkpoint(TINY, tmp_path, budget=0.65, text=TEXT)


def into_a_folder(folder):
    return folder, "is a folder"


def into_the_result(folder):
    return folder / "out" / "kept.safetensors", "expected a file outside"


def into_nothing(folder):
    (folder / "link").symlink_to(folder / "gone" / "kept.safetensors")
    return folder / "link", "symbolic link"


def into_what_another_run_writes(folder):
    return folder / "taken.safetensors", "another run of tqcompressor"


@pytest.mark.parametrize("place", [into_a_folder, into_the_result, into_nothing, into_what_another_run_writes])
def test_a_calibration_that_could_not_be_saved_is_refused_before_anything_is_read(tmp_path, monkeypatch, place, capsys):
    monkeypatch.setattr("tqcompressor.compression.measured.calibrate_checkpoint", lambda *_, **__: pytest.fail("read"))
    kept, words = place(tmp_path)
    with sole_run(tmp_path / "taken.safetensors"):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(DestinationError, match=words):
            tqcompressor.compress_checkpoint(TINY, tmp_path / "out", budget=0.65, text=TEXT, save_calibration=kept)
        # The command `calibrate` goes the same way; nothing else is written there.
        if place is not into_the_result:
            assert cli.main(["calibrate", str(TINY), "--text", str(TEXT), "--out", str(kept)]) != 0
            assert words in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["gpt2", "bert-tied", "llama-tied", "distilbert"])
def test_files_that_transformers_misreads_are_refused_whichever_family(tmp_path, name):
    family_model(name).save_pretrained(tmp_path)
    check_files(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"_orig_mod.{stored}": tensor for stored, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"names begin with '_orig_mod\.'"):
        check_files(tmp_path)
    with pytest.raises(CheckpointError, match="_orig_mod"):
        tqcompressor.calibrate_checkpoint(tmp_path, TEXT, num_samples=2)


def test_files_of_a_family_without_a_description_are_left_to_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    save_file({"anything": torch.ones(2)}, tmp_path / "model.safetensors")
    check_files(tmp_path)


def test_a_live_model_needs_the_tokenizer():
    model = AutoModelForCausalLM.from_pretrained(TINY)
    for options in ({"text": TEXT}, {"tokenizer": AutoTokenizer.from_pretrained(TINY)}):
        with pytest.raises(ConfigError, match="got only one of them"):
            tqcompressor.compress(model, budget=0.65, **options)


@pytest.mark.parametrize("options", [{"budget": -1}, {"config": {"specs": {"none.such": {"rank": 2}}}}])
def test_a_live_model_is_not_calibrated_for_what_is_refused(options, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(TINY)
    monkeypatch.setattr("tqcompressor.compression.model.calibrate", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ConfigError):
        tqcompressor.compress(model, text=TEXT, tokenizer=AutoTokenizer.from_pretrained(TINY), **options)


def test_the_threads_of_torch_are_as_before():
    before = torch.get_num_threads()
    tqcompressor.calibrate_checkpoint(TINY, TEXT, num_samples=2, seq_len=16, threads=before + 1, progress=False)
    assert torch.get_num_threads() == before
