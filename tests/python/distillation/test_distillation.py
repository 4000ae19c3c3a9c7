"""Staged distillation from end to end on a small model: its result, its report, what it refuses, how it goes on."""

import json
import multiprocessing
import random
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.distillation import RECIPE, letters
from helpers.models import tiny_config
from helpers.processes import run_script
from helpers.tokenizer import save_tokenizer
from tqcompressor import KroneckerSpec, TQConfig, distill
from tqcompressor.cli import main as cli
from tqcompressor.compression.model import compress
from tqcompressor.distillation.config import DistillConfig, TrainingConfig
from tqcompressor.distillation.report import ModelResult, TrainingReport
from tqcompressor.distillation.stages import Stage, StagedRecipe
from tqcompressor.errors import ConfigError, DestinationError, StorageError, TextError
from tqcompressor.evaluate.results import exponential
from tqcompressor.evaluate.scoring import negative_log_likelihood, token_sequence
from transformers import GPT2LMHeadModel

TRAINING = TrainingConfig(batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a small trained model with its tokenizer, and a text. Its dropout is on: a state to be kept."""
    folder = tmp_path_factory.mktemp("distillation")
    tokenizer = save_tokenizer(folder / "teacher")
    (folder / "text.txt").write_text(letters(6000), encoding="utf-8")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config())
    ids = torch.tensor(tokenizer(letters(6400, seed=1))["input_ids"]).view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        batch = ids[step * 16 % 192 :][:16]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "teacher")
    return SimpleNamespace(path=folder / "teacher", text=folder / "text.txt", cache=folder / "cache")


def run(data, out, **changes):
    options = {"text": data.text, "out": out, "cache": data.cache, "training": TRAINING, "device": "cpu"}
    return distill(changes.pop("teacher", data.path), changes.pop("recipe", RECIPE), **{**options, **changes})


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "student"
    return SimpleNamespace(out=out, report=run(teacher, out, losses=DistillConfig(hidden_weight=0.1)))


def test_the_ladder_of_the_report(finished):
    report = finished.report
    assert [stage.name for stage in report.stages] == ["half", "feed-forward", "quarter"]
    assert [stage.steps for stage in report.stages] == [11, 23, 11]
    assert all(stage.tokens == stage.steps * 4 * 32 for stage in report.stages)
    assert list(report.stages[1].lost_energy) == ["h.1.mlp.c_fc"]
    sizes = [stage.trained.parameters for stage in report.stages]
    assert report.teacher.parameters > sizes[0] > sizes[1] > sizes[2] == report.one_shot.parameters
    # Training heals what compression did.
    for stage in report.stages:
        assert stage.trained.perplexity < stage.compressed.perplexity
        assert [record.step for record in stage.losses] == list(range(1, stage.steps + 1))
    assert report.stages[2].trained.perplexity < report.one_shot.perplexity
    table = str(report)
    assert "one-shot" in table and "stage 3, quarter: trained" in table


def test_the_report_on_disk_says_the_same(finished):
    data = json.loads((finished.out / "training_report.json").read_text(encoding="utf-8"))
    assert TrainingReport.from_dict(data).to_dict() == data
    assert data["teacher"]["perplexity"] == finished.report.teacher.perplexity
    assert data["settings"]["losses"]["hidden_weight"] == 0.1
    card = (finished.out / "README.md").read_text(encoding="utf-8")
    assert "| stage 3, quarter: trained |" in card and "pip install tqcompressor" in card


def test_the_student_loads_in_a_fresh_process_and_scores_as_reported(finished, teacher):
    output = run_script(
        """
        import sys, tqcompressor
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        print(model.num_parameters(), type(model.lm_head).__name__, len(tokenizer))
        """,
        finished.out,
    )
    assert output.split()[-3:] == [str(finished.report.stages[2].trained.parameters), "KroneckerHead", "102"]
    # The student after each stage is a checkpoint too, and nothing but these is left of the stages.
    for number, stage in enumerate(RECIPE.stages, 1):
        folder = finished.out / "stages" / f"{number}-{stage.name}"
        assert [path.name for path in folder.iterdir()] == ["trained"]
        assert (folder / "trained" / "model.safetensors").is_file()


def test_a_finished_run_that_is_resumed_says_what_it_did(finished, teacher):
    before = (finished.out / "model.safetensors").stat().st_mtime_ns
    again = run(teacher, finished.out, losses=DistillConfig(hidden_weight=0.1), resume=True)
    assert again.to_dict() == finished.report.to_dict()
    assert (finished.out / "model.safetensors").stat().st_mtime_ns == before


def test_another_run_cannot_go_on_in_its_folder(finished, teacher):
    with pytest.raises(DestinationError, match="not empty"):
        run(teacher, finished.out)
    with pytest.raises(ConfigError, match=r"other settings \(losses\)"):
        run(teacher, finished.out, resume=True)
    with pytest.raises(ConfigError, match="other settings"):
        run(teacher, finished.out, losses=DistillConfig(hidden_weight=0.1), seed=5, resume=True)


def test_a_live_teacher_a_single_stage_and_a_narrow_dtype(teacher, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher.path)
    with pytest.raises(ConfigError, match="tokenizer"):
        run(teacher, tmp_path / "out", teacher=model)
    tokenizer = AutoTokenizer.from_pretrained(teacher.path)
    report = run(
        teacher,
        tmp_path / "out",
        teacher=model,
        tokenizer=tokenizer,
        recipe=RECIPE.stages[2].config,
        heldout=teacher.text,
        tokens=512,
        dtype="bfloat16",
    )
    assert [stage.name for stage in report.stages] == ["one-shot"]
    assert report.tokens == 512
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in model.parameters())
    # The one-shot student and the single stage's are one, and are scored once.
    compress(model, RECIPE.stages[2].config)
    total, tokens = negative_log_likelihood(model, token_sequence(tokenizer, teacher.text.read_text(encoding="utf-8")))
    expected = ModelResult(model.num_parameters(), exponential(total / tokens))
    assert report.one_shot == report.stages[0].compressed == expected


def test_what_is_wrong_is_said_before_anything_is_done(teacher, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "short.txt").write_text(letters(20), encoding="utf-8")
    (tmp_path / "few.txt").write_text(letters(300), encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    with pytest.raises(TextError, match="one block needs 32"):
        run(teacher, out, text=tmp_path / "short.txt")
    with pytest.raises(TextError, match="stage half has 2 samples of 32 tokens to train on, and a step takes 4"):
        run(teacher, out, text=tmp_path / "few.txt")
    with pytest.raises(TextError, match=r"tokens: expected at most .* got 1,000,000"):
        run(teacher, out, tokens=1_000_000)
    with pytest.raises(TextError, match="not UTF-8 at byte 3"):
        run(teacher, out, text=tmp_path / "latin.txt")
    with pytest.raises(TextError, match="no file matches"):
        run(teacher, out, text=tmp_path / "*.md")
    with pytest.raises(ConfigError, match="seq_len"):
        run(teacher, out, training=TrainingConfig(seq_len=33))
    with pytest.raises(ConfigError, match=r"h\.7"):
        recipe = TQConfig({"h.7.mlp.c_fc": KroneckerSpec((2, 2), 1)})
        run(teacher, out, recipe=StagedRecipe((RECIPE.stages[0], Stage("none", recipe))))
    with pytest.raises(ConfigError, match="dtype"):
        run(teacher, out, dtype="int8")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=0, free=1000))
    with pytest.raises(StorageError, match="0 MB are free"):
        run(teacher, out)
    assert not out.exists()


def test_another_models_tokenizer_is_refused(teacher, tmp_path):
    shutil.copytree(teacher.path, tmp_path / "teacher")
    tokenizer = save_tokenizer(tmp_path / "larger")
    tokenizer.add_tokens([f"<{number}>" for number in range(10)])
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="112 tokens, the teacher's vocabulary only 104"):
        run(teacher, tmp_path / "out", teacher=tmp_path / "teacher")


def test_the_command(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TQCOMPRESSOR_CACHE", str(teacher.cache))
    recipe = tmp_path / "recipe.json"
    recipe.write_text(StagedRecipe(RECIPE.stages[:1]).to_json(), encoding="utf-8")
    command = ["distill", "--teacher", str(teacher.path), "--recipe", str(recipe), "--text", str(teacher.text)]
    command += ["--out", str(tmp_path / "out"), "--device", "cpu", "--batch-size", "4"]
    assert cli.main([*command, "--tokens", "512"]) == 0
    printed = capsys.readouterr().out
    assert "stage 1, half: trained" in printed and f"written to {tmp_path / 'out'}" in printed
    assert cli.main([*command, "--tokens", "512", "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 512
    for wrong, message in (
        ([], "is not empty"),
        (["--resume", "--alpha", "0.7", "--tokens", "512"], "other settings (losses)"),
        (["--temperature", "0"], "temperature"),
        (["--text", "/nothing/*.txt", "--out", str(tmp_path / "other")], "no file matches"),
    ):
        assert cli.main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


def go_on(teacher, out):
    """What a process that may be killed does; with one thread, so that every run adds in the same order."""
    torch.set_num_threads(1)
    run(teacher, out, resume=True)


def start(teacher, out):
    # Forked from a process that imports everything once.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    process = processes.Process(target=go_on, args=(teacher, out))
    process.start()
    return process


def finish(process):
    process.join(timeout=300)
    assert process.exitcode == 0


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_equal_weights(one, other, tolerance):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0, atol=tolerance), name


def test_killed_five_times_it_ends_with_the_same_weights(teacher, tmp_path):
    finish(start(teacher, tmp_path / "whole"))
    stages, generator, killed_in = tmp_path / "killed" / "stages", random.Random(0), []
    for kill in range(5):
        process = start(teacher, tmp_path / "killed")
        # The moments are spread over the work.
        wanted, deadline = kill * 2 + generator.randrange(3), time.monotonic() + 120
        while progress(stages) < wanted and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(generator.random() * 0.2)
        if process.is_alive():
            process.kill()
            killed_in.append(progress(stages))
        process.join()
    assert len(killed_in) == 5 and len(set(killed_in)) >= 3, killed_in
    finish(start(teacher, tmp_path / "killed"))
    assert_equal_weights(tmp_path / "whole", tmp_path / "killed", 1e-6)
    whole, killed = (
        json.loads((tmp_path / name / "training_report.json").read_text(encoding="utf-8"))
        for name in ("whole", "killed")
    )
    for one, other in zip(whole["stages"], killed["stages"], strict=True):
        assert [record["loss"] for record in one["losses"]] == pytest.approx(
            [record["loss"] for record in other["losses"]], rel=1e-6
        )


def progress(stages):
    """How many things were written, so far: checkpoints, and the students of every stage."""
    done = 0
    for stage in stages.glob("*"):
        if (stage / "trained").is_dir():
            done += 6
        else:
            done += (stage / "compressed").is_dir()
            steps = [int(path.name.rpartition("-")[2]) for path in stage.glob("checkpoints/checkpoint-*")]
            done += len(steps) and 1 + max(steps) // 4
    return done
