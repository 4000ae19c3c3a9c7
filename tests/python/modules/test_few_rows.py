"""Layers of a few rows in Rust: the same values as the operations of torch, and a step aside where those are wanted."""

import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from tqcompressor import _core
from tqcompressor.errors import ShapeError
from tqcompressor.modules import (
    FusedLinear,
    GroupedEmbedding,
    GroupedHead,
    KroneckerEmbedding,
    KroneckerHead,
    KroneckerLinear,
    LowRankEmbedding,
    LowRankHead,
    LowRankLinear,
    MixedLinear,
    few_rows,
)

MODULES = {
    "low rank, on rows": lambda: LowRankLinear(40, 72, 11),
    "low rank, on columns": lambda: LowRankLinear(72, 40, 11, bias=False),
    "low rank, square": lambda: LowRankLinear(33, 33, 7),
    "Kronecker, A first": lambda: KroneckerLinear(36, 68, (2, 4), 3),
    "Kronecker, B first": lambda: KroneckerLinear(68, 36, (4, 2), 3, bias=False),
    "Kronecker, large blocks": lambda: KroneckerLinear(38, 57, (19, 19), 2),
    "Kronecker, no permutation": lambda: KroneckerLinear(35, 66, (5, 3), 1, True, False, False),
    "Kronecker, rows alone": lambda: KroneckerLinear(36, 68, (2, 4), 2, True, True, False),
    "Kronecker, flat": lambda: KroneckerLinear(32, 64, (32, 1), 3),
    "mixed": lambda: MixedLinear([LowRankLinear(40, 72, 4, False), KroneckerLinear(40, 72, (2, 4), 1, False)]),
    "fused": lambda: FusedLinear(
        {"q": KroneckerLinear(40, 24, (2, 4), 2, False), "k": LowRankLinear(40, 32, 5, False)}
    ),
    "Kronecker head": lambda: KroneckerHead(KroneckerEmbedding(120, 36, (1, 4), 1, True)),
    "Kronecker head, rank 2": lambda: KroneckerHead(KroneckerEmbedding(120, 36, (3, 2), 2)),
    "low-rank head": lambda: LowRankHead(LowRankEmbedding(120, 36, 9), torch.nn.Parameter(torch.zeros(120))),
    "grouped head": lambda: GroupedHead(GroupedEmbedding(150, 36, [(50, 12), (100, 5)])),
}


def module_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    module = MODULES[name]()
    for owner in module.modules():
        for key, buffer in list(owner._buffers.items()):
            # The groups of an embedding keep their columns to themselves.
            if buffer is not None and "grouped" not in name:
                owner._buffers[key] = torch.randperm(len(buffer))
        if getattr(owner, "bias", None) is not None:
            torch.nn.init.normal_(owner.bias)
    return module.to(dtype).requires_grad_(False)


def by_torch(module, x):
    """The result of the operations of torch: those of a layer that may be differentiated."""
    return module(x.detach().clone().requires_grad_()).detach()


@pytest.fixture
def calls(monkeypatch):
    """How often the operators are called."""
    made = []

    def counted(run, *arguments):
        made.append(1)
        return run(*arguments)

    for name in ("_low_rank_rows", "_kronecker_rows"):
        monkeypatch.setattr(few_rows, name, partial(counted, getattr(few_rows, name)))
    return made


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 2), (0,)])
def test_few_rows_are_those_of_the_dense_matrix(name, shape, calls):
    module = module_of(name)
    x = torch.randn(*shape, module.in_features, generator=torch.Generator().manual_seed(1))
    y = module(x)
    bias = 0 if getattr(module, "bias", None) is None else module.bias
    torch.testing.assert_close(y, (x.double() @ module.dense_weight().double() + bias).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, by_torch(module, x), rtol=1e-5, atol=1e-5)
    if shape == (1,):
        assert calls


@pytest.mark.parametrize("name", MODULES)
def test_halves_are_rounded_once(name, calls):
    module = module_of(name, torch.float16)
    x = torch.randn(1, module.in_features, generator=torch.Generator().manual_seed(1)).half()
    y = module(x)
    assert calls and y.dtype == torch.float16
    torch.testing.assert_close(y, by_torch(module, x), rtol=1e-2, atol=1e-2)
    bias = 0 if getattr(module, "bias", None) is None else module.bias.double()
    exact = x.double() @ module_of(name).double().dense_weight() + bias
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


