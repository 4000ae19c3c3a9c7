"""Programs exported with any number of tokens: one graph, whose results are the module's own."""

import math

import numpy as np
import pytest
import torch
from torch.export import Dim, export
from tqcompressor.modules import (
    FusedLinear,
    KroneckerEmbedding,
    KroneckerHead,
    KroneckerLinear,
    LowRankEmbedding,
    LowRankHead,
    LowRankLinear,
    MixedEmbedding,
    MixedHead,
    MixedLinear,
)


def kronecker(rank=4, outputs=64, bias=True):
    return KroneckerLinear(32, outputs, (2, 4), rank, bias)


def mixed_embedding():
    return MixedEmbedding([LowRankEmbedding(96, 32, 8), KroneckerEmbedding(96, 32, (2, 4), 2)])


MODULES = {
    "kronecker": kronecker,
    # Contracted with B first, and as a plain low-rank product.
    "kronecker-wide": lambda: KroneckerLinear(64, 32, (16, 2), 3),
    "kronecker-flat": lambda: KroneckerLinear(32, 64, (32, 1), 2),
    "low-rank": lambda: LowRankLinear(32, 64, 8),
    "mixed": lambda: MixedLinear([LowRankLinear(32, 64, 4, False), kronecker(4, bias=False)]),
    "fused": lambda: FusedLinear({"q": kronecker(4, 32, False), "k": LowRankLinear(32, 32, 4, False)}),
    "kronecker-embedding": lambda: KroneckerEmbedding(96, 32, (2, 4), 2, True),
    "mixed-embedding": mixed_embedding,
    "kronecker-head": lambda: KroneckerHead(KroneckerEmbedding(96, 32, (2, 4), 2, True)),
    "low-rank-head": lambda: LowRankHead(LowRankEmbedding(96, 32, 8)),
    "mixed-head": lambda: MixedHead(mixed_embedding()),
}


def inputs_of(module, rows, tokens):
    if hasattr(module, "embedding_dim"):
        return torch.randint(0, module.num_embeddings, (rows, tokens))
    return torch.randn(rows, tokens, module.in_features)


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in MODULES), ("fused", True), ("mixed", True)])
def test_one_exported_graph_takes_any_number_of_tokens(name, strict):
    torch.manual_seed(0)
    module = MODULES[name]()

    def inputs(rows, tokens):
        return inputs_of(module, rows, tokens)

    dynamic = ({0: Dim("rows", max=64), 1: Dim("tokens", max=4096)},)
    program = export(module, (inputs(2, 7),), dynamic_shapes=dynamic, strict=strict).module()
    # The last is one that the module itself multiplies by the dense matrix.
    for rows, tokens in ((1, 1), (5, 3), (2, 1000)):
        x = inputs(rows, tokens)
        assert torch.allclose(program(x), module(x), atol=1e-4)


class Side(torch.nn.Module):
    """All modules, each on an input of its own, so that one export takes them all."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(make() for make in MODULES.values())

    def forward(self, *inputs):
        return tuple(part(x) for part, x in zip(self.parts, inputs, strict=True))


def test_every_module_runs_in_onnxruntime_by_its_factors(tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript, of the dev extra, is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, of the dev extra, is not installed")
    torch.manual_seed(0)
    side = Side().eval()
    names = [f"x{number}" for number in range(len(side.parts))]

    def inputs(rows, tokens):
        return tuple(inputs_of(part, rows, tokens) for part in side.parts)

    dynamic = (tuple({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for _ in names),)
    path = tmp_path / "side.onnx"
    options = {"dynamo": True, "input_names": names, "dynamic_shapes": dynamic, "verbose": False}
    exported = torch.onnx.export(side, inputs(2, 7), path, **options)
    session = onnxruntime.InferenceSession(path)
    for rows, tokens in ((1, 1), (5, 3), (2, 1000)):
        given = inputs(rows, tokens)
        found = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        for name, values, expected in zip(MODULES, found, side(*given), strict=True):
            assert np.allclose(values, expected.detach().numpy(), atol=1e-4), name
    # No product of factors is stored.
    largest = max(value.const_value.size for value in exported.model.graph.initializers.values())
    assert largest < min(math.prod(part.dense_weight().shape) for part in side.parts)


@pytest.mark.parametrize("name", MODULES)
def test_one_traced_graph_takes_any_number_of_tokens(name):
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    # So many that the module itself multiplies them by the dense matrix.
    program = torch.jit.trace(module, inputs_of(module, 2, 5000))
    assert "tqcompressor::" not in str(program.inlined_graph)
    x = inputs_of(module, 3, 2)
    assert torch.allclose(program(x), module(x), atol=1e-4)
