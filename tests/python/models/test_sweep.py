"""Many architectures of transformers: compressed, saved, loaded in a fresh process, trained and dense again."""

import json
import traceback
import warnings

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, REFUSED, UNTRIED, all_outputs, architecture
from helpers.processes import run_script
from helpers.snapshots import assert_untouched, snapshot
from tqcompressor.compression.model import compress
from tqcompressor.config import TQConfig
from tqcompressor.errors import ConfigError
from tqcompressor.models.matrices import compressed_modules

# Loads every folder, and prints what is wrong with each model as JSON.
_LOAD = """
import json, sys, traceback, torch, transformers, tqcompressor
from helpers.architectures import UNTRAINABLE, all_outputs
from tqcompressor.models.matrices import compressed_modules, factor_parameters
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

def check(folder, name):
    known = torch.load(f"{folder}/{name}.pt")
    model, info = getattr(transformers, name).from_pretrained(f"{folder}/{name}", output_loading_info=True)
    assert not any(info.values()), info
    for kind, tensors in (("state", model.state_dict()), ("buffers", dict(model.named_buffers()))):
        assert tensors.keys() == known[kind].keys(), kind
        for key, tensor in tensors.items():
            assert torch.equal(tensor.nan_to_num(), known[kind][key].nan_to_num()), key
    outputs = all_outputs(model, known["inputs"])
    for output, expected in zip(outputs, known["outputs"], strict=True):
        assert torch.allclose(output, expected, rtol=0, atol=1e-5 * expected.abs().max().item()), "outputs"
    if name not in UNTRAINABLE:
        trained = model(**known["inputs"])
        sum(tensor.float().pow(2).sum() for tensor in trained.to_tuple()
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad).backward()
        factors = [factor for _, module in compressed_modules(model) for factor in factor_parameters(module)]
        assert any(factor.grad is not None and factor.grad.abs().max() > 0 for factor in factors), "no gradient"
    model.dequantize()
    assert not list(compressed_modules(model)), "still compressed"
    for output, expected in zip(all_outputs(model, known["inputs"]), known["outputs"], strict=True):
        assert torch.allclose(output, expected, rtol=0, atol=2e-3 * expected.abs().max().item()), "dense outputs"

faults = {}
for name in json.loads(sys.argv[2]):
    try:
        check(sys.argv[1], name)
    except Exception:
        faults[name] = traceback.format_exc()
print("FAULTS" + json.dumps(faults))
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """What went wrong for each architecture, and those whose forward pass `compress` called untested."""
    folder = tmp_path_factory.mktemp("architectures")
    faults, untried, threads = {}, set(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ARCHITECTURES:
            try:
                if _saved(name, folder):
                    untried.add(name)
            except Exception:
                faults[name] = traceback.format_exc()
    finally:
        torch.set_num_threads(threads)
    names = [name for name in ARCHITECTURES if name not in faults]
    output = run_script(_LOAD, folder, json.dumps(names), warm="transformers")
    return faults | json.loads(output.rpartition("FAULTS")[2].splitlines()[0]), untried


def _saved(name, folder):
    """Compresses and saves a model and what it computes; returns whether `compress` says that this is untested."""
    model, inputs, patterns = architecture(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compress(model, budget=0.8, effort="fast", progress=False, matrices=patterns)
    model.save_pretrained(folder / name)
    known = {"inputs": inputs, "outputs": all_outputs(model, inputs), "state": model.state_dict()}
    torch.save({**known, "buffers": dict(model.named_buffers())}, folder / f"{name}.pt")
    return any("untested" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_compressed_model_of_any_architecture_comes_back_as_it_was(swept, name):
    faults, untried = swept
    assert name not in faults, faults[name]
    assert (name in untried) == (name in UNTRIED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_changed(name):
    cls, config, specs, message = REFUSED[name]
    model = getattr(transformers, cls)(config()).eval()
    before, own = snapshot(model), model.config
    with pytest.raises(ConfigError, match=message):
        compress(model, TQConfig(specs, effort="fast"), progress=False)
    assert_untouched(model, before)
    assert model.config is own and not list(compressed_modules(model))
