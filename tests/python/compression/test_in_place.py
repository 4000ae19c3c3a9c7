"""Compressing a live model: every head, all or nothing, and the parts of the model that must not change."""

import copy
import json

import pytest
import torch
from helpers.models import CONFIG, SPECS, VOCABULARY, first_output, some_ids, tiny_model
from helpers.snapshots import assert_untouched, snapshot
from torch import nn
from tqcompressor import _core
from tqcompressor.compression.model import compress
from tqcompressor.config import KroneckerSpec, TQConfig
from tqcompressor.errors import ConfigError, DtypeError, NonFiniteError, ShapeError
from tqcompressor.modules import FusedLinear, KroneckerEmbedding, KroneckerHead, KroneckerLinear
from transformers.pytorch_utils import Conv1D

HEADS = [
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
]
# The kind of each matrix of CONFIG in a model of two layers.
COMPRESSED = {
    "wte": KroneckerEmbedding,
    "h.0.attn.c_attn": FusedLinear,
    "h.0.mlp.c_proj": KroneckerLinear,
    "h.1.mlp.c_fc": KroneckerLinear,
    "h.1.mlp.c_proj": KroneckerLinear,
}


def with_dense_weights(model, compressed):
    """A copy of the stock `model` with the dense weights of the factors of `compressed`."""
    dense = copy.deepcopy(model)
    for name in COMPRESSED:
        weight = compressed.base_model.get_submodule(name).dense_weight()
        dense.base_model.get_submodule(name).weight.data.copy_(weight)
    return dense


@pytest.mark.parametrize("head", HEADS)
def test_every_head_computes_what_the_reconstructed_weights_would(head):
    model = tiny_model(head)
    compressed = copy.deepcopy(model)
    compress(compressed, CONFIG)
    for name, cls in COMPRESSED.items():
        assert type(compressed.base_model.get_submodule(name)) is cls
    assert type(compressed.base_model.h[0].mlp.c_fc) is Conv1D
    expected = first_output(with_dense_weights(model, compressed), some_ids())
    assert not torch.allclose(expected, first_output(model, some_ids()), atol=0.1)
    difference = (first_output(compressed, some_ids()) - expected).abs().max()
    assert difference < 1e-4 * expected.abs().max()


def test_the_factors_are_those_of_the_standalone_decomposition_whatever_the_threads():
    model = tiny_model()
    fused = model.transformer.h[0].attn.c_attn.weight.detach().numpy()
    matrices = {
        "wte": (model.transformer.wte.weight.detach().numpy(), SPECS["wte"]),
        "h.0.attn.c_attn.k": (fused[:, 32:64].copy(), SPECS["h.0.attn.c_attn.*"]),
        "h.1.mlp.c_proj": (model.transformer.h[1].mlp.c_proj.weight.detach().numpy(), SPECS["h.*.mlp.c_proj"]),
    }
    for threads in (1, 2):
        compressed = copy.deepcopy(model)
        compress(compressed, CONFIG, threads=threads)
        for name, (matrix, spec) in matrices.items():
            options = {"effort": "fast", "seed": 3, "threads": threads, "progress": None}
            (term,) = _core.fit_many([matrix], [name], [spec], [(None, None)], **options)[0].terms
            p, q = term.row_permutation, term.column_permutation
            module = compressed.transformer.get_submodule(name)
            assert torch.equal(module.A, torch.from_numpy(term.a)) and torch.equal(module.B, torch.from_numpy(term.b))
            # Gather indices of the forward pass: an embedding looks its rows up, so they are inverted too.
            rows = module.input_permutation
            if rows is not None:
                rows = rows.argsort() if name == "wte" else rows
                assert torch.equal(rows, torch.from_numpy(p))
            if module.output_permutation is not None:
                assert torch.equal(module.output_permutation.argsort(), torch.from_numpy(q))


def test_a_tied_head_uses_the_factors_of_the_embedding():
    model = tiny_model()
    before = model.num_parameters()
    compress(model, CONFIG)
    head, wte = model.lm_head, model.transformer.wte
    assert isinstance(head, KroneckerHead) and head.A is wte.A and head.B is wte.B
    spared = sum(
        parameters - spec.parameters(*shape)
        for spec, shape, parameters in [
            (SPECS["wte"], (VOCABULARY, 32), VOCABULARY * 32),
            *[(SPECS["h.0.attn.c_attn.*"], (32, 32), 32 * 32)] * 3,
            (SPECS["h.1.mlp.c_fc"], (32, 128), 32 * 128),
            *[(SPECS["h.*.mlp.c_proj"], (128, 32), 32 * 128)] * 2,
        ]
    )
    # No dense weight is left, and nothing is counted twice.
    assert model.num_parameters() == before - spared
    assert all(VOCABULARY not in parameter.shape for parameter in model.parameters())


