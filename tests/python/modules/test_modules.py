"""The torch modules against dense oracles: matrices built by `numpy.kron` and indexing."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from tqcompressor.errors import ConfigError, ShapeError
from tqcompressor.modules import FusedLinear, KroneckerEmbedding, KroneckerHead, KroneckerLinear
from tqcompressor.modules.functional import kronecker_matmul, macs, prefers_dense

PERMUTES = st.sampled_from(["none", "rows", "columns", "both"])


@st.composite
def decompositions(draw, largest=4):
    """`(a, b, p, q, permute, W)` with integer entries, so that every order of summation gives the same floats."""
    m1, n1, m2, n2 = (draw(st.integers(1, largest)) for _ in range(4))
    rank = draw(st.integers(1, min(m1 * n1, m2 * n2)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    a = rng.integers(-3, 4, (rank, m1, n1)).astype(np.float32)
    b = rng.integers(-3, 4, (rank, m2, n2)).astype(np.float32)
    permute = draw(PERMUTES)
    p = rng.permutation(m1 * m2) if permute in ("rows", "both") else np.arange(m1 * m2)
    q = rng.permutation(n1 * n2) if permute in ("columns", "both") else np.arange(n1 * n2)
    w = np.empty((m1 * m2, n1 * n2), np.float32)
    # The definition: W[p][:, q] is the Kronecker sum.
    w[np.ix_(p, q)] = sum(np.kron(a[k], b[k]) for k in range(rank))
    return a, b, p, q, permute, torch.from_numpy(w)


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


@given(decompositions(), st.sampled_from([(), (3,), (2, 3), (0,)]), st.booleans())
def test_linear_equals_its_dense_matrix(decomposition, batch, with_bias):
    a, b, p, q, permute, w = decomposition
    bias = integers(w.shape[1]) if with_bias else None
    module = KroneckerLinear.from_factors(a, b, p, q, permute, bias)
    x = integers(*batch, w.shape[0])
    assert torch.equal(module(x), x @ w + (0 if bias is None else bias))
    assert torch.equal(module.dense_weight(), w)


@given(decompositions(), st.sampled_from([(), (5,), (2, 3), (0,)]))
def test_embedding_equals_its_dense_table(decomposition, batch):
    a, b, p, q, permute, w = decomposition
    module = KroneckerEmbedding.from_factors(a, b, p, q, permute)
    ids = torch.randint(0, len(w), batch)
    assert torch.equal(module(ids), w[ids])
    assert torch.equal(module.dense_weight(), w)


@given(decompositions(), st.sampled_from([(3,), (2, 3), (0,)]))
def test_tied_head_equals_its_dense_matrix(decomposition, batch):
    a, b, p, q, permute, w = decomposition
    embedding = KroneckerEmbedding.from_factors(a, b, p, q, permute)
    head = KroneckerHead(embedding)
    hidden = integers(*batch, w.shape[1])
    assert torch.equal(head(hidden), hidden @ w.T)
    assert torch.equal(head.dense_weight(), w.T)
    assert head.A is embedding.A and head.B is embedding.B


@given(decompositions(), st.booleans())
def test_both_orders_of_contraction_and_transposed_factors(decomposition, transpose):
    from tqcompressor.modules import functional as contraction

    a, b = decomposition[:2]
    if transpose:
        a, b = a.transpose(0, 2, 1), b.transpose(0, 2, 1)
    dense = torch.from_numpy(sum(np.kron(a[k], b[k]) for k in range(len(a))))
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    x = integers(3, len(dense))
    rows = x.reshape(3, a.shape[1], b.shape[1])
    for order in (contraction._contract_a_first, contraction._contract_b_first):
        assert torch.equal(order(rows, a, b).reshape(3, -1), x @ dense)
    assert torch.equal(kronecker_matmul(x, a, b), x @ dense)


def count_macs(function, *arguments):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("block", [(2, 4), (4, 2), (1, 4), (4, 1), (8, 8)])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_cheaper_order_is_taken_and_costs_what_the_formula_says(block, rank):
    module = KroneckerLinear(32, 64, block, rank)
    assert count_macs(module, torch.ones(5, 32)) == 5 * min(macs(block, rank, 32, 64))


@pytest.mark.parametrize("permute", ["none", "rows", "columns", "both"])
def test_many_tokens_go_through_the_matrix_with_equal_results_and_gradients(permute):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((4, 16, 16), (4, 2, 4)))
    p, q = rng.permutation(32), rng.permutation(64)
    module = KroneckerLinear.from_factors(a, b, p, q, permute, integers(64))
    many, few = 1000, 50
    assert prefers_dense(many, (2, 4), 4, 32, 64) and not prefers_dense(few, (2, 4), 4, 32, 64)
    x, gradient = integers(many, 32), integers(many, 64, seed=1)

    def run(size):
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        pieces = [module(piece) for piece in inputs.split(size)]
        torch.cat(pieces).backward(gradient)
        return torch.cat(pieces), inputs.grad, module.A.grad, module.B.grad, module.bias.grad

    # Rust forms the matrix, so torch does not count its operations.
    assert count_macs(module, x) == many * 32 * 64
    # Integers are added without rounding, so both methods give equal numbers.
    for dense, factored in zip(run(many), run(few), strict=True):
        assert torch.equal(dense, factored)


def test_logits_cost_a_quarter_of_the_dense_ones():
    embedding = KroneckerEmbedding(96, 32, (1, 4), 1)
    dense = 5 * 96 * 32
    assert count_macs(KroneckerHead(embedding), torch.ones(5, 32)) == dense // 4 + 5 * 32


@settings(max_examples=15)
@given(decompositions(largest=3))
def test_gradients_in_double_precision(decomposition):
    a, b, p, q, permute, w = decomposition
    linear = KroneckerLinear.from_factors(a, b, p, q, permute, torch.ones(w.shape[1]), dtype=torch.float64)
    embedding = KroneckerEmbedding.from_factors(a, b, p, q, permute, dtype=torch.float64)
    head = KroneckerHead(embedding)
    x = torch.randn(2, w.shape[0], dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, w.shape[1], dtype=torch.float64, requires_grad=True)
    ids = torch.arange(len(w))

    def with_factors(module, *inputs):
        def run(a, b, *arguments):
            return torch.func.functional_call(module, {"A": a, "B": b}, arguments)

        factors = (module.A.detach().requires_grad_(), module.B.detach().requires_grad_())
        return torch.autograd.gradcheck(run, (*factors, *inputs))

    assert with_factors(linear, x)
    assert with_factors(head, hidden)
    assert with_factors(embedding, ids)


def make_fused(bias=True):
    parts = {name: KroneckerLinear(8, 8, (2, 2), 2, bias=False) for name in ("q", "k", "v")}
    fused = FusedLinear(parts, bias)
    if bias is True:
        nn.init.normal_(fused.bias)
    return fused


def test_fused_is_its_parts_side_by_side():
    fused = make_fused()
    x = torch.randn(2, 3, 8)
    expected = torch.cat([x @ part.dense_weight() for part in fused.parts], -1) + fused.bias
    assert torch.allclose(fused(x), expected, atol=1e-5)
    assert torch.equal(fused.dense_weight(), torch.cat([part.dense_weight() for part in fused.parts], 1))
    assert (fused.in_features, fused.out_features) == (8, 24)
    assert {"q.A", "k.B", "v.output_permutation", "bias"} <= set(fused.state_dict())
    assert make_fused(bias=False)(x).shape == (2, 3, 24)


MODULES = {
    "linear": (lambda: KroneckerLinear(16, 32, (2, 4), 3), torch.randn(4, 16)),
    "wide": (lambda: KroneckerLinear(32, 16, (4, 2), 3), torch.randn(4, 32)),
    "fused": (make_fused, torch.randn(4, 8)),
    "embedding": (lambda: KroneckerEmbedding(24, 16, (2, 4), 2, True), torch.arange(24)),
    "head": (lambda: KroneckerHead(KroneckerEmbedding(24, 16, (2, 4), 2, True)), torch.randn(4, 16)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    make, x = MODULES[name]
    torch.manual_seed(0)
    module = make()
    expected = module(x)
    half = copy.deepcopy(module).to(dtype)
    out = half(x.to(dtype) if x.is_floating_point() else x)
    assert out.dtype == dtype
    assert all(values.dtype == torch.int64 for values in half.buffers())
    assert torch.allclose(out.float(), expected, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODULES)
def test_autocast_gives_the_dtype_of_the_dense_module(name):
    make, x = MODULES[name]
    dense = nn.Embedding(24, 16) if name == "embedding" else nn.Linear(x.shape[-1], 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make()(x).dtype == dense(x).dtype


@pytest.mark.parametrize("name", MODULES)
def test_compiles_as_one_graph(name):
    make, x = MODULES[name]
    torch.manual_seed(0)
    module = make()
    # Only the capture is tested: code generation would take minutes and test torch.
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.allclose(compiled(x), module(x), atol=1e-5)
    assert torch.allclose(compiled(x[:2]), module(x[:2]), atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_on_the_meta_device(name):
    make, x = MODULES[name]
    with torch.device("meta"):
        module = make()
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert module(x.to("meta")).shape == make()(x).shape


@pytest.mark.parametrize("permuted", [False, True])
def test_ids_out_of_range_are_refused(permuted):
    module = KroneckerEmbedding(24, 16, (2, 4), 2, permuted)
    for bad in (-1, 24):
        with pytest.raises(IndexError):
            module(torch.tensor([0, bad]))


def test_initial_values_have_the_variance_of_the_dense_module():
    torch.manual_seed(0)
    linear = KroneckerLinear(256, 512, (16, 16), 8)
    assert linear.dense_weight().var().item() == pytest.approx(1 / (3 * 256), rel=0.2)
    assert KroneckerEmbedding(512, 256, (16, 16), 8).dense_weight().var().item() == pytest.approx(1, rel=0.2)


def test_head_follows_a_state_dict_loaded_into_its_embedding():
    torch.manual_seed(0)
    model, other = (nn.ModuleDict({"wte": KroneckerEmbedding(24, 16, (2, 4), 2, True)}) for _ in range(2))
    for part in (model, other):
        for permutation in (part.wte.input_permutation, part.wte.output_permutation):
            permutation.copy_(torch.randperm(len(permutation)))
        part["lm_head"] = KroneckerHead(part.wte)
    hidden = torch.randn(3, 16)
    # A copy has its own head, tied to the copy's embedding.
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(other.state_dict())
    assert torch.equal(loaded.lm_head(hidden), other.lm_head(hidden))
    assert not torch.equal(model.lm_head(hidden), other.lm_head(hidden))
    assert "lm_head.input_permutation" not in model.state_dict()


def test_representation_says_what_it_is():
    assert repr(KroneckerLinear(16, 32, (2, 4), 3, output_permutation=False)) == (
        "KroneckerLinear(16, 32, block=(2, 4), rank=3, input_permutation=True, bias=True)"
    )
    assert repr(KroneckerEmbedding(24, 16, (1, 4), 1)) == (
        "KroneckerEmbedding(24, 16, block=(1, 4), rank=1, output_permutation=True)"
    )


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="does not divide"):
        KroneckerLinear(15, 32, (2, 4), 1)
    with pytest.raises(ShapeError, match="rank 9"):
        KroneckerLinear(16, 32, (2, 4), 9)
    with pytest.raises(ConfigError, match="rank"):
        KroneckerLinear(16, 32, (2, 4), 0)
    linear = KroneckerLinear(16, 32, (2, 4), 1)
    a, b = np.zeros((1, 8, 8), np.float32), np.zeros((1, 2, 4), np.float32)
    with pytest.raises(ShapeError, match="A has shape"):
        linear.set_factors(a[:, :7], b, np.arange(16), np.arange(32))
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    with pytest.raises(ShapeError, match="output_permutation has shape"):
        linear.set_factors(a, b, np.arange(16), np.arange(31))
    assert all(torch.equal(tensor, before[name]) for name, tensor in linear.state_dict().items())
    with pytest.raises(ShapeError, match="bias"):
        KroneckerLinear.from_factors(a, b, np.arange(16), np.arange(32), bias=torch.zeros(31))
    with pytest.raises(ShapeError, match="part k"):
        FusedLinear({"q": KroneckerLinear(8, 8, (2, 2), 1, False), "k": KroneckerLinear(8, 8, (2, 2), 1)})
    with pytest.raises(ShapeError, match="bias"):
        FusedLinear({"q": KroneckerLinear(8, 8, (2, 2), 1, False)}, torch.zeros(7))
