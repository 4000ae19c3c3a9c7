"""Models of several families, tied and untied, with specs of every kind: in place, on disk, dense again, once more."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from helpers.families import FAMILIES, KRONECKER, LOW_RANK, MIXED, family_config, family_model
from helpers.models import VOCABULARY, agree, first_output, some_ids
from helpers.processes import run_script
from torch import nn
from tqcompressor.compression.model import compress, recompress
from tqcompressor.compression.model_plan import plan_model
from tqcompressor.config import TQConfig
from tqcompressor.config.specs import KroneckerSpec, describe
from tqcompressor.errors import ConfigError, ShapeError
from tqcompressor.models.matrices import compressed_modules, factor_parameters
from tqcompressor.modules import MixedHead
from tqcompressor.modules.mixed import FactoredHead

every_family = pytest.mark.parametrize("name", FAMILIES)


def compressed_model(name):
    model = family_model(name)
    return model, compress(model, family_config(name))


@every_family
def test_a_compressed_model_computes_what_its_dense_weights_would(name):
    dense = family_model(name)
    model, report = compressed_model(name)
    expected = copy.deepcopy(model).dequantize()
    assert [type(module) for module in expected.modules()] == [type(module) for module in dense.modules()]
    assert expected.state_dict().keys() == dense.state_dict().keys()
    assert expected.config.to_dict() == dense.config.to_dict() and vars(expected).keys() == vars(dense).keys()
    output, wanted = first_output(model, some_ids()), first_output(expected, some_ids())
    assert torch.allclose(output, wanted, atol=1e-4 * wanted.abs().max().item())
    assert not torch.allclose(output, first_output(dense, some_ids()), atol=0.1)
    # Names of the base model's modules, its prefix left out, and one spec for each.
    specs = model.config.quantization_config.specs
    assert [matrix.name for matrix in report.matrices] == list(specs)
    assert set(specs.values()) == set(FAMILIES[name][3].values()) and len(specs) > 5
    assert (report.parameters_before, report.parameters_after) == (dense.num_parameters(), model.num_parameters())
    assert describe(MIXED) in str(report)
    assert {tensor.tensor for tensor in report.untouched} <= dense.state_dict().keys()
    assert {matrix.tensor for matrix in report.matrices} <= dense.state_dict().keys()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.endswith("-tied")])
def test_a_tied_head_has_its_embeddings_factors_and_its_own_bias(name):
    dense = family_model(name)
    bias = dense.get_output_embeddings().bias
    model, _ = compressed_model(name)
    head = next(module for _, module in compressed_modules(model) if isinstance(module, FactoredHead))
    embedding = model.get_input_embeddings()
    assert all(own is its for own, its in zip(factor_parameters(head), factor_parameters(embedding), strict=True))
    if name == "bert-tied":
        assert isinstance(head, MixedHead)
        # transformers also ties the bias, which stays the same parameter object.
        assert head.bias is model.cls.predictions.bias and torch.equal(head.bias, bias)
    stored = {name for name in model.state_dict() if name not in model.all_tied_weights_keys}
    assert not any(VOCABULARY in model.state_dict()[name].shape[1:] for name in stored)
    model.tie_weights()
    assert all(own is its for own, its in zip(factor_parameters(head), factor_parameters(embedding), strict=True))


def test_loading_in_a_fresh_process_is_exact_and_says_nothing(tmp_path):
    for name in FAMILIES:
        model, _ = compressed_model(name)
        model.save_pretrained(tmp_path / name)
        torch.save(first_output(model, some_ids()), tmp_path / f"{name}.pt")
    run_script(
        """
