"""Compressed models of transformers in ONNX: with their factors, for any number of tokens."""

import math

import numpy as np
import pytest
import torch
from helpers.families import family_config, family_model
from tqcompressor import compress

pytest.importorskip("onnxscript", reason="onnxscript, of the dev extra, is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, of the dev extra, is not installed")


class Logits(torch.nn.Module):
    """A model with one input and one output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "llama-untied", "opt-tied"])
def test_a_compressed_model_runs_in_onnxruntime(name, tmp_path):
    model = family_model(name)
    compress(model, family_config(name), progress=False)
    dynamic = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    ids = torch.arange(2 * 7).reshape(2, 7) * 5 % 104
    path = tmp_path / "model.onnx"
    exported = torch.onnx.export(Logits(model), (ids,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for shape in ((1, 1), (2, 7), (3, 32)):
        ids = torch.arange(math.prod(shape)).reshape(shape) * 11 % 104
        with torch.no_grad():
            expected = model(ids).logits.numpy()
        found = session.run(None, {"input_ids": ids.numpy()})[0]
        assert np.allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    # What was compressed is nowhere dense.
    sizes = {value.const_value.size for value in exported.model.graph.initializers.values()}
    compressed = {tuple(module.dense_weight().shape) for module in model.modules() if hasattr(module, "dense_weight")}
    dense = {tuple(tensor.shape) for tensor in model.parameters() if tensor.dim() == 2}
    for shape in compressed - dense - {shape[::-1] for shape in dense}:
        assert math.prod(shape) not in sizes, shape
