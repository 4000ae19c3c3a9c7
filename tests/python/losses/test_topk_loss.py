"""The loss on a teacher's most probable tokens, against its definition in float64 and the loss on all tokens."""

import numpy as np
import pytest
from helpers.logits import log_softmax, noise
from tqcompressor import losses
from tqcompressor.errors import ConfigError, DtypeError, LabelError, NonFiniteError, ShapeError, TQError

torch = pytest.importorskip("torch")


def likeliest(teacher, k, temperature):
    tokens = np.argsort(-teacher, axis=-1)[..., :k]
    p = np.exp(log_softmax(teacher.astype(np.float64) / temperature))
    return tokens, np.take_along_axis(p, tokens, -1).astype(np.float32)


def oracle(student, tokens, probabilities, labels, temperature, alpha):
    """Value and gradient by the definitions, in float64, for k below the vocabulary."""
    z, rows = student.astype(np.float64), np.arange(len(student))
    counted = labels != -100
    log_q, log_s, p = log_softmax(z / temperature), log_softmax(z), probabilities.astype(np.float64)
    p /= np.maximum(p.sum(-1, keepdims=True), 1)
    named = np.zeros(z.shape, bool)
    np.put_along_axis(named, tokens, True, -1)
    q_tail = np.where(named, 0, np.exp(log_q)).sum(-1, keepdims=True)
    p_tail = np.maximum(1 - p.sum(-1, keepdims=True), 1e-300)
    kl = (p * (np.log(p) - np.take_along_axis(log_q, tokens, -1))).sum(-1) + (p_tail * np.log(p_tail / q_tail))[:, 0]
    by_kl = np.exp(log_q) * (1 - p_tail / q_tail)
    np.put_along_axis(by_kl, tokens, np.exp(np.take_along_axis(log_q, tokens, -1)) - p, -1)
    targets = np.where(counted, labels, 0)
    softmax = np.exp(log_s)
    softmax[rows, targets] = np.expm1(log_s[rows, targets])
    value = alpha * temperature**2 * kl - (1 - alpha) * log_s[rows, targets]
    gradient = alpha * temperature * by_kl + (1 - alpha) * softmax
    return np.where(counted, value, 0).sum() / counted.sum(), np.where(counted[:, None], gradient, 0) / counted.sum()


def assert_gradient(found, expected, tolerance=1e-4):
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(found - expected) <= tolerance * np.maximum(np.abs(expected), 1e-3 * largest)).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.7, 10.0])
@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("scale", [0.5, 4.0, 12.0])
def test_the_loss_equals_the_oracle(temperature, k, scale):
    student, teacher = noise((6, 3001), 1, scale), noise((6, 3001), 2, scale)
    tokens, probabilities = likeliest(teacher, k, temperature)
    # A label among the teacher's tokens, some that are not, and the student's most probable token.
    labels = np.array([tokens[0, 0], 17, -100, 3000, student[4].argmax(), 5])
    for alpha in (0.3, 1.0):
        arguments = (student, tokens, probabilities, labels)
        value, gradient = losses.topk_distillation_loss(*arguments, temperature=temperature, alpha=alpha)
        expected_value, expected = oracle(*arguments, temperature, alpha)
        assert value == pytest.approx(expected_value, rel=2e-6, abs=2e-6)
        assert_gradient(gradient, expected)
        assert not gradient[2].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("package", ["numpy", "torch.float64"])
def test_all_tokens_give_the_full_distillation_loss(temperature, package):
    student, teacher, labels = noise((5, 701), 1, 3.0), noise((5, 701), 2, 3.0), np.array([0, 700, -100, 3, 4])
    tokens, probabilities = likeliest(teacher, 701, temperature)
    expected = losses.distillation_loss(student, teacher, labels, temperature=temperature)
    if package == "numpy":
        value, gradient = losses.topk_distillation_loss(student, tokens, probabilities, labels, temperature=temperature)
    else:
        leaf = torch.from_numpy(student).double().requires_grad_()
        others = [torch.from_numpy(array) for array in (tokens, probabilities, labels)]
        loss = losses.topk_distillation_loss(leaf, *others, temperature=temperature)
        value, gradient = loss.item(), torch.autograd.grad(loss, leaf)[0].numpy()
    assert value == pytest.approx(expected[0], rel=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-3, atol=1e-7)


