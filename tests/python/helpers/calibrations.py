"""Calibrations without a text: made of random samples, or measured on random tokens."""

import numpy as np
import torch
from tqcompressor import Calibration, calibrate

from .models import VOCABULARY, tiny_model


def second_moment(side, seed):
    """The moment of 24 samples in uneven directions: singular, like that of a short text."""
    random = np.random.default_rng(seed)
    samples = random.standard_normal((24, side)) * np.exp(random.standard_normal(side))
    moment = (samples.T @ samples / 24).astype(np.float32)
    return np.maximum(moment, moment.T)


def made_calibration(shapes, sensitivity=True):
    """A calibration of matrices `{name: (rows, columns)}`, without a model."""
    moments = {}
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        embedding = name == "wte"
        frequencies = np.random.default_rng(seed).dirichlet(np.full(rows, 0.5)).astype(np.float32)
        moments[f"input.{name}"] = frequencies if embedding else second_moment(rows, seed)
        if sensitivity:
            moments[f"output.{name}"] = second_moment(columns, seed + 100) * np.float32(10.0 ** (seed % 3))
    return Calibration(moments, 24, 0, sensitivity, "gpt2")


def measured_model():
    """A small model, and its calibration on random tokens."""
    model = tiny_model()
    random = torch.Generator().manual_seed(1)
    batches = [torch.randint(1, VOCABULARY, (8, 16), generator=random) for _ in range(2)]
    return model, calibrate(model, batches)


def saved(model, folder):
    """The folder, with the model's checkpoint in it."""
    model.save_pretrained(folder)
    return folder
