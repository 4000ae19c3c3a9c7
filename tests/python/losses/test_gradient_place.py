"""The gradient of a loss is written over the student's values, to `out`, or to new memory, with the same bits."""

import ml_dtypes
import numpy as np
import pytest
from helpers.logits import noise
from helpers.processes import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from tqcompressor import losses
from tqcompressor.errors import ConfigError, DtypeError, NonFiniteError, ShapeError
from tqcompressor.modules import KroneckerLinear

torch = pytest.importorskip("torch")

# (the student's values, another's, labels, options) to the loss.
LOSSES = {
    "distillation": lambda x, y, labels, **options: losses.distillation_loss(x, y, labels, alpha=0.3, **options),
    "cross entropy": lambda x, y, labels, **options: losses.cross_entropy(x, labels, **options),
    "divergence": lambda x, y, labels, **options: losses.kl_divergence(x, y, temperature=3.0, **options),
    "reverse": lambda x, y, labels, **options: losses.kl_divergence(
        x, y, temperature=0.7, reverse=True, mask=labels >= 0, **options
    ),
    "top k": lambda x, y, labels, **options: losses.topk_distillation_loss(
        x, *likeliest(y), labels, temperature=1.0, **options
    ),
}
STATES = {
    kind: lambda x, y, labels, kind=kind, **options: losses.hidden_state_loss(
        x, y, kind=kind, mask=labels >= 0, **options
    )
    for kind in ("mse", "relative_mse", "cosine")
}


def likeliest(logits):
    """The two likeliest tokens of the teacher, with probabilities that any teacher may give them."""
    values = torch.as_tensor(np.asarray(logits, np.float32)) if isinstance(logits, np.ndarray) else logits.float()
    tokens = values.topk(2, dim=-1).indices
    probabilities = torch.full(tokens.shape, 0.4)
    return (tokens.numpy(), probabilities.numpy()) if isinstance(logits, np.ndarray) else (tokens, probabilities)


def arrays(rows=12, width=11, dtype=np.float32, seed=0):
    labels = np.arange(rows) % width
    labels[rows // 2] = -100
    return *(noise((rows, width), seed + i, 2.0).astype(dtype) for i in (0, 1)), labels


def tensors(dtype=torch.float32, shape=(3, 4, 11)):
    x, y, labels = map(torch.from_numpy, arrays(int(np.prod(shape[:-1])), shape[-1]))
    return x.to(dtype).reshape(shape), y.to(dtype).reshape(shape), labels.reshape(shape[:-1])


@pytest.mark.parametrize("name", LOSSES | STATES)
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(3, 2500),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    st.integers(0, 2**32 - 2),
)
def test_an_array_gets_the_same_bits_anywhere(name, rows, width, dtype, seed):
    x, y, labels = arrays(rows, width, dtype, seed)
    function = (LOSSES | STATES)[name]
    value, gradient = function(x, y, labels)
    assert gradient.dtype == dtype
    apart = np.full_like(x, np.nan)
    for out in (apart, x):
        other, found = function(x, y, labels, out=out)
        assert other == value and found is out and out.tobytes() == gradient.tobytes()


