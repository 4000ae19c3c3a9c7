"""Distillation from end to end on a small model: its result, its report, its errors, and resuming."""

import inspect
import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.distillation import RECIPE, letters
from helpers.models import tiny_config
from helpers.processes import forked, run_script
from helpers.tokenizer import save_tokenizer
from tqcompressor import KroneckerSpec, TQConfig, _core, distill, token_blocks
from tqcompressor.cli import main as cli
from tqcompressor.cli.options import parser
from tqcompressor.compression.model import compress
from tqcompressor.distillation import runner
from tqcompressor.distillation.config import DistillConfig, TrainingConfig
from tqcompressor.distillation.report import ModelResult, TrainingReport
from tqcompressor.distillation.stages import Stage, StagedRecipe
from tqcompressor.distillation.training import Trained, training_arguments
from tqcompressor.errors import ConfigError, DestinationError, StorageError, TextError
from tqcompressor.evaluate.results import exponential
from tqcompressor.evaluate.scoring import negative_log_likelihood, tokenised
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, TrainingArguments

TRAINING = TrainingConfig(batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a small trained model with its tokenizer, and a text. Its dropout has a state to resume."""
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


def test_the_scores_of_the_report(finished):
    report = finished.report
    assert [stage.name for stage in report.stages] == ["half", "feed-forward", "quarter"]
    assert [stage.steps for stage in report.stages] == [11, 23, 11]
    assert all(stage.tokens == stage.steps * 4 * 32 for stage in report.stages)
    assert list(report.stages[1].lost_energy) == ["h.1.mlp.c_fc"]
    sizes = [stage.trained.parameters for stage in report.stages]
    assert report.teacher.parameters > sizes[0] > sizes[1] > sizes[2] == report.one_shot.parameters
    # Training lowers the perplexity after every compression.
    for stage in report.stages:
        assert stage.trained.perplexity < stage.compressed.perplexity
        assert [record.step for record in stage.losses] == list(range(1, stage.steps + 1))
    assert report.stages[2].trained.perplexity < report.one_shot.perplexity
    table = str(report)
    assert "one-shot" in table and "stage 3, quarter: trained" in table


def test_the_report_on_disk_is_equal(finished):
    data = json.loads((finished.out / "training_report.json").read_text(encoding="utf-8"))
    assert TrainingReport.from_dict(data).to_dict() == data
    assert data["teacher"]["score"] == finished.report.teacher.perplexity
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
        warm="transformers",
    )
    assert output.split()[-3:] == [str(finished.report.stages[2].trained.parameters), "KroneckerHead", "102"]
    # Of the stages, only the trained students remain.
    for number, stage in enumerate(RECIPE.stages, 1):
        folder = finished.out / "stages" / f"{number}-{stage.name}"
        assert [path.name for path in folder.iterdir()] == ["trained"]
        assert (folder / "trained" / "model.safetensors").is_file()


def test_resuming_a_finished_run_returns_its_report(finished, teacher):
    before = (finished.out / "model.safetensors").stat().st_mtime_ns
    again = run(teacher, finished.out, losses=DistillConfig(hidden_weight=0.1), resume=True)
    assert again.to_dict() == finished.report.to_dict()
    assert (finished.out / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_with_other_settings_is_not_resumed(finished, teacher):
    with pytest.raises(DestinationError, match="not empty"):
        run(teacher, finished.out)
    with pytest.raises(ConfigError, match=r"other settings \(losses\)"):
        run(teacher, finished.out, resume=True)
    with pytest.raises(ConfigError, match="other settings"):
        run(teacher, finished.out, losses=DistillConfig(hidden_weight=0.1), seed=5, resume=True)


def test_a_live_teacher_a_single_stage_and_a_narrow_dtype(teacher, tmp_path):
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
    # The student of the single stage is the one-shot student, and is scored once.
    compress(model, RECIPE.stages[2].config)
    total, tokens = negative_log_likelihood(model, tokenised(tokenizer, teacher.text).tokens)
    expected = ModelResult(model.num_parameters(), exponential(total / tokens))
    assert report.one_shot == report.stages[0].compressed == expected


def test_errors_come_before_anything_is_written(teacher, tmp_path, monkeypatch):
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
    with pytest.raises(ConfigError, match="tokens: expected an integer from 1 up, got 0"):
        run(teacher, out, tokens=0)
    with pytest.raises(ConfigError, match=r"training: expected a TrainingConfig or a .* got dict"):
        run(teacher, out, training={"batch_size": 4})
    with pytest.raises(ConfigError, match=r"max_steps=9 .*eval_strategy='steps'"):
        run(teacher, out, training=TrainingArguments(max_steps=9, eval_strategy="steps", use_cpu=True))
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


@pytest.fixture(scope="module")
def one_stage(teacher, tmp_path_factory):
    """A short run of one stage, and the number of plans that it made."""
    out, plans = tmp_path_factory.mktemp("short") / "student", []
    with pytest.MonkeyPatch.context() as patch:
        make_plan = _core.plan
        patch.setattr(_core, "plan", lambda *arguments: plans.append(arguments) or make_plan(*arguments))
        training = TrainingConfig(batch_size=4, learning_rate=1e-3, warmup_ratio=0, weight_decay=0.1, seed=3)
        report = run(teacher, out, recipe=RECIPE.stages[2].config, tokens=512, training=training)
    return SimpleNamespace(out=out, report=report, plans=len(plans))


def test_a_stage_is_planned_once(one_stage):
    assert one_stage.plans == 1


def arguments(folder, **changes):
    """The `TrainingArguments` equivalent to the training of `one_stage`."""
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "seed": 3,
        "data_seed": 3,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
    }
    return TrainingArguments(**options | changes)


def test_training_arguments_take_the_place_of_a_training_config(teacher, one_stage, tmp_path):
    out, given = tmp_path / "out", arguments(tmp_path / "elsewhere")
    options = {"recipe": RECIPE.stages[2].config, "tokens": 512}
    report = run(teacher, out, training=given, **options)
    assert report.stages[0].losses == one_stage.report.stages[0].losses
    assert_equal_weights(out, one_stage.out, 0)
    # The user's object is unchanged, and the trainer wrote nothing to its folder.
    assert given.to_dict() == arguments(tmp_path / "elsewhere").to_dict()
    assert not (tmp_path / "elsewhere").exists()
    same = arguments(tmp_path / "another", run_name="again", disable_tqdm=True)
    assert run(teacher, out, training=same, resume=True, **options).to_dict() == report.to_dict()
    for change in ({"learning_rate": 2e-3}, {"optim": "sgd"}, {"max_grad_norm": 0.5}):
        with pytest.raises(ConfigError, match=r"other settings \(training\)"):
            run(teacher, out, training=arguments(tmp_path, **change), resume=True, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 5}, "max_steps=5"),
        ({"num_train_epochs": 2}, "num_train_epochs=2"),
        ({"save_strategy": "epoch"}, "save_strategy='epoch'"),
        ({"save_only_model": True}, "save_only_model=True"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True"),
        ({"eval_strategy": "steps"}, "eval_strategy='steps'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"resume_from_checkpoint": "checkpoint-1"}, "resume_from_checkpoint='checkpoint-1'"),
        ({"use_cpu": False}, "use_cpu=False"),
    ],
)
def test_training_arguments_that_contradict_a_stage(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        training_arguments(arguments(tmp_path, **change), tmp_path, 4, "cpu")


def test_arguments_of_a_stage(tmp_path):
    given = arguments(tmp_path, save_total_limit=1, num_train_epochs=1)
    made = training_arguments(given, tmp_path / "checkpoints", 7, "cpu")
    assert (made.output_dir, made.max_steps, made.save_total_limit) == (str(tmp_path / "checkpoints"), 7, 2)
    assert training_arguments(arguments(tmp_path, save_total_limit=5), tmp_path, 7, None).save_total_limit == 5
    short = training_arguments(TrainingConfig(bf16=True, warmup_ratio=0.5, save_steps=3), tmp_path, 8, "cpu")
    assert (short.bf16, short.fp16, short.warmup_steps, short.save_steps) == (True, False, 4, 3)


def test_token_blocks_are_taken_as_they_are(teacher, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(teacher.path)
    samples = token_blocks(teacher.text, tokenizer, 16, cache=teacher.cache)
    with pytest.raises(ConfigError, match="seq_len: expected 16, that of the text's samples, got 32"):
        run(teacher, tmp_path / "out", text=samples, training=TrainingConfig(seq_len=32))
    wide = save_tokenizer(tmp_path / "wide")
    wide.add_tokens([f"<{number}>" for number in range(10)])
    with pytest.raises(ConfigError, match="text: its tokenizer has 112 tokens"):
        run(teacher, tmp_path / "out", text=token_blocks(teacher.text, wide, 16, cache=teacher.cache))
    options = {"recipe": RECIPE.stages[2].config, "tokens": 64, "heldout": letters(500)}
    report = run(teacher, tmp_path / "out", text=samples, **options)
    assert (report.tokens, report.settings["training"]["seq_len"]) == (64, 16)
    assert report.heldout_tokens == 500


def test_tokens_are_drawn_from_all_of_the_text(teacher, tmp_path, monkeypatch):
    """Every stage reads blocks of its own from everywhere but the held-out end; another seed reads others."""
    blocks = token_blocks(teacher.text, AutoTokenizer.from_pretrained(teacher.path), 32, cache=teacher.cache)
    every = [block["input_ids"].tolist() for block in blocks]

    def read(name, **changes):
        stages = []

        def train_stage(student, teacher, tokenizer, samples, *_arguments, **_settings):
            stages.append([every.index(block["input_ids"].tolist()) for block in samples.blocks])
            return Trained((), 0.0, 0.0, 0)

        monkeypatch.setattr(runner, "train_stage", train_stage)
        run(teacher, tmp_path / name, tokens=96 * 32, **changes)
        return stages

    stages = read("one")
    drawn = [place for stage in stages for place in stage]
    assert len(stages) == 3 and len(drawn) == len(set(drawn)) == 96
    assert all(min(stage) < len(every) // 4 and max(stage) > len(every) * 3 // 4 for stage in stages)
    assert max(drawn) < len(every) - 1
    assert read("other", training=replace(TRAINING, seed=1)) != stages


def test_the_command_line_has_the_defaults_of_the_function():
    parsed = vars(parser().parse_args(["distill", "--teacher", "T", "--text", "F", "--out", "O"]))
    for name, parameter in inspect.signature(distill).parameters.items():
        if name in parsed and parameter.default is not parameter.empty:
            assert parsed[name] == parameter.default, name
    for config in (DistillConfig(), TrainingConfig()):
        for name, value in vars(config).items():
            # `--seed` is the recipe's, as in Python.
            option = "data_seed" if name == "seed" else name
            assert parsed.get(option, value) == value, name


@pytest.mark.parametrize(("given", "seeds"), [([], (None, 0)), (["--seed", "5", "--data-seed", "3"], (5, 3))])
def test_the_seeds_of_the_command_line(monkeypatch, given, seeds):
    calls = []
    monkeypatch.setattr(runner, "distill", lambda *arguments, **options: calls.append(options))
    assert cli.main(["distill", "--teacher", "T", "--text", "F", "--out", "O", "--save-steps", "2", *given]) == 0
    assert (calls[0]["seed"], calls[0]["training"].seed) == seeds
    assert calls[0]["text"] == [Path("F")] and calls[0]["training"].save_steps == 2


def go_on(teacher, out):
    """Runs in the process that is killed. One thread: every run adds in the same order."""
    torch.set_num_threads(1)
    run(teacher, out, resume=True)


def start(teacher, out):
    return forked(go_on, teacher, out)


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


@pytest.mark.long
def test_a_run_killed_five_times_ends_with_the_same_weights(teacher, tmp_path):
    finish(start(teacher, tmp_path / "whole"))
    stages, generator, killed_in = tmp_path / "killed" / "stages", random.Random(0), []
    for kill in range(5):
        process = start(teacher, tmp_path / "killed")
        # Kill at times spread over the run.
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
    """A number that grows with the checkpoints and students on the disk."""
    done = 0
    for stage in stages.glob("*"):
        if (stage / "trained").is_dir():
            done += 6
        else:
            done += (stage / "compressed").is_dir()
            steps = [int(path.name.rpartition("-")[2]) for path in stage.glob("checkpoints/checkpoint-*")]
            done += len(steps) and 1 + max(steps) // 6
    return done
