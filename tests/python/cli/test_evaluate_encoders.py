"""`tqcompressor evaluate` of models that predict no next token: their embeddings are compared with the teacher's."""

import json

import pytest
import torch
import transformers
from helpers.tokenizer import save_tokenizer
from tqcompressor import compress
from tqcompressor.cli import main as cli
from tqcompressor.verify.subject import predicts_next_token

SIZES = {
    "vocab_size": 104,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def bert(kind="BertModel"):
    return getattr(transformers, kind)(transformers.BertConfig(**SIZES, max_position_embeddings=32))


def distilbert():
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=104, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    )


def t5():
    config = transformers.T5Config(vocab_size=104, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def llama(kind):
    return getattr(transformers, kind)(transformers.LlamaConfig(**SIZES, max_position_embeddings=32))


def gpt2(kind):
    config = transformers.GPT2Config(vocab_size=104, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return getattr(transformers, kind)(config)


ENCODERS = {
    "BertModel": bert,
    "BertForMaskedLM": lambda: bert("BertForMaskedLM"),
    "DistilBertModel": distilbert,
    "T5ForConditionalGeneration": t5,
    # Its head is not its embedding, and not in the file.
    "LlamaModel": lambda: llama("LlamaModel"),
}
CAUSAL = {
    "GPT2LMHeadModel": lambda: gpt2("GPT2LMHeadModel"),
    "GPT2Model": lambda: gpt2("GPT2Model"),
    "LlamaForCausalLM": lambda: llama("LlamaForCausalLM"),
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat\n\nanother line of words\nand one more\n", encoding="utf-8")
    return path


def saved(make, folder):
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("name", ENCODERS)
def test_the_embeddings_of_an_encoder_are_compared(name, tmp_path, text, capsys):
    model = saved(ENCODERS[name], tmp_path / "teacher")
    before = model.num_parameters()
    compress(model, budget=0.6, progress=False)
    model.save_pretrained(tmp_path / "student")
    command = ["evaluate", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--text", str(text)]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    student, teacher = found["models"]
    assert student["parameters"] <= 0.6 * before and teacher["parameters"] == before
    assert found["embeddings"]["texts"] == 3 and -1 <= found["embeddings"]["smallest"] <= found["embeddings"]["cosine"]
    assert found["embeddings"]["cosine"] < 0.9999
    command[1] = command[3]
    assert cli.main(command) == 0
    header, _, row, _ = capsys.readouterr().out.splitlines()
    assert "perplexity" not in header and row.split()[3:6] == ["1.0000", "1.0000", "3"]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_has_a_perplexity(name, tmp_path, text, capsys):
    saved(CAUSAL[name], tmp_path)
    assert cli.main(["evaluate", str(tmp_path), "--text", str(text), "--engine", "torch", "--context", "16"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_what_has_no_perplexity_is_refused_without_a_teacher(tmp_path, text, capsys):
    saved(bert, tmp_path)
    assert not predicts_next_token(tmp_path)
    command = ["evaluate", str(tmp_path), "--text", str(text)]
    assert cli.main(command) == 2
    assert "is no causal language model, so it has no perplexity: give --teacher" in capsys.readouterr().err
    for option, value in (("--stride", "8"), ("--context", "8"), ("--passages", str(text))):
        assert cli.main([*command, "--teacher", str(tmp_path), option, value]) == 2
        assert f"{option}: expected a causal language model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_halves_are_scored_in_float32_on_the_cpu(name, tmp_path, text, capsys):
    model = saved(CAUSAL[name], tmp_path / "single").half()
    model.save_pretrained(tmp_path / "half")
    save_tokenizer(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "rounded")
    save_tokenizer(tmp_path / "rounded")

    def score(folder, *options):
        command = ["evaluate", str(tmp_path / folder), "--text", str(text), "--engine", "torch", "--context", "16"]
        assert cli.main([*command, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["models"][0]

    half, rounded = score("half"), score("rounded")
    assert half["text"]["perplexity"] == rounded["text"]["perplexity"]
    assert half["text"]["perplexity"] != score("half", "--dtype", "float16")["text"]["perplexity"]
    # The size is that of the checkpoint.
    assert half["bytes"] < 0.6 * rounded["bytes"]


def test_halves_of_an_encoder_are_compared_in_float32_on_the_cpu(tmp_path, text, capsys):
    saved(bert, tmp_path).half().save_pretrained(tmp_path)
    command = ["evaluate", str(tmp_path), "--teacher", str(tmp_path), "--text", str(text), "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["embeddings"]["smallest"] > 1 - 1e-6
    assert found["models"][0]["bytes"] < 3 * found["models"][0]["parameters"]
