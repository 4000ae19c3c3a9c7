"""The matrix of a permuted Kronecker sum: Rust's against torch's, its gradients, and torch.compile."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tqcompressor import _core
from tqcompressor.errors import ShapeError
from tqcompressor.modules import KroneckerLinear
from tqcompressor.modules import functional as expansion
from tqcompressor.modules.functional import kronecker_matrix

sizes = st.integers(1, 6)


def case(m1, n1, m2, n2, rank, permute, seed, dtype=torch.float32):
    """Factors of small integers, whose sums are exact, and gather indices."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randint(-3, 4, (rank, *sides), generator=generator).to(dtype).requires_grad_()
        for sides in ((m1, n1), (m2, n2))
    )
    rows, columns = (torch.randperm(size, generator=generator) for size in (m1 * m2, n1 * n2))
    return a, b, rows if permute[0] else None, columns if permute[1] else None


@given(sizes, sizes, sizes, sizes, st.integers(1, 3), st.tuples(st.booleans(), st.booleans()), st.integers(0, 99))
def test_rust_makes_what_torch_makes_with_the_same_gradients(m1, n1, m2, n2, rank, permute, seed):
    rank = min(rank, m1 * n1, m2 * n2)
    results = []
    # float64 is computed by torch.
    for dtype in (torch.float32, torch.float64):
        a, b, rows, columns = case(m1, n1, m2, n2, rank, permute, seed, dtype)
        matrix = kronecker_matrix(a, b, rows, columns)
        weights = torch.randint(-3, 4, matrix.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
        (matrix * weights).sum().backward()
        results.append([tensor.double() for tensor in (matrix.detach(), a.grad, b.grad)])
    for rust, by_torch in zip(*results, strict=True):
        assert torch.equal(rust, by_torch)


def test_torch_finds_nothing_wrong_with_the_operator():
    torch.library.opcheck(expansion._in_rust, case(3, 4, 2, 5, 3, (True, True), 0))
    torch.library.opcheck(expansion._in_rust, case(3, 1, 2, 1, 1, (False, True), 0))
    with torch.no_grad():
        arguments = (torch.ones(6, 20), *case(3, 4, 2, 5, 3, (True, True), 0))
        torch.library.opcheck(expansion._gradients_in_rust, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_matrix_of_many_entries_is_the_same_on_any_number_of_threads():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 1025, 1024), (2, 2, 3)))
    rows, columns = rng.permutation(2050), rng.permutation(3072)
    first = _core.expand(a, b, rows, columns, 1)
    assert first.size > 1 << 22 and (first == _core.expand(a, b, rows, columns, 3)).all()
    expected = np.einsum("kij,kl->ijl", a[:, :9].astype(float), b[:, 1].astype(float)).reshape(9, -1)
    at = np.argsort(rows)[1:18:2]
    np.testing.assert_allclose(first[at], expected[:, columns], atol=1e-6)


def test_gradients_of_many_entries_are_the_same_on_any_number_of_threads_and_those_of_torch():
    rng = np.random.default_rng(0)
    a, b, gradient = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 1025, 1024), (2, 2, 3), (2050, 3072))
    )
    rows, columns = rng.permutation(2050), rng.permutation(3072)
    first = _core.expand_gradients(gradient, a, b, rows, columns, 1)
    for found, again in zip(first, _core.expand_gradients(gradient, a, b, rows, columns, 3), strict=True):
        assert (found == again).all()
    arguments = (torch.from_numpy(array) for array in (gradient.astype(float), a, b.astype(float), rows, columns))
    gradient, a, *rest = arguments
    for found, expected in zip(first, expansion._gradients_in_torch(gradient, a.double(), *rest), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_second_derivative_is_that_of_torch():
    found = []
    for dtype in (torch.float32, torch.float64):
        a, b, rows, columns = case(3, 4, 2, 3, 2, (True, True), 0, dtype)
        matrix = kronecker_matrix(a, b, rows, columns)
        (by_a,) = torch.autograd.grad(matrix.square().sum(), a, create_graph=True)
        found.append(torch.autograd.grad(by_a.square().sum(), (a, b)))
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_bad_factors_and_orders_are_refused():
    a, b = np.ones((2, 3, 4), np.float32), np.ones((2, 2, 2), np.float32)
    rows, columns = np.arange(6), np.arange(8)
    with pytest.raises(ShapeError, match="2 terms"):
        _core.expand(a, b[:1], rows, columns, 1)
    with pytest.raises(ShapeError, match="6 indices"):
        _core.expand(a, b, columns, rows, 1)
    with pytest.raises(ShapeError, match="permutation"):
        _core.expand(a, b, np.zeros(6, np.int64), None, 1)
    with pytest.raises(ShapeError, match="contiguous"):
        _core.expand(a.transpose(0, 2, 1), b, None, None, 1)
    with pytest.raises(ShapeError, match="6 × 8 matrix"):
        _core.expand_gradients(np.ones((8, 6), np.float32)[:5], a, b, rows, columns, 1)


def test_many_rows_compile_whole_with_equal_gradients():
    torch.manual_seed(0)
    module = KroneckerLinear(32, 64, (2, 4), 4)
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for call in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        module.zero_grad()
        y = call(x)
        y.square().sum().backward()
        found.append((y.detach(), module.A.grad.clone(), module.B.grad.clone()))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_the_transforms_of_torch_func_see_through_many_rows():
    torch.manual_seed(0)
    module = KroneckerLinear(32, 64, (2, 4), 4)
    parameters = dict(module.named_parameters())
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        assert (gradients[name] - parameter.grad).abs().max() < 1e-5 * parameter.grad.abs().max()
    two = torch.func.vmap(lambda a: loss(parameters | {"A": a}))(torch.stack([module.A, 2 * module.A]))
    torch.testing.assert_close(two[0], loss(parameters), rtol=1e-4, atol=0)
