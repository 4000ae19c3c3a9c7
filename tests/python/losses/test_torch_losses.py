"""The losses as torch functions: gradients, compilation, and heads whose logits are computed in chunks."""

import numpy as np
import pytest
from helpers.logits import assert_gradient, noise
from tqcompressor import losses
from tqcompressor.errors import LabelError, NonFiniteError
from tqcompressor.losses import _torch_ops as torch_losses
from tqcompressor.losses import _torch_reference as torch_formulas

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_gives_the_loss_of_its_logits(with_teacher, dtype):
    hidden, head = torch.from_numpy(noise((3, 4, 16), 1)).to(dtype), torch.from_numpy(noise((3001, 16), 2)).to(dtype)
    teacher_hidden, teacher_head = torch.from_numpy(noise((3, 4, 9), 3)), torch.from_numpy(noise((3001, 9), 4))
    teacher = (teacher_hidden.to(dtype), teacher_head.to(dtype)) if with_teacher else (None, None)
    labels = torch.arange(12).reshape(3, 4) * 200
    labels[1, 2] = -100
    for leaf in (hidden, head):
        leaf.requires_grad_()
    loss = losses.head_distillation_loss(hidden, head, *teacher, labels, temperature=2.5, alpha=0.3)
    found = torch.autograd.grad(loss, (hidden, head))
    logits = hidden @ head.T
    if with_teacher:
        expected = losses.distillation_loss(logits, teacher[0] @ teacher[1].T, labels, temperature=2.5, alpha=0.3)
    else:
        expected = losses.cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(found, torch.autograd.grad(expected, (hidden, head)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert not found[0][1, 2].any()
    if dtype == torch.float32:
        arrays = [None if tensor is None else tensor.detach().numpy() for tensor in (hidden, head, *teacher, labels)]
        value, gradients = losses.head_distillation_loss(*arrays, temperature=2.5, alpha=0.3)
        assert value == pytest.approx(loss.item(), rel=1e-6)
        for one, other in zip(gradients, found, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_head_in_several_chunks_gives_the_same(with_teacher, monkeypatch):
    hidden, head = torch.from_numpy(noise((12, 16), 1)), torch.from_numpy(noise((301, 16), 2))
    teacher = (torch.from_numpy(noise((12, 9), 3)), torch.from_numpy(noise((301, 9), 4))) if with_teacher else ()
    labels = torch.arange(12) * 20
    labels[7] = -100

    def run():
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = losses.head_distillation_loss(*leaves, *teacher, labels=labels)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    whole = run()
    # Five rows at a time, or two of student and teacher: the last chunk is smaller.
    monkeypatch.setattr(torch_losses, "_LOGITS_BYTES", 5 * 301 * 4)
    for one, other in zip(run(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    hidden[10] = float("nan")
    with pytest.raises(NonFiniteError, match="row 10"):
        run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_of_a_chunked_head_name_the_row_of_the_batch(dtype, monkeypatch):
    # Rust on float32 and torch on float64, both five rows at a time.
    monkeypatch.setattr(torch_losses, "_LOGITS_BYTES", 5 * 301 * 4)
    monkeypatch.setattr(torch_formulas, "_CHUNK", 5 * 301)
    hidden, head = (torch.from_numpy(noise(shape, 1)).to(dtype) for shape in ((12, 16), (301, 16)))
    labels = torch.arange(12) * 20
    labels[8] = 301
    with pytest.raises(LabelError, match=r"got 301 at row 8$"):
        losses.head_distillation_loss(hidden, head, labels=labels)
    labels[8] = 300
    hidden[11] = float("nan")
    with pytest.raises(NonFiniteError, match="row 11,"):
        losses.head_distillation_loss(hidden, head, labels=labels)


SAMPLES = {
    "distillation": lambda x, y, labels: losses.distillation_loss(x, y, labels, temperature=1.7, alpha=0.3),
    "unlabelled": lambda x, y, labels: losses.distillation_loss(x, y),
    "cross_entropy": lambda x, y, labels: losses.cross_entropy(x, labels),
    "forward": lambda x, y, labels: losses.kl_divergence(x, y, temperature=3.0, mask=labels >= 0),
    "reverse": lambda x, y, labels: losses.kl_divergence(x, y, temperature=0.7, reverse=True),
    "mse": lambda x, y, labels: losses.hidden_state_loss(x, y, mask=labels >= 0),
    "cosine": lambda x, y, labels: losses.hidden_state_loss(x, y, kind="cosine"),
    "head": lambda x, y, labels: losses.head_distillation_loss(x, x[:9], y, y[:9], labels % 9, temperature=3.0),
}


def sample(dtype, seed=0):
    x, y = (torch.from_numpy(noise((12, 11), seed + i, 2.0)).to(dtype) for i in (0, 1))
    labels = torch.arange(12) % 11
    labels[5] = -100
    return x.requires_grad_(), y, labels


@pytest.mark.parametrize("name", SAMPLES)
def test_float64_passes_gradcheck_and_rust_agrees_with_it(name):
    function = SAMPLES[name]
    x, y, labels = sample(torch.float64)
    assert torch.autograd.gradcheck(lambda x: function(x, y, labels), (x,), eps=1e-6, atol=1e-7)
    single, single_y, _ = sample(torch.float32)
    expected, found = function(x, y, labels), function(single, single_y, labels)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=2e-6)
    (expected_gradient,) = torch.autograd.grad(3 * expected, x)
    (gradient,) = torch.autograd.grad(3 * found, single)
    assert_gradient(gradient.numpy(), expected_gradient.numpy())


@pytest.mark.parametrize("name", SAMPLES)
def test_torch_compiles_without_a_graph_break(name):
    function = SAMPLES[name]
    x, y, labels = sample(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = function(x, y, labels), compiled(x, y, labels)
    assert found.item() == expected.item()
    (expected_gradient,) = torch.autograd.grad(expected, x)
    (gradient,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=0)


def test_the_operators_pass_opcheck():
    from tqcompressor.losses import _torch_ops as torch_losses

    x, y, labels = sample(torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x, y, labels, 2.0, 1.0, 0.5, False, -100, True, 1)
    torch.library.opcheck(torch_losses._distillation_loss, arguments, test_utils=tests)
    torch.library.opcheck(torch_losses._hidden_state_loss, (x, y, None, "mse", True, 1), test_utils=tests)
    arguments = (x, y, None, None, labels % 9, 1.0, 0.0, 1.0, False, -100, True, 1)
    torch.library.opcheck(torch_losses._head_loss, arguments, test_utils=tests)


def test_the_gradient_flows_beyond_the_logits():
    x, y, labels = sample(torch.float32)
    weight = torch.eye(11, requires_grad=True)
    losses.distillation_loss((x @ weight).reshape(3, 4, 11), y.reshape(3, 4, 11), labels.reshape(3, 4)).backward()
    (expected,) = torch.autograd.grad(losses.distillation_loss(x, y, labels), x)
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(weight.grad, x.detach().T @ expected)


def test_the_teacher_gets_no_gradient_and_none_is_computed_without_grad():
    x, y, labels = sample(torch.float32)
    y.requires_grad_()
    losses.distillation_loss(x, y, labels).backward()
    assert y.grad is None
    with torch.no_grad():
        assert not losses.distillation_loss(x, y, labels).requires_grad


def test_two_backward_passes_give_the_same_and_a_second_derivative_is_refused():
    x, y, labels = sample(torch.float32)
    loss = losses.distillation_loss(x, y, labels)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * loss, x, retain_graph=True)
    assert torch.equal(first, kept) and not first.requires_grad and not second.requires_grad
    torch.testing.assert_close(second, 2 * first)
    (once,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        once.sum().backward()
