"""Eight-bit weights: on disk and live the same, run by torch and the native runtime, reloaded, expanded, refused."""

import copy

import numpy as np
import pytest
import torch
import transformers
from helpers.families import FAMILIES, family_config, family_model
from helpers.models import first_output, some_ids, tiny_model
from helpers.native import SPECS, TINY, reference
from helpers.processes import run_script
from helpers.spoiling import copied, with_tensors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from tqcompressor import (
    NativeModel,
    TQConfig,
    _core,
    compress,
    compress_checkpoint,
    expand_checkpoint,
    plan,
)
from tqcompressor.compression.model import recompress
from tqcompressor.errors import CheckpointError, ConfigError, DtypeError, NonFiniteError
from tqcompressor.models.matrices import compressed_modules, require_trainable
from tqcompressor.modules.build import is_int8

NOTHING = TQConfig({}, dtype="int8")
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def int8_config(name, plain):
    return NOTHING if plain else family_config(name).replace(dtype="int8")


def load(name, folder, **options):
    auto = getattr(transformers, FAMILIES[name][1])
    return auto.from_pretrained(folder, output_loading_info=True, **options)


@given(arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), elements=FINITE))
def test_codes_are_the_nearest_multiples_of_the_scale_of_their_row_or_column(values):
    _, rows, columns = values.shape
    for by_rows in (True, False):
        codes, bits = _core.quantize(values.reshape(-1), rows, columns, by_rows)
        scales = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        scales = scales.reshape(-1, rows, 1) if by_rows else scales.reshape(-1, 1, columns)
        wide = values.astype(np.float64)
        error = np.abs(codes.reshape(values.shape) * scales - wide)
        assert (error <= 0.5 * scales * (1 + 1e-6)).all()
        largest = np.abs(wide).max(2 if by_rows else 1, keepdims=True)
        assert ((scales == 0) == (largest == 0)).all()
        assert (scales <= np.maximum(largest / 127 * 1.01, np.finfo(np.float32).tiny)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3e38, 65504.0, 1e-30, -1e-45])
def test_constant_rows_of_any_size_come_back(value):
    codes, bits = _core.quantize(np.full(12, value, np.float32), 3, 4, True)
    scales = (bits.astype(np.uint32) << 16).view(np.float32)
    back = codes.reshape(3, 4) * scales[:, None].astype(np.float64)
    assert np.abs(back - np.float32(value)).max() <= max(abs(value) / 253, 1e-38)


@pytest.mark.parametrize("plain", [False, True], ids=["factors", "dense"])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "llama-untied", "bert-tied", "distilbert", "opt-untied"])
def test_disk_and_live_are_equal_reloaded_and_expanded(name, plain, tmp_path):
    model = family_model(name)
    before = first_output(model, some_ids())
    model.save_pretrained(tmp_path / "dense")
    config = int8_config(name, plain)
    disk = compress_checkpoint(tmp_path / "dense", tmp_path / "small", config, dtype="int8", progress=False)
    live = compress(model, config, progress=False)
    assert disk.dtype == live.dtype == "int8" and disk.format_version == live.format_version == 4
    assert disk.parameters_after == live.parameters_after
    if plain:
        assert live.parameters_after == live.parameters_before
        # A byte a weight; a few small tensors keep four.
        assert disk.bytes_after < 0.4 * disk.bytes_before
    loaded, info = load(name, tmp_path / "small")
    assert not any(info.values())
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key
    assert {tensor.dtype for key, tensor in state.items() if key.endswith("_scale")} == {torch.bfloat16}
    found = first_output(loaded.eval(), some_ids())
    assert torch.equal(found, first_output(model, some_ids()))
    if plain:
        assert (found - before).norm() < 0.05 * before.norm()

    model.save_pretrained(tmp_path / "saved")
    again = load_file(tmp_path / "saved" / "model.safetensors")
    first = load_file(tmp_path / "small" / "model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(tensor, first[key]) for key, tensor in again.items())

    expand_checkpoint(tmp_path / "small", tmp_path / "expanded", progress=False)
    stock, info = load(name, tmp_path / "expanded")
    assert not any(info.values())
    tied = loaded.get_output_embeddings() is not None and name.endswith("-tied")
    dense = loaded.dequantize()
    for key, tensor in stock.state_dict().items():
        assert torch.allclose(dense.state_dict()[key], tensor, rtol=1e-5, atol=1e-6), key
    assert all(parameter.requires_grad for parameter in dense.parameters())
    if tied:
        assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["dense", *SPECS])