def test_logits_of_ten_thousand_are_finite():
    student = noise((4, 300), 1, 1e4)
    tokens, probabilities = likeliest(noise((4, 300), 2, 5.0), 10, 2.0)
    for labels in (None, np.arange(4)):
        value, gradient = losses.topk_distillation_loss(student, tokens, probabilities, labels)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    value, gradient = losses.topk_distillation_loss(student, tokens, probabilities, np.arange(4))
    assert value == pytest.approx(oracle_of_large(student, tokens, probabilities), rel=1e-5)


def oracle_of_large(student, tokens, probabilities):
    """The value at T = 2, alpha = 0.5 and labels 0 to 3; the student's tail is a logarithm, or it would be zero."""
    z, p = student.astype(np.float64), probabilities.astype(np.float64)
    log_q = log_softmax(z / 2)
    others = log_q.copy()
    np.put_along_axis(others, tokens, -np.inf, -1)
    log_tail = others.max(-1) + np.log(np.exp(others - others.max(-1, keepdims=True)).sum(-1))
    p_tail = 1 - p.sum(-1)
    kl = (p * (np.log(p) - np.take_along_axis(log_q, tokens, -1))).sum(-1) + p_tail * (np.log(p_tail) - log_tail)
    return np.mean(2 * kl - 0.5 * log_softmax(z)[np.arange(4), np.arange(4)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_rounded_once(dtype):
    student = torch.from_numpy(noise((4, 501), 1, 3.0)).to(dtype)
    tokens, probabilities = map(torch.from_numpy, likeliest(noise((4, 501), 2, 3.0), 9, 2.0))
    labels = torch.tensor([1, -100, 2, 500])
    wide, leaf = student.float().requires_grad_(), student.clone().requires_grad_()
    expected = losses.topk_distillation_loss(wide, tokens, probabilities, labels)
    loss = losses.topk_distillation_loss(leaf, tokens.int(), probabilities, labels)
    expected.backward()
    loss.backward()
    assert loss.item() == expected.item() and torch.equal(leaf.grad, wide.grad.to(dtype))


def test_probabilities_kept_in_half_precision_may_sum_to_a_little_more():
    student, tokens = noise((1, 9), 1), np.array([[0, 1]])
    value, gradient = losses.topk_distillation_loss(student, tokens, np.array([[0.6, 0.4005]]), alpha=1.0)
    expected = losses.topk_distillation_loss(student, tokens, np.array([[0.6, 0.4005]]) / 1.0005, alpha=1.0)
    assert value == pytest.approx(expected[0], rel=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-6)


def test_the_result_does_not_depend_on_threads():
    student, labels = noise((300, 5001), 1), np.arange(300)
    tokens, probabilities = likeliest(noise((300, 5001), 2), 16, 2.0)
    first, *others = (
        losses.topk_distillation_loss(student, tokens, probabilities, labels, threads=threads)
        for threads in (1, 2, 4, None)
    )
    for value, gradient in others:
        assert value == first[0] and gradient.tobytes() == first[1].tobytes()


def test_the_loss_of_no_counted_row_is_zero_whatever_its_values():
    for rows in (0, 3):
        student, labels = np.full((rows, 7), np.nan, np.float32), np.full(rows, -100)
        tokens, probabilities = np.full((rows, 2), 99), np.full((rows, 2), np.nan, np.float32)
        value, gradient = losses.topk_distillation_loss(student, tokens, probabilities, labels)
        assert value == 0 and gradient.shape == (rows, 7) and not gradient.any()
        for dtype in (torch.float32, torch.float64):
            leaf = torch.from_numpy(student).to(dtype).requires_grad_()
            others = [torch.from_numpy(array) for array in (tokens, probabilities, labels)]
            loss = losses.topk_distillation_loss(leaf, *others)
            loss.backward()
            assert loss.item() == 0 and not leaf.grad.any()


GOOD = {
    "student_logits": noise((3, 5), 1),
    "teacher_tokens": np.array([[0, 1], [1, 2], [4, 3]]),
    "teacher_probabilities": np.full((3, 2), 0.4, np.float32),
    "labels": np.array([0, 1, 2]),
}


def changed(name, at, value):
    array = GOOD[name].copy()
    array[at] = value
    return {name: array}


BAD = [
    (changed("teacher_tokens", (1, 0), 5), LabelError, "row 1"),
    (changed("teacher_tokens", (2, 1), -1), LabelError, "teacher_tokens: expected 0 to 4"),
    (changed("teacher_tokens", (2, 1), 4), LabelError, "twice at row 2"),
    (changed("teacher_probabilities", (1, 0), -0.1), LabelError, "teacher_probabilities"),
    (changed("teacher_probabilities", (1, 0), np.nan), LabelError, "teacher_probabilities"),
    (changed("teacher_probabilities", (1, 0), 0.7), LabelError, "a sum of at most 1"),
    (changed("student_logits", (1, 2), np.nan), NonFiniteError, "row 1, column 2"),
    (changed("student_logits", (1, 4), np.inf), NonFiniteError, "row 1, column 4"),
    (changed("student_logits", (1, 4), -np.inf), NonFiniteError, "row 1, column 4"),
    (changed("labels", 1, 7), LabelError, "got 7 at row 1"),
    ({"teacher_tokens": GOOD["teacher_tokens"][:2]}, ShapeError, "teacher_tokens"),
    ({"teacher_tokens": np.zeros((3, 6), int)}, ShapeError, "1 to 5"),
    ({"teacher_tokens": np.zeros((3, 0), int)}, ShapeError, "1 to 5"),
    ({"teacher_probabilities": GOOD["teacher_probabilities"][:, :1]}, ShapeError, "teacher_probabilities"),
    ({"teacher_tokens": GOOD["teacher_tokens"].astype(float)}, DtypeError, "teacher_tokens"),
    ({"teacher_probabilities": GOOD["teacher_tokens"]}, DtypeError, "teacher_probabilities"),
    ({"temperature": 0.0}, ConfigError, "temperature"),
    ({"alpha": 1.5}, ConfigError, "alpha"),
]


@pytest.mark.parametrize(("changes", "kind", "words"), BAD)
@pytest.mark.parametrize("package", ["numpy", "torch", "torch.float64"])
def test_errors_name_the_argument_and_what_was_expected(changes, kind, words, package):
    arguments = GOOD | changes
    if package != "numpy":
        arguments = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in arguments.items()
        }
    if package == "torch.float64":
        arguments["student_logits"] = arguments["student_logits"].double()
    with pytest.raises(kind) as caught:
        losses.topk_distillation_loss(**arguments)
    assert isinstance(caught.value, TQError) and words in str(caught.value)


def test_of_the_whole_vocabulary_the_probabilities_must_sum_to_one():
    tokens, probabilities = np.arange(5)[None], np.full((1, 5), 0.1, np.float32)
    for convert in (np.asarray, torch.from_numpy, lambda array: torch.from_numpy(array).double()):
        student = convert(noise((1, 5)))
        named = (torch.from_numpy(tokens), torch.from_numpy(probabilities))
        with pytest.raises(LabelError, match=r"sum of 1, got"):
            losses.topk_distillation_loss(student, *((tokens, probabilities) if convert is np.asarray else named))


def sample(dtype):
    x = torch.from_numpy(noise((12, 11), 1, 2.0)).to(dtype)
    tokens, probabilities = map(torch.from_numpy, likeliest(noise((12, 11), 2, 2.0), 3, 1.7))
    labels = torch.arange(12) % 11
    labels[5] = -100
    return x.requires_grad_(), tokens, probabilities, labels


def function(x, tokens, probabilities, labels):
    return losses.topk_distillation_loss(x, tokens, probabilities, labels, temperature=1.7, alpha=0.3)


def test_float64_passes_gradcheck_and_rust_agrees_with_it():
    x, *others = sample(torch.float64)
    assert torch.autograd.gradcheck(lambda x: function(x, *others), (x,), eps=1e-6, atol=1e-7)
    single, *_ = sample(torch.float32)
    expected, found = function(x, *others), function(single, *others)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=2e-6)
    (expected_gradient,) = torch.autograd.grad(3 * expected, x)
    (gradient,) = torch.autograd.grad(3 * found, single)
    assert_gradient(gradient.double().numpy(), expected_gradient.numpy())


def test_it_compiles_without_a_graph_break_and_passes_opcheck():
    from tqcompressor.losses import _torch_ops as torch_topk_loss

    x, tokens, probabilities, labels = sample(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = function(x, tokens, probabilities, labels), compiled(x, tokens, probabilities, labels)
    assert found.item() == expected.item()
    (expected_gradient,) = torch.autograd.grad(expected, x)
    (gradient,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=0)
    arguments = (x, tokens, probabilities, labels, 2.0, 1.0, 0.5, -100, True, 1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch_topk_loss._topk_loss, arguments, test_utils=tests)
