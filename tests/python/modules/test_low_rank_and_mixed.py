"""Modules of low rank and sums of several kinds against dense oracles that numpy builds from the definitions."""

import copy

import numpy as np
import pytest
import torch
from helpers.terms import dense, random_terms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from tqcompressor._core import LowRankTerm
from tqcompressor.config.specs import KroneckerSpec, LowRankSpec, MixedSpec
from tqcompressor.errors import ConfigError, ShapeError
from tqcompressor.modules import (
    FusedLinear,
    KroneckerLinear,
    LowRankEmbedding,
    LowRankHead,
    LowRankLinear,
    MixedEmbedding,
    MixedHead,
    MixedLinear,
)
from tqcompressor.modules.build import empty_embedding, empty_linear
from tqcompressor.modules.functional import kronecker_matmul
from tqcompressor.modules.mixed import tied_head

# Of a matrix (16, 24) or (24, 16).
LOW_RANK = LowRankSpec(5)
MIXED = MixedSpec((LowRankSpec(3), KroneckerSpec((2, 4), 2), KroneckerSpec((4, 2), 1, "columns")))
SPECS = {"low rank": LOW_RANK, "mixed": MIXED}
SHAPES = [(16, 24), (24, 16), (16, 16)]


@st.composite
def cases(draw, largest=9):
    """`(spec, rows, columns, terms, W)` with integer entries: every order of summation gives the same floats."""
    rows, columns = draw(st.integers(2, largest)), draw(st.integers(2, largest))
    low_rank = st.builds(LowRankSpec, st.integers(1, min(rows, columns) - 1))
    block = st.tuples(
        st.sampled_from([m for m in range(1, rows + 1) if rows % m == 0]),
        st.sampled_from([n for n in range(1, columns + 1) if columns % n == 0]),
    )
    kronecker = st.builds(KroneckerSpec, block, st.just(1), st.sampled_from(["none", "rows", "columns", "both"]))
    spec = draw(low_rank | st.builds(MixedSpec, st.lists(kronecker | low_rank, min_size=2, max_size=3)))
    terms = random_terms(spec, rows, columns, np.random.default_rng(draw(st.integers(0, 2**32))), integers=True)
    return spec, rows, columns, terms, torch.from_numpy(dense(terms, rows, columns))


def integers(*shape, seed=0):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def linear_of(spec, terms, rows, columns, bias=None):
    module = empty_linear(rows, columns, spec, bias is not None)
    module.set_terms(terms)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


def embedding_of(spec, terms, rows, columns):
    module = empty_embedding(rows, columns, spec)
    module.set_terms(terms)
    return module


@given(cases(), st.sampled_from([(), (3,), (2, 3), (0,)]), st.booleans())
def test_linear_equals_its_dense_matrix(case, batch, with_bias):
    spec, rows, columns, terms, w = case
    bias = integers(columns) if with_bias else None
    module = linear_of(spec, terms, rows, columns, bias)
    x = integers(*batch, rows)
    assert torch.equal(module(x), x @ w + (0 if bias is None else bias))
    assert torch.equal(module.dense_weight(), w)
    elements = sum(parameter.numel() for parameter in module.parameters()) - (columns if with_bias else 0)
    assert elements == spec.parameters(rows, columns)


@given(cases(), st.sampled_from([(), (5,), (2, 3), (0,)]))
def test_embedding_equals_its_dense_table(case, batch):
    spec, rows, columns, terms, w = case
    module = embedding_of(spec, terms, rows, columns)
    ids = torch.randint(0, rows, batch)
    assert torch.equal(module(ids), w[ids])
    assert torch.equal(module.dense_weight(), w)


@given(cases(), st.sampled_from([(3,), (2, 3), (0,)]), st.booleans())
def test_tied_head_equals_its_dense_matrix(case, batch, with_bias):
    spec, rows, columns, terms, w = case
    embedding = embedding_of(spec, terms, rows, columns)
    bias = nn.Parameter(integers(rows)) if with_bias else None
    head = tied_head(embedding, bias)
    hidden = integers(*batch, columns)
    assert torch.equal(head(hidden), hidden @ w.T + (0 if bias is None else bias))
    assert torch.equal(head.dense_weight(), w.T)
    own = {name: parameter for name, parameter in head.named_parameters() if name != "bias"}
    assert own.keys() == dict(embedding.named_parameters()).keys()
    assert all(parameter is own[name] for name, parameter in embedding.named_parameters())
    assert head.bias is bias


@settings(max_examples=15)
@given(cases(largest=6))
def test_gradients_in_double_precision(case):
    spec, rows, columns, terms, _ = case
    linear = linear_of(spec, terms, rows, columns, torch.ones(columns)).double()
    embedding = embedding_of(spec, terms, rows, columns).double()
    head = tied_head(embedding)
    x = torch.randn(2, rows, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, columns, dtype=torch.float64, requires_grad=True)

    def with_factors(module, *inputs):
        names, values = zip(*module.named_parameters(), strict=True)

        def run(*arguments):
            factors = dict(zip(names, arguments, strict=False))
            return torch.func.functional_call(module, factors, arguments[len(names) :])

        leaves = [value.detach().requires_grad_() for value in values]
        return torch.autograd.gradcheck(run, (*leaves, *inputs))

    assert with_factors(linear, x)
    assert with_factors(head, hidden)
    assert with_factors(embedding, torch.arange(rows))


