"""The `weight` of compressed modules: laid out as the replaced module's, differentiable, and read-only."""

import copy

import pytest
import torch
from torch import nn
from tqcompressor.errors import ReadOnlyError, TQError
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


def _kronecker(bias=True):
    return KroneckerLinear(8, 12, (2, 3), 2, bias)


def _low_rank(bias=True):
    return LowRankLinear(8, 12, 3, bias)


def _embeddings():
    return KroneckerEmbedding(20, 8, (2, 2), 2), LowRankEmbedding(20, 8, 3)


MODULES = {
    "kronecker": _kronecker,
    "low rank": _low_rank,
    "mixed": lambda: MixedLinear([_kronecker(False), _low_rank(False)]),
    "fused": lambda: FusedLinear({"q": _kronecker(False), "k": _low_rank(False)}),
    "kronecker embedding": lambda: _embeddings()[0],
    "low rank embedding": lambda: _embeddings()[1],
    "mixed embedding": lambda: MixedEmbedding(list(_embeddings())),
    "kronecker head": lambda: KroneckerHead(_embeddings()[0]),
    "low rank head": lambda: LowRankHead(_embeddings()[1]),
    "mixed head": lambda: MixedHead(MixedEmbedding(list(_embeddings()))),
}
LINEAR = [name for name in MODULES if "embedding" not in name]
every_module = pytest.mark.parametrize("name", MODULES)


@every_module
def test_the_weight_is_the_dense_matrix_in_the_replaced_modules_layout(name):
    module = MODULES[name]()
    dense = module.dense_weight()
    weight = module.weight
    assert isinstance(weight, torch.Tensor) and weight.requires_grad
    assert torch.equal(weight, dense if "embedding" in name else dense.t())
    assert (weight.dtype, weight.device, weight.ndim) == (dense.dtype, dense.device, 2)
    assert weight.shape == (dense if "embedding" in name else dense.t()).shape
    # As in transformers' Conv1D.
    module.weight_is_transposed = False
    assert module.weight.shape == dense.shape and torch.equal(module.weight, dense)
    # It is no parameter and no buffer, so that nothing is stored twice.
    assert not any(key.split(".")[-1] == "weight" for key in module.state_dict())


@pytest.mark.parametrize("name", LINEAR)
def test_a_product_with_the_weight_is_the_forward_pass_and_trains_the_factors(name):
    module = MODULES[name]()
    x = torch.randn(5, module.in_features)
    out = nn.functional.linear(x, module.weight, module.bias)
    assert torch.allclose(out, module(x), atol=1e-5)
    parts = torch.cat(module.weight.chunk(2), 0)
    assert torch.allclose(parts, module.weight[:], atol=0)
    out.pow(2).sum().backward()
    by_weight = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    module(x).pow(2).sum().backward()
    for own, parameter in zip(by_weight, module.parameters(), strict=True):
        assert torch.allclose(own, parameter.grad, atol=1e-3)


def test_properties_do_not_form_the_matrix(monkeypatch):
    module = _kronecker().to(torch.bfloat16)
    monkeypatch.setattr(KroneckerLinear, "dense_weight", lambda self: pytest.fail("formed"))
    weight = module.weight
    assert weight.dtype == torch.bfloat16 and weight.shape == (12, 8) and weight.device.type == "cpu"
    assert weight.is_floating_point() and weight.numel() == 96 and weight.size(0) == 12 and weight.requires_grad
    assert weight.data.dtype == torch.bfloat16 and not weight.data.requires_grad


def _add(weight):
    weight += 1


def _replace_data(weight):
    weight.data = torch.zeros(weight.shape)


def _freeze(weight):
    weight.requires_grad = False


WRITES = {
    "method": lambda weight: weight.zero_(),
    "of the data": lambda weight: weight.data.clamp_(0, 1),
    "copy": lambda weight: weight.copy_(torch.ones(weight.shape)),
    "rows": lambda weight: weight.__setitem__(0, 1.0),
    "operator": _add,
    "initialisation": nn.init.normal_,
    "data": _replace_data,
    "requires_grad": _freeze,
    "out": lambda weight: torch.add(torch.ones(weight.shape), 1, out=weight),
    "a row of the data": lambda weight: weight.data[0].zero_(),
    "rows of the data": lambda weight: weight.data[:2].mul_(2),
    "a value of a row": lambda weight: weight[1].__setitem__(0, 3.0),
    "the transpose": lambda weight: weight.data.t().copy_(torch.ones(weight.shape[::-1])),
    "a value, detached": lambda weight: weight.detach().unsqueeze(0)[0, 1, 3:5].fill_(1),
    "a part": lambda weight: _add(weight.data.chunk(2)[1]),
    "the same dtype": lambda weight: weight.float().zero_(),
    "initialisation of a row": lambda weight: nn.init.zeros_(weight.data[0]),
    "out, a row": lambda weight: torch.neg(torch.ones(weight.shape[1]), out=weight.data[0]),
}


@every_module
@pytest.mark.parametrize("write", WRITES)
def test_writing_the_weight_is_refused(name, write):
    module = MODULES[name]()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with torch.no_grad(), pytest.raises(ReadOnlyError, match=f"dense weight of a {type(module).__name__}") as caught:
        WRITES[write](module.weight)
    assert isinstance(caught.value, TQError) and caught.value.module is module
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def test_what_is_computed_from_a_view_is_a_plain_tensor(tmp_path):
    module = _kronecker()
    view = module.weight.data[2:4]
    copied = (view * 1, view.clone(), view + view, torch.cat([view, view]), copy.deepcopy(view), view.double())
    for tensor in copied:
        assert type(tensor) is torch.Tensor
        tensor.zero_()
    torch.save(view, tmp_path / "view.pt")
    loaded = torch.load(tmp_path / "view.pt", weights_only=True)
    assert type(loaded) is torch.Tensor and torch.equal(loaded, view)
    # Gradients flow through views of the weight, and to a view of its data.
    module.weight[:2].pow(2).sum().backward()
    assert module.A.grad.abs().sum() > 0
    leaf = module.weight.detach().requires_grad_()
    (leaf[0] * 3).sum().backward()
    assert leaf.grad[0].eq(3).all() and leaf.grad[1:].eq(0).all()


@every_module
def test_transformers_leaves_it_alone_when_it_initialises(name):
    from transformers import initialization

    module = MODULES[name]()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    initialization.normal_(module.weight)
    initialization.zeros_(module.weight)
    initialization.zeros_(module.weight.data[0])
    initialization.copy_(module.weight, torch.ones(module.weight.shape))
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", LINEAR)
def test_the_weight_compiles_without_a_break(name):
    module = MODULES[name]()

    def run(x):
        return nn.functional.linear(x.to(module.weight.dtype), module.weight)

    x = torch.randn(5, module.in_features)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), run(x), atol=1e-6)
