"""Checkpoints with huge or tiny weights compress as those with ordinary ones."""

import numpy as np
import pytest
from helpers.checkpoints import Checkpoint, decode, encode, read_safetensors
from tqcompressor import KroneckerSpec, LowRankSpec, MixedSpec, TQConfig, compress_checkpoint, plan
from tqcompressor.calibration.calibration import Calibration

CONFIG = TQConfig(
    {
        "wte": KroneckerSpec((1, 4), 2, "columns"),
        "h.0.mlp.c_fc": KroneckerSpec((2, 4), 3),
        "h.1.mlp.c_fc": LowRankSpec(3),
        "h.1.mlp.c_proj": MixedSpec((LowRankSpec(1), KroneckerSpec((4, 2), 2))),
    },
    effort="fast",
)


def scaled(folder, scale):
    """A checkpoint whose matrices are multiplied by `scale`."""
    source = Checkpoint()
    for name, tensor in source.tensors.items():
        if len(tensor[1]) == 2:
            source.tensors[name] = encode(decode(*tensor) * np.float32(scale))
    return source.write(folder / "in")


def moments(scale):
    random = np.random.default_rng(3)
    found = {}
    for layer in range(2):
        for matrix, rows, columns in (("mlp.c_fc", 8, 32), ("mlp.c_proj", 32, 8)):
            for side, length in (("input", rows), ("output", columns)):
                x = random.standard_normal((50, length)).astype(np.float32)
                found[f"{side}.h.{layer}.{matrix}"] = np.float32(scale) * (x.T @ x)
    return Calibration(found, tokens=50, seed=0, sensitivity=True, model_type="gpt2")


@pytest.mark.parametrize("scale", [2.0**84, 2.0**-84, 2.0**118])
def test_configs_and_budgets(tmp_path, scale):
    def run(factor, name, **options):
        folder = tmp_path / f"{name} {factor}"
        report = compress_checkpoint(scaled(folder, factor), folder / "out", **options, threads=2)
        return [(each.name, str(each.spec), each.lost_energy) for each in report.matrices], read_safetensors(
            folder / "out"
        )

    ways = {
        "config": {"config": CONFIG},
        "calibrated": {"config": CONFIG, "calibration": moments(scale), "objective": "second_moment"},
        "budget": {"budget": 0.9, "effort": "balanced", "matrices": ["h.1.mlp.*"]},
    }
    ways["calibrated"]["config"] = CONFIG.replace(specs={k: v for k, v in CONFIG.specs.items() if k != "wte"})
    for name, options in ways.items():
        (expected, ones), (found, tensors) = run(1, name, **options), run(scale, name, **options)
        assert found == expected, name
        for tensor, stored in tensors.items():
            values, one = decode(*stored), decode(*ones[tensor])
            if tensor.endswith((".A", ".B")):
                assert np.array_equal(values, one * np.float32(scale**0.5)), tensor
            elif tensor.endswith((".left", ".right")):
                assert np.array_equal(values, one) or np.array_equal(values, one * np.float32(scale)), tensor


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_plans(tmp_path, scale):
    def planned(factor):
        folder = tmp_path / f"{factor}"
        found = plan(scaled(folder, factor), 0.9, calibration=moments(factor), matrices=["h.*.mlp.*"], effort="fast")
        return [(each.name, str(each.spec)) for each in found.matrices]

    assert planned(scale) == planned(1)
