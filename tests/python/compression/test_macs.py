"""A cap on MACs beside a budget: the count equals that of the models, and the cap is kept."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.calibrations import saved
from helpers.families import bert_config
from helpers.models import some_ids, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from tqcompressor import KroneckerSpec, MixedSpec, TQConfig, compress, compress_checkpoint, plan
from tqcompressor.cli.main import main
from tqcompressor.errors import ConfigError

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"


def measured(model, ids):
    """MACs of a forward pass for one token."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    # A multiply and an addition each.
    return counter.get_total_flops() / 2 / ids.numel()


def counted(spec, rows, columns):
    """MACs of a matrix, by their definition."""
    if isinstance(spec, MixedSpec):
        return sum(counted(term, rows, columns) for term in spec.terms)
    if isinstance(spec, KroneckerSpec):
        (rank, m1, n1), (_, m2, n2) = spec.factor_shapes(rows, columns)
        return rank * min(m2 * m1 * n1 + n1 * m2 * n2, m1 * m2 * n2 + n2 * m1 * n1)
    return spec.parameters(rows, columns)


def bert():
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(bert_config(num_hidden_layers=1)).eval()


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model("GPT2Model"), bert], ids=["tied", "no head", "bert"])
def test_a_plan_says_what_a_model_takes(make):
    model = make()
    found = plan(model, 0.5, effort="fast")
    before = measured(model, some_ids())
    compress(model, found.config)
    saves = found.macs_before - found.macs_after
    assert before - measured(model, some_ids()) == pytest.approx(saves, abs=1e-6) and saves > 0


def test_sums_of_terms_are_counted_as_models_take_them():
    model = tiny_model()
    found = plan(model, 0.9, effort="balanced", max_macs=math.inf, matrices=["h.1.*"])
    assert any(isinstance(matrix.spec, MixedSpec) for matrix in found.matrices)
    before = measured(model, some_ids())
    compress(model, found.config)
    saves = found.macs_before - found.macs_after
    assert before - measured(model, some_ids()) == pytest.approx(saves, abs=1e-6)


def test_an_embedding_takes_none_unless_it_is_the_head(tmp_path):
    expected = {"GPT2LMHeadModel": 104 * 32, "GPT2Model": 0}
    for class_name, before in expected.items():
        model = tiny_model(class_name)
        for source in (model, saved(model, tmp_path / class_name)):
            found = plan(source, 0.5, effort="fast")
            embedding = found.matrices[0]
            assert embedding.name == "wte" and embedding.macs_before == before
            # The columns that are not stored, computed from the stored ones.
            row = embedding.spec.rank * (32 - embedding.spec.rank)
            assert embedding.macs_after == row + bool(before) * embedding.parameters_after
            assert all(each.macs_before == math.prod(each.shape) for each in found.matrices[1:])


@pytest.mark.parametrize(("budget", "cap"), [(0.8, 0.3), (0.8, 0.55), (3_000_000, 0.4), ("lost_energy=0.2", 0.9)])
def test_whichever_limit_is_met_first_is_kept(budget, cap):
    free, capped = plan(TINY, budget), plan(TINY, budget, max_macs=cap)
    assert capped.macs_after <= cap * capped.macs_before and capped.parameters_after <= free.parameters_after
    if free.macs_after > cap * free.macs_before:
        # Nearly all of the cap is used.
        assert capped.macs_after > 0.99 * cap * capped.macs_before
    else:
        assert capped.to_dict() == {**free.to_dict(), "max_macs": cap}
    assert capped.to_dict() == plan(TINY, budget, max_macs=cap).to_dict()


def keeps_within(source, cap, options):
    capped = plan(source, max_macs=cap, **options)
    assert capped.macs_after <= cap * capped.macs_before
    assert capped.parameters_after <= options["budget"] * capped.parameters_before
    for matrix in capped.matrices:
        takes = math.prod(matrix.shape) if matrix.spec is None else counted(matrix.spec, *matrix.shape)
        assert takes == matrix.macs_after
    return capped


def test_sums_of_terms_keep_within_a_cap():
    model = tiny_model()
    options = {"budget": 0.9, "matrices": ["h.1.*"], "effort": "balanced"}
    free = plan(model, **options, max_macs=math.inf)
    assert any(isinstance(matrix.spec, MixedSpec) for matrix in free.matrices)
    most = free.macs_after / free.macs_before
    for cap in (0.4 * most, 0.7 * most, 0.95 * most):
        assert keeps_within(model, cap, options).macs_after < free.macs_after
    assert keeps_within(model, 1000, options).config == free.config
    # By default, the limit is the dense matrix's own.
    assert all(matrix.macs_after <= matrix.macs_before for matrix in plan(model, **options).matrices)


