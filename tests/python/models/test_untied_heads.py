"""Models whose head differs from the embedding although the config ties them, as flan-T5 is loaded."""

import copy

import pytest
import torch
import tqcompressor
from helpers.composites import composite, logits
from helpers.families import KRONECKER, LOW_RANK, family_model
from helpers.models import agree, first_output, some_ids
from helpers.processes import run_script
from helpers.snapshots import assert_untouched, snapshot
from safetensors import safe_open
from tqcompressor.compression.model import compress, recompress
from tqcompressor.config import TQConfig
from tqcompressor.errors import ConfigError, NonFiniteError
from tqcompressor.models.matrices import module_name

# Name: the embedding, the head, another matrix, and whether nothing is tied once the head is not.
UNTIED = {
    "gpt2": ("wte", "lm_head", "h.1.mlp.c_fc", True),
    "llama-tied": ("embed_tokens", "lm_head", "layers.1.mlp.up_proj", True),
    "distilbert": ("embeddings.word_embeddings", "vocab_projector", "transformer.layer.0.attention.q_lin", True),
    # Transformers ties the bias of its head, too.
    "bert-tied": ("embeddings.word_embeddings", "cls.predictions.decoder", "encoder.layer.0.output.dense", False),
    # Their encoders and decoders share the embedding, and T5's config cannot say that its head is not tied.
    "t5": ("shared", "lm_head", "encoder.block.0.layer.1.DenseReluDense.wi", False),
    "marian": ("shared", "lm_head", "encoder.layers.0.fc1", False),
    "two-berts": (
        "decoder.bert.embeddings.word_embeddings",
        "decoder.cls.predictions.decoder",
        "encoder.encoder.layer.0.output.dense",
        False,
    ),
}
# The specs of the embedding, the head and another matrix.
CHOICES = {
    "embedding": (KRONECKER, None, None),
    "head": (None, LOW_RANK, None),
    "both": (LOW_RANK, KRONECKER, None),
    "neither": (None, None, LOW_RANK),
}


def outputs(model):
    return logits(model) if model.config.is_encoder_decoder else first_output(model, some_ids())


def says_tied(model):
    # The config of two models has none of its own.
    return getattr(model.config, "tie_word_embeddings", True)


def untied(name):
    model = composite(name) if name in ("t5", "marian", "two-berts") else family_model(name)
    head = model.get_submodule(module_name(model, UNTIED[name][1]))
    head.weight = torch.nn.Parameter(head.weight.detach() * 1.5 + 0.1)
    return model


def config(name, choice):
    specs = zip(UNTIED[name], CHOICES[choice], strict=False)
    return TQConfig({matrix: spec for matrix, spec in specs if spec is not None}, effort="fast")


def compressed(name, choice):
    model = untied(name)
    with pytest.warns(UserWarning, match=r"differs from .* a matrix of its own") as heard:
        compress(model, config(name, choice), progress=False)
    assert len([each for each in heard if "tie_word_embeddings" in str(each.message)]) == 1
    return model


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", UNTIED)
def test_each_is_a_matrix_of_its_own_until_the_model_is_dense_again(name, choice):
    dense, model = untied(name), compressed(name, choice)
    assert model.config.quantization_config.specs.keys() == config(name, choice).specs.keys()
    assert says_tied(model) is (not UNTIED[name][3]) and says_tied(dense)
    expected = outputs(model)
    again = copy.deepcopy(model).dequantize()
    for each in (model, again):
        each.tie_weights()
        assert torch.allclose(outputs(each), expected, atol=1e-4 * expected.abs().max().item())
    assert again.num_parameters() == dense.num_parameters()


def test_saved_and_loaded_in_a_fresh_process_they_compute_the_same(tmp_path):
    for name in UNTIED:
        # All choices where the config says it, and where it cannot.
        for choice in CHOICES if name in ("gpt2", "t5") else ["both"]:
            model = compressed(name, choice)
            model.save_pretrained(tmp_path / name / choice)
            torch.save(outputs(model), tmp_path / name / f"{choice}.pt")
    run_script(
        """
import sys, warnings
from pathlib import Path
import torch, transformers, tqcompressor
from helpers.models import agree
from models.test_untied_heads import outputs
warnings.simplefilter("error")
transformers.logging.set_verbosity_error()
for expected in sorted(Path(sys.argv[1]).glob("*/*.pt")):
    folder = expected.with_suffix("")
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    assert agree(outputs(model), torch.load(expected)), folder
    model.save_pretrained(folder / "again")
    assert (folder / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes(), folder
    dense = model.dequantize()
    dense.save_pretrained(folder / "dense")
    assert torch.equal(outputs(kind.from_pretrained(folder / "dense")), outputs(dense)), folder
""",
        tmp_path,
        warm="transformers",
    )


@pytest.mark.parametrize("name", ["gpt2", "t5", "two-berts"])
def test_a_refusal_leaves_the_model_as_it_was(name):
    model = untied(name)
    with torch.no_grad():
        model.get_submodule(module_name(model, UNTIED[name][0])).weight[3, 5] = float("nan")
    tables = {part: vars(module).get("_tied_weights_keys") for part, module in model.named_modules()}
    before, own = {part: tensor.clone() for part, tensor in model.state_dict().items()}, model.config
    with pytest.warns(UserWarning, match="differs"), pytest.raises(NonFiniteError):
        compress(model, config(name, "both"), progress=False)
    assert model.config is own and says_tied(model)
    assert {part: vars(module).get("_tied_weights_keys") for part, module in model.named_modules()} == tables
    after = model.state_dict()
    assert all(torch.equal(after[part].nan_to_num(), tensor.nan_to_num()) for part, tensor in before.items())


@pytest.mark.parametrize("name", ["gpt2", "bert-tied", "marian"])
def test_a_budget_is_spent_on_both_and_both_are_compressed_again(name):
    embedding, head, _, _ = UNTIED[name]
    model = untied(name)
    with pytest.warns(UserWarning, match="differs"):
        found = tqcompressor.plan(model, 0.6, progress=False)
    assert found.parameters_before == model.num_parameters()
    assert {embedding, head} <= found.config.specs.keys()
    with pytest.warns(UserWarning, match="differs"):
        compress(model, budget=0.6, progress=False)
    assert model.num_parameters() == found.parameters_after
    recompress(model, TQConfig({head: LOW_RANK}, effort="fast"), progress=False)
    expected = outputs(copy.deepcopy(model).dequantize())
    assert torch.allclose(outputs(model), expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5"])
def test_a_dense_checkpoint_is_loaded_and_compressed_in_one_call(name, tmp_path):
    model = untied(name)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="differs"):
        loaded = type(model).from_pretrained(tmp_path, quantization_config=config(name, "both"))
    assert agree(outputs(loaded), outputs(compressed(name, "both")))
    loaded.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        assert any(stored.startswith("lm_head.") for stored in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", None), ("llama-tied", torch.float16), ("bert-tied", None)])
def test_equal_weights_that_are_not_one_are_refused_with_the_way_out(name, dtype):
    model = family_model(name).to(dtype)
    head = model.get_output_embeddings()
    # In whichever dtype: saved and loaded again they would be one.
    head.weight = torch.nn.Parameter(head.weight.detach().float().clone())
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"do not share one weight: set it to False, or call model\.tie_weights\(\)"):
        compress(model, config(name, "both"), progress=False)
    assert before[0].keys() == snapshot(model)[0].keys() and before[1:] == snapshot(model)[1:]
    model.tie_weights()
    compress(model, config(name, "embedding"), progress=False)
    assert_untouched(model, snapshot(model))
