"""One budget for a whole model: what it means, that it is kept, and that the plan is the same everywhere."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import Checkpoint, read_safetensors
from helpers.models import agree, first_output, some_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tqcompressor import Calibration, LowRankSpec, TQConfig, calibrate, compress, compress_checkpoint, plan
from tqcompressor.budget import meaning
from tqcompressor.errors import ConfigError, ShapeError
from tqcompressor.in_place import compress_again

TINY = Path(__file__).parents[1] / "data" / "tiny-gpt2"
PARAMETERS = 5_289_472


def second_moment(side, seed):
    """Of 24 samples in uneven directions: singular, as that of a short text is."""
    random = np.random.default_rng(seed)
    samples = random.standard_normal((24, side)) * np.exp(random.standard_normal(side))
    moment = (samples.T @ samples / 24).astype(np.float32)
    return np.maximum(moment, moment.T)


def made_calibration(shapes, sensitivity=True):
    """A calibration of matrices `{name: (rows, columns)}`, without a model."""
    moments = {}
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        embedding = name == "wte"
        frequencies = np.random.default_rng(seed).dirichlet(np.full(rows, 0.5)).astype(np.float32)
        moments[f"input.{name}"] = frequencies if embedding else second_moment(rows, seed)
        if sensitivity:
            moments[f"output.{name}"] = second_moment(columns, seed + 100) * np.float32(10.0 ** (seed % 3))
    return Calibration(moments, 24, 0, sensitivity, "gpt2")


@pytest.fixture(scope="module")
def tiny_calibration():
    shapes = {matrix.name: matrix.shape for matrix in plan(TINY, 0.5, effort="fast").matrices}
    return made_calibration(shapes)


@pytest.fixture(scope="module")
def measured():
    """A small model with a checkpoint's weights, and what text-like batches say of it."""
    model = tiny_model()
    random = torch.Generator().manual_seed(1)
    batches = [torch.randint(1, 104, (8, 16), generator=random) for _ in range(2)]
    return model, calibrate(model, batches)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


# What a budget means.


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


# What it comes to.


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
    assert 0.995 * allowed < found.parameters <= allowed
    # The sum is that of the specs, and of everything else.
    matrices = sum(matrix.parameters for matrix in found.matrices)
    dense = sum(matrix.parameters_before for matrix in found.matrices)
    assert found.parameters == PARAMETERS - dense + matrices and found.parameters_before == PARAMETERS
    for matrix in found.matrices:
        assert matrix.parameters == (
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
    assert 0.995 * 0.93 * PARAMETERS < found.parameters <= 0.93 * PARAMETERS
    assert len(found.matrices) == 10


def test_what_is_written_is_what_was_planned(tmp_path):
    found = plan(TINY, 0.5, effort="fast")
    report = compress_checkpoint(TINY, tmp_path / "budget", budget=0.5, effort="fast")
    assert report.parameters_after == found.parameters <= 0.5 * PARAMETERS
    stored = read_safetensors(tmp_path / "budget")
    assert (
        sum(math.prod(shape) for dtype, shape, _ in stored.values() if dtype not in ("I64", "U8")) == found.parameters
    )
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
    assert found[0].parameters > found[1].parameters > found[2].parameters


def test_balanced_is_never_worse_than_fast(measured):
    model, calibration = measured
    fast, balanced = (plan(model, 0.5, calibration=calibration, effort=effort) for effort in ("fast", "balanced"))
    for one, other in zip(fast.matrices, balanced.matrices, strict=True):
        assert one.name == other.name and other.parameters <= one.parameters
        assert other.lost_energy <= one.lost_energy * (1 + 1e-9)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0.005, "what is not compressed has 46,592"),
        (0.012, "which need"),
        ("1GB", "nothing to compress"),
        (PARAMETERS, "nothing to compress"),
    ],
)
def test_budgets_that_cannot_be_kept_or_need_nothing(budget, message):
    with pytest.raises(ConfigError, match=message):
        plan(TINY, budget, effort="fast")


# The same everywhere.


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_a_plan_is_one_for_all_threads_and_for_models_and_checkpoints(effort, measured, tmp_path):
    model, calibration = measured
    folder = saved(model, tmp_path)
    for known in (None, calibration):
        found = [plan(folder, 0.6, calibration=known, effort=effort, threads=threads) for threads in (1, 2, 3)]
        found += [plan(model, 0.6, calibration=known, effort=effort, threads=threads) for threads in (1, 2)]
        assert all(each.to_json() == found[0].to_json() and str(each) == str(found[0]) for each in found)
        assert found[0].parameters <= 0.6 * model.num_parameters()


def test_a_calibration_changes_the_plan(measured):
    model, calibration = measured
    found = [
        plan(model, 0.6, calibration=calibration, objective=objective, effort="fast").config.specs
        for objective in ("frobenius", "diagonal", "second_moment", "sensitivity")
    ]
    assert all(found[i] != found[j] for i in range(4) for j in range(i))
    assert found[3] == plan(model, 0.6, calibration=calibration, effort="fast").config.specs
    assert found[0] == plan(model, 0.6, effort="fast").config.specs


