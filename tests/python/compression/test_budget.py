"""One budget for a whole model: its meaning, its limit, and the same plan in memory and on disk."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.calibrations import made_calibration, measured_model, saved
from helpers.checkpoints import read_safetensors
from helpers.families import bert_config
from helpers.models import agree, first_output, some_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tqcompressor import Calibration, LowRankSpec, TQConfig, calibrate, compress, compress_checkpoint, plan
from tqcompressor.compression.budget import meaning
from tqcompressor.errors import ConfigError

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
PARAMETERS = 5_289_472


@pytest.fixture(scope="module")
def tiny_calibration():
    shapes = {matrix.name: matrix.shape for matrix in plan(TINY, 0.5, effort="fast").matrices}
    return made_calibration(shapes)


@pytest.fixture(scope="module")
def measured():
    return measured_model()


# The meaning of a budget.


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (0.65, "at most 0.65 of the model's parameters"),
        ("0.65", "at most 0.65 of the model's parameters"),
        (np.float32(0.5), "at most 0.5 of the model's parameters"),
        ("65%", "at most 0.65 of the model's parameters"),
        (" 65.5 % ", "at most 0.655 of the model's parameters"),
        (81_336_388, "at most 81,336,388 parameters"),
        (np.int64(3000), "at most 3,000 parameters"),
        ("81336388", "at most 81,336,388 parameters"),
        ("2MB", "at most 2,000,000 bytes"),
        ("2 MiB", "at most 2,097,152 bytes"),
        ("1.5gb", "at most 1,500,000,000 bytes"),
        ("lost_energy=0.1", "as few parameters as lose 0.1 of the energy"),
        ("Lost energy = .05", "as few parameters as lose 0.05 of the energy"),
    ],
    ids=repr,
)
def test_every_form_of_a_budget_has_a_meaning(budget, words):
    assert meaning(budget).startswith(words)


@pytest.mark.parametrize(
    "budget",
    [
        *(
            0.0,
            1.0,
            1.5,
            -0.5,
            math.nan,
            math.inf,
            0,
            -3,
            True,
            None,
            [0.5],
            b"65%",
            "",
            "much",
            "0",
            "1",
            "0%",
            "100%",
        ),
        *(
            "120%",
            "-5%",
            "nan",
            "inf",
            "2MBs",
            "2 furlongs",
            "lost_energy=0",
            "lost_energy=1",
            "lost_energy=",
            "9" * 400,
        ),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_nonsense_is_refused(budget):
    with pytest.raises(ConfigError, match="budget must be a share"):
        plan(TINY, budget)


@given(st.one_of(st.text(max_size=12), st.integers(), st.floats(), st.from_regex(r"[0-9.]{1,4} ?[%kKmMbBiI]{0,3}")))
def test_any_budget_has_a_meaning_or_is_refused(budget):
    try:
        words = meaning(budget)
    except ConfigError:
        return
    assert words.startswith(("at most ", "as few "))


@given(st.integers(1, 999))
def test_shares_and_percentages_mean_the_same(thousandths):
    share = thousandths / 1000
    assert meaning(share) == meaning(str(share)) == meaning(f"{thousandths / 10:.1f}%")


# The result of a budget.


@pytest.mark.parametrize(
    ("budget", "calibrated", "effort"),
    [
        (0.1, False, "fast"),
        (0.35, True, "fast"),
        (0.5, False, "fast"),
        ("65%", True, "fast"),
        (0.8, False, "fast"),
        (0.95, True, "fast"),
        (3_000_000, False, "fast"),
    ],
)
def test_a_budget_is_kept_and_spent(budget, calibrated, effort, tiny_calibration):
    calibration = tiny_calibration if calibrated else None
    found = plan(TINY, budget, calibration=calibration, effort=effort)
    allowed = {"65%": 0.65}.get(budget, budget)
    allowed = allowed if allowed > 1 else allowed * PARAMETERS
    assert 0.995 * allowed < found.parameters_after <= allowed
    # The total is that of the specs and of all other tensors.
    matrices = sum(matrix.parameters_after for matrix in found.matrices)
    dense = sum(matrix.parameters_before for matrix in found.matrices)
    assert found.parameters_after == PARAMETERS - dense + matrices and found.parameters_before == PARAMETERS
    for matrix in found.matrices:
        assert matrix.parameters_after == (
            math.prod(matrix.shape) if matrix.spec is None else matrix.spec.parameters(*matrix.shape)
        )
        assert 0 <= matrix.lost_energy < 1 and (matrix.spec is not None or matrix.lost_energy == 0)
        assert matrix.energies.sum() == pytest.approx(1) and (np.diff(matrix.energies) <= 0).all()
    assert found.calibrated is calibrated and meaning(budget) in str(found)
    assert {name: spec for name, spec in found.config.specs.items()} == {
        matrix.name: matrix.spec for matrix in found.matrices if matrix.spec is not None
    }


def test_a_search_for_the_best_kinds_leaves_no_more(tiny_calibration):
    # Without the embedding, which takes the longest.
    patterns = ["h.0.mlp.*", "h.[13].attn.*"]
    found = plan(TINY, 0.93, calibration=tiny_calibration, matrices=patterns, effort="balanced")
    assert 0.995 * 0.93 * PARAMETERS < found.parameters_after <= 0.93 * PARAMETERS
    assert len(found.matrices) == 10


def test_what_is_written_is_what_was_planned(tmp_path):
    found = plan(TINY, 0.5, effort="fast")
    report = compress_checkpoint(TINY, tmp_path / "budget", budget=0.5, effort="fast")
    assert report.parameters_after == found.parameters_after <= 0.5 * PARAMETERS
    stored = read_safetensors(tmp_path / "budget")
    floating = sum(math.prod(shape) for dtype, shape, _ in stored.values() if dtype not in ("I64", "U8"))
    assert floating == found.parameters_after
    expected = {matrix.name: matrix.lost_energy for matrix in found.matrices if matrix.spec is not None}
    assert {matrix.name: matrix.lost_energy for matrix in report.matrices} == pytest.approx(expected, rel=1e-6)
    # The plan's config does the same.
    compress_checkpoint(TINY, tmp_path / "config", found.config)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("budget", "config")]
    assert written[0] == written[1]


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_size_is_that_of_the_weights_as_they_are_written(dtype, tmp_path):
    compress_checkpoint(TINY, tmp_path / "out", budget="6MB", dtype=dtype, effort="fast")
    stored = read_safetensors(tmp_path / "out")
    size = sum(len(data) for dtype, _, data in stored.values() if dtype not in ("I64", "U8"))
    assert 0.99 * 6e6 < size <= 6e6


def test_a_quality_is_reached_with_as_little_as_it_takes():
    shares = [0.02, 0.1, 0.3]
    found = [plan(TINY, f"lost_energy={share}", effort="fast") for share in shares]
    for share, each in zip(shares, found, strict=True):
        sizes = np.array([matrix.parameters_before for matrix in each.matrices])
        lost = np.array([matrix.lost_energy for matrix in each.matrices])
        # Without gradients, each matrix counts by its size.
        assert 0.97 * share < (sizes * lost).sum() / sizes.sum() <= share
    assert found[0].parameters_after > found[1].parameters_after > found[2].parameters_after


def test_balanced_is_never_worse_than_fast(measured):
    model, calibration = measured
    fast, balanced = (plan(model, 0.5, calibration=calibration, effort=effort) for effort in ("fast", "balanced"))
    for one, other in zip(fast.matrices, balanced.matrices, strict=True):
        assert one.name == other.name and other.parameters_after <= one.parameters_after
        assert other.lost_energy <= one.lost_energy * (1 + 1e-9)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0.005, "what is not compressed has 46,592"),
        (0.012, "smallest budget that can be met is 0.0139"),
        ("1GB", "nothing to compress"),
        (PARAMETERS, "nothing to compress"),
    ],
)
def test_budgets_that_cannot_be_kept_or_need_nothing(budget, message):
    with pytest.raises(ConfigError, match=message):
        plan(TINY, budget, effort="fast")


# The selection of matrices.


def test_parts_of_a_fused_weight_are_compressed_all_or_none(tmp_path):
    model = tiny_model()
    fused = model.transformer.h[0].attn.c_attn.weight.data
    # The query is full-rank noise, which needs its parameters; keys and values have rank 2.
    random = torch.Generator().manual_seed(0)
    fused[:, :32] = torch.linalg.qr(torch.randn(32, 32, generator=random)).Q
    fused[:, 32:] = torch.randn(32, 2, generator=random) @ torch.randn(2, 64, generator=random)
    folder = saved(model, tmp_path / "dense")
    budget = model.num_parameters() - 2 * (32 * 32 - LowRankSpec(3).parameters(32, 32))
    found = plan(folder, budget, matrices=["h.0.attn.c_attn.*"], effort="fast")
    specs = {matrix.name[-1]: matrix.spec for matrix in found.matrices}
    assert specs["q"] == LowRankSpec(31) and specs["k"].rank < 5 and specs["v"].rank < 5
    assert found.matrices[0].lost_energy == pytest.approx(1 / 32, rel=1e-3) and found.parameters_after <= budget
    options = {"budget": budget, "matrices": ["h.0.attn.c_attn.*"], "effort": "fast"}
    report = compress_checkpoint(folder, tmp_path / "out", **options)
    assert report.parameters_after == found.parameters_after
    compress(model, **options)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert agree(first_output(loaded, some_ids()), first_output(model, some_ids()))


def test_what_the_calibration_never_saw_stays_dense_unless_it_is_named(measured):
    model, calibration = measured
    moments = dict(calibration.moments)
    del moments["input.h.0.mlp.c_fc"]
    moments["output.h.1.mlp.c_proj"] = np.zeros_like(moments["output.h.1.mlp.c_proj"])
    partial = Calibration(moments, calibration.tokens)
    names = {matrix.name for matrix in plan(model, 0.7, calibration=calibration, effort="fast").matrices}
    assert {"wte", "h.0.mlp.c_fc", "h.1.mlp.c_proj", "h.1.attn.c_attn.v"} <= names and "wpe" not in names
    found = plan(model, 0.7, calibration=partial, effort="fast")
    assert {matrix.name for matrix in found.matrices} == names - {"h.0.mlp.c_fc", "h.1.mlp.c_proj"}
    named = plan(model, 0.7, calibration=partial, matrices=["h.*"], objective="frobenius", effort="fast")
    assert {"h.0.mlp.c_fc", "h.1.mlp.c_proj"} <= {matrix.name for matrix in named.matrices}


def test_a_models_unused_parts_stay_dense():
    torch.manual_seed(0)
    model = transformers.BertModel(bert_config(num_hidden_layers=1)).eval()
    # The embedding of a text is its tokens' mean: nothing depends on the pooler.
    calibration = calibrate(model, [some_ids()])
    names = {matrix.name for matrix in plan(model, 0.8, calibration=calibration, effort="fast").matrices}
    assert "encoder.layer.0.attention.self.query" in names and "pooler.dense" not in names
    assert "pooler.dense" in {matrix.name for matrix in plan(model, 0.8, effort="fast").matrices}


def test_patterns_choose_matrices(measured, tmp_path):
    model, _ = measured
    folder = saved(model, tmp_path)
    for patterns in (["h.*.mlp.*"], "h.*.mlp.*", ["transformer.h.*.mlp.c_fc", "h.*.mlp.c_proj"]):
        for source in (model, folder):
            found = plan(source, 0.8, matrices=patterns, effort="fast")
            assert [matrix.name for matrix in found.matrices] == [
                f"h.{layer}.mlp.{name}" for layer in (0, 1) for name in ("c_fc", "c_proj")
            ]
    assert [matrix.name for matrix in plan(model, 0.99, matrices=["wpe"], effort="fast").matrices] == ["wpe"]
    for source in (model, folder):
        for wrong in (["none.such"], []):
            with pytest.raises(ConfigError, match="none.such" if wrong else "at least one pattern"):
                plan(source, 0.8, matrices=wrong)


def test_a_plan_as_json_says_what_it_means():
    found = plan(TINY, "50%", effort="fast", seed=4)
    data = json.loads(found.to_json())
    assert data["meaning"] == meaning("50%") and data["parameters_after"] == found.parameters_after
    assert TQConfig.from_dict(data["config"]) == found.config and found.config.seed == 4
    assert [matrix["name"] for matrix in data["matrices"]] == [matrix.name for matrix in found.matrices]
