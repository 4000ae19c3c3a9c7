"""Models compressed by a budget, in memory, on disk and in any precision; and calibrations that do not fit."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from helpers.calibrations import measured_model, saved
from helpers.checkpoints import Checkpoint, read_safetensors
from helpers.models import CONFIG, agree, first_output, some_ids
from tqcompressor import Calibration, LowRankSpec, TQConfig, compress, compress_checkpoint, inspect, plan
from tqcompressor.cli import main as cli
from tqcompressor.compression.model import recompress
from tqcompressor.errors import ConfigError, ShapeError


@pytest.fixture(scope="module")
def measured():
    return measured_model()


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_a_plan_is_one_for_all_threads_and_for_models_and_checkpoints(effort, measured, tmp_path):
    model, calibration = measured
    folder = saved(model, tmp_path)
    for known in (None, calibration):
        found = [plan(folder, 0.6, calibration=known, effort=effort, threads=threads) for threads in (1, 2, 3)]
        found += [plan(model, 0.6, calibration=known, effort=effort, threads=threads) for threads in (1, 2)]
        assert all(each.to_json() == found[0].to_json() and str(each) == str(found[0]) for each in found)
        assert found[0].parameters_after <= 0.6 * model.num_parameters()


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


WORDS = ("without a calibration", "far worse than a calibrated one", "tqcompressor calibrate", "--calibration")


def test_a_budget_without_a_calibration_says_what_that_costs(measured, tmp_path, capsys):
    """The plan, the command line, the report in the folder and the card; also where the objective ignores it."""
    model, calibration = measured
    folder, path = saved(model, tmp_path / "dense"), tmp_path / "moments.safetensors"
    calibration.save(path)
    plain = {"budget": 0.6, "effort": "fast"}
    told = [str(plan(model, **plain)), str(compress(copy.deepcopy(model), **plain)), plan(folder, **plain).to_json()]
    ignored = {"calibration": path, "objective": "frobenius"}
    told.append(str(compress_checkpoint(folder, tmp_path / "written", **plain, **ignored)))
    assert cli.main(["compress", str(folder), "--budget", "0.6", "--out", str(tmp_path / "out")]) == 0
    told.append(capsys.readouterr().out)
    told += [(tmp_path / "out" / name).read_text() for name in ("README.md", "compression_report.json")]
    told.append(str(inspect(tmp_path / "out")))
    for text in told:
        assert all(word in " ".join(text.split()) for word in WORDS), text
    # With a calibration, and by a config, nothing is said.
    silent = [str(plan(model, **plain, calibration=path)), str(compress(copy.deepcopy(model), CONFIG))]
    compress_checkpoint(folder, tmp_path / "better", **plain, calibration=path)
    compress_checkpoint(folder, tmp_path / "config", CONFIG)
    silent += [(tmp_path / name / "README.md").read_text() for name in ("better", "config")]
    assert not any(WORDS[1] in text for text in silent)


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


# Invalid inputs.


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
            with pytest.raises(ConfigError, match='objective: expected "auto"'):
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
        with pytest.raises(ConfigError, match="or budget=…, got both"):
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


# Low-rank specs in other settings.


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
    report = recompress(student, TQConfig({"h.0.mlp.c_fc": smaller}, effort="fast"))
    assert student.config.quantization_config.specs == {**before, "h.0.mlp.c_fc": smaller}
    # The fit is of the current weights, which have the earlier rank.
    energies = np.linalg.svd(dense.astype(np.float64), compute_uv=False) ** 2
    (matrix,) = report.matrices
    assert matrix.lost_energy == pytest.approx(energies[smaller.rank :].sum() / energies.sum(), rel=1e-4)
    assert report.parameters_after == student.num_parameters()
    stock = copy.deepcopy(student).dequantize()
    assert agree(first_output(student, some_ids()), first_output(stock, some_ids()))