def test_the_native_runtime_computes_what_torch_does_and_quantizes_on_loading(kind, tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    config = NOTHING if kind == "dense" else TQConfig(SPECS[kind], effort="fast")
    for name, dtype in [("floats", "float32"), ("codes", "int8")]:
        plain = kind == "dense" and name == "floats"
        if not plain:
            compress_checkpoint(tmp_path / "dense", tmp_path / name, config, dtype=dtype, progress=False)
    ids = some_ids()
    model = NativeModel.from_pretrained(tmp_path / "codes", threads=1)
    logits = model.logits(ids.numpy())
    expected = first_output(reference(tmp_path / "codes"), ids).numpy()
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()
    source = tmp_path / ("dense" if kind == "dense" else "floats")
    for threads in (1, 2):
        quantized = NativeModel.from_pretrained(source, dtype="int8", threads=threads)
        assert np.array_equal(quantized.logits(ids.numpy()), logits)
        assert (quantized.parameters, quantized.bytes) == (model.parameters, model.bytes)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A GPT-2 with int8 factors of low rank and Kronecker sums, and int8 matrices that stayed dense."""
    folder = tmp_path_factory.mktemp("int8")
    tiny_model().save_pretrained(folder / "dense")
    specs = {"wte": {"rank": 9}, "h.0.mlp.c_fc": {"block": [2, 4], "rank": 3}, "h.1.attn.c_attn.*": {"rank": 5}}
    compress_checkpoint(folder / "dense", folder / "small", {"specs": specs}, dtype="int8", progress=False)
    return folder / "small"


TENSORS = ["transformer.wte.left", "transformer.h.0.mlp.c_fc.A", "transformer.h.1.mlp.c_proj.codes"]


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("fault", ["missing", "float16", "shape", "nan", "infinite", "codes"])
def test_spoiled_files_are_refused_by_name(mixed, tensor, fault, tmp_path):
    scale = f"{tensor}_scale"

    def spoil(tensors):
        if fault == "missing":
            del tensors[scale]
        elif fault == "float16":
            tensors[scale] = tensors[scale].half()
        elif fault == "shape":
            tensors[scale] = tensors[scale].flatten()
        elif fault == "codes":
            tensors[tensor] = tensors[tensor].float()
        else:
            tensors[scale].flatten()[0] = float("nan" if fault == "nan" else "inf")

    folder = copied(mixed, tmp_path / "spoiled")
    with_tensors(folder, spoil)
    bare = tensor.removeprefix("transformer.")
    with pytest.raises(CheckpointError, match=bare):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    errors = (CheckpointError, DtypeError, NonFiniteError)
    for use in (lambda: NativeModel.from_pretrained(folder), lambda: expand_checkpoint(folder, tmp_path / "dense")):
        with pytest.raises(errors, match=bare):
            use()
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_change_of_dtype_leaves_codes_and_scales(mixed, dtype):
    model = reference(mixed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = first_output(model, some_ids())
    changed = {"to": copy.deepcopy(model).to(dtype)}
    changed["loaded"] = transformers.AutoModelForCausalLM.from_pretrained(mixed, dtype=dtype).eval()
    for other in changed.values():
        for name, tensor in other.state_dict().items():
            kept = name.endswith("_scale") or tensor.dtype == torch.int8
            assert not kept or torch.equal(tensor, before[name]), name
            assert not kept or tensor.dtype == before[name].dtype
        found = first_output(other, some_ids())
        assert found.dtype == dtype
        assert (found.float() - expected).norm() < 0.1 * expected.norm()
        assert other.get_input_embeddings().weight.dtype == dtype
    assert torch.equal(first_output(copy.deepcopy(model), some_ids()), expected)


def test_a_fresh_process_computes_the_same(mixed):
    expected = first_output(reference(mixed), some_ids())
    code = (
        "import sys, torch, tqcompressor, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        f"print(model(torch.tensor({some_ids().tolist()})).logits.double().sum().item())"
    )
    found = float(run_script(code, mixed, warm="transformers").split()[-1])
    assert found == pytest.approx(expected.double().sum().item(), abs=1e-2)


def test_codes_do_not_train_and_adapters_beside_them_do(mixed):
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(mixed)
    assert any(is_int8(module) for _, module in compressed_modules(model))
    with pytest.raises(ConfigError, match="wte has eight-bit weights"):
        require_trainable(model)
    with pytest.raises(ConfigError, match="eight-bit"):
        recompress(model, {"specs": {"h.0.mlp.c_fc": {"rank": 2}}})
    assert not any(name.split(".")[-1] in ("left", "right", "codes") for name, _ in model.named_parameters())
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn", "c_fc", "mlp.c_proj"], fan_in_fan_out=True))
    ids = some_ids()
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradients = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert gradients and all("lora_" in name for name in gradients)
    for kind in ("c_fc", "c_attn", "c_proj"):
        assert any(kind in name for name in gradients)


@pytest.mark.parametrize("share", [0.3, 0.42, 0.8])
def test_a_budget_in_bytes_holds_and_is_used(share, tmp_path):
    half = 2 * _core.Checkpoint.open(str(TINY)).parameters
    budget = f"{int(share * half)}"
    report = compress_checkpoint(TINY, tmp_path / "small", budget=f"{budget}B", dtype="int8", progress=False)
    stored = load_file(tmp_path / "small" / "model.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for name, tensor in stored.items() if "permutation" not in name)
    assert size <= int(budget)
    # More than int8 alone takes: then everything stays dense.
    assert (not report.matrices) if share > 0.6 else size > 0.97 * int(budget)
    planned = plan(TINY, f"{budget}B", dtype="int8", progress=False)
    assert planned.parameters_after == report.parameters_after


def test_equal_bytes_for_any_number_of_threads(tmp_path):
    written = []
    for threads in (1, 2):
        out = tmp_path / str(threads)
        compress_checkpoint(TINY, out, budget=0.5, dtype="int8", threads=threads, progress=False)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_what_int8_cannot_mean_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ConfigError, match="dtype: expected \"int8\" or none, got 'float16'"):
        compress(model, "tq-81m", dtype="float16")
    with pytest.raises(DtypeError, match="int4"):
        compress_checkpoint(TINY, tmp_path / "out", dtype="int4")
    with pytest.raises(ConfigError, match="expected a config"):
        compress_checkpoint(TINY, tmp_path / "out", dtype="float16")
    with pytest.raises(DtypeError, match="int8"):
        NativeModel.from_pretrained(TINY, dtype="float16")
    with pytest.raises(ConfigError, match="dense: expected with"):
        TQConfig({"wte": {"rank": 2}}, dense=["wpe"])
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = float("inf")
    with pytest.raises(NonFiniteError, match="c_fc"):
        compress(model, dtype="int8", progress=False)
    assert not any(True for _ in compressed_modules(model)) and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match="c_fc"):
        compress_checkpoint(tmp_path / "model", tmp_path / "out", dtype="int8", progress=False)
    assert not (tmp_path / "out").exists()
