"""Staged recipes: JSON, shares of the text, and further compression of a compressed student."""

import json

import numpy as np
import pytest
import torch
from helpers.models import agree, first_output, some_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tqcompressor import RECIPES, KroneckerSpec, TQConfig
from tqcompressor.compression.model import compress, recompress
from tqcompressor.distillation.stages import STAGED_RECIPES, Stage, StagedRecipe, resolve_staged_recipe
from tqcompressor.errors import ConfigError
from tqcompressor.models.matrices import compressed_modules

HALF = TQConfig({"wte": KroneckerSpec((1, 2), 1, "columns")}, effort="fast")
FEED_FORWARD = TQConfig({"h.1.mlp.c_fc": KroneckerSpec((2, 4), 4)}, effort="fast")
QUARTER = TQConfig({"wte": KroneckerSpec((1, 4), 1, "columns")}, effort="fast")


def test_the_published_recipe_ends_where_the_one_shot_recipe_does():
    names = [list(stage.config.specs) for stage in STAGED_RECIPES["tq-81m-staged"].stages]
    assert names[0] == names[2] == ["wte"]
    assert set(names[1]) == set(RECIPES["tq-81m"].specs) - {"wte"}
    last = {name: spec for stage in STAGED_RECIPES["tq-81m-staged"].stages for name, spec in stage.config.specs.items()}
    assert last == dict(RECIPES["tq-81m"].specs)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(any), st.integers(0, 1000))
def test_stages_share_all_samples_in_order(shares, num_samples):
    recipe = StagedRecipe(tuple(Stage(str(n), HALF, share) for n, share in enumerate(shares)))
    ranges = recipe.samples_of_stages(num_samples)
    assert [sample for part in ranges for sample in part] == list(range(num_samples))
    for share, part in zip(shares, ranges, strict=True):
        assert abs(len(part) - num_samples * share / sum(shares)) <= 1


def test_json_round_trip_and_files(tmp_path):
    recipe = StagedRecipe((Stage("a", HALF, 2.0), Stage("b", FEED_FORWARD, 0.0), Stage("c", QUARTER)))
    assert StagedRecipe.from_json(recipe.to_json()) == recipe
    path = tmp_path / "recipe.json"
    path.write_text(recipe.to_json(), encoding="utf-8")
    assert resolve_staged_recipe(path) == resolve_staged_recipe(str(path)) == recipe
    path.write_text(HALF.to_json(), encoding="utf-8")
    assert [stage.config for stage in resolve_staged_recipe(path).stages] == [HALF]
    assert [stage.config for stage in resolve_staged_recipe("tq-81m").stages] == [RECIPES["tq-81m"]]
    changed = resolve_staged_recipe(recipe, effort="best", seed=None)
    assert {stage.config.effort for stage in changed.stages} == {"best"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stages": []}, "at least one stage"),
        ({"stages": 3}, "must be a list"),
        (
            {"stages": [{"name": "a", "config": HALF.to_dict(), "budget": 0.5}]},
            "stage a: expected a config or a budget",
        ),
        ({"stages": [{"name": "a", "config": HALF.to_dict()}, {"name": "b", "budget": 0.5}]}, "configs or budgets"),
        ({"stages": [{"name": "a", "budget": "much"}]}, "stage a: budget"),
        ({"stages": [{"share": 1}]}, "needs name"),
        ({"stages": [{"name": "a/b", "config": HALF.to_dict()}]}, "without slashes"),
        ({"stages": [{"name": "a", "config": {"specs": {"wte": {"block": [0, 1], "rank": 1}}}}]}, "stage a: specs"),
        ({"stages": [{"name": "a", "config": HALF.to_dict(), "share": -1}]}, "from 0 up"),
        ({"stages": [{"name": "a", "config": HALF.to_dict(), "share": 0}]}, "nothing would be trained"),
        ({"stages": [{"name": "a", "config": HALF.to_dict(), "epochs": 2}]}, "unknown key"),
        ({"stages": [{"name": "a", "config": HALF.to_dict()}], "format_version": 99}, "format 99"),
    ],
)
def test_invalid_recipes(data, message, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        resolve_staged_recipe(path)


def test_recipes_that_are_no_name_no_file_or_no_json(tmp_path):
    with pytest.raises(ConfigError, match="tq-81m-staged"):
        resolve_staged_recipe("tq-82m")
    (tmp_path / "bad.json").write_bytes(b"{\xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 1"):
        resolve_staged_recipe(tmp_path / "bad.json")


def test_a_further_stage_keeps_the_matrices_that_it_does_not_name():
    model = tiny_model()
    recompress(model, HALF)
    recompress(model, FEED_FORWARD)
    feed_forward = model.transformer.h[1].mlp.c_fc
    kept = feed_forward.A.detach().clone()
    embedding = model.transformer.wte.dense_weight().detach()
    before = model.num_parameters()

    report = recompress(model, QUARTER)

    assert [matrix.name for matrix in report.matrices] == ["wte"]
    assert (report.parameters_before, report.parameters_after) == (before, model.num_parameters())
    assert model.transformer.h[1].mlp.c_fc is feed_forward and torch.equal(feed_forward.A, kept)
    assert dict(model.config.quantization_config.specs) == {**FEED_FORWARD.specs, **QUARTER.specs}
    assert model.lm_head.A is model.transformer.wte.A
    # The stage decomposed the student's embedding, not the original one.
    error = torch.linalg.norm(model.transformer.wte.dense_weight() - embedding) ** 2 / torch.linalg.norm(embedding) ** 2
    assert np.isclose(error.item(), report.matrices[0].lost_energy, rtol=1e-4)


def test_a_first_stage_equals_compress():
    one, other = tiny_model(), tiny_model()
    compress(one, HALF)
    recompress(other, HALF)
    assert torch.equal(first_output(one, some_ids()), first_output(other, some_ids()))


def test_a_stage_that_fails_leaves_the_student_as_it_was():
    model = tiny_model()
    recompress(model, HALF)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    modules = dict(compressed_modules(model))
    expected = model.transformer.wte.dense_weight()
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_fc"):
        recompress(
            model, {"specs": {"wte": {"block": [1, 4], "rank": 1}, "h.0.mlp.c_fc": {"block": [2, 2], "rank": 1}}}
        )
    assert dict(compressed_modules(model)) == modules
    assert torch.equal(model.transformer.wte.dense_weight(), expected)
    assert dict(model.config.quantization_config.specs) == dict(HALF.specs)
    with pytest.raises(ConfigError):
        recompress(model, {"specs": {"h.9.mlp.c_fc": {"block": [2, 2], "rank": 1}}})


def test_a_student_of_several_stages_is_saved_and_loaded(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    for config in (HALF, FEED_FORWARD, QUARTER):
        recompress(model, config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert agree(first_output(loaded, some_ids()), first_output(model, some_ids()))
