"""Distillation of budgets: causal and masked language models and text encoders, given students, what is kept."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers.distillation import letters
from helpers.processes import run_script
from helpers.tokenizer import save_tokenizer
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from tqcompressor import calibrate, compress, distill
from tqcompressor.calibration.calibration import Calibration
from tqcompressor.cli import main as cli
from tqcompressor.distillation import runner
from tqcompressor.distillation.config import DistillConfig, TrainingConfig
from tqcompressor.distillation.prepare import default_learning_rate
from tqcompressor.distillation.stages import StagedRecipe
from tqcompressor.distillation.tasks import MaskedTask
from tqcompressor.errors import ConfigError, ShapeError, TextError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

SIZES = {"vocab_size": 104, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 32}
TRAINING = TrainingConfig(batch_size=4, learning_rate=1e-3, save_steps=0.5)


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    )


def bert(kind, **options):
    return getattr(transformers, kind)(transformers.BertConfig(**SMALL, **options, pad_token_id=0))


MODELS = {
    "llama": llama,
    "masked": lambda: bert("BertForMaskedLM"),
    "encoder": lambda: bert("BertModel", initializer_range=0.3),
}


def trained(model, tokenizer):
    """The model after some steps on letters, so that its weights are no noise."""
    ids = torch.tensor(tokenizer(letters(3000, seed=1), add_special_tokens=False)["input_ids"][:2976]).view(-1, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        batch = ids[step * 8 % 112 :][:8]
        if hasattr(model, "cls"):
            item = [MaskedTask(tokenizer).item(row, step) for row in batch]
            inputs = {name: torch.stack([each[name] for each in item]) for name in item[0]}
            loss = model(**inputs).loss
        else:
            loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healing")
    (folder / "text.txt").write_text(letters(4000), encoding="utf-8")
    for name, make in MODELS.items():
        tokenizer = save_tokenizer(folder / name)
        if name != "llama":
            tokenizer.add_special_tokens({"mask_token": "~", "cls_token": "{", "sep_token": "}"})
            ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in "{}"]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="{ $A }", special_tokens=ids)
            tokenizer.save_pretrained(folder / name)
        torch.manual_seed(0)
        model = make()
        (model if name == "encoder" else trained(model, tokenizer)).save_pretrained(folder / name)
    return SimpleNamespace(folder=folder, text=folder / "text.txt", cache=folder / "cache")


def run(data, name, out, **changes):
    options = {"text": data.text, "out": out, "cache": data.cache, "training": TRAINING, "device": "cpu"}
    options |= {"num_samples": 16, "tokens": 1500, "progress": False}
    return distill(data.folder / name, **{**options, **changes})


@pytest.mark.parametrize(
    ("name", "measure", "auto"),
    [
        ("llama", "perplexity", "AutoModelForCausalLM"),
        ("masked", "perplexity of masked tokens", "AutoModelForMaskedLM"),
        ("encoder", "cosine distance", "AutoModel"),
    ],
)
def test_a_budget_is_healed(data, tmp_path, name, measure, auto):
    # Few steps help little: it takes more than the default's one sample to see it, and small steps for random weights.
    options = {"heldout": letters(1200, seed=2), "training": replace(TRAINING, learning_rate=3e-4)}
    report = run(data, name, tmp_path / "out", budget=0.6, **options)
    (stage,) = report.stages
    assert report.measure == measure and measure in str(report)
    assert stage.trained.parameters <= 0.6 * report.teacher.parameters
    assert stage.compressed == report.one_shot
    assert stage.trained.score < stage.compressed.score
    assert stage.kept_step > 0
    if name == "encoder":
        assert report.teacher.score < 1e-6
    # Loaded by transformers in a fresh process, the student has the reported number of parameters.
    printed = run_script(
        f"""
        import sys, tqcompressor, transformers
        print(transformers.{auto}.from_pretrained(sys.argv[1]).num_parameters())
        """,
        tmp_path / "out",
        warm="transformers",
    )
    assert int(printed.split()[-1]) == stage.trained.parameters
    assert auto in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["llama", "masked", "encoder"])
def test_factors_are_refined_before_they_are_trained(data, tmp_path, name):
    options = {"recipe": StagedRecipe.of_budgets(0.7, 0.5), "num_samples": 64}
    plain = run(data, name, tmp_path / "plain", **options)
    out = tmp_path / "refined"
    refined = run(data, name, out, refine=True, **options)
    assert refined.settings["refine"] and not plain.settings["refine"]
    assert refined.stages[0].compressed.parameters == plain.stages[0].compressed.parameters
    # Refining follows the teacher, not the text, on which these students are no worse than their teachers. All that the
    # blocks of the masked model change is a hundred-thousandth of its score.
    far, near = (abs(each.stages[0].compressed.score - each.teacher.score) for each in (plain, refined))
    assert near < (1e-4 * refined.teacher.score if name == "masked" else far)
    assert refined.stages[0].compressed.score < 1.001 * plain.stages[0].compressed.score
    # The student without any training is the same.
    assert refined.one_shot == plain.one_shot
    with pytest.raises(ConfigError, match=r"other settings .*refine"):
        run(data, name, out, resume=True, **options)
    assert run(data, name, out, refine=True, resume=True, **options).to_dict() == refined.to_dict()


def test_a_run_never_ends_worse_than_it_began(data, tmp_path):
    report = run(data, "llama", tmp_path / "out", budget=0.6, training=TrainingConfig(batch_size=4, learning_rate=3.0))
    (stage,) = report.stages
    assert stage.kept_step == 0 and stage.trained == stage.compressed
    assert "the student of step 0" in str(report)
    # The same as without any training.
    model = AutoModelForCausalLM.from_pretrained(data.folder / "llama")
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "llama")
    calibration = tmp_path / "out" / "calibration.safetensors"
    assert not calibration.exists()
    assert model.num_parameters() > stage.trained.parameters > 0 and len(tokenizer) == 102


def test_an_interrupted_run_ends_with_the_same_weights(data, tmp_path):
    torch.set_num_threads(1)
    options = {"budget": 0.6, "training": TrainingConfig(batch_size=4, learning_rate=1e-3, save_steps=2)}
    whole = run(data, "llama", tmp_path / "whole", **options)
    out = tmp_path / "out"

    def stop(done, total):
        # Behind the first checkpoint, before the last.
        if (out / "stages" / "1-one-shot" / "checkpoints" / "scores.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, "llama", out, **options, progress=stop)
    assert not (out / "model.safetensors").exists()
    again = run(data, "llama", out, **options, resume=True)
    assert again.stages[0].trained == whole.stages[0].trained
    one, other = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor.float(), other[name].float(), rtol=0, atol=1e-6), name


def test_a_given_student_and_a_given_calibration(data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(data.folder / "llama")
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "llama")
    calibration = calibrate(model, tokenizer, data.text, num_samples=16, seq_len=32)
    calibration.save(tmp_path / "calibration.safetensors")
    one = run(data, "llama", tmp_path / "one", budget=0.6, calibration=tmp_path / "calibration.safetensors")
    compress(model, budget=0.6, calibration=calibration)
    model.save_pretrained(tmp_path / "student")
    other = run(data, "llama", tmp_path / "other", student=tmp_path / "student")
    live = run(data, "llama", tmp_path / "live", student=model)
    assert one.stages[0].compressed == other.stages[0].compressed == live.stages[0].compressed
    assert other.stages[0].trained == live.stages[0].trained
    assert other.stages[0].trained.score < other.stages[0].compressed.score


def test_the_calibration_of_a_student_is_not_measured_again(data, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(data.folder / "llama")
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "llama")
    calibration = calibrate(model, tokenizer, data.text, num_samples=16, seq_len=32)
    compress(model, budget=0.6, calibration=calibration)
    monkeypatch.setattr(runner, "calibrate", None)
    report = run(data, "llama", tmp_path / "out", student=model, calibration=calibration)
    assert report.stages[0].trained.score < report.stages[0].compressed.score
    with pytest.raises(TypeError):
        run(data, "llama", tmp_path / "measured", student=model)


def test_a_calibration_of_another_model_than_the_student_is_refused_before_any_work(data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(data.folder / "llama")
    compress(model, budget=0.6)
    moments = {f"input.{name}": np.eye(5, dtype=np.float32) for name in ("h.0.attn.c_attn", "layers.0.mlp.up_proj")}
    for name, moment in moments.items():
        other = Calibration({name: moment}, tokens=1, seed=0)
        with pytest.raises((ConfigError, ShapeError), match="it is of another model"):
            run(data, "llama", tmp_path / "out", student=model, calibration=other)
    assert not (tmp_path / "out").exists()


def test_a_low_rank_student_with_too_little_text_to_calibrate_is_refused_before_any_work(data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(data.folder / "llama")
    compress(model, budget=0.6)
    with pytest.raises(TextError, match=r"num_samples: expected at most .* got 100000"):
        run(data, "llama", tmp_path / "out", student=model, num_samples=100_000)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "encoder"])
def test_the_default_learning_rate_follows_the_width(data, tmp_path, name):
    expected = 3e-4 * 256 / SIZES["hidden_size"]
    training = replace(TRAINING, learning_rate=None, warmup_ratio=0.0)
    report = run(data, name, tmp_path / "out", budget=0.6, training=training)
    assert report.settings["training"]["learning_rate"] == pytest.approx(expected)
    # On a cosine that begins there.
    assert 0.8 * expected < report.stages[0].losses[0].learning_rate <= expected


def test_the_default_learning_rate_of_gpt2_and_of_a_model_that_names_no_width():
    gpt2 = transformers.GPT2Config()
    for config in (gpt2, SimpleNamespace()):
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda config=config: config))
        assert default_learning_rate(model) == pytest.approx(1e-4)


def test_staged_budgets(data, tmp_path):
    recipe = StagedRecipe.of_budgets(0.8, 0.6)
    report = run(data, "llama", tmp_path / "out", recipe=recipe)
    sizes = [stage.compressed.parameters for stage in report.stages]
    assert report.teacher.parameters * 0.8 >= sizes[0] > report.teacher.parameters * 0.6 >= sizes[1]
    assert report.one_shot.parameters == pytest.approx(sizes[1], rel=0.02)
    path = tmp_path / "recipe.json"
    path.write_text(recipe.to_json(), encoding="utf-8")
    again = run(data, "llama", tmp_path / "out", recipe=path, resume=True)
    assert again.to_dict() == report.to_dict()
    saved = json.loads((tmp_path / "out" / "training_report.json").read_text(encoding="utf-8"))
    assert saved["settings"]["recipe"]["stages"][1]["budget"] == 0.6


def test_what_does_not_fit_is_refused_before_anything_is_written(data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="expected one of recipe, budget and student, got recipe and budget"):
        run(data, "llama", out, recipe="tq-81m", budget=0.6)
    with pytest.raises(ConfigError, match="calibration: expected with a budget"):
        run(data, "llama", out, recipe="tq-81m", calibration=tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="refine: expected with a budget"):
        run(data, "llama", out, student=data.folder / "llama", refine=True)
    with pytest.raises(ConfigError, match="budget"):
        run(data, "llama", out, budget="much")
    with pytest.raises(ConfigError, match="student: expected a LlamaForCausalLM as its teacher is, got BertModel"):
        run(data, "llama", out, student=data.folder / "encoder")
    with pytest.raises(ConfigError, match="has no vocabulary and learns from a teacher alone"):
        run(data, "encoder", tmp_path / "alpha", losses=DistillConfig(alpha=0.5))
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "masked")
    with pytest.raises(ConfigError, match="BertForSequenceClassification: distill trains causal and masked"):
        distill(model, tokenizer=tokenizer, text=data.text, out=out, device="cpu")
    plain = AutoTokenizer.from_pretrained(data.folder / "llama")
    with pytest.raises(ConfigError, match="has no mask token"):
        run(data, "masked", out, tokenizer=plain)
    assert not out.exists()


def test_the_masks_of_a_text_are_fixed(data):
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "masked")
    task, tokens = MaskedTask(tokenizer), torch.arange(2, 22)
    one, again, other = task.item(tokens, 3), task.item(tokens, 3), task.item(tokens, 4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["labels"], other["labels"])
    masked = one["labels"] != -100
    assert torch.equal(one["input_ids"][masked], torch.full((int(masked.sum()),), tokenizer.mask_token_id))
    assert torch.equal(torch.where(masked, one["labels"], one["input_ids"])[1:-1], tokens)
    assert AutoModel.from_pretrained(data.folder / "encoder").config.model_type == "bert"


def test_compress_heals_as_its_last_phase(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQCOMPRESSOR_CACHE", str(data.cache))
    command = [
        "compress",
        str(data.folder / "llama"),
        "--budget",
        "0.6",
        "--text",
        str(data.text),
        "--num-samples",
        "16",
    ]
    healing = ["--heal-tokens", "1.5k", "--refine"]
    assert cli.main([*command, *healing, "--out", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["refine"]
    assert (
        report["tokens"] <= 1500
        and report["stages"][0]["trained"]["parameters"] <= 0.6 * report["teacher"]["parameters"]
    )
    assert (tmp_path / "out" / "model.safetensors").exists()
    for wrong, message in (
        (["--matrices", "layers.*"], "--matrices cannot be combined with --heal-tokens"),
        (["--heal-tokens", "none"], "invalid number of tokens"),
    ):
        try:
            status = cli.main([*command, "--heal-tokens", "1k", "--out", str(tmp_path / "other"), *wrong])
        except SystemExit as error:
            status = error.code
        assert status == 2
        assert message in capsys.readouterr().err
    assert (
        cli.main(["compress", "SRC", "--budget", "0.6", "--heal-tokens", "1k", "--out", str(tmp_path / "other")]) == 2
    )
    assert "--heal-tokens: expected with --text" in capsys.readouterr().err
    assert cli.main([*command, "--refine", "--out", str(tmp_path / "other")]) == 2
    assert "--refine: expected with --heal-tokens" in capsys.readouterr().err
