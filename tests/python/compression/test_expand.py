"""A compressed checkpoint on disk, written as a stock one: what `dequantize` makes of the live model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.families import FAMILIES, family_config, family_model
from safetensors.torch import load_file, save_file
from tqcompressor import (
    GroupedSpec,
    KroneckerSpec,
    LowRankSpec,
    TQConfig,
    compress,
    compress_checkpoint,
    expand_checkpoint,
)
from tqcompressor.cli import main as cli
from tqcompressor.errors import CheckpointError, DestinationError, NonFiniteError, TQError

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
EVERY_KIND = TQConfig(
    {
        "wte": GroupedSpec(((384, 90), (7808, 30))),
        "wpe": LowRankSpec(40),
        "h.0.attn.c_attn": KroneckerSpec((2, 4), 2),
        "h.1.mlp.*": LowRankSpec(8),
    }
)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed") / "gpt2"
    compress_checkpoint(TINY, folder, EVERY_KIND, progress=False)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_dequantized_model_of_every_family(name, tmp_path):
    model = family_model(name)
    compress(model, family_config(name), progress=False)
    model.save_pretrained(tmp_path / "compressed")
    expand_checkpoint(tmp_path / "compressed", tmp_path / "dense", progress=False)
    expanded, info = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values()) and not hasattr(expanded.config, "quantization_config")
    expected = model.dequantize().state_dict()
    found = expanded.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.allclose(tensor, expected[key], rtol=1e-5, atol=1e-6), key


def test_shards_and_another_dtype_and_any_number_of_threads(compressed, tmp_path):
    for threads in (1, 2):
        options = {"dtype": "bfloat16", "max_shard_size": "3MB", "threads": threads}
        expand_checkpoint(compressed, tmp_path / str(threads), **options)
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len([name for name in files if name.startswith("model-0000")]) > 1 and "tokenizer.json" in files
    assert "compression_report.json" not in files
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert json.loads((tmp_path / "1" / "config.json").read_text())["dtype"] == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    expected = transformers.AutoModelForCausalLM.from_pretrained(compressed).dequantize()
    assert model.dtype == torch.bfloat16
    for key, tensor in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[key].float(), tensor.float(), rtol=1e-2, atol=1e-2), key


def test_on_the_command_line(compressed, tmp_path, capsys):
    assert cli.main(["expand", str(compressed), "--out", str(tmp_path / "dense")]) == 0
    assert "written to" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "dense")]) == 0
    assert cli.main(["expand", str(tmp_path / "dense"), "--out", str(tmp_path / "again")]) == 2
    assert "is dense already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def spoilt(folder, change):
    """A copy of the compressed checkpoint whose tensors are changed."""

    def spoil(source):
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop("transformer.wte.left"), CheckpointError, "wte.left' is missing"),
        (lambda t: t.update({"transformer.h.1.mlp.c_fc.right": torch.zeros(3)}), TQError, "h.1.mlp.c_fc.right"),
        (lambda t: t["transformer.wte.right"].fill_(float("nan")), NonFiniteError, "wte.right"),
        (
            lambda t: t["transformer.wte.output_permutation"].fill_(0),
            TQError,
            "wte.output_permutation",
        ),
        (
            lambda t: t.update({"transformer.wte.output_permutation": torch.zeros(255)}),
            TQError,
            "wte.output_permutation",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(compressed, tmp_path, change, error, words):
    spoilt(tmp_path / "damaged", change)(compressed)
    with pytest.raises(error, match=words):
        expand_checkpoint(tmp_path / "damaged", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_taken_destination_is_refused(compressed, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for out in (tmp_path, compressed):
        with pytest.raises(DestinationError):
            expand_checkpoint(compressed, out)
