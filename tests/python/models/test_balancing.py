"""Low-rank modules as balanced products for the time of a training: the same model within the block and after it."""

import copy

import pytest
import torch
import transformers
from helpers.models import agree, first_output, some_ids, tiny_config, tiny_model
from tqcompressor import LowRankSpec, TQConfig, calibrate, compress
from tqcompressor.models.balancing import balanced, has_low_rank
from tqcompressor.modules.balanced import BalancedFactors
from tqcompressor.utils.torch_utils import torch_threads

GPT2 = {
    "wte": LowRankSpec(20),
    "h.0.attn.c_attn.*": LowRankSpec(9),
    "h.0.attn.c_proj": LowRankSpec(16),
    "h.1.mlp.c_fc": LowRankSpec(12),
    "h.*.mlp.c_proj": LowRankSpec(13),
}


def gpt2(**changes):
    return tiny_model(**changes)


def t5():
    config = transformers.T5Config(
        vocab_size=104, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    return transformers.T5EncoderModel(config).eval()


MODELS = {
    "gpt2": (gpt2, GPT2),
    "more columns than rows": (lambda: gpt2(vocab_size=24), {"wte": LowRankSpec(11), "h.0.mlp.c_fc": LowRankSpec(7)}),
    "t5 reads weights": (t5, {"encoder.block.*.layer.1.DenseReluDense.wo": LowRankSpec(9), "shared": LowRankSpec(17)}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_model_is_the_same_within_and_after(name, calibrated):
    make, specs = MODELS[name]
    model = make()
    ids = some_ids() % model.config.vocab_size
    calibration = calibrate(model, [ids], samples=1) if calibrated else None
    compress(model, TQConfig(specs, effort="fast"))
    before, weights = first_output(model, ids), copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    with balanced(
        model, lambda matrix: (calibration and calibration.input(matrix), calibration and calibration.output(matrix))
    ):
        found = [module for module in model.modules() if isinstance(module, BalancedFactors)]
        assert found
        for module in found:
            assert torch.isclose(module.P.norm(), module.Q.norm(), rtol=1e-4)
        assert agree(first_output(model, ids), before)
    assert [name for name, _ in model.named_modules()] == names
    assert agree(first_output(model, ids), before)
    for key, value in model.state_dict().items():
        assert torch.allclose(value.float(), weights[key].float(), rtol=1e-3, atol=1e-4), key


def test_what_the_products_learn_is_in_the_interpolative_form():
    model, ids = gpt2(), some_ids()
    compress(model, TQConfig(GPT2, effort="fast"))
    before = first_output(model, ids)
    with balanced(model, lambda matrix: (None, None)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        learned = first_output(model, ids)
    assert not agree(learned, before)
    assert torch.allclose(first_output(model, ids), learned, atol=1e-3 * learned.abs().max().item(), rtol=0)
    # The head has the embedding's factors again.
    assert model.lm_head.left is model.transformer.wte.left


def test_an_error_leaves_the_values_from_before():
    model, ids = gpt2(), some_ids()
    compress(model, TQConfig(GPT2, effort="fast"))
    before = first_output(model, ids)
    with pytest.raises(RuntimeError), balanced(model, lambda matrix: (None, None)):
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, BalancedFactors):
                    module.P.zero_()
        raise RuntimeError
    assert torch.equal(first_output(model, ids), before)


@pytest.mark.parametrize("threads", [2, 3])
def test_factors_have_the_same_bits_on_any_number_of_threads(threads):
    ids, found = some_ids(), []
    first = gpt2()
    calibration = calibrate(first, [ids], samples=1)
    compress(first, TQConfig(GPT2, effort="fast"))
    for count in (1, threads):
        model = copy.deepcopy(first)
        with (
            torch_threads(count),
            balanced(model, lambda matrix: (calibration.input(matrix), calibration.output(matrix))),
        ):
            assert torch.get_num_threads() == count
            found.append({name: parameter.clone() for name, parameter in model.named_parameters()})
    one, several = found
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_a_model_without_low_rank_is_left_alone():
    model = gpt2()
    assert not has_low_rank(model)
    compress(model, TQConfig({"h.0.attn.c_attn.*": LowRankSpec(9)}, effort="fast"))
    assert has_low_rank(model)
    assert tiny_config().n_embd == 32
