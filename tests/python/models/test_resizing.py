"""Another number of tokens: refused for compressed embeddings and heads, as ever for dense ones."""

import copy
import pickle

import pytest
import tqcompressor
from helpers.families import LOW_RANK, family_config, family_model
from helpers.models import VOCABULARY, agree, first_output, some_ids
from tqcompressor.compression.model import compress
from tqcompressor.config import TQConfig
from tqcompressor.errors import ConfigError


def compressed(family, specs=None):
    model = family_model(family)
    compress(model, family_config(family) if specs is None else TQConfig(specs, effort="fast"), progress=False)
    return model


@pytest.mark.parametrize(
    ("family", "specs", "name"),
    [
        ("gpt2", None, "transformer.wte"),
        ("bert-tied", None, "bert.embeddings.word_embeddings"),
        ("opt-tied", None, "model.decoder.embed_tokens"),
        ("llama-untied", {"lm_head": LOW_RANK}, "lm_head"),
        ("bert", {"embeddings.word_embeddings": LOW_RANK}, "embeddings.word_embeddings"),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_another_size_is_refused_and_nothing_changes(family, specs, name, loaded, tmp_path):
    model = compressed(family, specs)
    if loaded:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    expected = first_output(model, some_ids())
    for each in (model, copy.deepcopy(model)):
        for arguments in ((VOCABULARY + 3,), (VOCABULARY - 4,), (None, 16), (VOCABULARY, 10)):
            with pytest.raises(ConfigError, match=rf"{name} is compressed and has {VOCABULARY} rows.*dequantize\(\)"):
                each.resize_token_embeddings(*arguments)
        assert agree(first_output(each, some_ids()), expected) and each.config.vocab_size == VOCABULARY
    # The size that it has, as in scripts that always resize.
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    dense = model.dequantize()
    dense.resize_token_embeddings(VOCABULARY + 3)
    assert dense.get_input_embeddings().weight.shape[0] == dense.config.vocab_size == VOCABULARY + 3


@pytest.mark.parametrize("family", ["gpt2", "llama-untied"])
def test_dense_embeddings_of_a_compressed_model_are_resized(family, tmp_path):
    model = compressed(family, {"*.mlp.*": LOW_RANK})
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    expected = first_output(model, some_ids())
    assert expected.shape[-1] == VOCABULARY + 3
    model.save_pretrained(tmp_path)
    assert agree(first_output(type(model).from_pretrained(tmp_path), some_ids()), expected)


def test_a_model_is_pickled_as_before():
    model = compressed("gpt2")
    again = pickle.loads(pickle.dumps(model))
    assert agree(first_output(again, some_ids()), first_output(model, some_ids()))
    assert isinstance(again.config.quantization_config, tqcompressor.TQConfig)