@pytest.mark.parametrize("sensitivity", [True, False])
def test_a_model_and_its_checkpoint_become_the_same(sensitivity, measured, tmp_path):
    model, calibration = measured
    if not sensitivity:
        inputs = {name: moment for name, moment in calibration.moments.items() if name.startswith("input.")}
        calibration = Calibration(inputs, calibration.tokens, sensitivity=False)
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    folder = saved(model, tmp_path / "dense")
    options = {"budget": 0.6, "calibration": path, "effort": "fast", "seed": 2}
    written = compress_checkpoint(folder, tmp_path / "written", **options)
    live = copy.deepcopy(model)
    report = compress(live, **options)
    assert written.calibrated and report.calibrated
    live.save_pretrained(tmp_path / "saved")
    assert read_safetensors(tmp_path / "written") == read_safetensors(tmp_path / "saved")
    assert report.parameters_after == written.parameters_after == live.num_parameters() <= 0.6 * model.num_parameters()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    expected = first_output(live, some_ids())
    assert agree(first_output(loaded, some_ids()), expected)
    assert not torch.allclose(expected, first_output(model, some_ids()), atol=1e-3)


def test_a_calibration_makes_the_model_better_at_what_it_saw(measured):
    model, calibration = measured
    ids = torch.randint(1, 104, (16, 16), generator=torch.Generator().manual_seed(2))
    expected = torch.log_softmax(first_output(model, ids), -1)
    divergences = []
    for known in (None, calibration):
        student = copy.deepcopy(model)
        compress(student, budget=0.7, calibration=known, effort="fast")
        found = torch.log_softmax(first_output(student, ids), -1)
        divergences.append((expected.exp() * (expected - found)).sum(-1).mean().item())
    assert divergences[1] < 0.8 * divergences[0]


# Which matrices.