def module_of(kind, name, rows, columns):
    """A linear module, embedding or tied head of the named spec, with random values, and an input for it."""
    torch.manual_seed(0)
    terms = random_terms(SPECS[name], rows, columns, np.random.default_rng(0))
    if kind == "linear":
        return linear_of(SPECS[name], terms, rows, columns, torch.randn(columns)), torch.randn(4, rows)
    embedding = embedding_of(SPECS[name], terms, rows, columns)
    return (embedding, torch.arange(rows)) if kind == "embedding" else (tied_head(embedding), torch.randn(4, columns))


every_module = pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [(kind, name, shape) for kind in ("linear", "embedding", "head") for name in SPECS for shape in SHAPES],
)


@every_module
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, name, shape, dtype):
    module, x = module_of(kind, name, *shape)
    expected = module(x)
    half = copy.deepcopy(module).to(dtype)
    out = half(x.to(dtype) if x.is_floating_point() else x)
    assert out.dtype == dtype
    assert all(values.dtype == torch.int64 for values in half.buffers())
    assert torch.allclose(out.float(), expected, atol=0.05 * expected.abs().max().item())
    assert half.dense_weight().dtype == dtype


@every_module
def test_autocast_gives_the_dtype_of_the_dense_module(kind, name, shape):
    module, x = module_of(kind, name, *shape)
    stock = nn.Embedding(*shape) if kind == "embedding" else nn.Linear(x.shape[-1], 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == stock(x).dtype


@every_module
def test_compiles_as_one_graph(kind, name, shape):
    module, x = module_of(kind, name, *shape)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.allclose(compiled(x), module(x), atol=1e-4)
    assert torch.allclose(compiled(x[:2]), module(x[:2]), atol=1e-4)


@every_module
def test_without_values_on_the_meta_device(kind, name, shape):
    module, x = module_of(kind, name, *shape)
    rows, columns = shape
    spec, dtype = SPECS[name], torch.bfloat16
    if kind == "linear":
        empty = empty_linear(rows, columns, spec, True, dtype)
    else:
        empty = empty_embedding(rows, columns, spec, dtype)
        empty = tied_head(empty) if kind == "head" else empty
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert all(parameter.dtype == dtype for parameter in empty.parameters())
    assert empty.state_dict().keys() == module.state_dict().keys()
    x = x.to(dtype) if x.is_floating_point() else x
    assert empty(x.to("meta")).shape == module(x.to(torch.float32) if x.is_floating_point() else x).shape


@every_module
def test_state_dict_round_trip(kind, name, shape):
    module, x = module_of(kind, name, *shape)
    if kind == "head":
        # Its permutations are derived from its embedding: see the next test.
        return
    other = copy.deepcopy(module)
    with torch.no_grad():
        for values in (*other.parameters(), *other.buffers()):
            values.zero_()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_head_follows_a_state_dict_loaded_into_its_embedding(name, shape):
    rows, columns = shape
    models = []
    for seed in (0, 1):
        terms = random_terms(SPECS[name], rows, columns, np.random.default_rng(seed))
        model = nn.ModuleDict({"wte": embedding_of(SPECS[name], terms, rows, columns)})
        model["lm_head"] = tied_head(model.wte)
        models.append(model)
    model, other = models
    hidden = torch.randn(3, columns)
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(other.state_dict())
    assert torch.equal(loaded.lm_head(hidden), other.lm_head(hidden))
    assert not torch.equal(model.lm_head(hidden), other.lm_head(hidden))
    assert not any("lm_head" in key and "permutation" in key for key in model.state_dict())


def test_fused_parts_may_be_of_any_kind():
    torch.manual_seed(0)
    parts = {}
    for part, spec in (("q", LOW_RANK), ("k", MIXED), ("v", KroneckerSpec((2, 2), 2))):
        terms = random_terms(spec, 16, 16, np.random.default_rng(1))
        parts[part] = linear_of(spec, terms, 16, 16)
    fused = FusedLinear(parts, torch.randn(48))
    x = torch.randn(2, 3, 16)
    expected = x @ torch.cat([part.dense_weight() for part in parts.values()], 1) + fused.bias
    assert torch.allclose(fused(x), expected, atol=1e-4)
    assert {"q.left", "q.input_permutation", "k.terms.0.left", "k.terms.1.B", "v.A", "bias"} <= set(fused.state_dict())
    assert FusedLinear(parts).bias.shape == (48,)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_costs_what_the_formula_says(shape):
    from torch.utils.flop_counter import FlopCounterMode

    module = LowRankLinear(*shape, 5)
    with FlopCounterMode(display=False) as counter:
        module(torch.ones(7, shape[0]))
    assert counter.get_total_flops() // 2 == 7 * LOW_RANK.parameters(*shape)


@pytest.mark.parametrize(("block", "shapes"), [((1, 6), ((3, 8, 1), (3, 1, 6))), ((8, 1), ((3, 1, 6), (3, 8, 1)))])
@pytest.mark.parametrize("transpose", [False, True])
def test_kronecker_blocks_of_one_row_or_column_are_two_plain_products(block, shapes, transpose):
    a, b = (integers(*shape, seed=seed) for seed, shape in enumerate(shapes))
    if transpose:
        a, b = a.transpose(1, 2), b.transpose(1, 2)
    w = sum(torch.kron(a[k], b[k]) for k in range(3))
    from torch.utils.flop_counter import FlopCounterMode

    for batch in ((), (5,), (2, 3), (0,)):
        x = integers(*batch, len(w))
        with FlopCounterMode(display=False) as counter:
            y = kronecker_matmul(x, a, b)
        assert torch.equal(y, x @ w)
        assert set(counter.get_flop_counts()["Global"]) <= {torch.ops.aten.mm, torch.ops.aten.addmm}


def test_initial_values_have_the_variance_of_the_dense_module():
    torch.manual_seed(0)
    for shape in ((256, 512), (512, 256)):
        linear, embedding = LowRankLinear(*shape, 64), LowRankEmbedding(*shape, 64)
        assert linear.dense_weight().var().item() == pytest.approx(1 / (3 * shape[0]), rel=0.2)
        assert embedding.dense_weight().var().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_out_of_range_are_refused(shape):
    module = LowRankEmbedding(*shape, 5)
    for bad in (-1, shape[0]):
        with pytest.raises(IndexError):
            module(torch.tensor([0, bad]))


@pytest.mark.parametrize("shape", SHAPES)
def test_from_factors_is_the_module_of_these_sizes(shape):
    (term,) = terms = random_terms(LOW_RANK, *shape, np.random.default_rng(0))
    left, right, order = term.left, term.right, term.order
    w = torch.from_numpy(dense(terms, *shape))
    linear = LowRankLinear.from_factors(left, right, order, torch.ones(shape[1]), dtype=torch.float64)
    assert (linear.in_features, linear.out_features, linear.bias.dtype) == (*shape, torch.float64)
    assert torch.allclose(linear.dense_weight(), w.double(), atol=1e-5)
    embedding = LowRankEmbedding.from_factors(left, right, order)
    assert torch.allclose(embedding.dense_weight(), w, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="rank 16"):
        LowRankLinear(16, 24, 16)
    with pytest.raises(ConfigError, match="rank"):
        LowRankLinear(16, 24, 0)
    with pytest.raises(ShapeError, match=r"terms\[1\]"):
        empty_linear(15, 24, MIXED)
    linear = LowRankLinear(16, 24, 5)
    (term,) = random_terms(LOW_RANK, 16, 24, np.random.default_rng(0))
    before = linear.left
    for terms, message in [
        ([LowRankTerm(term.left[1:], term.right, term.order)], "left has shape"),
        ([LowRankTerm(term.left, term.right, term.order[1:])], "input_permutation"),
        (
            random_terms(KroneckerSpec((2, 2), 2), 16, 24, np.random.default_rng(0)),
            "one LowRankTerm, got KroneckerTerm",
        ),
        ([term, term], "one LowRankTerm, got LowRankTerm, LowRankTerm"),
    ]:
        with pytest.raises(ShapeError, match=message):
            linear.set_terms(terms)
    assert linear.left is before
    with pytest.raises(ShapeError, match="3 terms, got 1"):
        empty_linear(16, 24, MIXED).set_terms([term])
    with pytest.raises(ShapeError, match="bias"):
        LowRankLinear.from_factors(term.left, term.right, term.order, bias=torch.zeros(3))
    with pytest.raises(ShapeError, match="one shape"):
        MixedLinear([LowRankLinear(16, 24, 1, False), KroneckerLinear(24, 16, (2, 2), 1, False)])
    with pytest.raises(ShapeError, match="no bias"):
        MixedLinear([LowRankLinear(16, 24, 1, False), LowRankLinear(16, 24, 1)])
    with pytest.raises(ShapeError, match="bias"):
        MixedLinear([LowRankLinear(16, 24, 1, False), LowRankLinear(16, 24, 2, False)], torch.zeros(3))
    for head in (
        LowRankHead(LowRankEmbedding(24, 16, 3)),
        MixedHead(MixedEmbedding([LowRankEmbedding(24, 16, 3)] * 2)),
    ):
        with pytest.raises(TypeError, match="tie"):
            head.set_terms([term])


def test_representation_says_what_it_is():
    assert repr(LowRankLinear(16, 24, 5)) == "LowRankLinear(16, 24, rank=5, bias=True)"
    assert repr(LowRankEmbedding(24, 16, 5)) == "LowRankEmbedding(24, 16, rank=5)"
