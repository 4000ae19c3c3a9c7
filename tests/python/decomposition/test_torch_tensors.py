"""Matrices and moments that are torch tensors: any device, dtype and gradient, or an error of this package."""

import numpy as np
import pytest
import torch
from tqcompressor import Calibration, KroneckerSpec, LowRankSpec, decompose, find_permutation, nearest_kronecker_sum
from tqcompressor.errors import ConfigError, DtypeError, NonFiniteError, ShapeError, TQError

SPEC = KroneckerSpec((2, 4), 2)


def tensor(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


TENSORS = {
    "bfloat16": lambda: tensor(16, 24, dtype=torch.bfloat16),
    "with a gradient": lambda: tensor(16, 24).requires_grad_(),
    "a parameter in bfloat16": lambda: torch.nn.Parameter(tensor(16, 24, dtype=torch.bfloat16)),
    "float16": lambda: tensor(16, 24, dtype=torch.float16),
    "float64": lambda: tensor(16, 24, dtype=torch.float64),
    "a transposed weight": lambda: torch.nn.Linear(16, 24).weight.t(),
    "a result of a computation": lambda: tensor(16, 24).requires_grad_() * 2,
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_is_decomposed_as_its_values(kind):
    w = TENSORS[kind]()
    plain = w.detach().float().numpy().copy()
    moment = tensor(16, 16, dtype=w.dtype)
    moment = (moment @ moment.t()).requires_grad_(w.requires_grad)
    as_numpy = moment.detach().float().numpy().copy()
    for work in (
        lambda w, moment: decompose(w, SPEC, moment=moment, effort="fast").reconstruct(),
        lambda w, moment: decompose(w, LowRankSpec(3), moment=(None, None), effort="fast").reconstruct(),
        lambda w, moment: decompose(w, budget=0.5, moment=moment, effort="fast").reconstruct(),
        lambda w, _: nearest_kronecker_sum(w, SPEC).a,
        lambda w, _: find_permutation(w, SPEC, effort="fast")[0],
        lambda w, _: decompose(plain, SPEC, effort="fast").apply(w[:, :16]),
    ):
        assert np.array_equal(work(w, moment), work(plain, as_numpy))
    found = Calibration({"input.wte": moment}, 3).moments["input.wte"]
    np.testing.assert_allclose(found, as_numpy, rtol=1e-6)


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        (torch.empty(4, 8, device="meta"), ConfigError, "w has no values: it is on the meta device"),
        (
            tensor(4, 8).to_sparse(),
            DtypeError,
            r"w: expected a dense tensor, got torch\.sparse_coo: call \.to_dense\(\)",
        ),
        (tensor(4, 8).to(torch.float8_e4m3fn), DtypeError, r"float8_e4m3fn: call \.float\(\) first"),
        (torch.ones(4, 8, dtype=torch.int64), DtypeError, "w: expected float16, float32 or float64, got int64"),
        (torch.ones(4, 8, dtype=torch.complex64), DtypeError, "got complex64"),
        (torch.full((4, 8), torch.nan, dtype=torch.bfloat16), NonFiniteError, "NaN"),
        (tensor(8, dtype=torch.bfloat16).requires_grad_(), ShapeError, "w: expected a matrix, got 1 dimensions"),
    ],
)
def test_what_cannot_be_read_is_refused(w, error, message):
    with pytest.raises(error, match=message) as caught:
        decompose(w, KroneckerSpec((2, 2), 1))
    assert isinstance(caught.value, TQError)
