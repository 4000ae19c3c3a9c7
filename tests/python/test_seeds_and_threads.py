"""Every function with a seed or a number of threads rejects invalid values by name, before any work."""

import numpy as np
import pytest
import torch
import tqcompressor
from helpers.corpora import TINY
from helpers.models import CONFIG, tiny_model
from tqcompressor import KroneckerSpec, NativeModel, TrainingConfig, losses
from tqcompressor.compression.model import recompress
from tqcompressor.errors import ConfigError

SEEDS = [-1, 2**64, 1.0, True, "1"]
THREADS = [0, -1, 1.5, True, False, "2", 2**16]
W = np.ones((4, 6), np.float32)
SPEC = KroneckerSpec((2, 2), 1)
LOGITS, LABELS = np.zeros((2, 3), np.float32), np.zeros(2, np.int64)
PROBABILITIES = np.full((2, 1), 0.5, np.float32)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def native():
    return NativeModel.from_pretrained(TINY)


BATCHES = [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]
WITH_BOTH = {
    "decompose": lambda model, tmp_path, **given: tqcompressor.decompose(W, SPEC, **given),
    "decompose, budget": lambda model, tmp_path, **given: tqcompressor.decompose(W, budget=0.5, **given),
    "find_permutation": lambda model, tmp_path, **given: tqcompressor.find_permutation(W, SPEC, **given),
    "plan": lambda model, tmp_path, **given: tqcompressor.plan(model, 0.5, **given),
    "plan, checkpoint": lambda model, tmp_path, **given: tqcompressor.plan(TINY, 0.5, **given),
    "compress": lambda model, tmp_path, **given: tqcompressor.compress(model, CONFIG, **given),
    "compress, budget": lambda model, tmp_path, **given: tqcompressor.compress(model, budget=0.5, **given),
    "recompress": lambda model, tmp_path, **given: recompress(model, CONFIG, **given),
    "compress_checkpoint": lambda model, tmp_path, **given: tqcompressor.compress_checkpoint(
        TINY, tmp_path / "out", "tq-81m", **given
    ),
    "compress_checkpoint, budget": lambda model, tmp_path, **given: tqcompressor.compress_checkpoint(
        TINY, tmp_path / "out", budget=0.5, **given
    ),
    "distill": lambda model, tmp_path, **given: tqcompressor.distill(
        TINY, text=TINY / "heldout.txt", out=tmp_path / "out", **given
    ),
}
WITH_SEED = {
    "calibrate": lambda model, seed: tqcompressor.calibrate(model, BATCHES, seed=seed),
    "TrainingConfig": lambda model, seed: TrainingConfig(seed=seed),
}


@pytest.mark.parametrize("function", WITH_BOTH)
@pytest.mark.parametrize(
    ("name", "value"), [*(("seed", value) for value in SEEDS), *(("threads", value) for value in THREADS)]
)
def test_compression_refuses(model, tmp_path, function, name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected an integer from"):
        WITH_BOTH[function](model, tmp_path, **{name: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", WITH_SEED)
@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_and_training_refuse(model, function, seed):
    with pytest.raises(ConfigError, match="seed: expected an integer from 0"):
        WITH_SEED[function](model, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_native_runtime_refuses_seeds(native, seed):
    for use in (native.calibrate, native.generate):
        with pytest.raises(ConfigError, match="seed: expected an integer from 0"):
            use("He looked at it.", seed=seed)


@pytest.mark.parametrize("threads", THREADS)
def test_the_native_runtime_refuses_threads(threads):
    with pytest.raises(ConfigError, match="threads: expected an integer from 1"):
        NativeModel.from_pretrained(TINY, threads=threads)


@pytest.mark.parametrize("of", [np.asarray, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("threads", THREADS)
def test_losses_refuse_threads(of, threads):
    logits, labels, probabilities = of(LOGITS), of(LABELS), of(PROBABILITIES)
    for use in (
        lambda: losses.cross_entropy(logits, labels, threads=threads),
        lambda: losses.distillation_loss(logits, logits, labels, threads=threads),
        lambda: losses.kl_divergence(logits, logits, threads=threads),
        lambda: losses.hidden_state_loss(logits, logits, threads=threads),
        lambda: losses.head_distillation_loss(logits, logits, labels=labels, threads=threads),
        lambda: losses.topk_distillation_loss(logits, labels[:, None], probabilities, threads=threads),
    ):
        with pytest.raises(ConfigError, match="threads: expected an integer from 1"):
            use()
