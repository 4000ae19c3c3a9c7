"""The losses against float64 oracles in plain numpy, and their errors."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.logits import assert_gradient, noise, oracle
from helpers.processes import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from tqcompressor import losses
from tqcompressor.errors import ConfigError, DtypeError, LabelError, NonFiniteError, ShapeError, TQError

torch = pytest.importorskip("torch")

TEMPERATURES = [0.5, 1.0, 1.7, 2.0, 3.0, 10.0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.5, 4.0, 12.0])
def test_the_fused_loss_equals_the_oracle(temperature, alpha, scale):
    student, teacher = noise((7, 5003), 1, scale), noise((7, 5003), 2, scale)
    labels = np.array([0, 5002, -100, 17, student[4].argmax(), -100, 3])
    value, gradient = losses.distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    expected_value, expected = oracle(student, teacher, labels, temperature, alpha * temperature**2, 1 - alpha)
    assert value == pytest.approx(expected_value, rel=1e-6, abs=1e-6)
    assert_gradient(gradient, expected)
    assert not gradient[[2, 5]].any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(2, 3000),
    st.floats(0.5, 10),
    st.booleans(),
    st.floats(0.5, 10),
    st.integers(0, 2**32 - 1),
)
def test_the_divergences_equal_the_oracle(rows, vocabulary, temperature, reverse, scale, seed):
    student, teacher = noise((rows, vocabulary), seed, scale), noise((rows, vocabulary), seed + 1, scale)
    mask = np.arange(rows) % 3 != 1
    value, gradient = losses.kl_divergence(student, teacher, temperature=temperature, reverse=reverse, mask=mask)
    labels = np.where(mask, 0, -100)
    expected_value, expected = oracle(student, teacher, labels, temperature, 1.0, 0.0, reverse)
    assert value == pytest.approx(expected_value, rel=2e-6, abs=2e-6)
    assert_gradient(gradient, expected)
    assert not gradient[~mask].any()


def test_cross_entropy_equals_the_oracle():
    logits, labels = noise((9, 1001), 3, 5.0), np.arange(9) * 100
    value, gradient = losses.cross_entropy(logits, labels)
    expected_value, expected = oracle(logits, None, labels, 1.0, 0.0, 1.0)
    assert value == pytest.approx(expected_value, rel=1e-6)
    assert_gradient(gradient, expected)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_state_losses_equal_torch_in_float64(kind):
    student, teacher, mask = noise((3, 4, 77), 1), noise((3, 4, 77), 2), np.arange(12).reshape(3, 4) % 4 != 2
    value, gradient = losses.hidden_state_loss(student, teacher, kind=kind, mask=mask)
    s = torch.from_numpy(student).double().requires_grad_()
    t = torch.from_numpy(teacher).double()
    rows = (s - t).square().mean(-1) if kind == "mse" else 1 - torch.cosine_similarity(s, t, dim=-1)
    expected = rows[torch.from_numpy(mask)].mean()
    (by_student,) = torch.autograd.grad(expected, s)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, by_student.numpy(), rtol=1e-5, atol=1e-9)
    assert not gradient[~mask].any()


def test_a_zero_state_has_the_documented_cosine():
    value, gradient = losses.hidden_state_loss(np.zeros((2, 3)), np.ones((2, 3)), kind="cosine")
    assert value == 1 and not gradient.any()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_logits_of_ten_thousand_are_finite(temperature):
    student, teacher = noise((4, 300), 1, 1e4), noise((4, 300), 2, 1e4)
    labels = np.arange(4)
    for reverse in (False, True):
        value, gradient = losses.kl_divergence(student, teacher, temperature=temperature, reverse=reverse)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    value, gradient = losses.distillation_loss(student, teacher, labels, temperature=temperature)
    expected_value, expected = oracle(student, teacher, labels, temperature, temperature**2 / 2, 0.5)
    assert value == pytest.approx(expected_value, rel=1e-5)
    assert_gradient(gradient, expected)


def test_shapes_and_layouts():
    student, teacher, labels = noise((2, 3, 50), 1), noise((2, 3, 50), 2), np.arange(6).reshape(2, 3)
    value, gradient = losses.distillation_loss(student, teacher, labels)
    flat = losses.distillation_loss(student.reshape(6, 50), teacher.reshape(6, 50), labels.reshape(6))
    assert gradient.shape == (2, 3, 50) and value == flat[0] and gradient.tobytes() == flat[1].tobytes()
    for same in (np.asfortranarray(student), student.astype(np.float64), np.repeat(student, 2, axis=0)[::2]):
        other, by_same = losses.distillation_loss(same, teacher, labels.astype(np.int32))
        assert other == value and by_same.tobytes() == gradient.tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_rounded_once(dtype):
    student, teacher = (torch.from_numpy(noise((4, 501), seed, 3.0)).to(dtype) for seed in (1, 2))
    labels = torch.tensor([1, -100, 2, 500])
    wide = student.float().requires_grad_()
    leaf = student.clone().requires_grad_()
    expected = losses.distillation_loss(wide, teacher.float(), labels)
    loss = losses.distillation_loss(leaf, teacher, labels)
    expected.backward()
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == expected.item()
    assert leaf.grad.dtype == dtype and torch.equal(leaf.grad, wide.grad.to(dtype))
    if dtype == torch.float16:
        value, gradient = losses.distillation_loss(student.numpy(), teacher.numpy(), labels.numpy())
        assert value == pytest.approx(loss.item(), rel=1e-7) and gradient.dtype == np.float16
        np.testing.assert_array_equal(gradient, leaf.grad.numpy())


def test_the_result_does_not_depend_on_threads():
    student, teacher, labels = noise((300, 5001), 1), noise((300, 5001), 2), np.arange(300)
    runs = [losses.distillation_loss(student, teacher, labels, threads=threads) for threads in (1, 2, 4, None)]
    states = (noise((70, 33), 3), noise((5001, 33), 4), noise((70, 20), 5), noise((5001, 20), 6), labels[:70])
    heads = [losses.head_distillation_loss(*states, threads=threads) for threads in (1, 2, 4, None)]
    for value, gradient in runs[1:]:
        assert value == runs[0][0] and gradient.tobytes() == runs[0][1].tobytes()
    for value, gradients in heads[1:]:
        assert value == heads[0][0]
        assert all(a.tobytes() == b.tobytes() for a, b in zip(gradients, heads[0][1], strict=True))


def test_the_loss_of_no_counted_row_is_zero():
    for rows in (0, 3):
        logits, labels = np.full((rows, 7), np.nan, np.float32), np.full(rows, -100)
        value, gradient = losses.distillation_loss(logits, logits, labels)
        assert value == 0 and gradient.shape == (rows, 7) and not gradient.any()
        leaf = torch.from_numpy(logits).requires_grad_()
        loss = losses.distillation_loss(leaf, torch.from_numpy(logits), torch.from_numpy(labels))
        loss.backward()
        assert loss.item() == 0 and leaf.grad.shape == (rows, 7) and not leaf.grad.any()
    value, gradient = losses.hidden_state_loss(noise((0, 7)), noise((0, 7)))
    assert value == 0 and gradient.shape == (0, 7)


def spoilt(value, shape=(3, 5), at=(1, 2)):
    logits = noise(shape)
    logits[at] = value
    return logits


LABELS = np.array([0, 1, 2])
BAD = [
    ({"student_logits": noise((3, 6))}, ShapeError, "(3, 6)"),
    ({"teacher_logits": noise((3, 6))}, ShapeError, "(3, 6)"),
    ({"teacher_logits": noise((2, 5))}, ShapeError, "(2, 5)"),
    ({"student_logits": np.float32(1), "teacher_logits": np.float32(1)}, ShapeError, "at least one"),
    ({"student_logits": noise((3, 0)), "teacher_logits": noise((3, 0))}, ShapeError, "at least one"),
    ({"labels": np.array([0, 1])}, ShapeError, "(2,)"),
    ({"labels": np.array([0.0, 1.0, 2.0])}, DtypeError, "float64"),
    ({"labels": np.array([0, 1, 5])}, LabelError, "0 to 4, or the ignored index, got 5 at row 2"),
    ({"labels": np.array([0, -1, 2])}, LabelError, "got -1 at row 1"),
    ({"student_logits": np.zeros((3, 5), np.int64)}, DtypeError, "int64"),
    ({"teacher_logits": np.zeros((3, 5), np.complex64)}, DtypeError, "complex64"),
    ({"student_logits": spoilt(np.nan)}, NonFiniteError, "student_logits"),
    ({"student_logits": spoilt(np.inf)}, NonFiniteError, "inf at row 1, column 2"),
    ({"teacher_logits": spoilt(-np.inf)}, NonFiniteError, "teacher_logits"),
    ({"temperature": 0.0}, ConfigError, "temperature"),
    ({"temperature": -1.0}, ConfigError, "-1.0"),
    ({"temperature": float("nan")}, ConfigError, "nan"),
    ({"temperature": float("inf")}, ConfigError, "inf"),
    ({"alpha": -0.1}, ConfigError, "alpha"),
    ({"alpha": 1.1}, ConfigError, "1.1"),
    ({"alpha": float("nan")}, ConfigError, "nan"),
]


@pytest.mark.parametrize(("changes", "kind", "words"), BAD)
@pytest.mark.parametrize("package", ["numpy", "torch", "torch.float64"])
def test_errors_name_the_argument_and_what_was_expected(changes, kind, words, package):
    arguments = {"student_logits": noise((3, 5), 1), "teacher_logits": noise((3, 5), 2), "labels": LABELS} | changes
    if package != "numpy":
        arguments = {
            name: torch.tensor(value) if isinstance(value, np.ndarray | np.generic) else value
            for name, value in arguments.items()
        }
        if package == "torch.float64":
            arguments = {
                name: value.double() if torch.is_tensor(value) and value.dtype == torch.float32 else value
                for name, value in arguments.items()
            }
    with pytest.raises(kind) as caught:
        losses.distillation_loss(**arguments)
    assert isinstance(caught.value, TQError) and words in str(caught.value)


def test_bad_hidden_states_and_heads_are_refused():
    states, head = noise((3, 5)), noise((9, 5))
    for convert in (np.asarray, torch.from_numpy):
        with pytest.raises(ShapeError, match="teacher_hidden"):
            losses.hidden_state_loss(convert(states), convert(noise((3, 4))))
        with pytest.raises(ConfigError, match="manhattan"):
            losses.hidden_state_loss(convert(states), convert(states), kind="manhattan")
        with pytest.raises(NonFiniteError, match=r"student_hidden.*row 1, column 2"):
            losses.hidden_state_loss(convert(spoilt(np.nan)), convert(states))
        with pytest.raises(DtypeError, match="mask"):
            losses.hidden_state_loss(convert(states), convert(states), mask=convert(LABELS))
        with pytest.raises(ShapeError, match="student_head"):
            losses.head_distillation_loss(convert(states), convert(noise((9, 4))), labels=convert(LABELS))
        with pytest.raises(ShapeError, match="vocabulary"):
            losses.head_distillation_loss(
                convert(states), convert(head), convert(noise((3, 2))), convert(noise((8, 2))), convert(LABELS)
            )
        with pytest.raises(ConfigError, match="both or neither"):
            losses.head_distillation_loss(convert(states), convert(head), convert(states), labels=convert(LABELS))
        with pytest.raises(ConfigError, match="labels"):
            losses.head_distillation_loss(convert(states), convert(head))
        with pytest.raises(LabelError):
            losses.head_distillation_loss(convert(states), convert(head), labels=convert(LABELS + 7))
        with pytest.raises(NonFiniteError, match=r"student_logits.*row 1"):
            losses.head_distillation_loss(convert(spoilt(np.nan)), convert(head), labels=convert(LABELS))


def test_numpy_arrays_need_no_torch():
    run_script(
        """
        import sys
        import numpy as np
        from tqcompressor import losses
        x = np.ones((2, 3), np.float32)
        losses.distillation_loss(x, x, [0, 1])
        losses.hidden_state_loss(x, x)
        assert "torch" not in sys.modules
        """
    )


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_interrupts_a_long_loss():
    code = """
import numpy as np
from tqcompressor.losses import head_distillation_loss
hidden, head = np.ones((20000, 512), np.float32), np.ones((20000, 512), np.float32)
print("working", flush=True)
try:
    head_distillation_loss(hidden, head, labels=np.zeros(20000, int), threads=1)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    # Without an interrupt, it ends without output.
    assert process.communicate(timeout=120)[0].split() == ["interrupted"]