def test_float64_and_strided_values_take_an_out_of_their_gradient():
    x, y, labels = arrays()
    value, gradient = losses.distillation_loss(x, y, labels)
    out = np.empty_like(x)
    for same in (x.astype(np.float64), np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
        assert losses.distillation_loss(same, y, labels, out=out)[0] == value
        assert out.tobytes() == gradient.tobytes()
        out.fill(np.nan)


def test_a_head_writes_its_gradients_to_a_pair():
    states = (noise((7, 5), 1), noise((301, 5), 2), noise((7, 4), 3), noise((301, 4), 4), np.arange(7))
    value, gradients = losses.head_distillation_loss(*states)
    out = np.full((7, 5), np.nan, np.float32), np.full((301, 5), np.nan, np.float32)
    other, found = losses.head_distillation_loss(*states, out=out)
    assert other == value and found[0] is out[0] and found[1] is out[1]
    assert [array.tobytes() for array in out] == [array.tobytes() for array in gradients]
    for wrong, error in {
        "the states themselves": ((states[0], out[1]), ConfigError),
        "twice the same": ((out[1][:7], out[1]), ConfigError),
        "another shape": ((out[0], out[1][:300]), ShapeError),
        "one array": (out[0], ConfigError),
    }.values():
        before = states[0].copy(), out[1].copy()
        with pytest.raises(error, match="out"):
            losses.head_distillation_loss(*states, out=wrong)
        assert (states[0] == before[0]).all() and (out[1] == before[1]).all()


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("name", LOSSES | STATES)
def test_an_out_that_does_not_fit_is_refused_and_nothing_changes(name):
    x, y, labels = arrays()
    memory = np.zeros(2 * x.size, np.float32)
    inside = memory[: x.size].reshape(x.shape)
    inside[:] = x
    outs = {
        "rows": (np.zeros((11, 11), np.float32), ShapeError, r"\(12, 11\), got \(11, 11\)"),
        "flat": (np.zeros(12 * 11, np.float32), ShapeError, r"\(12, 11\)"),
        "dtype": (np.zeros(x.shape), DtypeError, "float32, got float64"),
        "integers": (np.zeros(x.shape, np.int32), DtypeError, "float32, got int32"),
        "strided": (np.zeros((12, 22), np.float32)[:, ::2], ConfigError, "C-contiguous"),
        "columns first": (np.zeros(x.shape, np.float32, order="F"), ConfigError, "C-contiguous"),
        "read-only": (read_only(np.zeros(x.shape, np.float32)), ConfigError, "may be written"),
        "shifted": (memory[11 : 11 + x.size].reshape(x.shape), ConfigError, "overlap"),
        "a list": (x.tolist(), ConfigError, "numpy array, got list"),
    }
    if name not in ("cross entropy", "top k"):
        outs["the teacher"] = (y, ConfigError, "overlap")
    function = (LOSSES | STATES)[name]
    for out, error, message in outs.values():
        before = np.array(out)
        with pytest.raises(error, match=f"out: .*{message}"):
            function(inside, y, labels, out=out)
        assert (np.array(out) == before).all() and (inside == x).all()
    with pytest.raises(ConfigError, match=r"out: .*inplace=True"):
        function(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(labels), out=x)
    if name in LOSSES:
        with pytest.raises(ConfigError, match=r"inplace: .*out=student_logits"):
            function(x, y, labels, inplace=True)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_a_tensor_is_overwritten_by_the_same_bits(name, dtype, factor):
    x, y, labels = tensors(dtype)
    found = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        places = []
        logits.register_hook(lambda gradient, places=places: places.append(gradient.data_ptr()))
        loss = LOSSES[name](logits, y, labels, inplace=inplace)
        (loss * factor).backward()
        found.append((loss.item(), leaf.grad))
        # Over the logits, and with no other copy of them in the backward pass.
        assert (places == [logits.data_ptr()]) == inplace
        assert torch.equal(logits.reshape(-1, 11), (leaf.grad if inplace else x).reshape(-1, 11))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert not found[0][1].isnan().any() and found[0][1].any()


@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_the_backward_pass_of_a_gradient_of_its_own_copies_nothing(factor):
    x, y, labels = tensors()
    kept, returned = [], []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        loss = losses.distillation_loss(x.view_as(x), y, labels) * factor
    x.register_hook(lambda gradient: returned.append(gradient.data_ptr()))
    loss.backward()
    assert returned[0] in kept


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradients_of_a_layer_are_those_of_other_memory(bias):
    # The logits of a layer with a bias are a view.
    x, y, labels = tensors()
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(11, 11, bias=bias)
        inputs = x.clone().requires_grad_()
        losses.distillation_loss(layer(inputs), y, labels, inplace=inplace).backward()
        found.append([inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_several_backward_passes_leave_each_other_alone(inplace):
    x, y, labels = tensors()
    x.requires_grad_()
    loss = losses.distillation_loss(x * 1, y, labels, inplace=inplace)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = once.clone()
    (twice,) = torch.autograd.grad(2 * loss, x, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, x)
    assert torch.equal(once, kept)
    torch.testing.assert_close((twice, thrice), (2 * kept, 3 * kept))


def test_what_has_kept_the_logits_fails_rather_than_compute_with_the_gradient():
    x, y, labels = tensors()
    for use in (torch.square, torch.exp, lambda logits: torch.nn.functional.softplus(logits)):
        logits = x.clone().requires_grad_() * 1
        # `exp` keeps its result, here the logits of the loss.
        other = use(logits)
        loss = losses.distillation_loss(other if use is torch.exp else logits, y, labels, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss + other.sum()).backward()


def test_logits_that_cannot_be_overwritten_are_refused_and_left():
    x, y, labels = tensors()
    leaf = x.clone().requires_grad_()
    made = leaf * 1
    wide = torch.cat([leaf, leaf], dim=-1)
    both = torch.cat([leaf, leaf])
    cases = {
        "leaf": (leaf, y, "a leaf"),
        "view of a leaf": (leaf.view(3, 4, 11), y, "a leaf"),
        "every second": (wide[..., ::2], y, r"strides \(88, 22, 2\)"),
        "transposed": (made.transpose(0, 1), y.transpose(0, 1), r"contiguous\(\)"),
        "expanded": (made[:1].expand(3, 4, 11), y, "strides"),
        "the teacher itself": (made, made.detach(), "share"),
        "a part of the teacher": (both[:3], both.detach()[1:4], "share"),
    }
    for logits, teacher, message in cases.values():
        before = logits.detach().clone()
        for name in ("distillation", "divergence", "reverse"):
            targets = labels.transpose(0, 1) if logits.shape[0] == 4 else labels
            with pytest.raises(ConfigError, match=f"inplace: .*{message}"):
                LOSSES[name](logits, teacher, targets, inplace=True)
        assert torch.equal(logits, before)


def test_nothing_is_overwritten_where_no_gradient_is_wanted():
    x, y, labels = tensors()
    before = x.clone()
    for function in LOSSES.values():
        function(x, y, labels, inplace=True)
        with torch.no_grad():
            function(x.requires_grad_() * 1, y, labels, inplace=True)
        x.requires_grad_(False)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["distillation", "cross entropy", "top k"])
def test_a_compiled_loss_leaves_the_logits(name):
    x, y, labels = tensors()
    x.requires_grad_()
    logits = x * 1
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    loss = compiled(logits, y, labels, inplace=True)
    (found,) = torch.autograd.grad(loss, x)
    expected_loss = LOSSES[name](x, y, labels)
    (expected,) = torch.autograd.grad(expected_loss, x)
    assert loss.item() == expected_loss.item() and torch.equal(logits, x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_bad_row_is_named_and_has_no_gradient():
    x, y, labels = tensors(shape=(12, 11))
    x[7, 3] = float("nan")
    logits = x.clone().requires_grad_() * 1
    with pytest.raises(NonFiniteError, match=r"student_logits.*row 7, column 3"):
        losses.distillation_loss(logits, y, labels, inplace=True)
    assert torch.equal(logits[7].isnan(), x[7].isnan())


def test_a_loss_and_a_factored_matrix_import_no_compiler():
    printed = run_script(
        """
        import sys
        import torch
        from tqcompressor import losses
        from tqcompressor.modules.functional import kronecker_matrix
        x = torch.randn(3, 5, requires_grad=True)
        losses.distillation_loss(x, torch.randn(3, 5)).backward()
        losses.cross_entropy(x * 1, torch.arange(3), inplace=True).backward()
        losses.topk_distillation_loss(x, torch.tensor([[1]] * 3), torch.full((3, 1), 0.5)).backward()
        losses.hidden_state_loss(x, torch.randn(3, 5)).backward()
        losses.head_distillation_loss(x, torch.randn(7, 5), labels=torch.arange(3)).backward()
        factors = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 2, 2)
        kronecker_matrix(*factors, None, None).sum().backward()
        print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
        """
    )
    assert printed.strip() == "[]"


def test_a_kernel_runs_in_a_process_that_has_compiled():
    # Graphs around and beside the operators, of losses and of layers.
    layer = KroneckerLinear(8, 6, (2, 2), 2)
    x, y = torch.randn(4, 8), torch.randn(4, 6)

    @torch.compile(backend="eager")
    def step(x):
        torch._dynamo.graph_break()
        return losses.kl_divergence(layer(x), y)

    torch.testing.assert_close(step(x), losses.kl_divergence(layer(x), y))