def test_parts_of_a_fused_weight_are_compressed_all_or_none(tmp_path):
    model = tiny_model()
    fused = model.transformer.h[0].attn.c_attn.weight.data
    # The query is all noise, and worth its parameters; keys and values have rank 2.
    random = torch.Generator().manual_seed(0)
    fused[:, :32] = torch.linalg.qr(torch.randn(32, 32, generator=random)).Q
    fused[:, 32:] = torch.randn(32, 2, generator=random) @ torch.randn(2, 64, generator=random)
    folder = saved(model, tmp_path / "dense")
    budget = model.num_parameters() - 2 * (32 * 32 - LowRankSpec(3).parameters(32, 32))
    found = plan(folder, budget, matrices=["h.0.attn.c_attn.*"], effort="fast")
    specs = {matrix.name[-1]: matrix.spec for matrix in found.matrices}
    assert specs["q"] == LowRankSpec(31) and specs["k"].rank < 5 and specs["v"].rank < 5
    assert found.matrices[0].lost_energy == pytest.approx(1 / 32, rel=1e-3) and found.parameters <= budget
    options = {"budget": budget, "matrices": ["h.0.attn.c_attn.*"], "effort": "fast"}
    report = compress_checkpoint(folder, tmp_path / "out", **options)
    assert report.parameters_after == found.parameters
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
    config = transformers.BertConfig(
        vocab_size=104, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
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


# What cannot be.


def calls(model, folder, tmp_path):
    """Every entry point that takes a calibration."""
    return [
        lambda **options: plan(folder, 0.6, **options),
        lambda **options: plan(model, 0.6, **options),
        lambda **options: compress(model, budget=0.6, **options),
        lambda **options: compress(model, {"specs": {"h.0.mlp.c_fc": {"rank": 3}}}, **options),
        lambda **options: compress_checkpoint(folder, tmp_path / "out", budget=0.6, **options),
        lambda **options: compress_checkpoint(
            folder, tmp_path / "out", {"specs": {"h.0.mlp.c_fc": {"rank": 3}}}, **options
        ),
    ]


def test_calibrations_of_other_models_and_missing_moments(measured, tmp_path):
    model, calibration = measured
    folder = saved(model, tmp_path / "dense")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = dict(calibration.moments)
    wider = Calibration({**moments, "input.h.0.mlp.c_fc": np.eye(48, dtype=np.float32)}, 1)
    inputs = Calibration({name: moment for name, moment in moments.items() if name.startswith("input.")}, 1, 0, False)
    other = Calibration({"input.encoder.layer.0.output.dense": np.eye(32, dtype=np.float32)}, 1)
    for call in calls(model, folder, tmp_path):
        with pytest.raises(ConfigError, match=r"h\.0\.\S*, .*another model|h\.0\.mlp\.c_fc…, got none"):
            call(calibration=other)
        with pytest.raises(ShapeError, match=r"h\.0\.mlp\.c_fc.*another model"):
            call(calibration=wider)
        with pytest.raises(ConfigError, match="'sensitivity' needs the input and output moments"):
            call(calibration=inputs, objective="sensitivity")
        for objective in ("diagonal", "second_moment", "sensitivity"):
            with pytest.raises(ConfigError, match=f"{objective!r} needs"):
                call(objective=objective)
        for known in (None, calibration):
            with pytest.raises(ConfigError, match="objective must be one of"):
                call(calibration=known, objective="happiness")
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_options_that_exclude_each_other(measured, tmp_path):
    model, _ = measured
    folder = saved(model, tmp_path / "dense")
    for call in (
        lambda **options: compress(model, **options),
        lambda **options: compress_checkpoint(folder, tmp_path / "out", **options),
    ):
        with pytest.raises(ConfigError, match="either a config or a budget"):
            call(config="tq-81m", budget=0.5)
        with pytest.raises(ConfigError, match="matrices: expected with a budget"):
            call(config={"specs": {"h.0.mlp.c_fc": {"rank": 3}}}, matrices=["h.*"])
    assert not (tmp_path / "out").exists()


def test_singular_and_zero_moments_are_ordinary(measured):
    model, calibration = measured
    moments = {
        # Rank 1, or none at all.
        name: np.full_like(moment, float(number % 2))
        for number, (name, moment) in enumerate(calibration.moments.items())
    }
    student = copy.deepcopy(model)
    report = compress(student, budget=0.6, calibration=Calibration(moments, 1), matrices=["wte", "h.*"], effort="fast")
    assert report.parameters_after <= 0.6 * model.num_parameters()
    assert torch.isfinite(first_output(student, some_ids())).all()


# Low-rank specs in other circumstances.


@pytest.mark.parametrize(("dtype", "precision"), [("F32", 1e-6), ("F16", 2e-3), ("BF16", 2e-2)])
def test_low_rank_in_half_precision(dtype, precision, tmp_path):
    source = Checkpoint(dtype=dtype, width=16, vocabulary=40)
    specs = {"wte": {"rank": 9}, "h.0.attn.c_attn.*": {"rank": 7}, "h.*.mlp.c_proj": {"rank": 5}}
    report = compress_checkpoint(source.write(tmp_path / "in"), tmp_path / "out", {"specs": specs, "effort": "fast"})
    stored = read_safetensors(tmp_path / "out")
    factors = [name for name in stored if name.endswith((".left", ".right"))]
    assert len(factors) == 2 * 6 and all(stored[name][0] == dtype for name in factors)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert next(model.parameters()).dtype == {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    for matrix in report.matrices:
        module = model.transformer.get_submodule(matrix.name)
        dense = source.values(f"transformer.{matrix.tensor.removeprefix('transformer.')}").astype(np.float64)
        if matrix.name[-1] in "qkv":
            dense = np.split(dense, 3, axis=1)["qkv".index(matrix.name[-1])]
        error = dense - module.dense_weight().detach().to(torch.float64).numpy()
        lost = (error**2).sum() / (dense**2).sum()
        assert math.sqrt(lost) == pytest.approx(math.sqrt(matrix.lost_energy), abs=precision)


def test_a_low_rank_model_is_compressed_again(measured):
    model, calibration = measured
    student = copy.deepcopy(model)
    compress(student, budget=0.7, calibration=calibration, effort="fast")
    before = student.config.quantization_config.specs
    assert isinstance(before["h.0.mlp.c_fc"], LowRankSpec)
    dense = student.transformer.h[0].mlp.c_fc.dense_weight().detach().numpy()
    smaller = LowRankSpec(before["h.0.mlp.c_fc"].rank // 2)
    report = compress_again(student, TQConfig({"h.0.mlp.c_fc": smaller}, effort="fast"))
    assert student.config.quantization_config.specs == {**before, "h.0.mlp.c_fc": smaller}
    # From the weights as they were then, which have the rank of before.
    energies = np.linalg.svd(dense.astype(np.float64), compute_uv=False) ** 2
    (matrix,) = report.matrices
    assert matrix.lost_energy == pytest.approx(energies[smaller.rank :].sum() / energies.sum(), rel=1e-4)
    assert report.parameters_after == student.num_parameters()
    stock = copy.deepcopy(student).dequantize()
    assert agree(first_output(student, some_ids()), first_output(stock, some_ids()))


def test_a_plan_as_json_says_what_it_means():
    found = plan(TINY, "50%", effort="fast", seed=4)
    data = json.loads(found.to_json())
    assert data["meaning"] == meaning("50%") and data["parameters"] == found.parameters
    assert TQConfig.from_dict(data["config"]) == found.config and found.config.seed == 4
    assert [matrix["name"] for matrix in data["matrices"]] == [matrix.name for matrix in found.matrices]
