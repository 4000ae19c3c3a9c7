"""Random logits, and their distillation losses by definition in float64."""

import numpy as np


def noise(shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def oracle(student, teacher, labels, temperature, divergence, cross_entropy, reverse=False, ignore_index=-100):
    """Value and gradient by definition, in float64."""
    z, counted = student.astype(np.float64), np.ones(len(student), bool)
    value, gradient = np.zeros(len(z)), np.zeros_like(z)
    if labels is not None:
        counted = labels != ignore_index
    if teacher is not None and divergence:
        log_q, log_p = log_softmax(z / temperature), log_softmax(teacher.astype(np.float64) / temperature)
        q, p = np.exp(log_q), np.exp(log_p)
        kl = (q * (log_q - log_p) if reverse else p * (log_p - log_q)).sum(-1)
        value += divergence * kl
        gradient += divergence / temperature * (q * (log_q - log_p - kl[:, None]) if reverse else q - p)
    if labels is not None and cross_entropy:
        log_s, rows, targets = log_softmax(z), np.arange(len(z)), np.where(counted, labels, 0)
        value -= cross_entropy * log_s[rows, targets]
        softmax = np.exp(log_s)
        # 1 − softmax without cancellation.
        softmax[rows, targets] = np.expm1(log_s[rows, targets])
        gradient += cross_entropy * softmax
    count = max(counted.sum(), 1)
    return np.where(counted, value, 0).sum() / count, np.where(counted[:, None], gradient, 0) / count


def assert_gradient(found, expected, tolerance=1e-4):
    """Relative error of each entry above 1e-3 of its row's largest, under `tolerance`; the others below that limit."""
    found, expected = np.asarray(found, np.float64).reshape(expected.shape), np.abs(expected) * np.sign(expected)
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(found - expected) <= tolerance * np.maximum(np.abs(expected), 1e-3 * largest)).all()
