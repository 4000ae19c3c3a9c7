"""Models that transformers marks as quantized: with plain weights they are compressed, with packed ones refused."""

import pytest
import torch
import tqcompressor
import transformers
from helpers.families import LOW_RANK, family_model
from helpers.models import agree, first_output, some_ids
from tqcompressor.config import TQConfig
from tqcompressor.errors import ConfigError, NonFiniteError
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class Quantizer(HfQuantizer):
    """As that of GGUF is after weights are unpacked: it can neither train nor save."""

    is_trainable = False

    def is_serializable(self):
        return False


def marked(family):
    """What transformers leaves of a model that was read from a GGUF file."""
    model = family_model(family)
    config = QuantizationConfigMixin(quant_method="gguf")
    model.hf_quantizer = Quantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.config.quantization_config, model.config._is_quantized = config, True
    return model


CONFIG = TQConfig({"*.[qk]*": LOW_RANK}, effort="fast")


@pytest.mark.parametrize("family", ["llama-untied", "llama-tied", "opt-tied"])
def test_plain_weights_are_compressed_whatever_the_mark(family, tmp_path):
    model, dense = marked(family), family_model(family)
    found = tqcompressor.plan(model, 0.7, progress=False)
    assert found.config == tqcompressor.plan(dense, 0.7, progress=False).config
    tqcompressor.compress(model, CONFIG, progress=False)
    tqcompressor.compress(dense, CONFIG, progress=False)
    expected = first_output(dense, some_ids())
    assert agree(first_output(model, some_ids()), expected)
    model.save_pretrained(tmp_path)
    assert agree(first_output(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), some_ids()), expected)
    again = model.dequantize()
    assert not hasattr(again.config, "quantization_config") and "hf_quantizer" not in vars(again)


@pytest.mark.parametrize("change", ["tensor", "shape", "module"])
def test_packed_weights_are_refused(change):
    model = marked("llama-tied")
    layer = model.model.layers[1].mlp.up_proj
    if change == "tensor":
        layer.weight = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)
    elif change == "shape":
        layer.weight = torch.nn.Parameter(torch.zeros(64, 16))
    else:
        layer.__class__ = type("PackedLinear", (torch.nn.Linear,), {})
    for work in (lambda: tqcompressor.compress(model, CONFIG), lambda: tqcompressor.plan(model, 0.7)):
        with pytest.raises(ConfigError, match=r"quantized already, as model\.layers\.1\.mlp\.up_proj"):
            work()


def test_a_refusal_keeps_the_mark():
    model = marked("llama-tied")
    before = [dict(vars(part)) for part in (model, model.base_model, model.config)]
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        tqcompressor.compress(model, CONFIG, progress=False)
    assert [dict(vars(part)) for part in (model, model.base_model, model.config)] == before
