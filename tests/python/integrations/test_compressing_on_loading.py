"""`from_pretrained(dense, quantization_config=TQConfig(…))` compresses as `compress` does."""

import json
from pathlib import Path

import pytest
import torch
from helpers.processes import run_script
from tqcompressor import Calibration, KroneckerSpec, LowRankSpec, TQConfig, calibrate, compress, compress_checkpoint
from tqcompressor.config.recipes import read_config
from tqcompressor.errors import ConfigError, ShapeError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
SPECS = {"h.*.mlp.c_fc": LowRankSpec(32), "h.0.attn.c_attn": KroneckerSpec((2, 4), 2)}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "calibration.safetensors"
    model = AutoModelForCausalLM.from_pretrained(TINY)
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")[:20000]
    calibrate(model, AutoTokenizer.from_pretrained(TINY), text, num_samples=4, seq_len=32, progress=False).save(path)
    return path


def assert_equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


CASES = {
    "share": {"budget": 0.65},
    "percent, of some matrices": {"budget": "80%", "matrices": ["h.*.mlp.*"]},
    "loss": {"budget": "lost_energy=0.2", "objective": "diagonal", "seed": 3},
    "cap": {"budget": 0.7, "max_macs": 0.7},
    "specs": {"specs": SPECS, "effort": "balanced", "seed": 1},
}


@pytest.mark.parametrize(
    ("case", "given"), [(case, "object" if case in ("share", "specs") else "file") for case in CASES]
)
def test_it_is_compress_bit_for_bit(case, given, calibration):
    options = CASES[case]
    known = calibration if given == "file" else Calibration.load(calibration)
    loaded = AutoModelForCausalLM.from_pretrained(
        TINY, quantization_config=TQConfig(**options, calibration=known), dtype="float32"
    )
    live = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    arguments = dict(options)
    specs = arguments.pop("specs", None)
    config = None if specs is None else TQConfig(specs, arguments.pop("effort"), arguments.pop("seed"))
    compress(live, config, calibration=known, **arguments, progress=False)
    assert_equal(loaded, live)
    assert loaded.config.quantization_config == live.config.quantization_config
    # Of how it came to be, nothing is left.
    assert loaded.config.quantization_config.of_loading == {}
    assert loaded.hf_quantizer.quantization_config.of_loading == {}


@pytest.mark.parametrize(
    "more", [{"device_map": "cpu"}, {"dtype": torch.bfloat16}, {"dtype": torch.float16, "device_map": "cpu"}]
)
def test_with_a_dtype_and_a_device_map(more, calibration):
    config = TQConfig(budget=0.65, calibration=calibration)
    loaded = AutoModelForCausalLM.from_pretrained(TINY, quantization_config=config, **more)
    live = AutoModelForCausalLM.from_pretrained(TINY, **more)
    compress(live, budget=0.65, calibration=calibration, progress=False)
    assert_equal(loaded, live)


def test_saved_it_loads_as_ever_in_a_fresh_process(tmp_path, calibration):
    config = TQConfig(budget=0.65, calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(TINY, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert set(stored) == {"quant_method", "format_version", "specs", "effort", "seed"} and len(stored["specs"]) > 10
    torch.save(model(torch.tensor([[1, 2, 3]])).logits, tmp_path / "logits.pt")
    script = """
        import sys, torch, tqcompressor
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        expected = torch.load(sys.argv[2])
        assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, expected)
    """
    run_script(script, tmp_path / "saved", tmp_path / "logits.pt", warm="transformers")


def test_other_families_and_classes(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 200}
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    dense.save_pretrained(tmp_path)
    config = TQConfig(budget=0.6)
    for kind in (AutoModelForCausalLM, AutoModel):
        live = kind.from_pretrained(tmp_path)
        compress(live, budget=0.6, progress=False)
        assert_equal(kind.from_pretrained(tmp_path, quantization_config=config), live)
    as_json = {"quant_method": "tqcompressor", "budget": 0.6}
    assert_equal(kind.from_pretrained(tmp_path, quantization_config=as_json), live)


def test_a_calibration_of_another_model_is_refused_by_name(tmp_path, calibration):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 200}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path)
    for options in ({"budget": 0.6}, {"specs": {"layers.0.mlp.*": LowRankSpec(4)}}):
        config = TQConfig(**options, calibration=calibration)
        with pytest.raises(ConfigError, match=r"expected the moments of .*layers.0.*it is of another model"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    known = Calibration.load(calibration)
    smaller = {name: moment[:9] if moment.ndim == 1 else moment[:9, :9] for name, moment in known.moments.items()}
    with pytest.raises(ShapeError, match=r"wte.*of another model"):
        config = TQConfig(budget=0.6, calibration=Calibration(smaller, 10))
        AutoModelForCausalLM.from_pretrained(TINY, quantization_config=config)
    # A budget that cannot be met is found before the weights are read.
    with pytest.raises(ConfigError, match="budget 5"):
        AutoModelForCausalLM.from_pretrained(TINY, quantization_config=TQConfig(budget=5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "specs is empty"),
        ({"specs": SPECS, "budget": 0.5}, "got both"),
        ({"budget": 0.5, "objective": "taste"}, "objective"),
        ({"budget": 0.5, "effort": "utmost"}, "effort"),
    ],
)
def test_what_no_config_can_be_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        TQConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 1.5}, "budget must be"),
        ({"budget": 0.5, "matrices": []}, "at least one pattern"),
        ({"specs": SPECS, "max_macs": 0.5}, "go with a budget"),
    ],
)
def test_what_loading_cannot_follow_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        AutoModelForCausalLM.from_pretrained(TINY, quantization_config=TQConfig(**options))


def test_other_functions_take_these_as_their_own_arguments(tmp_path):
    config = TQConfig(budget=0.5, objective="diagonal")
    model = AutoModelForCausalLM.from_pretrained(TINY)
    for call in (lambda: compress(model, config), lambda: compress_checkpoint(TINY, tmp_path / "out", config)):
        with pytest.raises(ConfigError, match=r"budget, objective of a TQConfig .* give them here as arguments"):
            call()
    model.config.quantization_config = config
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="this one is compressed"):
        AutoModelForCausalLM.from_pretrained(TINY, config=model.config)


def test_a_config_with_a_budget_round_trips():
    config = TQConfig(budget="65%", calibration="moments.safetensors", matrices=["h.*"], effort="best", seed=2)
    assert TQConfig.from_json(config.to_json()) == config == read_config(config.to_dict())
    assert TQConfig(SPECS).to_dict().keys() == {"quant_method", "format_version", "specs", "effort", "seed"}