def test_an_untied_head_stays_its_own_or_is_compressed_by_name():
    model = tiny_model(tie_word_embeddings=False)
    own = model.lm_head
    compress(model, CONFIG)
    assert model.lm_head is own
    model = tiny_model(tie_word_embeddings=False)
    weight = model.lm_head.weight.detach().clone()
    compress(model, {"specs": {"lm_head": {"block": [4, 8], "rank": 32}}})
    assert isinstance(model.lm_head, KroneckerLinear) and isinstance(model.transformer.wte, nn.Embedding)
    # The rank is full, so the head is exact: an nn.Linear is stored transposed.
    assert torch.allclose(model.lm_head.dense_weight(), weight.T, atol=1e-5)


@pytest.mark.parametrize(("head", "name"), [("GPT2ForSequenceClassification", "score"), ("GPT2Model", "wpe")])
def test_heads_and_positions_can_be_compressed(head, name):
    model = tiny_model(head, num_labels=4)
    expected = first_output(model, some_ids())
    compress(model, TQConfig({name: KroneckerSpec((4, 2), 8)}))
    assert torch.allclose(first_output(model, some_ids()), expected, atol=1e-3)


def test_cross_attention_is_two_matrices_and_a_query():
    model = tiny_model(add_cross_attention=True)
    states = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model(some_ids(), encoder_hidden_states=states).logits
        compress(model, {"specs": {"*crossattention*": {"block": [2, 2], "rank": 4}}})
        fused = model.transformer.h[0].crossattention.c_attn
        assert fused.part_names == ("k", "v")
        assert torch.allclose(model(some_ids(), encoder_hidden_states=states).logits, expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_training_mode_and_trainability_are_kept(dtype):
    model = tiny_model().to(dtype).train()
    model.transformer.wte.requires_grad_(False)
    model.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)
    bias = model.transformer.h[1].mlp.c_fc.bias
    compress(model, CONFIG)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    c_fc = model.transformer.h[1].mlp.c_fc
    assert c_fc.bias is bias and bias.requires_grad
    assert not (c_fc.A.requires_grad or c_fc.B.requires_grad)
    assert not (model.transformer.wte.A.requires_grad or model.lm_head.B.requires_grad)
    assert model.transformer.h[1].mlp.c_proj.A.requires_grad
    # Factors are found in single precision and rounded once.
    single = tiny_model().to(dtype).float()
    compress(single, CONFIG)
    assert torch.equal(single.transformer.wte.A.to(dtype), model.transformer.wte.A)


def interrupt(*_arguments, **_keywords):
    raise KeyboardInterrupt


def test_interrupted_by_the_progress_callback_the_model_is_as_it_was():
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        compress(model, CONFIG, progress=interrupt)
    assert_untouched(model, before)
    compress(model, CONFIG)


@pytest.mark.parametrize("step", ["tqcompressor.compression.model.attach", "tqcompressor.models.surgery.retie"])
def test_interrupted_while_modules_are_swapped_the_model_is_as_it_was(monkeypatch, step):
    import importlib

    module_name, _, function = step.rpartition(".")
    module = importlib.import_module(module_name)
    real, model = getattr(module, function), tiny_model()
    before = snapshot(model)
    calls = []

    def once(*arguments):
        # The first call is interrupted at its end; the later calls that undo it are not.
        real(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, function, once)
    with pytest.raises(KeyboardInterrupt):
        compress(model, CONFIG)
    assert calls
    assert_untouched(model, before)


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_changed():
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 5] = float("inf")
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=r"h\.1\.mlp\.c_proj"):
        compress(model, CONFIG)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({"h.7.mlp.c_fc": KroneckerSpec((2, 4), 1)}, ConfigError, r"h\.7\.mlp\.c_fc"),
        ({"h.0.attn.c_attn.q": KroneckerSpec((2, 4), 1)}, ConfigError, "c_attn"),
        ({"h.1.mlp.c_fc": KroneckerSpec((5, 4), 1)}, ShapeError, r"h\.1\.mlp\.c_fc"),
        ({"h.1.mlp.c_fc": KroneckerSpec((2, 4), 9)}, ShapeError, r"h\.1\.mlp\.c_fc"),
    ],
)
def test_configs_that_do_not_fit(specs, error, message):
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        compress(model, TQConfig(specs))
    assert_untouched(model, before)


