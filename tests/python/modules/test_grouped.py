"""Embeddings in groups of rows, and their tied modules, against dense oracles built from the definition."""

import copy

import numpy as np
import pytest
import torch
from helpers.terms import dense_table, random_terms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from tqcompressor._core import GroupedTerm
from tqcompressor.config.specs import GroupedSpec, LowRankSpec, MixedSpec, spec_from_dict
from tqcompressor.errors import ConfigError, ShapeError
from tqcompressor.losses import head_distillation_loss
from tqcompressor.modules import GroupedEmbedding, GroupedHead
from tqcompressor.modules.balanced import BalancedGroups, BalancedHead, BalancedTiedEmbedding
from tqcompressor.modules.build import empty_embedding, empty_linear
from tqcompressor.modules.mixed import tied_embedding, tied_head

SPEC = GroupedSpec(((9, 7), (12, 4), (30, 1)))
ROWS, COLUMNS = 51, 8


@st.composite
def cases(draw):
    """`(spec, terms, W)` with integer entries: every order of summation gives the same floats."""
    columns = draw(st.integers(2, 6))
    pair = st.tuples(st.integers(columns + 1, columns + 9), st.integers(1, columns - 1))
    spec = GroupedSpec(tuple(draw(st.lists(pair, min_size=1, max_size=3))))
    rows = sum(size for size, _ in spec.groups)
    terms = random_terms(spec, rows, columns, np.random.default_rng(draw(st.integers(0, 2**32))), integers=True)
    return spec, terms, torch.from_numpy(dense_table(spec, terms[0]))


def embedding_of(spec, terms, rows, columns):
    module = empty_embedding(rows, columns, spec)
    module.set_terms(terms)
    return module


@pytest.fixture
def embedding():
    torch.manual_seed(0)
    return embedding_of(SPEC, random_terms(SPEC, ROWS, COLUMNS, np.random.default_rng(0)), ROWS, COLUMNS)


@given(cases(), st.sampled_from([(), (5,), (2, 3), (0,)]), st.booleans())
def test_all_modules_equal_the_dense_table(case, batch, with_bias):
    spec, terms, w = case
    embedding = embedding_of(spec, terms, *w.shape)
    ids = torch.randint(0, len(w), batch)
    assert torch.equal(embedding(ids), w[ids]) and torch.equal(embedding.dense_weight(), w)
    assert sum(factor.numel() for factor in embedding.parameters()) == spec.parameters(*w.shape)
    bias = nn.Parameter(torch.ones(len(w))) if with_bias else None
    head = tied_head(embedding, bias)
    hidden = torch.randint(-3, 4, (*batch, w.shape[1])).float()
    assert torch.equal(head(hidden), hidden @ w.T + (0 if bias is None else bias))
    assert torch.equal(head.dense_weight(), w.T) and head.bias is bias
    second = tied_embedding(embedding)
    assert torch.equal(second(ids), w[ids]) and torch.equal(second.dense_weight(), w)
    assert second.left is head.left is embedding.left


@settings(max_examples=10)
@given(cases())
def test_gradients_in_double_precision(case):
    spec, terms, w = case
    embedding = embedding_of(spec, terms, *w.shape).double()
    hidden = torch.randn(2, w.shape[1], dtype=torch.float64, requires_grad=True)
    for module, inputs in ((embedding, (torch.arange(len(w)),)), (tied_head(embedding), (hidden,))):

        def run(left, right, *inputs, module=module):
            return torch.func.functional_call(module, {"left": left, "right": right}, inputs)

        leaves = [factor.detach().requires_grad_() for factor in (embedding.left, embedding.right)]
        assert torch.autograd.gradcheck(run, (*leaves, *inputs))


