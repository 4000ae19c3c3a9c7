"""A head that is stored although config.json ties it: transformers, the native runtime and `compress` agree."""

import json

import numpy as np
import pytest
import torch
from helpers.checkpoints import Checkpoint, decode, encode, read_safetensors
from helpers.composites import composite, logits
from helpers.families import family_model
from helpers.models import agree, first_output, some_ids
from tqcompressor import LowRankSpec, NativeModel, TQConfig, compress, compress_checkpoint, expand_checkpoint, inspect
from transformers import AutoModelForCausalLM

TOKENS = [[3, 1, 4, 1, 5]]
WARNING = r"'lm_head\.weight' differs from 'transformer\.wte\.weight'.*as transformers takes it"


def source(head, embedding="F32", head_dtype="F32"):
    """`head` maps the values of the embedding to those of the head."""
    found = Checkpoint()
    found.config |= {"bos_token_id": 1, "eos_token_id": 1}
    values = decode(*encode(found.values("transformer.wte.weight"), embedding))
    found.tensors["transformer.wte.weight"] = encode(values, embedding)
    found.tensors["lm_head.weight"] = encode(head(values), head_dtype)
    return found


def by_torch(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


DIFFERENT = [
    (lambda w: w * 2, "F32", "F32"),
    (lambda w: w * 2, "F32", "F16"),
    (lambda w: w + 0.01, "F16", "F32"),
    (lambda w: np.where(np.arange(w.size).reshape(w.shape) == w.size - 1, w + 1, w), "F32", "F32"),
]
EQUAL = [
    (lambda w: w, "F32", "F32"),
    (lambda w: w, "F16", "F32"),
    (lambda w: w, "BF16", "F32"),
    (lambda w: w, "F16", "F16"),
]


@pytest.mark.parametrize(
    "specs", [{"wte": LowRankSpec(4)}, {"h.0.mlp.c_fc": LowRankSpec(4)}, {"lm_head": LowRankSpec(7)}]
)
@pytest.mark.parametrize(("head", "embedding", "head_dtype"), DIFFERENT)
def test_one_that_differs_is_a_matrix_of_its_own(tmp_path, specs, head, embedding, head_dtype):
    folder = source(head, embedding, head_dtype).write(tmp_path / "in")
    with pytest.warns(UserWarning, match=WARNING):
        native = NativeModel.from_pretrained(folder)
    assert native.logits(TOKENS) == pytest.approx(by_torch(folder), abs=1e-4)
    with pytest.warns(UserWarning, match=WARNING):
        listed = inspect(folder)
    assert "lm_head" in [matrix.name for matrix in listed.matrices]
    with pytest.warns(UserWarning, match=WARNING):
        compress_checkpoint(folder, tmp_path / "out", TQConfig(specs, effort="fast"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    # Nothing is left to warn of.
    found = NativeModel.from_pretrained(tmp_path / "out").logits(TOKENS)
    assert found == pytest.approx(by_torch(tmp_path / "out"), abs=1e-4)


@pytest.mark.parametrize(("head", "embedding", "head_dtype"), EQUAL)
def test_one_with_equal_values_is_the_embedding_in_whichever_dtype(tmp_path, recwarn, head, embedding, head_dtype):
    folder = source(head, embedding, head_dtype).write(tmp_path / "in")
    native = NativeModel.from_pretrained(folder)
    assert native.logits(TOKENS) == pytest.approx(by_torch(folder), abs=1e-4)
    compress_checkpoint(folder, tmp_path / "out", TQConfig({"wte": LowRankSpec(4)}, effort="fast"))
    assert "lm_head.weight" not in read_safetensors(tmp_path / "out")
    found = NativeModel.from_pretrained(tmp_path / "out")
    assert found.logits(TOKENS) == pytest.approx(by_torch(tmp_path / "out"), abs=1e-4)
    assert not [each for each in recwarn if "tie_word_embeddings" in str(each.message)]


# Name: the embedding, the head, and whether the key of the config means the head alone.
FAMILIES = {
    "llama-tied": ("embed_tokens", "lm_head", True),
    "distilbert": ("embeddings.word_embeddings", "vocab_projector", True),
    "bert-tied": ("embeddings.word_embeddings", "cls.predictions.decoder", False),
    "t5": ("shared", "lm_head", False),
}


def outputs(model):
    return logits(model) if model.config.is_encoder_decoder else first_output(model, some_ids())


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_of_every_family_it_is_compressed_on_disk_as_live(tmp_path, name, which):
    model = composite(name) if name == "t5" else family_model(name)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 1.5 + 0.1)
    model.save_pretrained(tmp_path / "in")
    config = TQConfig({FAMILIES[name][number]: LowRankSpec(5) for number in which}, effort="fast")
    with pytest.warns(UserWarning, match="differs from"):
        compress_checkpoint(tmp_path / "in", tmp_path / "out", config)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["tie_word_embeddings"] is (not FAMILIES[name][2])
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    with pytest.warns(UserWarning, match="differs from"):
        compress(model, config, progress=False)
    assert agree(outputs(loaded), outputs(model))
    expand_checkpoint(tmp_path / "out", tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    assert torch.allclose(outputs(dense), outputs(model), atol=1e-4 * outputs(model).abs().max().item())