def test_models_that_cannot_be_compressed():
    with pytest.raises(ConfigError, match="Linear is not a model of transformers"):
        compress(nn.Linear(3, 3), CONFIG)
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"a recipe such as .* or budget=…, got neither"):
        compress(model)
    compress(model, CONFIG)
    with pytest.raises(ConfigError, match="already"):
        compress(model, CONFIG)
    with torch.device("meta"):
        empty = tiny_model()
    with pytest.raises(ConfigError, match=r"wte.*meta"):
        compress(empty, CONFIG)
    model = tiny_model()
    model.transformer.h[1].mlp.c_fc.weight = nn.Parameter(torch.zeros(32, 128, dtype=torch.complex64))
    with pytest.raises(DtypeError, match=r"h\.1\.mlp\.c_fc"):
        compress(model, CONFIG)


def test_tying_must_be_what_the_config_says():
    model = tiny_model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ConfigError, match="tie_word_embeddings is True"):
        compress(model, CONFIG)
    model.config.tie_word_embeddings = False
    compress(model, CONFIG)
    assert isinstance(model.lm_head, nn.Linear)


def test_effort_and_seed_override_the_config_and_are_recorded():
    model = tiny_model()
    compress(model, CONFIG.to_dict(), effort="balanced", seed=11)
    recorded = model.config.quantization_config
    assert (recorded.effort, recorded.seed) == ("balanced", 11)
    # Matrices by name, in model order, not patterns.
    assert list(recorded.specs) == [
        "wte",
        "h.0.attn.c_attn.q",
        "h.0.attn.c_attn.k",
        "h.0.attn.c_attn.v",
        "h.0.mlp.c_proj",
        "h.1.mlp.c_fc",
        "h.1.mlp.c_proj",
    ]


def test_progress_ends_at_the_total():
    seen = []
    compress(tiny_model(), CONFIG, effort="balanced", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_the_report_accounts_for_every_parameter():
    model = tiny_model()
    before = model.num_parameters()
    report = compress(model, CONFIG, seed=5)
    assert (report.parameters_before, report.parameters_after) == (before, model.num_parameters())
    kept = sum(tensor.parameters for tensor in report.untouched)
    assert kept + sum(matrix.parameters_before for matrix in report.matrices) == report.parameters_before
    assert kept + sum(matrix.parameters_after for matrix in report.matrices) == report.parameters_after
    assert [matrix.name for matrix in report.matrices] == list(model.config.quantization_config.specs)
    assert (report.effort, report.seed, report.source) == ("fast", 5, None)
    dense = dict(tiny_model().named_parameters())
    for matrix in report.matrices:
        assert matrix.seconds >= 0
        if matrix.name == "h.0.attn.c_attn.k":
            weight = dense["transformer.h.0.attn.c_attn.weight"][:, 32:64]
            error = weight - model.transformer.h[0].attn.c_attn.k.dense_weight()
            assert matrix.lost_energy == pytest.approx((error.square().sum() / weight.square().sum()).item(), rel=1e-4)
    assert "h.0.attn.c_attn.k" in str(report)


def test_dequantize_gives_a_stock_model_that_can_be_compressed_again():
    model = tiny_model()
    compressed = copy.deepcopy(model)
    compress(compressed, CONFIG)
    expected = first_output(compressed, some_ids())
    dense = compressed.dequantize()
    assert [type(module) for module in dense.modules()] == [type(module) for module in model.modules()]
    assert dense.state_dict().keys() == model.state_dict().keys()
    assert dense.lm_head.weight is dense.transformer.wte.weight
    assert dense.config.to_dict() == model.config.to_dict()
    assert vars(dense).keys() == vars(model).keys()
    assert torch.allclose(first_output(dense, some_ids()), expected, atol=1e-4)
    compress(dense, CONFIG)
    assert isinstance(dense.lm_head, KroneckerHead)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "GPT2Model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_and_on_disk_give_the_same_tensors_and_config(head, dtype, tmp_path):
    from safetensors.torch import load_file
    from tqcompressor.compression.checkpoint import compress_checkpoint

    model = tiny_model(head).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    on_disk = compress_checkpoint(tmp_path / "dense", tmp_path / "on-disk", CONFIG)
    report = compress(model, CONFIG)
    model.save_pretrained(tmp_path / "in-place")
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("on-disk", "in-place")]
    assert stored[0].keys() == stored[1].keys()
    for name, tensor in stored[0].items():
        assert tensor.dtype == stored[1][name].dtype and torch.equal(tensor, stored[1][name]), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("on-disk", "in-place")]
    assert configs[0] == configs[1]
    assert [(m.name, m.lost_energy) for m in report.matrices] == [(m.name, m.lost_energy) for m in on_disk.matrices]
    assert report.parameters_after == on_disk.parameters_after
