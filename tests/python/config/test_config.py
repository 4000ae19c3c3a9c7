"""Specs, `TQConfig`, recipes, and the configs that entry points accept."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqcompressor import compress_checkpoint, decompose, find_permutation
from tqcompressor.config import RECIPES, TQConfig, resolve_config
from tqcompressor.config.specs import KroneckerSpec, LowRankSpec, MixedSpec, spec_from_dict
from tqcompressor.errors import ConfigError, ShapeError

KRONECKER = st.builds(
    KroneckerSpec,
    block=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    rank=st.integers(1, 64),
    permute=st.sampled_from(["none", "rows", "columns", "both"]),
)
LOW_RANK = st.builds(LowRankSpec, st.integers(1, 64))
TERMS = st.lists(KRONECKER | LOW_RANK, min_size=2, max_size=3)
SPECS = KRONECKER | LOW_RANK | st.builds(MixedSpec, TERMS)
CONFIGS = st.builds(
    TQConfig,
    specs=st.dictionaries(st.text(min_size=1), SPECS, min_size=1),
    effort=st.sampled_from(["fast", "balanced", "best"]),
    seed=st.integers(0, 2**64 - 1),
)


@given(CONFIGS)
def test_json_round_trip(config):
    assert TQConfig.from_json(config.to_json()) == config
    assert TQConfig.from_dict(config.to_dict()) == config
    assert copy.deepcopy(config) == config
    # Order decides which pattern wins, so it must survive too.
    assert list(TQConfig.from_json(config.to_json()).specs) == list(config.specs)


@given(SPECS)
def test_spec_round_trip(spec):
    data = json.loads(json.dumps(spec.to_dict()))
    assert spec_from_dict(data) == type(spec).from_dict(data) == spec
    assert {spec: 1}[spec_from_dict(data)] == 1


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_parameters_are_the_elements_of_the_factors(m1, m2, n1, n2, rank):
    spec = KroneckerSpec((m2, n2), rank)
    if rank > min(m1 * n1, m2 * n2):
        with pytest.raises(ShapeError, match="rank"):
            spec.parameters(m1 * m2, n1 * n2)
    else:
        assert spec.factor_shapes(m1 * m2, n1 * n2) == ((rank, m1, n1), (rank, m2, n2))
        assert spec.parameters(m1 * m2, n1 * n2) == rank * (m1 * n1 + m2 * n2)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_parameters_of_low_rank_are_the_elements_of_the_factors(rows, columns, rank):
    spec = LowRankSpec(rank)
    if rank >= min(rows, columns):
        with pytest.raises(ShapeError, match=f"rank {rank} is too large"):
            spec.check(rows, columns)
        return
    left, right = spec.factor_shapes(rows, columns)
    # An identity with as many rows or columns as the rank completes one of the two factors.
    assert (left[0] + (rank if rows <= columns else 0), left[1]) == (rows, rank)
    assert (right[0], right[1] + (0 if rows <= columns else rank)) == (rank, columns)
    assert spec.parameters(rows, columns) == left[0] * left[1] + right[0] * right[1]
    assert spec.parameters(rows, columns) <= rows * columns - 1


def test_a_sum_has_the_parameters_of_its_terms_and_names_the_one_that_does_not_fit():
    kronecker, low_rank = KroneckerSpec((2, 4), 3), LowRankSpec(5)
    mixed = MixedSpec((kronecker, low_rank))
    assert mixed.parameters(16, 32) == kronecker.parameters(16, 32) + low_rank.parameters(16, 32)
    with pytest.raises(ShapeError, match=r"terms\[0\]: block"):
        mixed.check(15, 32)
    with pytest.raises(ShapeError, match=r"terms\[1\]: rank 5"):
        mixed.parameters(4, 32)


@pytest.mark.parametrize(("rows", "columns"), [(7, 8), (8, 7), (0, 8)])
def test_a_block_must_divide(rows, columns):
    with pytest.raises(ShapeError, match="does not divide"):
        KroneckerSpec((2, 4), 1).factor_shapes(rows, columns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": (2,), "rank": 1}, "block"),
        ({"block": (2, 0), "rank": 1}, "block"),
        ({"block": (2, 1.5), "rank": 1}, "block"),
        ({"block": 4, "rank": 1}, "block"),
        ({"block": (2, 4), "rank": 0}, "rank"),
        ({"block": (2, 4), "rank": True}, "rank"),
        ({"block": (2, 4), "rank": "1"}, "rank"),
        ({"block": (2, 4), "rank": 1, "permute": "all"}, "permute"),
    ],
)
def test_a_spec_that_cannot_be_followed(arguments, message):
    with pytest.raises(ConfigError, match=message):
        KroneckerSpec(**arguments)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rank": 0}, "rank"),
        ({}, "rank"),
        (3, "JSON object"),
        ({"rank": 2, "permute": "both"}, "block"),
        ({"rank": 2, "ranks": 3}, "ranks"),
        ({"terms": [{"rank": 2}]}, "at least two"),
        ({"terms": 2}, "list"),
        ({"terms": "ab"}, "list"),
        ({"terms": [{"rank": 2}, 3]}, r"terms\[1\]"),
        ({"terms": [{"rank": 2}, {"block": [1, 2]}]}, r"terms\[1\].*rank"),
        ({"terms": [{"rank": 2}, {"terms": [{"rank": 2}, {"rank": 3}]}]}, r"terms\[1\]"),
        ({"terms": [{"rank": 2}, {"rank": 3}], "rank": 2}, "unknown key"),
    ],
)
def test_a_spec_in_json_that_cannot_be_followed(data, message):
    with pytest.raises(ConfigError, match=message):
        spec_from_dict(data)


def test_specs_are_values():
    spec = KroneckerSpec([2, 4], 4)
    assert spec.block == (2, 4)
    assert {spec: 1}[KroneckerSpec((2, 4), 4, "both")] == 1
    with pytest.raises(AttributeError):
        spec.rank = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effort": "slow"}, "effort"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"specs": {}}, "empty"),
        ({"specs": {"": {"block": [1, 4], "rank": 1}}}, "pattern"),
        ({"specs": {"wte": {"block": [1, 4]}}}, "wte.*rank"),
        ({"specs": {"wte": {"block": [1, 4], "rank": 1, "blok": 2}}}, "wte.*blok"),
        ({"specs": ["wte"]}, "specs"),
        ({"sped": 1}, "sped"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"format_version": 0}, "format_version"),
        ({"format_version": "1"}, "format_version"),
    ],
)
def test_a_config_that_cannot_be_followed(changes, message):
    with pytest.raises(ConfigError, match=message):
        TQConfig.from_dict({**RECIPES["tq-81m"].to_dict(), **changes})


def test_a_newer_format_is_named_before_its_keys_are_judged():
    newer = {**RECIPES["tq-81m"].to_dict(), "format_version": 5, "new_key": 1}
    with pytest.raises(ConfigError, match=r"newer tqcompressor \(format 5\), this one reads up to 4: upgrade"):
        TQConfig.from_dict(newer)


def test_only_what_the_first_format_cannot_say_is_written_in_the_second():
    kronecker, low_rank = KroneckerSpec((1, 4), 1), LowRankSpec(2)
    for specs, version in [
        ([kronecker], 1),
        ([low_rank], 2),
        ([kronecker, low_rank], 2),
        ([MixedSpec((kronecker, kronecker))], 2),
    ]:
        config = TQConfig({str(number): spec for number, spec in enumerate(specs)})
        assert config.to_dict()["format_version"] == config.format_version == version
    # Both are read, whatever their contents.
    for version in (1, 2):
        recipe = RECIPES["tq-81m"]
        assert TQConfig.from_dict({**recipe.to_dict(), "format_version": version}) == recipe


def test_missing_effort_and_seed_take_the_defaults():
    config = TQConfig.from_dict({"specs": {"wte": {"block": [1, 4], "rank": 1}}})
    assert (config.effort, config.seed, config.specs["wte"].permute) == ("fast", 0, "both")
    with pytest.raises(ConfigError, match="specs"):
        TQConfig.from_dict({"effort": "fast"})


def test_a_recipe_has_the_published_size():
    config = RECIPES["tq-81m"]
    assert config == resolve_config("tq-81m") and config.effort == "balanced"
    # GPT-2 small: 124,439,808 parameters before, 81,336,388 after (arXiv 2401.16367).
    wte, c_fc, c_proj = config.specs.values()
    saved = 50257 * 768 - wte.parameters(50257, 768)
    saved += 6 * (2 * 768 * 3072 - c_fc.parameters(768, 3072) - c_proj.parameters(3072, 768))
    assert 124_439_808 - saved == 81_336_388
    with pytest.raises(ConfigError, match="tq-81m"):
        resolve_config("tq-82m")


def test_replace_leaves_out_what_is_none():
    recipe = RECIPES["tq-81m"]
    config = recipe.replace(effort="fast", seed=None)
    assert (config.effort, config.seed, config.specs) == ("fast", 0, recipe.specs)
    assert config != recipe
    with pytest.raises(ConfigError, match="speed"):
        config.replace(speed=1)


def test_equality_ignores_the_order_of_specs_as_transformers_sorts_them():
    specs = RECIPES["tq-81m"].specs
    assert TQConfig(dict(reversed(specs.items()))) == TQConfig(specs)


def test_a_config_does_not_follow_the_dict_it_was_made_from():
    specs = {"wte": KroneckerSpec((1, 4), 1)}
    config = TQConfig(specs)
    specs.clear()
    assert list(config.specs) == ["wte"]


def test_every_form_of_a_config_is_resolved(tmp_path):
    config = TQConfig({"wte": KroneckerSpec((1, 4), 1)}, effort="fast", seed=7)
    file = tmp_path / "config.json"
    assert json.loads(config.to_json(file)) == config.to_dict()
    for given_config in (config, config.to_dict(), file, str(file)):
        assert resolve_config(given_config) == config
        assert resolve_config(given_config, effort="best", seed=None) == config.replace(effort="best")
    for name, recipe in RECIPES.items():
        assert resolve_config(name) == recipe


@pytest.mark.parametrize("bad", [None, "tq-82m", "no/such/file.json", 3, ["wte"]])
def test_what_is_no_config_is_refused(bad):
    with pytest.raises(ConfigError):
        resolve_config(bad)


def test_a_bad_file_is_named(tmp_path):
    file = tmp_path / "broken.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json"):
        resolve_config(file)


@pytest.mark.parametrize("bad", [None, "heroic", 3, ["fast"]], ids=repr)
def test_what_is_none_of_the_choices_is_refused_by_name(bad):
    w, spec = np.ones((4, 4), np.float32), KroneckerSpec((2, 2), 1)
    with pytest.raises(ConfigError, match='permute: expected "none", "rows", "columns" or "both", got'):
        KroneckerSpec((2, 2), 1, permute=bad)
    for call in (
        lambda: TQConfig({"wte": spec}, effort=bad),
        lambda: decompose(w, spec, effort=bad),
        lambda: find_permutation(w, spec, effort=bad),
    ):
        with pytest.raises(ConfigError, match='effort: expected "fast", "balanced" or "best", got'):
            call()
    with pytest.raises(ConfigError, match='objective: expected "auto", '):
        decompose(w, spec, objective=bad)


def test_neither_config_nor_budget_is_an_error_that_names_both(tmp_path):
    with pytest.raises(ConfigError, match=r'a recipe such as "tq-81m".* or budget=…, got neither'):
        compress_checkpoint("in", tmp_path / "out")
    with pytest.raises(ConfigError, match="got both"):
        compress_checkpoint("in", tmp_path / "out", "tq-81m", budget=0.5)