@pytest.mark.parametrize("kind", ["embedding", "head"])
def test_dtypes_compiling_meta_and_state_dicts(embedding, kind):
    module, x = (
        (embedding, torch.arange(ROWS)) if kind == "embedding" else (tied_head(embedding), torch.randn(5, COLUMNS))
    )
    expected = module(x)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(module).to(dtype)
        out = half(x.to(dtype) if x.is_floating_point() else x)
        assert out.dtype == half.dense_weight().dtype == dtype
        assert torch.allclose(out.float(), expected, atol=0.05 * expected.abs().max().item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == (torch.float32 if kind == "embedding" else torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.allclose(compiled(x), expected, atol=1e-4) and torch.allclose(compiled(x[:2]), expected[:2], atol=1e-4)
    empty = empty_embedding(ROWS, COLUMNS, SPEC)
    empty = empty if kind == "embedding" else tied_head(empty)
    assert empty(x.to("meta")).shape == expected.shape and empty.state_dict().keys() == module.state_dict().keys()


def test_tied_modules_follow_a_state_dict(embedding):
    other = embedding_of(SPEC, random_terms(SPEC, ROWS, COLUMNS, np.random.default_rng(1)), ROWS, COLUMNS)
    model = nn.ModuleDict({"wte": embedding, "second": tied_embedding(embedding), "head": tied_head(embedding)})
    assert not any("permutation" in key for key in model.state_dict() if not key.startswith("wte"))
    model.load_state_dict(
        {
            f"{name}.{key}": value
            for name in model
            for key, value in other.state_dict().items()
            if key in ("left", "right")
        }
        | {f"wte.{key}": value for key, value in other.state_dict().items()}
    )
    ids, hidden = torch.arange(ROWS), torch.randn(3, COLUMNS)
    assert torch.equal(model.second(ids), other(ids)) and torch.equal(model.head(hidden), tied_head(other)(hidden))


@pytest.mark.parametrize("moments", [False, True])
def test_balanced_groups_are_the_same_table_and_come_back(embedding, moments):
    rng = np.random.default_rng(0)
    given = (rng.random(ROWS), np.cov(rng.standard_normal((COLUMNS, 40)))) if moments else (None, None)
    balanced = BalancedGroups(embedding, *given)
    ids, hidden = torch.randint(0, ROWS, (3, 5)), torch.randn(2, COLUMNS)
    head, second = (
        BalancedHead(tied_head(embedding), balanced),
        BalancedTiedEmbedding(tied_embedding(embedding), balanced),
    )
    w = embedding.dense_weight().detach()
    for found, expected in (
        (balanced(ids), w[ids]),
        (second(ids), w[ids]),
        (head(hidden), hidden @ w.T),
        (balanced.dense_weight(), w),
        (head.dense_weight(), w.T),
    ):
        assert torch.allclose(found, expected, atol=1e-4)
    with torch.no_grad():
        for factor in balanced.parameters():
            factor.add_(0.1 * torch.randn_like(factor))
    learned = balanced.dense_weight().detach()
    balanced.restore()
    assert torch.allclose(embedding.dense_weight(), learned, atol=1e-3) and not torch.allclose(learned, w, atol=1e-2)
    # Training may move these modules and not the ones that they stand for.
    balanced.to("meta")
    assert balanced(ids.to("meta")).is_meta and head(hidden.to("meta")).is_meta and embedding.left.device.type == "cpu"


def test_the_head_s_loss_takes_it(embedding):
    head, hidden = tied_head(embedding), torch.randn(6, COLUMNS, requires_grad=True)
    labels = torch.randint(0, ROWS, (6,))
    loss = head_distillation_loss(hidden, head, labels=labels)
    expected = nn.functional.cross_entropy(hidden @ embedding.dense_weight().T, labels)
    assert torch.allclose(loss, expected, atol=1e-5)
    found = torch.autograd.grad(loss, [hidden, embedding.left, embedding.right])
    for one, other in zip(found, torch.autograd.grad(expected, [hidden, embedding.left, embedding.right]), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_ids_out_of_range_are_refused(embedding):
    for bad in (-1, ROWS):
        with pytest.raises(IndexError):
            embedding(torch.tensor([0, bad]))


def test_what_does_not_fit_is_refused(embedding):
    for groups, message in [
        ((), "at least one"),
        (((9, 0),), "groups"),
        (((9, 1, 2),), "pairs"),
        (5, "pairs"),
    ]:
        with pytest.raises(ConfigError, match=message):
            GroupedSpec(groups)
    for groups, message in [
        (((9, 7), (41, 4)), "50 rows together"),
        (((8, 7), (43, 4)), "more than 8 rows"),
        (((9, 8), (42, 4)), "a rank below 8"),
    ]:
        with pytest.raises(ShapeError, match=message):
            GroupedEmbedding(ROWS, COLUMNS, groups)
    with pytest.raises(ShapeError, match="only an embedding"):
        empty_linear(ROWS, COLUMNS, SPEC)
    with pytest.raises(ConfigError, match=r"terms\[1\]"):
        MixedSpec((LowRankSpec(2), SPEC))
    (term,) = random_terms(SPEC, ROWS, COLUMNS, np.random.default_rng(0))
    before = embedding.left
    for terms, message in [
        ([GroupedTerm(term.left[1:], term.right, term.row_order, term.column_order)], "left has shape"),
        ([GroupedTerm(term.left, term.right, term.row_order[1:], term.column_order)], "input_permutation"),
        (random_terms(LowRankSpec(2), ROWS, COLUMNS, np.random.default_rng(0)), "one GroupedTerm, got LowRankTerm"),
    ]:
        with pytest.raises(ShapeError, match=message):
            embedding.set_terms(terms)
    assert embedding.left is before
    with pytest.raises(TypeError, match="tie"):
        GroupedHead(embedding).set_terms([term])


def test_initial_values_have_the_variance_of_the_dense_module():
    torch.manual_seed(0)
    table = GroupedEmbedding(2000, 64, [(500, 40), (1500, 8)]).dense_weight()
    assert table.var().item() == pytest.approx(1, rel=0.2)


def test_a_spec_is_its_json():
    assert spec_from_dict(SPEC.to_dict()) == SPEC and SPEC.to_dict() == {"groups": [[9, 7], [12, 4], [30, 1]]}