def test_a_trained_models_plan_keeps_within_a_cap():
    options = {"budget": 0.97, "matrices": ["h.0.mlp.*", "h.[12].attn.c_proj"], "effort": "balanced"}
    free = plan(TINY, **options, max_macs=math.inf)
    # A sum of terms takes more MACs than it has parameters; low rank does not.
    assert free.macs_after > 1.1 * sum(matrix.parameters_after for matrix in free.matrices)
    assert keeps_within(TINY, 0.9 * free.macs_after / free.macs_before, options).macs_after < free.macs_after


def test_a_compression_keeps_the_cap(tmp_path):
    model = tiny_model()
    folder = saved(model, tmp_path / "dense")
    options = {"budget": 0.8, "max_macs": 0.4}
    found = plan(folder, **options)
    specs = {matrix.name: matrix.spec for matrix in found.matrices if matrix.spec is not None}
    for report in (compress_checkpoint(folder, tmp_path / "out", **options), compress(model, **options)):
        assert {matrix.name: matrix.spec for matrix in report.matrices} == specs
        assert report.parameters_after == found.parameters_after


def test_a_plan_states_macs():
    found = plan(TINY, 0.8, max_macs=0.5)
    data = json.loads(found.to_json())
    assert data["max_macs"] == 0.5 and plan(TINY, 0.8).to_dict()["max_macs"] is None
    for key in ("macs_before", "macs_after"):
        assert data[key] == getattr(found, key) == sum(matrix[key] for matrix in data["matrices"])
    line = f"MACs for one token: {found.macs_before:,} by the dense matrices, then {found.macs_after:,} ("
    allowed = "at most 0.5 of them allowed"
    assert line in str(found) and allowed in str(found) and allowed not in str(plan(TINY, 0.8))
    # A dense lookup takes no MACs, but a factored one takes some.
    only_looked_up = plan(tiny_model(), 0.98, matrices=["wpe"])
    assert "MACs for one token: 0 by the dense matrices" in str(only_looked_up) and only_looked_up.macs_after > 0


@pytest.mark.parametrize("spelling", [math.inf, "inf", np.float32("inf")], ids=repr)
def test_a_lifted_cap_is_text_in_json(spelling):
    lifted = plan(TINY, 0.8, max_macs=spelling)
    assert lifted.max_macs == math.inf and "of them allowed" not in str(lifted)
    assert json.loads(lifted.to_json(), parse_constant=pytest.fail)["max_macs"] == "inf"
    config = TQConfig(budget=0.8, max_macs=spelling)
    assert TQConfig.from_json(config.to_json()) == config and config.max_macs == math.inf
    assert json.loads(config.to_json(), parse_constant=pytest.fail)["max_macs"] == "inf"


@pytest.mark.parametrize("cap", [0, -0.5, math.nan, -math.inf, True, "0.7", [0.5]], ids=repr)
def test_nonsense_is_refused(cap):
    with pytest.raises(ConfigError, match="max_macs must be a positive share"):
        plan(TINY, 0.5, max_macs=cap)


def share_that_would_do(budget, cap, words):
    with pytest.raises(ConfigError, match=words) as error:
        plan(TINY, budget, max_macs=cap)
    return float(re.search(r"a share of (0\.\d+) would do", str(error.value))[1])


def test_a_cap_that_cannot_be_kept_says_what_can():
    least = share_that_would_do(0.5, 0.001, "rank 1 of every matrix takes")
    assert plan(TINY, 0.5, max_macs=least).macs_after > 0
    # This quality needs more MACs.
    free = plan(TINY, "lost_energy=0.05").to_dict()
    needed = share_that_would_do("lost_energy=0.05", 0.3, "a lost energy of 0.05 takes")
    assert plan(TINY, "lost_energy=0.05", max_macs=needed).to_dict() == {**free, "max_macs": needed}


def test_a_cap_without_a_budget_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_macs: expected with a budget only"):
        compress(tiny_model(), max_macs=0.5)
    with pytest.raises(ConfigError, match="max_macs: expected with a budget only"):
        compress_checkpoint(TINY, tmp_path, max_macs=0.5)


def test_the_commands_take_a_cap(tmp_path, capsys):
    found = plan(TINY, 0.8, max_macs=0.5)
    options = ["--budget", "0.8", "--max-macs", "0.5", "--json"]
    assert main(["inspect", str(TINY), *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("estimate")["threads"] >= 1
    assert printed == {**found.to_dict(), "budget": "0.8"}
    assert main(["compress", str(TINY), *options, "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["parameters_after"] == found.parameters_after
    assert main(["inspect", str(TINY), "--max-macs", "0"]) == 2
    assert "--max-macs needs --budget" in capsys.readouterr().err
