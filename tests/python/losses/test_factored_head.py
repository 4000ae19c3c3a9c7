"""The fused loss with a factored head, against the same loss with the dense head."""

import numpy as np
import pytest
from tqcompressor import losses
from tqcompressor.errors import ConfigError, ShapeError

torch = pytest.importorskip("torch")


def noise(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def factors(block, rank):
    (m2, n2), random = block, np.random.default_rng(9)
    a, b = noise((rank, 60 // m2, 24 // n2), 1), noise((rank, m2, n2), 2)
    return a, b, random.permutation(60), random.permutation(24)


@pytest.mark.parametrize(("block", "rank"), [((1, 4), 1), ((1, 4), 3), ((2, 4), 2), ((3, 1), 1)])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_factored_head_equals_its_dense_head(block, rank, with_teacher):
    from tqcompressor.modules import KroneckerEmbedding, KroneckerHead

    a, b, p, q = factors(block, rank)
    hidden, labels = noise((2, 7, 24), 3), np.arange(14).reshape(2, 7)
    labels[1, 2] = -100
    teacher = (noise((2, 7, 5), 4), noise((60, 5), 5)) if with_teacher else (None, None)
    embedding = KroneckerEmbedding.from_factors(a, b, p, q)
    states = torch.from_numpy(hidden).requires_grad_()
    leaves = (states, embedding.A, embedding.B)
    tensors = [None if array is None else torch.from_numpy(array) for array in (*teacher, labels)]
    expected = losses.head_distillation_loss(states, embedding.dense_weight(), *tensors)
    expected_gradients = torch.autograd.grad(expected, leaves)
    for head in (embedding, KroneckerHead(embedding)):
        found = losses.head_distillation_loss(states, head, *tensors)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, other in zip(torch.autograd.grad(found, leaves), expected_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    value, (by_hidden, by_factors) = losses.head_distillation_loss(hidden, (a, b, p, q), *teacher, labels)
    assert value == pytest.approx(expected.item(), rel=1e-5) and not by_hidden[1, 2].any()
    for one, other in zip((by_hidden, *by_factors), expected_gradients, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [60, 20])
@pytest.mark.parametrize("kind", ["low rank", "mixed"])
def test_heads_of_other_kinds_equal_their_dense_heads(kind, vocabulary):
    from helpers.terms import random_terms
    from tqcompressor.config.specs import KroneckerSpec, LowRankSpec, MixedSpec
    from tqcompressor.modules.build import empty_embedding
    from tqcompressor.modules.mixed import tied_head

    mixed = MixedSpec((LowRankSpec(3), KroneckerSpec((1, 4), 1), KroneckerSpec((2, 2), 1, "rows")))
    spec = LowRankSpec(5) if kind == "low rank" else mixed
    embedding = empty_embedding(vocabulary, 24, spec)
    embedding.set_terms(random_terms(spec, vocabulary, 24, np.random.default_rng(0)))
    states = torch.from_numpy(noise((2, 7, 24), 3)).requires_grad_()
    leaves, labels = (states, *embedding.parameters()), torch.arange(14).reshape(2, 7)
    expected = losses.head_distillation_loss(states, embedding.dense_weight(), labels=labels)
    expected_gradients = torch.autograd.grad(expected, leaves)
    for head in (embedding, tied_head(embedding)):
        found = losses.head_distillation_loss(states, head, labels=labels)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, other in zip(torch.autograd.grad(found, leaves), expected_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        with pytest.raises(ShapeError, match="24"):
            losses.head_distillation_loss(states[..., :20], head, labels=labels)
    with pytest.raises(ConfigError, match="bias"):
        biased = tied_head(embedding, torch.nn.Parameter(torch.zeros(vocabulary)))
        losses.head_distillation_loss(states, biased, labels=labels)


def test_a_head_of_another_width_is_refused():
    from tqcompressor.modules import KroneckerEmbedding

    arrays = factors((1, 4), 1)
    for hidden, head in ((noise((3, 20), 1), arrays), (torch.zeros(3, 20), KroneckerEmbedding.from_factors(*arrays))):
        labels = torch.arange(3) if torch.is_tensor(hidden) else np.arange(3)
        with pytest.raises(ShapeError, match="24"):
            losses.head_distillation_loss(hidden, head, labels=labels)


def test_a_tied_head_has_no_factors_of_its_own():
    from tqcompressor.modules import KroneckerEmbedding, KroneckerHead

    embedding = KroneckerEmbedding.from_factors(*factors((1, 4), 1))
    head = KroneckerHead(embedding)
    with pytest.raises(TypeError, match="tie"):
        head.set_factors(*factors((1, 4), 1))
    assert head.A is embedding.A
