"""A budget keeps the results of planning: no matrix is fitted twice, and a checkpoint is opened once."""

import numpy as np
import pytest
from helpers.calibrations import measured_model, saved
from helpers.checkpoints import Checkpoint
from helpers.models import tiny_model
from tqcompressor import _core, compress, compress_checkpoint, plan


class Counted:
    """The extension module, with the calls that fit or open counted."""

    COUNTED = ("fit_many", "fit_within", "spend_budget")

    def __init__(self, calls):
        self._calls = calls

    def __getattr__(self, name):
        real = getattr(_core, name)
        if name not in self.COUNTED:
            return real

        def call(*arguments, **options):
            self._calls.append(name)
            return real(*arguments, **options)

        return call


@pytest.fixture
def calls(monkeypatch):
    from tqcompressor.compression import model, model_plan

    seen = []
    for module in (model, model_plan):
        monkeypatch.setattr(module, "_core", Counted(seen))
    return seen


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_what_planning_found_is_not_fitted_again(effort, calls):
    model, calibration = measured_model()
    found = plan(model, 0.6, calibration=calibration, effort=effort)
    assert calls == ["spend_budget"]
    report = compress(model, budget=0.6, calibration=calibration, effort=effort)
    # A second plan and then only writing: no fit is computed from its spec.
    assert calls == ["spend_budget", "spend_budget"]
    assert {matrix.name: matrix.spec for matrix in report.matrices} == found.config.specs
    planned = {matrix.name: matrix.lost_energy for matrix in found.matrices}
    for matrix in report.matrices:
        assert matrix.lost_energy == pytest.approx(planned[matrix.name], rel=1e-5, abs=1e-9)


def test_a_fit_is_taken_once():
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal((24, 32), dtype=np.float32) for _ in range(3)]
    names, none = ["a", "b", "c"], [(None, None)] * 3
    for effort in ("fast", "balanced"):
        spent = _core.spend_budget(
            matrices,
            names,
            names,
            ["map"] * 3,
            none,
            parameters=1200,
            lost_energy=None,
            max_macs=None,
            effort=effort,
            keep=True,
            threads=1,
            progress=None,
        )
        compressed = [i for i, choice in enumerate(spent.choices) if choice.spec is not None]
        assert compressed
        given = ([matrices[i] for i in compressed], [names[i] for i in compressed], [none[0]] * len(compressed))
        fits = spent.fit(compressed, *given, threads=1, progress=None)
        for i, fitted in zip(compressed, fits, strict=True):
            assert fitted.spec == spent.choices[i].spec
            assert fitted.lost_energy == pytest.approx(spent.choices[i].lost_energy, rel=1e-6)
        with pytest.raises(RuntimeError, match="taken once"):
            spent.fit(compressed, *given, threads=1, progress=None)


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_disk_and_memory_give_the_same_factors(effort, tmp_path):
    model = tiny_model()
    source = saved(model, tmp_path / "dense")
    compress_checkpoint(source, tmp_path / "disk", budget=0.6, effort=effort)
    compress(model, budget=0.6, effort=effort)
    saved(model, tmp_path / "live")
    from safetensors.numpy import load_file

    disk, live = (load_file(tmp_path / name / "model.safetensors") for name in ("disk", "live"))
    assert disk.keys() == live.keys()
    assert all(np.array_equal(disk[name], live[name]) for name in disk)


def test_a_checkpoint_is_opened_once(tmp_path, monkeypatch):
    from tqcompressor.compression import checkpoint

    opened = []

    class Opening:
        @staticmethod
        def open(directory):
            opened.append(directory)
            return _core.Checkpoint.open(directory)

    class Core:
        Checkpoint, source_name = Opening, staticmethod(_core.source_name)

    monkeypatch.setattr(checkpoint, "_core", Core)
    source = Checkpoint(width=32, vocabulary=64).write(tmp_path / "in")
    compress_checkpoint(source, tmp_path / "out", budget=0.6)
    assert len(opened) == 1
