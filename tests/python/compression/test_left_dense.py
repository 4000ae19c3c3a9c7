"""What the model's own code writes or reads: a budget leaves it dense and says so; by name it is refused."""

import pytest
import torch
import tqcompressor
from helpers.architectures import architecture
from helpers.models import SPECS, tiny_config, tiny_model
from models.test_trial import ReadsAnAttribute, WritesAtFirst, WritesInTraining
from tqcompressor.compression.model import compress
from tqcompressor.config import TQConfig
from tqcompressor.errors import ConfigError
from tqcompressor.models.matrices import bare_name, compressed_modules
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig


def rwkv():
    return architecture("RwkvForCausalLM")[0]


def gemma3n():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"vocab_size_per_layer_input": 104, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "vocab_size": 104}
    layer = {"layer_types": ["full_attention"], "activation_sparsity_pattern": [0.0], "num_kv_shared_layers": 0}
    # So many that the matrix is wide enough to be chosen.
    return Gemma3nForCausalLM(
        Gemma3nTextConfig(**sizes, **more, **layer, num_key_value_heads=1, head_dim=16, altup_num_inputs=16)
    )


# Name: the model, the matrices that have to stay dense, and the reason.
LEFT_DENSE = {
    "rwkv": (rwkv, ("attention.output", "feed_forward.value"), "div_"),
    "gemma3n": (gemma3n, ("altup.prediction_coefs",), "clamp_"),
    "reads": (lambda: ReadsAnAttribute(tiny_config()), ("mlp.c_fc",), "nf"),
    "writes": (lambda: WritesInTraining(tiny_config()), ("mlp.c_fc",), "mul_"),
    "initialises": (lambda: WritesAtFirst(tiny_config()), ("mlp.c_fc",), "zero_"),
}


@pytest.mark.parametrize("name", LEFT_DENSE)
def test_a_budget_is_spent_on_the_rest_and_the_report_has_a_line(name):
    make, names, reason = LEFT_DENSE[name]
    model = make().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = tqcompressor.plan(model, 0.8, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    left = [matrix for matrix in plan.left_dense if matrix.endswith(names)]
    assert left == list(plan.left_dense)
    assert all(any(matrix.endswith(name) for matrix in left) for name in names)
    assert not {matrix.name for matrix in plan.matrices} & plan.left_dense.keys()
    line = next(line for line in str(plan).splitlines() if line.startswith("stays dense: "))
    assert left[0] in line and reason in line and line in plan.to_dict()["note"]
    report = compress(model, budget=0.8, progress=False)
    assert line in str(report) and report.parameters_after == plan.parameters_after
    assert not {bare_name(model, module) for module, _ in compressed_modules(model)} & plan.left_dense.keys()
    # Named, it is refused, before anything is changed; a pattern that matches others, too, is a choice of the rest.
    model = make().eval()
    with pytest.raises(ConfigError, match=reason):
        compress(model, budget=0.8, matrices=[left[0]], progress=False)
    with pytest.raises(ConfigError, match=reason):
        compress(model, budget=0.9, matrices=["*", left[0]], progress=False)
    assert next(compressed_modules(model), None) is None
    assert tqcompressor.plan(model, 0.9, matrices=["*"], progress=False).left_dense.keys() >= set(left)


def test_a_plan_of_a_model_without_such_code_says_nothing_of_it():
    model = tiny_model()
    plan = tqcompressor.plan(model, 0.8, progress=False)
    assert not plan.left_dense and "stays dense:" not in str(plan)
    # Compressed by a config, nothing is chosen.
    assert compress(model, TQConfig(SPECS, effort="fast"), progress=False).note is None