@given(st.integers(1, 8), st.integers(0, 99))
def test_rows_of_any_layout_and_number_have_the_same_bits(rows, seed):
    module = module_of("low rank, on rows")
    x = torch.randn(module.in_features, 2 * rows, generator=torch.Generator().manual_seed(seed))
    together = module(x.t()[::2])
    for row, found in zip(x.t()[::2], together, strict=True):
        assert torch.equal(module(row), found)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["low rank, on rows", "Kronecker, A first", "Kronecker head"])
def test_one_and_two_threads_give_the_same_bits_and_more_are_left_to_torch(name, calls):
    module = module_of(name)
    x = torch.randn(2, module.in_features)
    two = module(x)
    torch.set_num_threads(1)
    assert torch.equal(module(x), two) and len(calls) == 2
    torch.set_num_threads(3)
    torch.testing.assert_close(module(x), two, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


def test_python_threads_compute_at_the_same_time():
    module = module_of("Kronecker, B first")
    x = torch.randn(1, module.in_features)
    expected, found = module(x), [None] * 4

    def work(at):
        for _ in range(50):
            found[at] = module(x)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in found)


@pytest.mark.parametrize("name", ["low rank, on columns", "Kronecker, A first", "mixed", "Kronecker head"])
def test_torch_computes_where_its_operations_are_wanted(name, calls):
    module = module_of(name)
    x = torch.randn(2, module.in_features)
    expected = by_torch(module, x)
    assert not calls

    def same(y):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

    same(torch.vmap(module)(x))
    y, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    same(y)
    torch.testing.assert_close(tangent, (torch.ones_like(x) @ module.dense_weight()), rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert module(x.clone().requires_grad_()).requires_grad
    same(torch.jit.trace(module, x, check_trace=False)(x))
    module(torch.randn(few_rows.FEW + 1, module.in_features))
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() > 0
    assert not calls
    for parameter in module.parameters():
        parameter.requires_grad_()
    module(x).sum().backward()
    assert not calls and all(parameter.grad is not None for parameter in module.parameters())
    with torch.no_grad():
        same(module(x))
    assert calls


def test_a_compiled_layer_is_one_graph_with_the_same_values(calls):
    module = module_of("mixed")
    x = torch.randn(1, module.in_features)
    expected = by_torch(module, x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert not calls
    assert torch.export.export(module, (x,)).module()(x).shape == (1, module.out_features)


def test_torch_finds_nothing_wrong_with_the_operators():
    utils = ("test_schema", "test_faketensor")
    x = torch.randn(2, 12)
    for on_rows in (True, False):
        module = LowRankLinear(12, 20, 3) if on_rows else LowRankLinear(20, 12, 3)
        rows = x if on_rows else torch.randn(2, 20)
        sides = (module.input_permutation, module.output_permutation, module.bias.detach())
        factors = (module.left.detach(), module.right.detach())
        torch.library.opcheck(few_rows._low_rank_rows, (rows, *factors, *sides, False), test_utils=utils)
    a, b = torch.randn(2, 6, 5), torch.randn(2, 2, 4)
    torch.library.opcheck(few_rows._kronecker_rows, (x, a, b, None, None, None, False), test_utils=utils)
    torch.library.opcheck(
        few_rows._kronecker_rows, (torch.randn(2, 20), a, b, None, None, torch.randn(12), True), test_utils=utils
    )


def test_wrong_shapes_and_indices_are_errors():
    x, left, right = (np.ones(shape, np.float32) for shape in ((1, 5), (5, 2), (2, 3)))
    order = np.arange(5)

    def run(x=x, left=left, right=right, input=None, output=order, bias=None):
        return _core.times_low_rank(x, left, right, input, output, bias, "float32", False)

    assert run().shape == (1, 5)
    for wrong in (
        {"x": x[:, :4].copy()},
        {"right": np.ones((3, 3), np.float32)},
        {"output": order[:4]},
        {"output": order + 1},
        {"output": order - 1},
        {"bias": np.ones(4, np.float32)},
    ):
        with pytest.raises(ShapeError, match="factored layer"):
            run(**wrong)
    with pytest.raises(TypeError):
        run(x=x.astype(np.float64))
    with pytest.raises(ShapeError, match="terms"):
        b = np.ones((2, 1, 1), np.float32)
        _core.times_kronecker(x, np.ones((1, 5, 2), np.float32), b, None, None, None, "float32", False)
