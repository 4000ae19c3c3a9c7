"""One matrix with several users: embeddings of an encoder and a decoder, heads that are tied within a submodel."""

import copy

import pytest
import torch
import tqcompressor
from helpers.composites import SCALED, SHARED, composite, logits, two_sides
from helpers.families import KRONECKER, LOW_RANK, MIXED
from helpers.models import agree
from safetensors import safe_open
from tqcompressor.compression.model import compress, recompress
from tqcompressor.config import TQConfig
from tqcompressor.errors import ConfigError, NonFiniteError
from tqcompressor.models.matrices import compressed_modules, factor_parameters, module_name

SPECS = dict(zip(SHARED, (MIXED, LOW_RANK, KRONECKER, LOW_RANK, MIXED, MIXED, KRONECKER), strict=True))


def compressed(name, spec=None):
    model = composite(name)
    compress(model, TQConfig({SHARED[name][1]: spec or SPECS[name]}, effort="fast"), progress=False)
    return model


def attributes(model):
    found = {name: vars(module).keys() - {"_is_hf_initialized"} for name, module in model.named_modules()}
    return found, {name: part.all_tied_weights_keys for name, part in model.named_modules() if name in ("", "model")}


def assert_shared(model, name):
    modules = dict(compressed_modules(model))
    owner = module_name(model, SHARED[name][1])
    assert modules.keys() == {owner, *SHARED[name][2]}
    factors = factor_parameters(modules[owner])
    for user in SHARED[name][2]:
        assert all(own is its for own, its in zip(factor_parameters(modules[user]), factors, strict=True)), user


@pytest.mark.parametrize("name", SHARED)
def test_all_users_have_the_same_factors_and_come_back_dense(name):
    dense = composite(name)
    model = compressed(name)
    assert_shared(model, name)
    model.tie_weights()
    assert_shared(model, name)
    assert model.num_parameters() < dense.num_parameters()
    again = copy.deepcopy(model).dequantize()
    assert attributes(again) == attributes(dense)
    weight = again.get_submodule(module_name(again, SHARED[name][1])).weight
    assert all(again.get_submodule(user).weight is weight for user in SHARED[name][2])