import hashlib, json, pathlib, sys, torch, transformers, tqcompressor
from helpers.families import FAMILIES, family_model
from helpers.models import VOCABULARY, agree, first_output, some_ids
directory = pathlib.Path(sys.argv[1])
digest = lambda name: hashlib.sha256((directory / name / "model.safetensors").read_bytes()).hexdigest()
for name, (class_name, auto, _, _) in FAMILIES.items():
    expected = torch.load(directory / f"{name}.pt")
    model, info = getattr(transformers, auto).from_pretrained(directory / name, output_loading_info=True)
    assert type(model).__name__ == class_name and not any(info.values()), (name, info)
    assert agree(first_output(model, some_ids()), expected), name
    assert json.loads((directory / name / "config.json").read_text())["quantization_config"]["format_version"] == 2
    model.save_pretrained(directory / "again")
    assert digest("again") == digest(name), name
    assert (directory / "again" / "config.json").read_text() == (directory / name / "config.json").read_text()
    # The base model out of a checkpoint with a head, and a head that is new.
    base, info = transformers.AutoModel.from_pretrained(directory / name, output_loading_info=True)
    assert not {key for key in info["missing_keys"] if not key.startswith("pooler")}, (name, info)
    hidden = first_output(base, some_ids())
    assert agree(hidden, first_output(model.base_model, some_ids())), name
    base.save_pretrained(directory / "base")
    model, info = getattr(transformers, auto).from_pretrained(directory / "base", output_loading_info=True)
    assert not info["unexpected_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}, (name, info)
    assert all(key.startswith(("cls.", "vocab_", "lm_head")) for key in info["missing_keys"]), (name, info)
    assert agree(first_output(model.base_model, some_ids()), hidden), name
    dense = model.dequantize()
    stock = family_model(name)
    assert [type(module) for module in dense.modules()] == [type(module) for module in stock.modules()], name
    assert torch.allclose(first_output(dense.base_model, some_ids()), hidden, atol=1e-4 * hidden.abs().max()), name
    dense.save_pretrained(directory / "dense")
    _, info = getattr(transformers, auto).from_pretrained(directory / "dense", output_loading_info=True)
    assert not any(info.values()), (name, info)
""",
        tmp_path,
        warm="transformers",
    )


def test_without_the_package_loading_raises(tmp_path):
    for name in ("bert-tied", "llama-tied"):
        compressed_model(name)[0].save_pretrained(tmp_path / name)
    output = run_script(
        """
import sys, transformers
for name, auto in [("bert-tied", "AutoModelForMaskedLM"), ("bert-tied", "AutoModel"), ("llama-tied", "AutoModel")]:
    try:
        getattr(transformers, auto).from_pretrained(f"{sys.argv[1]}/{name}")
    except RuntimeError as error:
        print("raised", error)
assert "tqcompressor" not in sys.modules
""",
        tmp_path,
        warm="transformers",
    )
    assert output.count("raised") == 3


@pytest.mark.parametrize("name", ["bert-tied", "llama-untied", "gpt2"])
def test_a_compressed_model_is_compressed_again(name):
    model, _ = compressed_model(name)
    before = dict(model.config.quantization_config.specs)
    first = next(iter(before))
    kept = {module_name: factor_parameters(module) for module_name, module in compressed_modules(model)}
    report = recompress(model, TQConfig({first: KRONECKER}, effort="fast"))
    assert [matrix.name for matrix in report.matrices] == [first]
    assert model.config.quantization_config.specs == {**before, first: KRONECKER}
    replaced = {name for name, module in compressed_modules(model) if factor_parameters(module)[0] is not kept[name][0]}
    assert len(replaced) == (2 if name in ("bert-tied", "gpt2") else 1)
    assert report.parameters_after == model.num_parameters()
    expected = first_output(copy.deepcopy(model).dequantize(), some_ids())
    assert torch.allclose(first_output(model, some_ids()), expected, atol=1e-4 * expected.abs().max().item())


def test_compressing_while_loading(tmp_path):
    config = TQConfig({"bert.encoder.*": KRONECKER, "embeddings.word_embeddings": KRONECKER}, effort="fast")
    model = family_model("bert-tied")
    model.save_pretrained(tmp_path)
    compress(model, config)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=config)
    assert agree(first_output(loaded, some_ids()), first_output(model, some_ids()))
    assert loaded.config.quantization_config == model.config.quantization_config


def test_a_compressed_encoder_works_inside_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from helpers.tokenizer import save_tokenizer

    model, _ = compressed_model("bert")
    model.save_pretrained(tmp_path / "encoder")
    save_tokenizer(tmp_path / "encoder")
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert dict(compressed_modules(encoder)).keys() == {f"0.model.{name}" for name, _ in compressed_modules(model)}
    sentences = ["a b c", "c b"]
    expected = encoder.encode(sentences)
    encoder.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.allclose(again.encode(sentences), expected, atol=1e-5)


def test_matrices_come_in_the_models_order_and_layers_as_numbers():
    config = copy.deepcopy(FAMILIES["bert"][2])
    config.num_hidden_layers = 11
    model = transformers.BertForMaskedLM(config)
    plan = plan_model(model, TQConfig({"*.query": LOW_RANK, "embeddings.*": KRONECKER}, effort="fast"))
    names = [matrix.name for matrix in plan.matrices]
    assert names[:3] == [f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]
    assert names[3:] == [f"encoder.layer.{layer}.attention.self.query" for layer in range(11)]
    assert plan.matrices[0].tensor == "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("name", "specs", "error", "message"),
    [
        ("bert-tied", {"cls.predictions.decoder": LOW_RANK}, ConfigError, "tied to embeddings.word_embeddings"),
        ("llama-tied", {"lm_head": LOW_RANK}, ConfigError, "tied to embed_tokens"),
        ("llama-tied", {"layers.9.*": LOW_RANK}, ConfigError, r"layers\.9"),
        # A subclass of nn.Embedding with another call signature.
        ("opt-tied", {"*embed_positions": LOW_RANK}, ConfigError, "embed_positions"),
        ("bert", {"encoder.layer.0.output.dense": KroneckerSpec((5, 2), 1)}, ShapeError, "layer.0.output"),
    ],
)
def test_configs_that_cannot_be_followed(name, specs, error, message):
    model = family_model(name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        compress(model, TQConfig(specs, effort="fast"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert next(compressed_modules(model), None) is None


def test_a_weight_that_several_modules_look_up_is_refused():
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 24}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads))
    with pytest.raises(ConfigError, match="shared"):
        compress(model, TQConfig({"shared": KRONECKER}, effort="fast"))
    # Unshared matrices are compressed, and the others stay tied.
    compress(model, TQConfig({"*.fc1": KRONECKER}, effort="fast"))
    assert model.lm_head.weight is model.model.shared.weight


def test_one_module_under_two_names_is_refused():
    model = family_model("bert")
    model.encoder.layer[1].intermediate.dense = model.encoder.layer[0].intermediate.dense
    with pytest.raises(ConfigError, match="several names"):
        compress(model, TQConfig({"encoder.layer.0.intermediate.dense": KRONECKER}, effort="fast"))


def test_a_checkpoint_whose_tensors_are_not_what_its_config_says(tmp_path):
    from safetensors.torch import load_file, save_file
    from tqcompressor.errors import CheckpointError

    compressed_model("bert-tied")[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for change, message in [
        (lambda t: t.pop("bert.embeddings.word_embeddings.terms.1.A"), "terms.1.A is missing"),
        (lambda t: t.pop("bert.encoder.layer.0.attention.self.query.left"), "query.left is missing"),
        (lambda t: t["bert.encoder.layer.0.attention.self.query.input_permutation"].fill_(1), "not a permutation"),
        (
            lambda t: t.update({"bert.encoder.layer.0.attention.self.key.left": torch.ones(2)}),
            "is not in quantization_config",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.0.attention.self.key.terms.0.A": torch.ones(2)}),
            "is not in quantization_config",
        ),
    ]:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        change(changed)
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_what_is_not_transformers_own_is_refused():
    with pytest.raises(ConfigError, match="Sequential is not a model of transformers"):
        compress(nn.Sequential(nn.Linear(3, 3)), TQConfig({"0": MIXED}))


def test_a_config_of_any_kind_survives_json():
    for name in FAMILIES:
        config = family_config(name)
        assert TQConfig.from_dict(json.loads(config.to_json())) == config
