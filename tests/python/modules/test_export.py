"""Programs exported with any number of tokens: one graph, whose results are the module's own."""

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


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in MODULES), ("fused", True), ("mixed", True)])
def test_one_exported_graph_takes_any_number_of_tokens(name, strict):
    torch.manual_seed(0)
    module = MODULES[name]()

    def inputs(rows, tokens):
        if hasattr(module, "embedding_dim"):
            return torch.randint(0, module.num_embeddings, (rows, tokens))
        return torch.randn(rows, tokens, module.in_features)

    dynamic = ({0: Dim("rows", max=64), 1: Dim("tokens", max=4096)},)
    program = export(module, (inputs(2, 7),), dynamic_shapes=dynamic, strict=strict).module()
    # The last is one that the module itself multiplies by the dense matrix.
    for rows, tokens in ((1, 1), (5, 3), (2, 1000)):
        x = inputs(rows, tokens)
        assert torch.allclose(program(x), module(x), atol=1e-4)