@pytest.mark.parametrize("name", SHARED)
def test_saved_and_loaded_they_compute_the_same(name, tmp_path):
    model = compressed(name)
    expected = logits(model)
    assert torch.allclose(expected, logits(copy.deepcopy(model).dequantize()), atol=1e-4 * expected.abs().max().item())
    assert not agree(expected, logits(composite(name)))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert not any(key.startswith(user) for key in file.keys() for user in SHARED[name][2])  # noqa: SIM118
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_shared(loaded, name)
    assert agree(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_the_base_model_is_saved_alone(tmp_path):
    model = compressed("prophetnet")
    model.base_model.save_pretrained(tmp_path)
    loaded, info = type(model.base_model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert agree(loaded(**two_sides())[0], model.base_model(**two_sides())[0])


@pytest.mark.parametrize("name", SHARED)
def test_a_budget_that_chooses_the_shared_matrix_is_carried_out(name):
    model = composite(name)
    found = tqcompressor.plan(model, 0.6, progress=False)
    assert SHARED[name][1] in found.config.specs
    compress(model, budget=0.6, progress=False)
    assert model.num_parameters() == found.parameters_after
    assert {*SHARED[name][2]} <= dict(compressed_modules(model)).keys()


class Scaled(torch.nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


@pytest.mark.parametrize("name", ["marian", "pegasus", *SCALED])
def test_a_budget_leaves_alone_what_cannot_be_shared(name):
    model = composite(name)
    if name in SHARED:
        # Of the three users of this matrix one computes something else.
        model.model.decoder.embed_tokens.__class__ = Scaled
        for patterns in (["shared"], ["*", "shared"], ["shar*"]):
            with pytest.raises(ConfigError, match=r"model\.shared shares its weight with .*decoder.*, a Scaled"):
                tqcompressor.plan(model, 0.8, matrices=patterns, progress=False)
        assert "shared" not in tqcompressor.plan(model, 0.9, matrices=["*"], progress=False).config.specs
    assert "shared" not in tqcompressor.plan(model, 0.9, progress=False).config.specs
    before = logits(model)
    compress(model, budget=0.9, progress=False)
    assert model.lm_head.weight is model.model.shared.weight is model.model.decoder.embed_tokens.weight
    assert not agree(logits(model), before)


def test_a_matrix_under_two_names_is_left_alone():
    from helpers.families import family_model

    model = family_model("bert")
    model.encoder.layer[1].intermediate.dense = model.encoder.layer[0].intermediate.dense
    specs = tqcompressor.plan(model, 0.8, progress=False).config.specs
    assert "encoder.layer.0.output.dense" in specs and "encoder.layer.0.intermediate.dense" not in specs
    compress(model, budget=0.8, progress=False)


@pytest.mark.parametrize("name", ["marian", "two-berts", "bert-and-gpt2"])
def test_a_refusal_puts_every_user_back(name):
    model = composite(name)
    before = attributes(model)
    last = next(module for part, module in reversed(list(model.named_modules())) if part.endswith(("fc2", "dense")))
    with torch.no_grad():
        next(iter(last.parameters())).fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        compress(model, budget=0.6, progress=False)
    assert attributes(model) == before and next(compressed_modules(model), None) is None
    owner = model.get_submodule(module_name(model, SHARED[name][1]))
    assert all(model.get_submodule(user).weight is owner.weight for user in SHARED[name][2])


@pytest.mark.parametrize("name", ["pegasus", "two-berts"])
def test_compressed_again_they_share_the_new_factors(name):
    model = compressed(name, KRONECKER)
    recompress(model, TQConfig({SHARED[name][1]: LOW_RANK}, effort="fast"), progress=False)
    assert_shared(model, name)
    expected = logits(copy.deepcopy(model).dequantize())
    assert torch.allclose(logits(model), expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["marian", "prophetnet", "two-berts"])
def test_moments_of_all_users_are_those_of_the_shared_matrix(name):
    dense, owner = composite(name), SHARED[name][1]
    found = tqcompressor.calibrate(dense, [two_sides()], progress=False)
    assert {f"input.{owner}", f"output.{owner}"} <= found.moments.keys()
    users = {user.removeprefix(f"{dense.base_model_prefix}.") for user in SHARED[name][2]}
    assert not {f"{side}.{user}" for user in users for side in ("input", "output")} & found.moments.keys()
    # Without gradients the input moment is the tokens that are looked up, and the head's uniform part.
    plain = tqcompressor.calibrate(dense, [two_sides()], sensitivity=False, progress=False)
    again = tqcompressor.calibrate(compressed(name), [two_sides()], sensitivity=False, progress=False)
    ids = torch.cat([side.reshape(-1) for part, side in two_sides().items() if name != "two-berts" or "dec" in part])
    for calibration in (plain, again):
        moment = torch.tensor(calibration.input(owner))
        assert set((moment > moment.min() * 1.0001).nonzero().reshape(-1).tolist()) == set(ids.tolist())
    report = compress(dense, TQConfig({owner: LOW_RANK}, effort="fast"), calibration=found, progress=False)
    assert report.calibrated and report.matrices[0].name == owner


@pytest.mark.parametrize(
    ("name", "part"), [("t5", "encoder"), ("prophetnet", "prophetnet.decoder"), ("marian", "model.encoder")]
)
def test_a_part_that_could_not_be_loaded_is_not_saved(name, part, tmp_path):
    model = compressed(name)
    with pytest.raises(ConfigError, match=r"save the whole model, or call its dequantize\(\) first"):
        model.get_submodule(part).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model.dequantize().get_submodule(part).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
