"""A sweep: one calibration and one set of spectra for several budgets, each measured; resumed to the same table."""

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tqcompressor
import transformers
from helpers.checkpoints import listing
from helpers.processes import environment
from helpers.tokenizer import save_tokenizer
from tqcompressor import _core, compress_checkpoint, sweep
from tqcompressor.cli.main import main
from tqcompressor.compression import checkpoint as on_disk
from tqcompressor.errors import CheckpointError, ConfigError, DestinationError, TextError, TQError
from tqcompressor.frontier import measuring
from tqcompressor.frontier.results import SweepResult, SweepRow, read_sweep

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
READING = {"text": TINY / "calibration.txt", "num_samples": 8, "seq_len": 64, "engine": "native"}
BUDGETS = [0.6, 3_900_000, "70%"]
# Names of files that a sweep leaves.
LEFT = ["frontier.png", "frontier.svg", "sweep.json"]


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text((TINY / "evaluation.txt").read_text()[:3000])
    return path


@pytest.fixture(scope="module")
def whole(heldout, tmp_path_factory):
    """A sweep that nothing stopped, with its models."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.warns(UserWarning, match="no gradients"):
        result = sweep(
            TINY, [0.6, 0.8], folder / "out", heldout=heldout, **READING, keep=folder / "kept", progress=False
        )
    return result, folder


def figures(result):
    """What does not depend on the speed of the machine."""
    rows = (*result.rows, result.dense)
    return [(row.budget, row.parameters, row.bytes, row.macs, row.quality.hex()) for row in rows]


def test_every_row_is_what_compressing_and_evaluating_alone_give(whole, heldout, tmp_path):
    result, folder = whole
    assert listing(folder / "out") == LEFT and result.complete and result.measure == "perplexity"
    assert [row.budget for row in result.rows] == [0.6, 0.8]
    reading = {**READING, "engine": "native"}
    for row in result.rows:
        with pytest.warns(UserWarning, match="no gradients"):
            report = compress_checkpoint(TINY, tmp_path / str(row.budget), budget=row.budget, **reading, progress=False)
        kept = folder / "kept" / str(row.budget)
        # The card has the perplexity, and is the same beside it.
        for name in ("model.safetensors", "config.json", "lost_energy.svg"):
            assert (kept / name).read_bytes() == (tmp_path / str(row.budget) / name).read_bytes()
        scores = [line for line in (kept / "README.md").read_text().splitlines() if "heldout.txt" in line]
        assert len(scores) == 1 and f"| {result.dense.quality:,.2f} | {row.quality:,.2f} |" in scores[0]
        assert (row.parameters, row.bytes) == (report.parameters_after, report.bytes_after)
        assert row.macs == sum(matrix.macs_after for matrix in report.matrices)
        model = tqcompressor.NativeModel.from_pretrained(kept)
        assert row.quality == model.perplexity(heldout).perplexity and row.tokens_per_second > 0
    assert result.dense.quality == tqcompressor.NativeModel.from_pretrained(TINY).perplexity(heldout).perplexity
    assert result.dense.macs > result.rows[1].macs


def test_the_result_reads_prints_and_draws(whole):
    result, folder = whole
    assert read_sweep(folder / "out" / "sweep.json") == result
    table = str(result).splitlines()
    assert table[2].startswith("0.6") and table[4].startswith("original") and "heldout.txt" in table[5]
    svg = ElementTree.fromstring((folder / "out" / "frontier.svg").read_text())
    points = list(svg.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(points) == 2 * 3
    (axes,) = result.plot().axes
    assert axes.get_ylabel() == "perplexity" and len(axes.lines[0].get_xdata()) == 2


@pytest.mark.parametrize("qualities", [[], [1e4, 20.0], [float("inf"), 30.0], [50.0, 50.0]])
def test_any_qualities_can_be_drawn_and_stored(whole, qualities):
    rows = tuple(replace(whole[0].rows[0], quality=quality, budget="<b>&") for quality in qualities)
    result = replace(whole[0], rows=rows)
    svg = ElementTree.fromstring(result.to_svg())
    finite = sum(np.isfinite(quality) for quality in qualities)
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) == 2 * (finite + 1)
    assert SweepResult.from_dict(json.loads(result.to_json())) == result


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tqcompressor": 1, "dense": null, "rows": [{}]}', "\xff"])
def test_what_is_no_sweep_is_refused(content, tmp_path):
    (tmp_path / "sweep.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"sweep\.json: not the result of a sweep"):
        read_sweep(tmp_path / "sweep.json")


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_spectra_are_computed_once_and_the_text_is_read_once(effort, heldout, tmp_path, monkeypatch):
    calibrations, stores = [], []
    kept = on_disk.kept_calibration
    monkeypatch.setattr(
        "tqcompressor.frontier.sweep.kept_calibration", lambda *a, **k: calibrations.append(a) or kept(*a, **k)
    )
    made = _core.SpectrumStore
    monkeypatch.setattr(_core, "SpectrumStore", lambda count: stores.append(count) or made(count))
    matrices = ["h.0.mlp.*", "wte"]
    with pytest.warns(UserWarning, match="no gradients"):
        result = sweep(
            TINY,
            BUDGETS,
            tmp_path / "out",
            heldout=heldout,
            **READING,
            matrices=matrices,
            effort=effort,
            progress=False,
        )
    assert len(calibrations) == 1 and stores == [3]
    assert [row.budget for row in result.rows] == [0.6, "70%", 3_900_000]


class StoppedError(Exception):
    pass


def stopping(monkeypatch, finished):
    """Stops a sweep when it measures the next checkpoint after so many."""
    measured = []
    call = measuring.Measuring.__call__

    def measure(self, folder, progress=None):
        if len(measured) == finished:
            raise StoppedError
        measured.append(folder)
        return call(self, folder, progress)

    monkeypatch.setattr(measuring.Measuring, "__call__", measure)
    return measured


@pytest.mark.filterwarnings("ignore:the native engine")
@pytest.mark.parametrize("finished", [1, 2])
def test_a_stopped_sweep_goes_on_without_repeating_anything(finished, whole, heldout, tmp_path, monkeypatch):
    out, options = tmp_path / "out", {"heldout": heldout, **READING, "progress": False}
    with monkeypatch.context() as patch:
        stopping(patch, finished)
        with pytest.raises(StoppedError):
            sweep(TINY, [0.6, 0.8], out, **options)
    partial = read_sweep(out / "sweep.json")
    assert not partial.complete and len(partial.rows) == finished - 1
    with pytest.raises(DestinationError, match="holds a sweep: resume"):
        sweep(TINY, [0.6, 0.8], out, **options)
    for changed, name in (({"seed": 1}, "seed"), ({"context": 64}, "context"), ({"num_samples": 9}, "num_samples")):
        with pytest.raises(ConfigError, match=f"is another one: {name} was"):
            sweep(TINY, [0.6, 0.8], out, **{**options, **changed}, resume=True)
    measured = stopping(monkeypatch, 9)
    monkeypatch.setattr(on_disk, "calibrate_checkpoint", None)
    result = sweep(TINY, [0.6, 0.8], out, **options, resume=True)
    assert len(measured) == 3 - finished and listing(out) == LEFT
    assert figures(result) == figures(whole[0])
    # What was finished keeps its speed, too.
    assert (partial.dense.tokens_per_second, *partial.rows) == (
        result.dense.tokens_per_second,
        *result.rows[: finished - 1],
    )


@pytest.mark.filterwarnings("ignore:the native engine")
def test_budgets_may_be_added_to_a_finished_sweep(whole, heldout, tmp_path, monkeypatch):
    options = {"heldout": heldout, **READING, "progress": False}
    sweep(TINY, [0.8], tmp_path / "out", **options)
    measured = stopping(monkeypatch, 9)
    result = sweep(TINY, ["60%", "0.8"], tmp_path / "out", **options, resume=True, keep=tmp_path / "kept")
    # The model that was finished without being kept is made again; its figures stay.
    assert len(measured) == 2 and sorted(listing(tmp_path / "kept"))[0] == "0.8"
    assert [row.quality for row in result.rows] == [row.quality for row in whole[0].rows]
    assert [row.budget for row in result.rows] == ["60%", 0.8]


@pytest.mark.filterwarnings("ignore:the native engine")
def test_a_killed_sweep_is_resumed_on_the_command_line(whole, heldout, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["sweep", str(TINY), "--budgets", "0.6", "0.8", "--heldout", str(heldout), "--out", str(out)]
    command += ["--text", str(READING["text"]), "--num-samples", "8", "--seq-len", "64", "--engine", "native", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tqcompressor", *command], env=environment(), stderr=-3, stdout=-3
    )
    while process.poll() is None and not ((out / "sweep.json").exists() and read_sweep(out / "sweep.json").rows):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert len(read_sweep(out / "sweep.json").rows) >= 1
    assert main([*command, "--resume"]) == 0
    result = SweepResult.from_dict(json.loads(capsys.readouterr().out))
    assert [each[1:] for each in figures(result)] == [each[1:] for each in figures(whole[0])]
    assert listing(out) == LEFT and listing(tmp_path) == sorted(["out", *(f"out/{name}" for name in LEFT)])


REFUSED = {
    "none": ({"budgets": []}, ConfigError, "at least one"),
    "twice": ({"budgets": [0.65, "65%"]}, ConfigError, r"each once, got 0\.65 and '65%'"),
    "too large": ({"budgets": [0.5, 1.5]}, ConfigError, r"budget must be .* got 1\.5"),
    "the whole": ({"budgets": [0.5, "99%", "6000000"]}, ConfigError, "budget 6000000: .*nothing to compress"),
    "too small": ({"budgets": [0.5, 0.01]}, ConfigError, r"budget 0\.01: .*smallest budget that can be met is 0\.0"),
    "bytes": ({"budgets": ["90kB"]}, ConfigError, "budget 90kB: .*already|smallest budget"),
    "no text": ({"heldout": "  "}, TextError, "empty"),
    "one token": ({"heldout": "a"}, TextError, "2 tokens|too short|at least"),
    "no file": ({"heldout": Path("nowhere.txt")}, (TQError, OSError), "nowhere"),
    "context": ({"context": 4096}, ConfigError, "context"),
    "both": ({"calibration": "x", "text": "y"}, ConfigError, "got both"),
    "objective": ({"objective": "sensitivity"}, ConfigError, "calibration"),
    "keep": ({"keep": "{out}"}, DestinationError, "another folder"),
    "short text": ({"text": "some words", "engine": "native"}, TextError, "sequences"),
    "device": ({"engine": "native", "device": "cuda"}, ConfigError, "device"),
}


@pytest.mark.filterwarnings("ignore:the native engine")
@pytest.mark.parametrize("options, error, words", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_leave_nothing(options, error, words, tmp_path):
    out = tmp_path / "out"
    given = {"budgets": [0.5], "heldout": "He looked at her.", "engine": "native", "progress": False, **options}
    given = {name: str(out) if value == "{out}" else value for name, value in given.items()}
    with pytest.raises(error, match=words):
        sweep(TINY, given.pop("budgets"), out, **given)
    # A text that is too short for a calibration is found when it is read, after the original.
    assert listing(tmp_path) == [] or (words == "sequences" and read_sweep(out / "sweep.json").rows == ())


def test_the_smallest_budget_that_is_named_can_be_met(tmp_path):
    with pytest.raises(ConfigError) as refused:
        sweep(TINY, [0.01], tmp_path / "out", heldout="He looked at her.", engine="native")
    share = float(str(refused.value).split("can be met is ")[1].split(",")[0])
    for budget, met in ((share, True), (share - 0.001, False)):
        if met:
            assert tqcompressor.plan(TINY, budget).parameters_after <= budget * 5_289_472
        else:
            with pytest.raises(ConfigError, match="smallest budget"):
                tqcompressor.plan(TINY, budget)


def test_folders_of_others_are_not_touched(heldout, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "kept" / "0.6"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(DestinationError, match=r"holds no sweep\.json"):
        sweep(TINY, [0.6], out, heldout=heldout, engine="native", progress=False)
    kept.mkdir(parents=True)
    (kept / "mine.txt").write_text("mine")
    with pytest.raises(DestinationError, match="not empty"):
        sweep(TINY, [0.6], tmp_path / "new", heldout=heldout, engine="native", keep=kept.parent, progress=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DestinationError, match="no folder"):
        sweep(TINY, [0.6], tmp_path / "file", heldout=heldout, engine="native", progress=False)
    assert listing(tmp_path) == ["file", "kept", "kept/0.6", "kept/0.6/mine.txt", "out", "out/mine.txt"]


def test_the_held_out_text_must_be_another_than_the_calibration(heldout, tmp_path):
    copied = tmp_path / "copied.txt"
    copied.write_bytes(heldout.read_bytes())
    options = {"text": [READING["text"], copied], "num_samples": 4, "seq_len": 32, "engine": "native"}
    with pytest.warns(UserWarning, match=r"copied\.txt: the held-out text is among"):
        sweep(TINY, [0.9], tmp_path / "out", heldout=heldout, **options, matrices=["h.0.*"], progress=False)


SIZES = {
    "vocab_size": 104,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def t5():
    config = transformers.T5Config(vocab_size=104, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


FAMILIES = {
    "gpt_neox": (lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)), "perplexity"),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**SIZES)), "cosine"),
    "t5": (t5, "cosine"),
}


@pytest.mark.parametrize("model, measure", FAMILIES.values(), ids=FAMILIES.keys())
def test_other_families_are_measured_by_torch(model, measure, tmp_path):
    model().save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    text = "He looked at her.\nShe looked at the door, and then at him."
    result = sweep(tmp_path / "source", [0.7, 0.9], tmp_path / "out", heldout=text, progress=False)
    assert (result.measure, result.engine) == (measure, "torch")
    assert all(np.isfinite(row.quality) and row.tokens_per_second > 0 for row in (*result.rows, result.dense))
    assert measure == "perplexity" or result.dense.quality == pytest.approx(1)
    with pytest.raises(CheckpointError):
        sweep(tmp_path / "source", [0.7], tmp_path / "native", heldout=text, engine="native", progress=False)
    assert not (tmp_path / "native").exists()


def test_a_sweep_of_the_native_engine_needs_no_torch(heldout, tmp_path):
    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["matplotlib"] = None
import importlib.util
find = importlib.util.find_spec
import tqcompressor.utils.engines, tqcompressor.frontier.sweep as module
missing = lambda name, *rest: None if name in ("torch", "transformers", "matplotlib") else find(name, *rest)
tqcompressor.utils.engines.find_spec = module.find_spec = missing
out = {str(tmp_path / "out")!r}
result = tqcompressor.sweep({str(TINY)!r}, [0.7], out, heldout="He looked at her.", progress=False)
print(result.engine, len(result.rows))
"""
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert run.stdout.strip().endswith("native 1"), run.stderr
    assert listing(tmp_path / "out") == ["frontier.svg", "sweep.json"]


def test_a_row_is_plain_json():
    row = SweepRow(0.5, 1, 2, None, float("inf"), 3.0, 0.0, {})
    assert SweepRow.from_dict(json.loads(json.dumps(row.to_dict(), allow_nan=False))) == row
